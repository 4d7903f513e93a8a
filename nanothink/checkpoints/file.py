"""A checkpoint file: written whole or not at all, loaded only after it is verified.

The file is what ``torch.save`` writes of one plain dict (``CheckpointPayload``), so
``torch.load(path, weights_only=True)`` opens it anywhere; see archive.py for the comment at its end.

disk/write.py describes the steps of a write and what a kill leaves at each.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import re
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar, cast

from nanothink.checkpoints.archive import DigestingWriter, check_archive, damaged, read_sealed_summary
from nanothink.checkpoints.manifest import is_shards, read_manifest
from nanothink.checkpoints.payload import (
    FORMAT_VERSION,
    CheckpointPayload,
    plain,
    summary_of,
    tensor_bytes,
    wrong_entry,
    wrong_in_summary,
)
from nanothink.disk import whole_file
from nanothink.errors import CheckpointMismatchError, CheckpointNotFoundError, StorageError
from nanothink.reporter import SILENT, Reporter
from nanothink.suggestions import did_you_mean, suggest
from nanothink.wording import counted, some_of

if TYPE_CHECKING:  # a listing does without torch, whose import takes longer than all the rest
    from torch import Tensor

T = TypeVar("T")

_PIECE = 2**22
"""Numbers checked at once."""

_SETTLED_NS = 100_000_000
"""Changes further apart than this have different times; disks count in ticks of 1 to 10 ms."""


class _Verified:
    """Files that this process has verified, so that opening one again need not read every byte.

    A file is identified by inode, size and times of change, so a replaced or changed file is another. Only
    the last few are remembered.
    """

    def __init__(self) -> None:
        self._known: deque[tuple[int, ...]] = deque(maxlen=64)

    def knows(self, file: BinaryIO) -> bool:
        return self._identity(file) in self._known

    @contextlib.contextmanager
    def verifying(self, file: BinaryIO) -> Iterator[None]:
        """Remember ``file`` if the block raises nothing and the file does not change meanwhile."""
        began, before = time.time_ns(), self._identity(file)
        yield
        if self._identity(file) == before and max(before[-2:]) < began - _SETTLED_NS:
            self._known.append(before)

    @staticmethod
    def _identity(file: BinaryIO) -> tuple[int, ...]:
        stat = os.fstat(file.fileno())
        return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


_verified = _Verified()


@dataclass(frozen=True, slots=True)
class CheckpointSummary:
    """Values that a listing shows of a checkpoint."""

    path: Path
    kind: str
    name: str | None
    """Name of the run."""
    step: int
    epoch: int
    position: int
    best_loss: float | None
    """Nats per token."""
    n_parameters: int
    """Numbers in ``model_state``, buffers included, tied ones counted once."""
    n_bytes: int
    modified: float
    """Seconds since 1970."""
    format_version: int


def write_checkpoint(
    path: Path, payload: CheckpointPayload, *, before_replace: Callable[[], None] | None = None
) -> None:
    """Write ``payload`` to ``path`` whole or not at all, creating the folder if need be.

    Until the new file is complete and on the disk, the old one stays as it is; ``before_replace`` is
    called at that moment, just before the rename. Temporary files that killed writers of the same file
    left behind are removed first, since the disk may be full of them.

    One writer per file at a time: hold ``CheckpointStore.lock``.

    Raises StorageError (disk full, no permission, read-only, ...), the old file intact; TypeError when the
    payload holds something that ``weights_only`` would not load again.
    """
    values = plain(payload, "payload")
    import torch

    if wrong := wrong_entry(values):
        raise TypeError(f"not a checkpoint payload: {wrong}")
    needed = tensor_bytes(values)

    def explain(path: Path, error: OSError) -> StorageError:
        return cannot_write(path, error, needed)

    with whole_file(path, before_replace=before_replace, explain=explain) as file:
        writer = DigestingWriter(file.raw)
        try:
            torch.save(values, cast("BinaryIO", writer))
        except BaseException:
            if writer.failure is not None:
                raise writer.failure from None
            raise
        if writer.failure is not None:
            raise writer.failure
        writer.seal(summary_of(values))


def read_checkpoint(
    path: Path,
    *,
    mmap: bool = False,
    shapes_only: bool = False,
    verified: bool = False,
    reporter: Reporter = SILENT,
) -> CheckpointPayload:
    """Verify every byte of ``path``, then load it. Never runs code from the file.

    A file that this process has verified before and that has not changed since is not verified again, nor is
    one that another process has ``verified``.

    With ``mmap`` the tensors stay on the disk until they are touched; the file can still be replaced
    meanwhile, since a replaced file lives on while it is mapped. Of a folder (shards.py) weights are read,
    and moments have shape and type alone.

    With ``shapes_only`` all tensors of a folder have shape and type alone, to be read by ``shards.fill``.

    Raises CheckpointNotFoundError, CheckpointDamagedError (cut short, changed, not a checkpoint),
    CheckpointMismatchError (no NanoThink checkpoint, or of another version), StorageError (not readable).
    """
    if is_shards(path):
        kept = {"weights": not shapes_only, "moments": not (mmap or shapes_only)}
        return _load_folder(path, **kept, verified=verified, reporter=reporter)
    return _load(path, mmap=mmap, verified=verified, reporter=reporter)


def verify_checkpoint(path: Path, *, reporter: Reporter = SILENT) -> CheckpointSummary:
    """Run the checks of ``read_checkpoint`` on every byte, without keeping the tensors in memory.

    Raises the same errors, and CheckpointDamagedError for weights that are not finite: NanoThink writes
    none, and no model works with them.
    """
    if is_shards(path):
        from nanothink.checkpoints.shards import weights_of

        payload = _load_folder(path, reporter=reporter)
        wrong = [name for name, tensor in weights_of(path) if not _is_finite(tensor)]
    else:
        payload = _load(path, mmap=True, again=True, reporter=reporter)
        wrong = [name for name, tensor in payload["model_state"].items() if not _is_finite(tensor)]
    if wrong:
        more = ", ..." if len(wrong) > 3 else ""
        raise damaged(
            path,
            f"{counted(len(wrong), 'tensor')} of {len(payload['model_state']):,} hold numbers that are not "
            f"finite ({', '.join(wrong[:3])}{more})",
        )
    return read_summary(path) if is_shards(path) else _summary(path, summary_of(payload))


def read_summary(path: Path) -> CheckpointSummary:
    """The summary at the end of the file, read without the rest and without torch, for long listings.

    Damage elsewhere in the file goes unnoticed. A file without a summary, because another program saved it,
    is read as by ``read_checkpoint``. Raises as that does.
    """
    if is_shards(path):
        manifest = _from_folder(path, lambda: read_manifest(path))
        summary, n_bytes = manifest["summary"], sum(n for n, _ in manifest["files"].values())
    else:
        summary, n_bytes = _read(path, lambda file: read_sealed_summary(file, path)), None
    if summary is None:
        return _summary(path, summary_of(_load(path, mmap=True)))
    _check_version(path, summary)
    if wrong := wrong_in_summary(summary):
        raise damaged(path, f"its summary is damaged: {wrong}")
    return _summary(path, summary, n_bytes)


def cannot_write(path: Path, error: OSError, needed: int) -> StorageError:
    there = os.path.isfile(path)
    kept = "The checkpoint that was there is intact" if there else "No file was left behind"
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        try:
            free = f"{shutil.disk_usage(path.parent).free:,} bytes are free"
        except OSError:
            free = "how much is free is unknown"
        remedy = (
            f"About {needed:,} bytes are needed, {free}. Make room "
            f"({suggest('checkpoints prune')} removes old snapshots) or choose another "
            "--checkpoint-dir, then resume with --resume"
        )
    else:
        remedy = "Check the disk and who may write there, or choose another --checkpoint-dir"
    return StorageError(f"{path}: cannot be written: {reason}. {kept}. {remedy}")


def _is_finite(tensor: Tensor) -> bool:
    """True if every number is finite. Checked in pieces, since the check takes a copy."""
    flat = tensor.reshape(-1)
    return all(bool(flat[at : at + _PIECE].isfinite().all()) for at in range(0, flat.numel(), _PIECE))


def _load(
    path: Path,
    *,
    mmap: bool,
    again: bool = False,
    verified: bool = False,
    reporter: Reporter = SILENT,
) -> CheckpointPayload:
    import torch

    def load(file: BinaryIO) -> object:
        if again or not (verified or _verified.knows(file)):
            with _verified.verifying(file):
                check_archive(file, path, reporter)
        try:
            # The open file, where possible: what is loaded is then what was checked.
            return torch.load(path if mmap else file, map_location="cpu", weights_only=True, mmap=mmap)
        except (OSError, MemoryError, torch.OutOfMemoryError):
            raise
        except pickle.UnpicklingError as error:
            found = re.search(r"GLOBAL:? \S+|Unsupported operand \d+", str(error))
            raise damaged(
                path,
                "loading it would run code: it holds more than tensors and plain values"
                + (f" ({found.group()})" if found else ""),
            ) from None
        except Exception as error:  # RuntimeError, KeyError, ... by where the damage is
            raise damaged(path, f"it does not load ({_first_line(error)})") from None

    return _checked(path, _read(path, load))


def _load_folder(path: Path, **options: Any) -> CheckpointPayload:
    from nanothink.checkpoints.shards import read_shards

    return _checked(path, _from_folder(path, lambda: read_shards(path, **options)))


def _from_folder(path: Path, read: Callable[[], T]) -> T:
    try:
        return read()
    except OSError as error:
        raise StorageError(
            f"{path}: cannot be read: {error.strerror or error}. Check its permissions and the disk"
        ) from error


def _read(path: Path, read: Callable[[BinaryIO], T]) -> T:
    """Call ``read`` with the open file; raise a disk's errors as ``read_checkpoint`` documents them."""
    if is_shards(path.parent):
        raise CheckpointNotFoundError(f"{path}: is a part of a checkpoint. Give all of it: {path.parent}")
    try:
        if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
            raise damaged(path, "it is a pipe or a device, not a file")
        with path.open("rb") as file:
            return read(file)
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointNotFoundError(_not_found(path)) from None
    except IsADirectoryError:
        raise CheckpointNotFoundError(
            f"{path}: is a folder; give one of the checkpoints in it. {_whats_in(path)}. To resume the "
            f"latest run in it, name no checkpoint, and the folder by --checkpoint-dir {path}"
        ) from None
    except OSError as error:
        raise StorageError(
            f"{path}: cannot be read: {error.strerror or error}. Check its permissions and the disk"
        ) from error


def _checked(path: Path, payload: object) -> CheckpointPayload:
    from nanothink.checkpoints.split_record import SplitRecord

    if not isinstance(payload, dict):
        raise CheckpointMismatchError(
            f"{path}: is not a NanoThink checkpoint: it holds a {type(payload).__name__}, not a dict"
        )
    _check_version(path, payload)
    if wrong := wrong_entry(payload):
        raise CheckpointMismatchError(
            f"{path}: is not a NanoThink checkpoint: {wrong}. If it comes from another program, only its "
            f"weights could be of use; NanoThink can't resume from it"
        )
    SplitRecord.from_state(payload["split"], path)
    return cast("CheckpointPayload", payload)


def _check_version(path: Path, values: dict[Any, Any]) -> None:
    version = values.get("format_version")
    if type(version) is int and version > FORMAT_VERSION:
        raise CheckpointMismatchError(
            f"{path}: was written by a newer NanoThink (format {version}; this one reads up to "
            f"{FORMAT_VERSION}). Upgrade NanoThink to use it"
        )
    if type(version) is int and 0 < version < FORMAT_VERSION:
        raise CheckpointMismatchError(
            f"{path}: was written by an earlier NanoThink (format {version}; this one reads "
            f"{FORMAT_VERSION}). Formats before 0.1.0 are not converted: train it again"
        )


def _summary(path: Path, values: dict[str, Any], n_bytes: int | None = None) -> CheckpointSummary:
    try:
        stat = path.stat()
    except OSError:
        raise CheckpointNotFoundError(f"{path}: was removed while it was being read") from None
    size = stat.st_size if n_bytes is None else n_bytes
    return CheckpointSummary(path=path, n_bytes=size, modified=stat.st_mtime, **values)


def _not_found(path: Path) -> str:
    if not os.path.isdir(path.parent):
        return (
            f"{path}: there is no such checkpoint, nor its folder. "
            f"Train one with {suggest('pretrain transformer')}"
        )
    suggestion = did_you_mean(path.name, _checkpoint_names(path.parent))
    return f"{path}: there is no such checkpoint.{suggestion} {_whats_in(path.parent)}"


def _whats_in(folder: Path) -> str:
    names = _checkpoint_names(folder)
    if not names:
        return (
            f"The folder {folder.resolve()} holds no checkpoint; "
            f"train one with {suggest('pretrain transformer')}"
        )
    return f"{folder.resolve() if folder == Path() else folder} holds {some_of(names, 12)}"


def _checkpoint_names(folder: Path) -> list[str]:
    with contextlib.suppress(OSError):
        found = (entry for entry in folder.iterdir() if is_shards(entry) or entry.suffix == ".pt")
        return sorted(entry.name for entry in found if not entry.name.startswith("."))
    return []


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0][:200] if lines else "") or type(error).__name__
