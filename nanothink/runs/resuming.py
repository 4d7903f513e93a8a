"""The run that a command means, and the checkpoint that it resumes from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nanothink.checkpoints import (
    CheckpointPayload,
    CheckpointStore,
    list_checkpoints,
    parse_name,
    read_checkpoint,
    verify_checkpoint,
)
from nanothink.checkpoints.manifest import is_shards
from nanothink.errors import (
    CheckpointDamagedError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    UsageError,
)
from nanothink.models import COMBINED
from nanothink.reporter import SILENT, Reporter
from nanothink.suggestions import suggest
from nanothink.wording import some_of

if TYPE_CHECKING:
    from torch import Tensor

NEWEST = "newest"
"""Stands for ``--resume`` without a path."""


@dataclass(frozen=True)
class RunSpec:
    """The run that a command means."""

    kind: str
    checkpoint_dir: Path
    name: str | None = None
    resume: str | None = None
    """None: a new run. NEWEST: the latest state of this name, or a new run if there is none. Else a path."""
    overwrite: bool = False
    device: str | None = None
    experts: tuple[Path, ...] = ()
    """Checkpoints that a combined model combines; none: the three experts in ``checkpoint_dir``."""
    verified: bool = False
    """The checkpoint to resume from was verified by another process."""
    init: Path | None = None
    """Checkpoint whose weights a new run starts from; None: random ones."""
    teacher: Path | None = None
    """Checkpoint whose predictions an expert learns; None: it learns from text, or resumes with its own."""
    command: str = ""
    """Command that starts this run anew, for its records; empty if unknown."""

    @property
    def stem(self) -> str:
        if self.kind == COMBINED:
            return f"{self.name}_{COMBINED}" if self.name else COMBINED
        return f"{self.name or self.kind}_expert"

    @property
    def store(self) -> CheckpointStore:
        return CheckpointStore(self.checkpoint_dir, self.stem)


_RESTORED = ("model_state", "optimizer_state")


@dataclass(frozen=True)
class ResumePoint:
    """The checkpoint that a run resumes from.

    Weights and moments stay in the mapped file, or the folder, until they are restored; everything else is in
    memory.
    """

    path: Path
    payload: CheckpointPayload

    @classmethod
    def open(cls, path: Path, reporter: Reporter = SILENT, *, verified: bool = False) -> ResumePoint:
        """Read and verify the checkpoint. Raises as ``read_checkpoint`` does."""
        payload = read_checkpoint(path, mmap=True, shapes_only=True, verified=verified, reporter=reporter)
        rest = {name: entry for name, entry in payload.items() if name not in _RESTORED}
        payload.update(deepcopy(rest))  # type: ignore[typeddict-item]
        return cls(path, payload)

    @property
    def read_weights(self) -> Callable[[Mapping[str, Tensor]], None] | None:
        """Fills weights by name from the folder; None where the payload has them."""
        return self._read if is_shards(self.path) else None

    def _read(self, wanted: Mapping[str, Tensor]) -> None:
        from nanothink.checkpoints.shards import fill, weight_key

        fill(self.path, {weight_key(name): tensor for name, tensor in wanted.items()})

    def read_moments(self, wanted: Mapping[tuple[str, str, str], Tensor]) -> None:
        """Fill moments by optimizer, parameter and name from the folder."""
        from nanothink.checkpoints.shards import fill, moment_key

        fill(self.path, {moment_key(*name): tensor for name, tensor in wanted.items()})

    def release(self) -> None:
        """Drop weights and moments: a mapped file takes disk space even after it is replaced."""
        for name in _RESTORED:
            self.payload[name] = {}  # type: ignore[literal-required]


def locate(checkpoint: str | None, checkpoint_dir: Path, reporter: Reporter = SILENT) -> RunSpec:
    """Find the run that ``nanothink resume [CHECKPOINT]`` means.

    Without a checkpoint it is the run that was interrupted last, at its latest state that verifies. A note
    names each file that is passed over.

    Raises:
        CheckpointNotFoundError: there is nothing to resume.
    """
    if checkpoint is None:
        entries = list_checkpoints(checkpoint_dir)
        paths = [e.path for e in entries if _stem_of_rolling(e.path) is not None]
        if not paths:
            if not entries:
                raise CheckpointNotFoundError(
                    f"There is no checkpoint in {checkpoint_dir}. Name the folder by --checkpoint-dir, or "
                    f"train a model: {suggest('pretrain transformer')}"
                )
            there = some_of([e.path.name for e in entries], 12)
            raise CheckpointNotFoundError(
                f"Nothing in {checkpoint_dir} was interrupted (there: {there}). To train a finished model "
                "further, name its checkpoint and raise --max-epochs or --max-steps."
            )
        newest = _newest_of(sorted(paths, key=_modified_ns, reverse=True), reporter)
        if newest is None:
            raise CheckpointNotFoundError(
                f"Runs in {checkpoint_dir} were interrupted, but all their files are damaged. List them: "
                + suggest("checkpoints ls --checkpoint-dir", checkpoint_dir)
            )
        checkpoint = str(newest)
    path = Path(checkpoint)
    payload = read_checkpoint(path, mmap=True, shapes_only=True, reporter=reporter)
    stem = payload["run"].get("name")
    if not isinstance(stem, str):
        raise CheckpointDamagedError(f"{path}: the name of its run is missing. Use another checkpoint")
    ending = f"_{COMBINED}" if payload["kind"] == COMBINED else "_expert"
    return RunSpec(
        kind=payload["kind"],
        checkpoint_dir=path.parent,
        name=None if stem == COMBINED else stem.removesuffix(ending),
        resume=str(path),
    )


def _newest_of(interrupted: Sequence[Path], reporter: Reporter) -> Path | None:
    """The latest state that verifies of the first run that has one."""
    for path in interrupted:
        store = CheckpointStore(path.parent, _stem_of_rolling(path) or "")
        newest = store.newest(reporter)
        if newest is not None:
            return newest
    return None


def _stem_of_rolling(path: Path) -> str | None:
    name = parse_name(path.name)
    return name.stem if name is not None and name.role == "interrupted" else None


def _modified_ns(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:  # a run that has just ended
        return 0


def find_start(spec: RunSpec, reporter: Reporter) -> ResumePoint | None:
    """Open the checkpoint that a run resumes from; None for a new run.

    Raises:
        CheckpointError: it is missing, damaged, or of another kind.
        UsageError: a later state of the run would be lost.
    """
    if spec.resume is None:
        return None
    store = spec.store
    if spec.resume == NEWEST:
        path = store.newest(reporter)
        if path is None:
            reporter.note(f"No state of {spec.stem} in {spec.checkpoint_dir} to resume; starting a new run.")
            return None
    else:
        path = Path(spec.resume)
    resume_point = ResumePoint.open(path, reporter, verified=spec.verified)
    payload = resume_point.payload
    if "imported" in payload["run"] and payload["step"] == 0 and "state" not in payload["run"]:
        raise UsageError(
            f"{path} is a published model, not a run of yours. Train it further by: "
            + suggest("pretrain", spec.kind, "--init", path, "--name", f"{spec.name or spec.kind}_further")
        )
    if payload["kind"] != spec.kind:
        raise CheckpointMismatchError(
            f"{path} holds a {payload['kind']}, not a {spec.kind}. Resume it with: {suggest('resume', path)}"
        )
    latest = None if spec.verified else next(reversed(store.rolling()), None)
    if (
        latest is not None
        and latest.resolve() != path.resolve()
        and not spec.overwrite
        and (later := _steps_of(latest, reporter)) is not None
        and later > payload["step"]
    ):
        raise UsageError(
            f"{latest} is further on (step {later}) than {path} (step {payload['step']}) and "
            "would be lost. Resume the later one (--resume without a path), or discard it: --overwrite"
        )
    reporter.note(f"Resuming from {path}: epoch {payload['epoch']}, step {payload['step']}.")
    return resume_point


def _steps_of(path: Path, reporter: Reporter) -> int | None:
    try:
        return verify_checkpoint(path, reporter=reporter).step
    except (CheckpointDamagedError, CheckpointNotFoundError):  # nothing that could be lost
        return None
