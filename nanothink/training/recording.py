"""Records of a run: ``checkpoints/runs/<name>/``.

    config.json       resolved settings, where each came from, versions, device, data
    metrics.jsonl     one JSON object a line: "train" and "validation"
    samples.jsonl     continuations of the fixed prompts
    events.out.*      the same numbers for TensorBoard, if that is the tracker (trackers.py)
    finished.json     how the run ended, of one that has

A resumed run first drops every line beyond the checkpoint it resumes from, so the file reads as if nothing
had happened: apart from ``seconds`` and ``tokens_per_second`` it equals that of a run that was never
interrupted.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nanothink.disk import GrowingFile, make_folder, new_folder, write_whole
from nanothink.errors import StorageError
from nanothink.inference.evaluate import Evaluation
from nanothink.reporter import SILENT, Reporter
from nanothink.training.events import Evaluated, Sampled, StepDone
from nanothink.training.state import TrainState
from nanothink.training.trackers import open_tracker
from nanothink.wording import counted

ENDING = "finished.json"

_FILES = ("metrics.jsonl", "samples.jsonl")


class RunRecorder(Reporter):
    """Writes the events of a run to its files, and passes every report on.

    Once it has begun, a disk that refuses does not stop the run: it is said once, what could not be written
    waits in memory, and each later event tries again.

    Args:
        folder: the run's own folder.
        description: what goes into config.json.
        state: where the run stands; lines beyond it are dropped, all of them if it has not begun.
        reporter: receives every report in turn, and notes when the disk refuses and when it recovers.
        tracker: name of the tracker that gets a copy of the numbers and samples.

    Raises:
        StorageError: the folder cannot be written.
        UsageError: the tracker cannot start.
    """

    def __init__(
        self,
        folder: Path,
        description: Mapping[str, Any],
        state: TrainState,
        reporter: Reporter = SILENT,
        tracker: str = "none",
    ) -> None:
        self.folder = folder
        self._reporter = reporter
        self._refused = False
        with self._disk_said_no():
            if not state.step and state.evaluated_step < 0 and folder.exists():
                _set_aside(folder)
            make_folder(folder, within=folder.parent.parent)
            for name in _FILES:
                _drop_lines_beyond(folder / name, state)
            _write_whole(folder / "config.json", description)
            self._metrics, self._samples = (GrowingFile(folder / name) for name in _FILES)
        self._tracker = open_tracker(tracker, folder, description.get("config", {}), state.step)

    @contextmanager
    def _disk_said_no(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise _cannot_write(self.folder, error) from None

    def note(self, message: str) -> None:
        self._reporter.note(message)

    def progress(self, stage: str, done: int, total: int) -> None:
        self._reporter.progress(stage, done, total)

    def event(self, event: object) -> None:
        self._record(event)
        self._write_out()
        self._reporter.event(event)

    def _write_out(self) -> None:
        refused: OSError | None = None
        for file in self._files:
            try:
                file.write_out()
            except OSError as error:
                refused = error
        if refused is not None and not self._refused:
            self._refused = True
            self._reporter.note(
                f"warning: the run's records cannot be written to {self.folder}: "
                f"{refused.strerror or refused}. Training continues; what is missing is written as soon as "
                "the disk takes it."
            )
        elif self._refused and not any(file.n_waiting for file in self._files):
            self._refused = False
            self._reporter.note(f"The run's records are complete again in {self.folder}.")

    @property
    def _files(self) -> tuple[GrowingFile, GrowingFile]:
        return self._metrics, self._samples

    def _record(self, event: object) -> None:
        if isinstance(event, StepDone) and event.logged:
            speed = event.tokens / event.seconds if event.seconds else 0.0
            numbers = {
                "loss": event.loss,
                **event.parts,
                "learning_rate": event.learning_rate,
                "gradient_norm": event.gradient_norm,
                "tokens": event.tokens,
                "tokens_per_second": speed,
            }
            self._line(
                self._metrics,
                {
                    "event": "train",
                    "step": event.step,
                    "epoch": event.epoch,
                    **numbers,
                    "skipped": event.skipped,
                    "seconds": event.seconds,
                },
            )
            self._track(event.step, train=numbers)
        elif isinstance(event, Evaluated):
            scores = event.evaluation.to_dict()
            self._line(
                self._metrics,
                {
                    "event": "validation",
                    "step": event.step,
                    "epoch": event.epoch,
                    **scores.pop("overall"),
                    "logit_scale": event.evaluation.logit_scale,
                    "best": event.best,
                    **({"fitted": True} if event.fitted else {}),
                    **scores,
                },
            )
            self._track_validation(event.evaluation, event.step)
        elif isinstance(event, Sampled):
            self._line(
                self._samples, {"step": event.step, "epoch": event.epoch, "samples": dict(event.texts)}
            )
            self._track(event.step, sample={prompt: prompt + text for prompt, text in event.texts.items()})

    def keep_ending(self, ending: Mapping[str, Any]) -> bool:
        """Record how the run ended. False where the disk refuses, which is said."""
        try:
            _write_whole(self.folder / ENDING, ending)
        except StorageError as error:
            reason = getattr(error.__cause__, "strerror", None) or error
            self._reporter.note(f"warning: {self.folder / ENDING} cannot be written: {reason}.")
            return False
        return True

    def forget_ending(self) -> None:
        """The run goes on."""
        with self._disk_said_no():
            (self.folder / ENDING).unlink(missing_ok=True)

    def close(self) -> None:
        self._write_out()
        missing = sum(file.n_waiting + file.n_lost for file in self._files)
        if missing:
            self._reporter.note(
                f"warning: {counted(missing, 'line')} of the run's records could not be written."
            )
        for file in self._files:
            file.close()
        self._close_tracker()

    def _line(self, file: GrowingFile, values: Mapping[str, Any]) -> None:
        file.add((json.dumps(_finite(values), ensure_ascii=False) + "\n").encode("utf-8", "replace"))

    def _track_validation(self, evaluation: Evaluation, step: int) -> None:
        overall = evaluation.overall
        self._track(
            step,
            validation={"loss": overall.loss, "bits_per_byte": overall.bits_per_byte},
            bits_per_byte={name: score.bits_per_byte for name, score in evaluation.domains.items()},
            denoising_mse={f"level {n}": mse for n, mse in evaluation.denoising.items()},
            **{
                f"routing/{domain}": {**routing.weights, "entropy": routing.entropy}
                for domain, routing in evaluation.routing.items()
            },
        )

    def _track(self, step: int, **groups: Mapping[str, float | str]) -> None:
        """Give the tracker ``group/name`` values. Its first failure ends it, not the run."""
        values = {
            f"{group}/{name}": value for group, named in groups.items() for name, value in named.items()
        }
        if self._tracker is None or not values:
            return
        try:
            self._tracker.log(values, step)
        except Exception as error:
            self._tracker = None
            self._reporter.note(f"warning: the tracker has failed ({error}). Training continues without it.")

    def _close_tracker(self) -> None:
        if self._tracker is not None:
            try:
                self._tracker.close()
            except Exception as error:
                self._reporter.note(f"warning: the tracker lacks the last values ({error}).")


def _finite(value: Any) -> Any:
    """JSON has no NaN: a number that is not finite is written as null, however deep it lies."""
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _set_aside(folder: Path) -> None:
    """Move the records of an earlier run of this name beside the checkpoints that --overwrite sets aside."""
    checkpoints = folder.parent.parent
    stem = f"{folder.name}-{time.strftime('%Y%m%d-%H%M%S')}-records"
    folder.rename(new_folder(checkpoints / "replaced" / stem, within=checkpoints))


def _drop_lines_beyond(path: Path, state: TrainState) -> None:
    """Keep the lines of steps (and evaluations) that ``state`` has behind it."""
    if not path.exists():
        return
    kept = []
    # Bytes, and cut at line feeds alone: a killed process may leave half a character, and text may hold
    # other characters that end a line, which str.splitlines would cut at.
    for line in path.read_bytes().split(b"\n"):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue  # the last line of a killed process may be cut off; its step is done again
        if not isinstance(entry, dict) or not isinstance(step := entry.get("step", 0), (int, float)):
            continue
        if entry.get("fitted"):
            continue  # fitted again at the end
        if step <= (state.step if entry.get("event") == "train" else state.evaluated_step):
            kept.append(line)
    write_whole(path, b"".join(line + b"\n" for line in kept), explain=_in_folder)


def _write_whole(path: Path, values: Mapping[str, Any]) -> None:
    """Write a small JSON file so that a reader finds the old one or the new one, never a part."""
    content = json.dumps(dict(values), indent=2, ensure_ascii=False) + "\n"
    write_whole(path, content.encode(), explain=_in_folder)


def _in_folder(path: Path, error: OSError) -> StorageError:
    return _cannot_write(path.parent, error)


def _cannot_write(folder: Path, error: OSError) -> StorageError:
    return StorageError(
        f"The run's records cannot be written to {folder}: {error.strerror or error}. The checkpoints are as "
        "they were. Free space or permissions there and continue with --resume, or choose another "
        "--checkpoint-dir."
    )
