"""Reader of the records that ``recording.py`` writes.

A run may be under way, or killed in the middle of a line: whole lines are read, others are counted.
"""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanothink.errors import DataError, StorageError

_NOT_CURVES = {"event", "step", "epoch", "skipped", "seconds"}


@dataclass(frozen=True)
class Curve:
    """Values of a number over the steps of a run; steps rise, values are finite."""

    steps: array[float] = field(default_factory=lambda: array("d"))
    values: array[float] = field(default_factory=lambda: array("d"))

    def append(self, step: float, value: float) -> None:
        self.steps.append(step)
        self.values.append(value)

    def __len__(self) -> int:
        return len(self.steps)


@dataclass(frozen=True)
class RunRecords:
    """Records that a run has written so far."""

    folder: Path
    description: Mapping[str, Any]
    """config.json: settings and their sources, data, precision, machine."""
    training: Mapping[str, Curve]
    """Curves by their names in ``metrics.jsonl``: loss, learning_rate, gradient_norm ..."""
    validations: tuple[Mapping[str, Any], ...]
    """The validation lines, in order."""
    samples: tuple[Mapping[str, Any], ...]
    last_step: int
    """Step of the last line; 0 if there is none."""
    last_epoch: int
    n_skipped: int
    """Logged steps that were left out for a loss or gradient that is not finite."""
    n_unreadable: int
    """Lines that are no JSON object, a last one that is being written left out."""
    ending: Mapping[str, Any] | None
    """finished.json: why and where the run ended; None while it has not."""

    @property
    def name(self) -> str:
        return str(self.description.get("name") or self.folder.name)

    @property
    def kind(self) -> str:
        return str(self.description.get("kind") or "")

    @property
    def best(self) -> Mapping[str, Any] | None:
        """The validation with the lowest loss."""
        scored = [v for v in self.validations if finite(v.get("loss")) is not None]
        return min(scored, key=lambda v: v["loss"], default=None)


def read_run(folder: Path) -> RunRecords:
    """Read the records in ``folder``, which a run may be writing at the moment.

    Raises:
        DataError: these are no records of a run.
        StorageError: they cannot be read.
    """
    description = read_description(folder)
    training: dict[str, Curve] = {}
    validations: list[Mapping[str, Any]] = []
    last_step = last_epoch = n_skipped = n_unreadable = 0
    for row in _rows(folder / "metrics.jsonl"):
        step = finite(row.get("step")) if row is not None else None
        if row is None or step is None:
            n_unreadable += 1
            continue
        last_step = max(last_step, int(step))
        last_epoch = max(last_epoch, int(finite(row.get("epoch")) or 0))
        if row.get("event") == "validation":
            validations.append(row)
            continue
        n_skipped += bool(row.get("skipped"))
        for name in row.keys() - _NOT_CURVES:
            if (value := finite(row[name])) is not None:
                if name not in training:
                    training[name] = Curve()
                training[name].append(step, value)
    samples = []
    for row in _rows(folder / "samples.jsonl"):
        if row is not None and isinstance(row.get("samples"), dict):
            samples.append(row)
        else:
            n_unreadable += 1
    return RunRecords(
        folder=folder,
        description=description,
        training=training,
        validations=tuple(validations),
        samples=tuple(samples),
        last_step=last_step,
        last_epoch=last_epoch,
        n_skipped=n_skipped,
        n_unreadable=n_unreadable,
        ending=_object(folder / "finished.json"),
    )


def read_description(folder: Path) -> dict[str, Any]:
    """config.json of a run alone; raises as ``read_run`` does."""
    description = _object(folder / "config.json")
    if description is None or "config" not in description:
        raise DataError(
            f"{folder} holds no records of a run: its config.json is missing or damaged. Name a folder under "
            "checkpoints/runs."
        )
    return description


def finite(value: Any) -> float | None:
    """A number that can be drawn, or None for anything else (null, NaN, infinity, text)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) else None


def _rows(path: Path) -> Iterator[dict[str, Any] | None]:
    """Each line as an object, or None for one that is none. A last line without its end is not there yet."""
    try:
        with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
            for line in file:
                if not line.endswith("\n"):
                    return
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    row = None
                yield row if isinstance(row, dict) else None
    except FileNotFoundError:
        return  # a run that has not come to its first line
    except OSError as error:
        raise _unreadable(path, error) from None


def _object(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
        return None
    except OSError as error:
        raise _unreadable(path, error) from None
    return value if isinstance(value, dict) else None


def _unreadable(path: Path, error: OSError) -> StorageError:
    return StorageError(f"{path} cannot be read: {error.strerror or error}. Check its permissions.")
