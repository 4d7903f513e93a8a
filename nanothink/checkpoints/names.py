"""Names of the files in a checkpoint folder.

    <stem>.pt                           best         lowest validation loss so far
    <stem>_epoch<N>.pt                  epoch        snapshot; N = epochs completed, without leading zeros
    <stem>_interrupted.pt               interrupted  rolling; the latest state of a run that has not ended
    <stem>_epoch<N>.dcp/                epoch        the same as a folder, written by several processes
    <stem>_interrupted<G>.dcp/          interrupted  the same; G counts them, so that each is a new folder
    .<file name>.<...>.tmp              a write under way, or left by a killed one
    .<stem>.lock                        lock of the run that writes this stem
    replaced/<stem>-<time>/             checkpoints displaced by ``--overwrite`` or by changed data

A stem can't end in ``_epoch<N>`` or ``_interrupted``, so a file name belongs to exactly one stem.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from nanothink.errors import UsageError

Role = Literal["best", "epoch", "interrupted"]

MAX_NAME_BYTES = 120
"""A file name may have 255 bytes on most file systems; suffix, host and pid need room too."""

_SUFFIX = re.compile(r"(?P<stem>.+?)(?:_epoch(?P<epoch>0|[1-9][0-9]*)|(?P<interrupted>_interrupted))?\.pt")
_FOLDER = re.compile(
    r"(?P<stem>.+?)(?:_epoch(?P<epoch>0|[1-9][0-9]*)|_interrupted(?P<generation>[1-9][0-9]*))\.dcp"
)
_RESERVED_END = re.compile(r"_epoch[0-9]+$|_interrupted$")


@dataclass(frozen=True, slots=True)
class CheckpointName:
    stem: str
    role: Role
    epoch: int | None = None
    """Epochs completed, of a snapshot."""
    generation: int | None = None
    """Number of a rolling folder within its run."""

    @property
    def sort_key(self) -> tuple[str, int, int]:
        """Order by stem, then best, snapshots by number, interrupted."""
        return (
            self.stem,
            ("best", "epoch", "interrupted").index(self.role),
            self.epoch or self.generation or 0,
        )


def parse_name(file_name: str) -> CheckpointName | None:
    """Stem and role of a file or folder, or None when it isn't called like a checkpoint."""
    if file_name.startswith("."):
        return None
    if folder := _FOLDER.fullmatch(file_name):
        if folder["generation"]:
            return CheckpointName(folder["stem"], "interrupted", generation=int(folder["generation"]))
        return CheckpointName(folder["stem"], "epoch", int(folder["epoch"]))
    match = _SUFFIX.fullmatch(file_name)
    if match is None:
        return None
    if match["interrupted"]:
        return CheckpointName(match["stem"], "interrupted")
    if match["epoch"] is not None:
        return CheckpointName(match["stem"], "epoch", int(match["epoch"]))
    return CheckpointName(match["stem"], "best")


def validate_name(name: str) -> str:
    """Return ``name`` if a run may have it.

    Raises UsageError that says what is wrong with it and suggests a similar valid name.
    """
    if not name:
        raise UsageError("a checkpoint name is empty; give it at least one letter or digit")
    if name.endswith(".pt"):
        raise UsageError(f"checkpoint name '{name}': give it without the ending '.pt'")
    if "/" in name or "\\" in name:
        raise UsageError(
            f"checkpoint name '{name}' contains a path separator; the name goes into a file name, "
            f"and the folder is chosen with --checkpoint-dir"
        )
    if not re.fullmatch(r"[\w.-]+", name) or name[0] in ".-":
        near = re.sub(r"[^\w.-]+", "-", name).strip(".-")
        raise UsageError(
            f"checkpoint name '{name}': use letters, digits, '-', '_' and '.', and begin with a letter, "
            f"a digit or '_'" + (f"; for example '{near}'" if near else "")
        )
    if end := _RESERVED_END.search(name):
        raise UsageError(
            f"checkpoint name '{name}' ends in '{end.group()}', which marks the files of a run "
            f"(snapshots and interrupted runs); choose another ending"
        )
    if len(name.encode()) > MAX_NAME_BYTES:
        raise UsageError(
            f"checkpoint name '{name[:40]}...' is too long: {len(name.encode())} bytes, "
            f"at most {MAX_NAME_BYTES}"
        )
    return name
