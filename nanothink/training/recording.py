"""What a run leaves behind to be read later: ``checkpoints/runs/<name>/``.

    config.json       resolved settings, where each came from, versions, device, data
    metrics.jsonl     one JSON object a line: "train" and "validation"
    samples.jsonl     continuations of the fixed prompts
    events.out.*      the same numbers for TensorBoard

A resumed run first drops every line that lies beyond the checkpoint it goes on from, so the file reads
as if nothing had happened: apart from ``seconds`` and ``tokens_per_second`` it equals that of a run
that was never interrupted.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanothink.errors import StorageError
from nanothink.inference.evaluate import Evaluation, Score
from nanothink.training.events import Evaluated, Event, Sampled, StepDone
from nanothink.training.state import TrainState

_FILES = ("metrics.jsonl", "samples.jsonl")


class RunRecorder:
    """An observer that writes a run's files.

    Args:
        folder: the run's own folder.
        description: what goes into config.json.
        state: where the run stands; lines beyond it are dropped, all of them if it has not begun.

    Raises:
        StorageError: the folder cannot be written.
    """

    def __init__(self, folder: Path, description: Mapping[str, Any], state: TrainState) -> None:
        self.folder = folder
        self._tensorboard: Any = None
        try:
            if state.step == 0 and folder.exists():
                _set_aside(folder)
            folder.mkdir(parents=True, exist_ok=True)
            for name in _FILES:
                _drop_lines_beyond(folder / name, state)
            write_whole(folder / "config.json", description)
            self._metrics, self._samples = ((folder / name).open("a", encoding="utf-8") for name in _FILES)
        except OSError as error:
            raise StorageError(
                f"The run's records cannot be written to {folder}: {error.strerror or error}. "
                "Free space or permissions there, or choose another --checkpoint-dir."
            ) from None
        # tensorboardX announces every file it opens at INFO, and takes a second to import
        logging.getLogger("tensorboardX").setLevel(logging.WARNING)
        from tensorboardX import SummaryWriter

        self._tensorboard = SummaryWriter(str(folder), purge_step=state.step + 1 if state.step else None)

    def __call__(self, event: Event) -> None:
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
            self._scalars("train", numbers, event.step)
        elif isinstance(event, Evaluated):
            self._line(
                self._metrics,
                {
                    "event": "validation",
                    "step": event.step,
                    "epoch": event.epoch,
                    **score_as_dict(event.evaluation.overall),
                    **denoising_as_dict(event.evaluation),
                    "best": event.best,
                    "domains": {name: score_as_dict(s) for name, s in event.evaluation.domains.items()},
                },
            )
            self._validation_scalars(event.evaluation, event.step)
        elif isinstance(event, Sampled):
            self._line(
                self._samples, {"step": event.step, "epoch": event.epoch, "samples": dict(event.texts)}
            )
            for prompt, text in event.texts.items():
                self._tensorboard.add_text(f"sample/{prompt}", prompt + text, event.step)

    def close(self) -> None:
        self._metrics.close()
        self._samples.close()
        self._tensorboard.close()

    def _line(self, file: Any, values: Mapping[str, Any]) -> None:
        # JSON has no NaN: a loss that is not a number is written as null
        clean = {k: None if isinstance(v, float) and v - v != 0 else v for k, v in values.items()}
        file.write(json.dumps(clean, ensure_ascii=False) + "\n")
        file.flush()

    def _scalars(self, group: str, numbers: Mapping[str, float], step: int) -> None:
        for name, value in numbers.items():
            self._tensorboard.add_scalar(f"{group}/{name}", value, step)

    def _validation_scalars(self, evaluation: Evaluation, step: int) -> None:
        overall = evaluation.overall
        self._scalars("validation", {"loss": overall.loss, "bits_per_byte": overall.bits_per_byte}, step)
        self._scalars("bits_per_byte", {n: s.bits_per_byte for n, s in evaluation.domains.items()}, step)
        self._scalars("denoising_mse", {f"level {n}": mse for n, mse in evaluation.denoising.items()}, step)


def score_as_dict(score: Score) -> dict[str, float]:
    """The numbers of a score under the names that scripts read."""
    return {
        "loss": score.loss,
        "perplexity": score.perplexity,
        "bits_per_byte": score.bits_per_byte,
        "tokens": score.tokens,
        "bytes": score.n_bytes,
    }


def denoising_as_dict(evaluation: Evaluation) -> dict[str, dict[str, float]]:
    """The squared error by noise level as scripts read it; nothing for a model that does not denoise."""
    if not evaluation.denoising:
        return {}
    return {"denoising_mse": {str(level): mse for level, mse in evaluation.denoising.items()}}


def _set_aside(folder: Path) -> None:
    """Move the records of an earlier run of this name beside the checkpoints that --overwrite sets aside."""
    replaced = folder.parent.parent / "replaced"
    replaced.mkdir(exist_ok=True)
    stem = f"{folder.name}-{time.strftime('%Y%m%d-%H%M%S')}-records"
    target, attempt = replaced / stem, 1
    while target.exists():
        attempt += 1
        target = replaced / f"{stem}-{attempt}"
    folder.rename(target)


def _drop_lines_beyond(path: Path, state: TrainState) -> None:
    """Keep the lines of steps (and evaluations) that ``state`` has behind it."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text("utf-8").splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue  # the last line of a killed process may be cut off; its step is done again
        limit = state.step if entry.get("event") == "train" else state.evaluated_step
        if entry.get("step", 0) <= limit:
            kept.append(line)
    _replace(path, "".join(line + "\n" for line in kept))


def write_whole(path: Path, values: Mapping[str, Any]) -> None:
    """Write a small JSON file so that a reader finds the old one or the new one, never a part."""
    _replace(path, json.dumps(dict(values), indent=2, ensure_ascii=False) + "\n")


def _replace(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    aside.write_text(text, "utf-8")
    os.replace(aside, path)
