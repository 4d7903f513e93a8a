"""The files of one run in a checkpoint folder: paths, search for the latest, lock, listing, pruning.

A run is named by its stem (``transformer_expert``, ``nanothink_mla``); names.py defines the file names. A
file may also be a folder that several processes wrote (shards.py).

Search and pruning verify a file before they count it.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from nanothink.checkpoints.file import (
    CheckpointSummary,
    cannot_write,
    read_summary,
    verify_checkpoint,
    write_checkpoint,
)
from nanothink.checkpoints.manifest import SUFFIX
from nanothink.checkpoints.names import (
    CheckpointName,
    Role,
    parse_name,
    validate_name,
)
from nanothink.checkpoints.payload import CheckpointPayload
from nanothink.disk import (
    HeldError,
    held,
    leftovers,
    make_folder,
    new_folder,
    remove,
    sync_folder,
    temporary_path,
    try_to_write,
    whole_file,
)
from nanothink.errors import (
    CheckpointBusyError,
    CheckpointDamagedError,
    CheckpointError,
    CheckpointNotFoundError,
    StorageError,
    UsageError,
)
from nanothink.reporter import SILENT, Reporter
from nanothink.suggestions import again
from nanothink.wording import counted

REPLACED_FOLDER = "replaced"
"""Folder that holds checkpoints displaced by ``--overwrite`` or by changed data."""


@dataclass(frozen=True, slots=True)
class DamagedEntry:
    """A file with the name of a checkpoint that cannot be used."""

    path: Path
    n_bytes: int
    modified: float
    """Seconds since 1970."""
    reason: str


class CheckpointStore:
    """The checkpoints of one run.

    ``--overwrite`` loses nothing: ``guard_new_run(overwrite=True)`` leaves the old files where they are,
    and only when ``write`` has the new run's first checkpoint complete on the disk are they moved to
    ``<folder>/replaced/<stem>-<time>/``. A run that dies before that has changed nothing.
    """

    def __init__(self, folder: Path, stem: str) -> None:
        self.folder = folder
        self.stem = validate_name(stem)
        self._to_set_aside = False

    @property
    def best(self) -> Path:
        return self.folder / f"{self.stem}.pt"

    @property
    def interrupted(self) -> Path:
        return self.folder / f"{self.stem}_interrupted.pt"

    def epoch(self, n: int) -> Path:
        """The snapshot taken when ``n`` epochs were completed."""
        return self.folder / f"{self.stem}_epoch{n}.pt"

    def rolling(self) -> list[Path]:
        """Rolling states, the latest last: several if a kill kept the earlier from being removed."""
        found = [
            path
            for name, path in _checkpoint_files(self.folder)
            if name.stem == self.stem and name.role == "interrupted"
        ]
        return sorted(found, key=lambda path: (_steps_done(path), _modified(path)))

    def existing(self) -> list[Path]:
        """Files of this stem, damaged ones included: best, snapshots by number, interrupted."""
        return [path for name, path in _checkpoint_files(self.folder) if name.stem == self.stem]

    def newest(self, reporter: Reporter = SILENT) -> Path | None:
        """The latest state: interrupted, then the newest snapshot, then best.

        The best file comes before the snapshots that it is further on than: a completed run may leave it
        after all of them. Each candidate is verified to the last byte; a damaged one is passed over, with
        a note of the reason.

        Raises StorageError, CheckpointMismatchError: a candidate cannot be read, or belongs to another
        version or program. It may be sound, and continuing without it would overwrite it.
        """
        rolling = self.rolling()
        files = [path for path in self.existing() if path not in rolling]  # best, snapshots by number
        best_steps = _steps_done(self.best)
        snapshots = [path for path in files if path != self.best]
        if behind := [path for path in snapshots if 0 <= _steps_done(path) < best_steps]:
            files.remove(self.best)
            files.insert(files.index(behind[-1]) + 1, self.best)
        for path in reversed([*files, *rolling]):
            try:
                verify_checkpoint(path, reporter=reporter)
            except CheckpointDamagedError as error:
                reporter.note(f"Passing over {path}: {_reason(path, error)}")
            except CheckpointNotFoundError:
                continue  # removed meanwhile
            else:
                return path
        return None

    def write(self, path: Path, payload: CheckpointPayload) -> None:
        """``write_checkpoint``, and with the first one of an overwriting run, set the old files aside."""
        with self._setting_aside() as set_aside:
            write_checkpoint(path, payload, before_replace=set_aside)
        if path == self.interrupted:
            self._remove_rolling(but=path)

    def write_shards(self, role: Role, epoch: int, payload: CheckpointPayload) -> Path:
        """``write`` to a folder, by all processes together; returns its path. Rank 0 holds the lock."""
        from nanothink.checkpoints.shards import write_shards

        def choose() -> Path:
            if role == "epoch":
                return self.folder / f"{self.stem}_epoch{epoch}{SUFFIX}"
            for left, name in leftovers(self.folder) if self.folder.is_dir() else ():  # of any generation
                if (of := parse_name(name)) is not None and of.stem == self.stem:
                    remove(left)
            numbers = [parse_name(path.name) for path in self.rolling()]
            last = max((number.generation or 0 for number in numbers if number is not None), default=0)
            return self.folder / f"{self.stem}_interrupted{last + 1}{SUFFIX}"

        with self._setting_aside() as set_aside:
            after = (lambda path: self._remove_rolling(but=path)) if role == "interrupted" else None
            return write_shards(choose, payload, explain=cannot_write, before_replace=set_aside, after=after)

    @contextmanager
    def _setting_aside(self) -> Iterator[Callable[[], None] | None]:
        """Give what sets the files of an earlier run aside, if that is due; put them back on an error."""
        moved: list[tuple[Path, Path]] = []
        set_aside = (lambda: self._set_aside(moved)) if self._to_set_aside else None
        try:
            yield set_aside
        except StorageError as error:
            if not moved or self.existing():  # all files of the stem were moved, so one is the new one
                raise
            raise StorageError(
                f"{error}. The earlier run's files are in {_put_back(moved, moved[0][1].parent)}"
            ) from error
        self._to_set_aside = False

    def remove_interrupted(self) -> None:
        """Remove the rolling checkpoint. Only once the run has completed and its best file is written."""
        self._remove_rolling(but=None)

    def _remove_rolling(self, *, but: Path | None) -> None:
        for path in self.rolling():
            if path != but:
                _remove(path)
        try:
            sync_folder(self.folder)
        except OSError as error:
            raise _storage_error(self.folder, "cannot be written", error) from error

    def keep_best(self) -> Path | None:
        """Keep the best checkpoint below ``replaced/`` too, before it is overwritten.

        Returns its path there; None if there is no best.
        """
        if not self.best.exists():
            return None
        try:
            kept = self._new_folder_aside() / self.best.name
            try:
                os.link(self.best, kept)
            except OSError:  # a file system without links
                with open(self.best, "rb") as best, whole_file(kept) as copy:
                    shutil.copyfileobj(best, copy)
            sync_folder(kept.parent)
        except OSError as error:
            raise _storage_error(self.best, "cannot be kept", error) from error
        return kept

    def guard_new_run(self, *, overwrite: bool) -> None:
        """Refuse to start a new run over the files of an old one, unless ``overwrite`` is set.

        Raises UsageError that names the files and the three alternatives.
        """
        old = self.existing()
        self._to_set_aside = bool(old) and overwrite
        if not old or overwrite:
            return
        rolling = self.rolling()
        state = "an interrupted run" if rolling else "a run"
        with suppress(CheckpointError, StorageError):
            summary = read_summary(rolling[-1] if rolling else old[0])
            state += f" (step {summary.step:,}, {counted(summary.epoch, 'epoch')} completed)"
        names = ", ".join(path.name for path in old)
        raise UsageError(
            f"{self.folder} already holds {state} called '{self.stem}': {names}. A new run would replace it. "
            f"Continue it: {again('--resume')}. Keep it: --name OTHER, or another --checkpoint-dir. "
            f"Start over: {again('--overwrite')} (the old files are moved to {self.folder / REPLACED_FOLDER})"
        )

    @contextmanager
    def lock(self, reporter: Reporter = SILENT) -> Iterator[None]:
        """Hold this stem: one run at a time writes it.

        Raises CheckpointBusyError that names the holder; StorageError when the folder can't be written.
        """
        lock_path = self.folder / f".{self.stem}.lock"
        with ExitStack() as stack:
            try:
                make_folder(self.folder)
                stack.enter_context(held(lock_path, reporter))
                try_to_write(self.folder)  # a lock that is there already needs no right to write
            except HeldError as error:
                raise CheckpointBusyError(
                    f"{self.folder}: another run is writing '{self.stem}'{error}. Wait for it, stop it, or "
                    f"give this run another name (--name) or --checkpoint-dir"
                ) from None
            except (FileExistsError, NotADirectoryError):
                raise StorageError(
                    f"{self.folder}: is a file, or lies below one. Name a folder by --checkpoint-dir"
                ) from None
            except OSError as error:
                raise _storage_error(lock_path, "cannot be locked", error) from error
            yield

    def _set_aside(self, moved: list[tuple[Path, Path]]) -> None:
        """Move all files of this stem out of the way, the latest state last; list where from and where to.

        In that order a kill at any point leaves the latest of them for a bare ``--resume`` to find.
        """
        old = self.existing()
        if not old:
            return
        target = self._new_folder_aside()
        try:
            for path in old:
                path.rename(target / path.name)
                moved.append((path, target / path.name))
            sync_folder(target)
        except OSError:
            _put_back(moved, target)
            moved.clear()
            raise

    def _new_folder_aside(self) -> Path:
        name = f"{self.stem}-{time.strftime('%Y%m%d-%H%M%S')}"
        return new_folder(self.folder / REPLACED_FOLDER / name, within=self.folder)


def _put_back(moved: list[tuple[Path, Path]], aside: Path) -> Path:
    """Move files back, the last one first; return the folder that holds them now."""
    with suppress(OSError):
        for old, new in reversed(moved):
            new.rename(old)
        aside.rmdir()
        return aside.parent.parent
    return aside


def _modified(path: Path) -> float:
    with suppress(OSError):
        return path.stat().st_mtime
    return 0.0


def _steps_done(path: Path) -> int:
    """Steps of a readable checkpoint; -1 of anything else."""
    with suppress(CheckpointError, StorageError):
        return read_summary(path).step
    return -1


def list_checkpoints(folder: Path) -> list[CheckpointSummary | DamagedEntry]:
    """Every checkpoint in ``folder``: by stem, then best, snapshots by number, interrupted.

    Cheap: tensor data isn't read, so damage inside it goes unnoticed (``verify_checkpoint`` finds it).
    Raises StorageError when the folder can't be read; a folder that isn't there holds nothing.
    """
    entries: list[CheckpointSummary | DamagedEntry] = []
    for _, path in _checkpoint_files(folder):
        try:
            entries.append(read_summary(path))
        except (CheckpointError, StorageError) as error:
            try:
                stat = path.stat()
            except OSError:
                continue  # removed meanwhile
            entries.append(DamagedEntry(path, stat.st_size, stat.st_mtime, _reason(path, error)))
    return entries


def prune(folder: Path, *, keep: int = 1, dry_run: bool = False) -> list[Path]:
    """Remove old snapshots and what killed writers left behind; give the paths (to be) removed.

    Of each stem the ``keep`` newest snapshots stay, and only verified ones count as kept: a damaged one
    never costs the sound one before it. Best and interrupted files, damaged files newer than the kept
    ones, and files of another name are never touched.

    Raises UsageError for ``keep`` below 1; StorageError when a file can't be removed.
    """
    if keep < 1:
        raise UsageError(f"keep={keep}: at least the newest snapshot of each run stays; use 1 or more")
    snapshots: dict[str, list[Path]] = {}
    for name, path in _checkpoint_files(folder):
        if name.role == "epoch":
            snapshots.setdefault(name.stem, []).append(path)
    surplus = [path for paths in snapshots.values() for path in _older_than_kept(paths, keep)]
    try:
        left = leftovers(folder) if os.path.isdir(folder) else []
        surplus += [p for p, name in left if name.endswith(SUFFIX if p.is_dir() else ".pt")]
    except OSError as error:
        raise _storage_error(folder, "cannot be read", error) from error
    if not dry_run:
        for path in surplus:
            _remove(path)
        if surplus:
            sync_folder(folder)
    return surplus


def _older_than_kept(paths: list[Path], keep: int) -> list[Path]:
    """Snapshots of one stem before the ``keep`` newest sound ones; ``paths`` is oldest first."""
    if len(paths) <= keep:
        return []
    n_sound = 0
    for index in range(len(paths) - 1, -1, -1):
        with suppress(CheckpointError, StorageError):
            verify_checkpoint(paths[index])
            n_sound += 1
        if n_sound == keep:
            return paths[:index]
    return []


def _checkpoint_files(folder: Path) -> list[tuple[CheckpointName, Path]]:
    try:
        names = [e.name for e in os.scandir(folder) if e.is_dir() == e.name.endswith(SUFFIX)]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise _storage_error(folder, "cannot be read", error) from error
    found = [(name, folder / file_name) for file_name in names if (name := parse_name(file_name)) is not None]
    return sorted(found, key=lambda item: item[0].sort_key)


def _remove(path: Path) -> None:
    """Remove a checkpoint. A folder is renamed first, so that a kill leaves no part of it under its name."""
    try:
        if path.is_dir():
            path = path.rename(temporary_path(path))
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except FileNotFoundError:
        return
    except OSError as error:
        raise _storage_error(path, "cannot be removed", error) from error


def _reason(path: Path, error: Exception) -> str:
    return str(error).removeprefix(f"{path}: ")


def _storage_error(path: Path, what: str, error: OSError) -> StorageError:
    return StorageError(
        f"{path}: {what} ({error.strerror or error}). Check the permissions and the disk, or choose another "
        f"--checkpoint-dir"
    )
