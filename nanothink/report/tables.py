"""Tables of the page: overview, domains, settings, machine, data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nanothink.config import Config
from nanothink.config.run import flatten, known_settings
from nanothink.models import COMBINED, EXPERTS, shape_sections, training_section
from nanothink.report.passages import ReportedRun
from nanothink.training.records import finite
from nanothink.wording import counted


@dataclass(frozen=True)
class Setting:
    name: str
    meaning: str
    default: str
    """Empty where this version does not know the setting."""
    cells: tuple[SettingCell | None, ...]
    """Value in each run; None where a run does not have it."""

    @property
    def differs(self) -> bool:
        """True if a run differs from the default, in a section that concerns its kind."""
        return any(cell is not None and cell.differs and cell.concerns for cell in self.cells)


@dataclass(frozen=True)
class SettingCell:
    value: str
    source: str
    differs: bool
    """True if it differs from the default."""
    concerns: bool
    """True if the setting concerns this kind of run."""


def settings(runs: Sequence[ReportedRun]) -> list[Setting]:
    """All settings of all runs, with their defaults."""
    defaults, meanings = flatten(Config()), known_settings()
    values = [_flat(run.records.description.get("config")) for run in runs]
    sources = [_mapping(run.records.description.get("sources")) for run in runs]
    names = list(dict.fromkeys([*defaults, *(name for own in values for name in own)]))
    rows = []
    for name in names:
        cells = tuple(
            SettingCell(
                value=_value(own[name]),
                source=str(source.get(name, "")),
                differs=name not in defaults or own[name] != defaults[name],
                concerns=name.partition(".")[0] in _concerning(run.records.kind),
            )
            if name in own
            else None
            for run, own, source in zip(runs, values, sources, strict=True)
        )
        if any(cell is not None for cell in cells):
            default = _value(defaults[name]) if name in defaults else ""
            rows.append(Setting(name, meanings.get(name, ""), default, cells))
    return rows


def overview(runs: Sequence[ReportedRun]) -> list[dict[str, Any]]:
    """Progress and best score of each run."""
    rows = []
    for run in runs:
        records, best = run.records, run.records.best or {}
        ending = records.ending
        rows.append(
            {
                "label": run.label,
                "kind": {COMBINED: "NanoThink"}.get(records.kind, records.kind.replace("_", "-")),
                "state": str(ending.get("reason", "finished")) if ending else "not finished",
                "finished": ending is not None,
                "step": records.last_step,
                "epoch": records.last_epoch,
                "bits_per_byte": finite(best.get("bits_per_byte")),
                "loss": finite(best.get("loss")),
                "best_step": best.get("step"),
                "parameters": finite(records.description.get("parameters")),
                "started": str(records.description.get("started", ""))[:10],
                "notes": [*run.notes, *_remarks(run)],
            }
        )
    return rows


def domains(runs: Sequence[ReportedRun]) -> list[str]:
    """Domains that any run was validated on."""
    return sorted(
        {name for run in runs for row in run.records.validations for name in row.get("domains", {})}
    )


def by_domain(runs: Sequence[ReportedRun], names: Sequence[str]) -> list[list[float | None]]:
    """Bits per byte at the best validation: a row for each run, a column for each domain and for all."""
    rows = []
    for run in runs:
        best = run.records.best or {}
        own = best.get("domains", {})
        cells = [finite(own.get(name, {}).get("bits_per_byte")) for name in names]
        rows.append([*cells, finite(best.get("bits_per_byte"))])
    return rows


def lowest(rows: Sequence[Sequence[float | None]]) -> list[float | None]:
    """Lowest number of each column."""
    return [min((v for v in column if v is not None), default=None) for column in zip(*rows, strict=True)]


def machines(runs: Sequence[ReportedRun]) -> list[tuple[str, list[str]]]:
    """Precision, machine and tokenizer: a column for each run."""
    facts: dict[str, list[str]] = {}
    for column, run in enumerate(runs):
        described = run.records.description
        precision = _mapping(described.get("precision"))
        machine = _mapping(described.get("machine"))
        tokenizer = _mapping(described.get("tokenizer"))
        own = {
            "started": str(described.get("started", ""))[:19].replace("T", " "),
            "device": precision.get("device"),
            "precision": precision.get("dtype"),
            "chosen because": precision.get("reason"),
            **machine,
            "tokenizer": tokenizer.get("name"),
            "vocabulary": tokenizer.get("vocab_size"),
            "tokenizer's fingerprint": str(tokenizer.get("fingerprint", ""))[:12],
            "records": run.records.folder,
        }
        for name, value in own.items():
            if value not in (None, ""):
                facts.setdefault(name, ["–"] * len(runs))[column] = _value(value)
    return list(facts.items())


@dataclass(frozen=True)
class Data:
    """A corpus, its split, and the runs trained on it."""

    labels: tuple[str, ...]
    folder: str
    fingerprint: str
    rows: tuple[tuple[str, int, int], ...]
    """Domain, tokens for training, tokens for validation."""


def data(runs: Sequence[ReportedRun]) -> list[Data]:
    found: dict[tuple[Any, ...], list[str]] = {}
    for run in runs:
        described = run.records.description
        own = _mapping(described.get("data"))
        train, held = _mapping(own.get("train_tokens")), _mapping(own.get("validation_tokens"))
        rows = tuple(
            (str(name), int(finite(train.get(name)) or 0), int(finite(held.get(name)) or 0))
            for name in {**train, **held}
        )
        folder = str(_mapping(_mapping(described.get("config")).get("data")).get("data_dir", ""))
        found.setdefault((folder, str(own.get("fingerprint", ""))[:12], rows), []).append(run.label)
    return [Data(tuple(labels), *key) for key, labels in found.items()]


def number(value: float | None) -> str:
    """Format a number with four digits."""
    if value is None:
        return "–"
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) < 1e-3:
        return f"{value:.2e}"
    return f"{value:.{max(0, 3 - math.floor(math.log10(abs(value))))}f}"


def _remarks(run: ReportedRun) -> list[str]:
    """Warnings about a run's records."""
    records, remarks = run.records, []
    data = records.description.get("data")
    if isinstance(data, dict) and isinstance(n_bad := data.get("n_bad_lines"), int) and n_bad:
        remarks.append(f"{counted(n_bad, 'bad line')} of the data left out (--skip-bad-records).")
    if records.n_skipped:
        steps = counted(records.n_skipped, "logged step")
        remarks.append(f"{steps} skipped: loss or gradient was not finite.")
    if records.n_unreadable:
        lines = counted(records.n_unreadable, "damaged line")
        remarks.append(f"{lines} of its records left out.")
    return remarks


def _concerning(kind: str) -> set[str]:
    if kind not in (*EXPERTS, COMBINED):
        return set(Config.model_fields)
    return {"model", "data", training_section(kind), *shape_sections(kind)}


def _flat(nested: Any) -> dict[str, Any]:
    return {
        f"{section}.{key}": value
        for section, values in _mapping(nested).items()
        for key, value in _mapping(values).items()
    }


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _value(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return ", ".join(map(_value, value)) or "none"
    return str(value)
