"""Files and folders that are written whole or not at all, and folders that a group can share.

Order of a write, and what a kill or a power cut leaves at each point:

    write a temporary file beside the target    old file intact, a temporary file to sweep up
    fsync it                                    the same
    rename it over the target                   old file or new file, each complete
    fsync the folder                            new file, also after a power cut

Nothing is ever written through a symbolic link that lies where a file is to be: temporary files are made
exclusively under names that cannot be guessed, and the rename replaces a link instead of following it.

Finished files get the mode that the umask gives, or keep that of the file they replace.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from nanothink.disk.folders import (
    make_folder,
    open_plain,
    remove_empty,
    set_mode,
    share,
    sync_file,
    sync_folder,
    sync_tree,
)
from nanothink.disk.names import shown, sweep, temporary_path
from nanothink.errors import StorageError

Explain = Callable[[Path, OSError], StorageError]
"""Makes the error for a failed write that left what was there in place."""

_REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "Free some space and run the command again"),
    errno.EFBIG: "Raise the limit (ulimit -f) or split the data",
    **dict.fromkeys((errno.EEXIST, errno.ENOTDIR), "A part of this path is a file, not a folder"),
    errno.ELOOP: "Nothing is written through a symbolic link: remove it",
    **dict.fromkeys((errno.EXDEV, errno.EBUSY), "It is in use, or a mount point, and cannot be replaced"),
}
"""Remedies that the system's reason does not suggest by itself."""


def storage_error(path: Path, error: OSError, replaced: bool | None = None) -> StorageError:
    """Make the error for a failed write: where, what, and what to do about it.

    Args:
        replaced: whether the new file is in place all the same; None: nothing is said about that.
    """
    reason = error.strerror or str(error)
    if replaced:
        return StorageError(
            f"{shown(path)}: the disk reports: {reason}. The new file is complete, but might not survive a "
            "power cut. Check the disk."
        )
    remedy = _REMEDIES.get(
        error.errno or 0, "Check the disk and who may write there, or choose another place"
    )
    kept = " Nothing was changed." if replaced is False else ""
    return StorageError(f"Cannot write {shown(path)}: {reason}. {remedy}.{kept}")


class RawFile(io.FileIO):
    """The file under way; remembers the error with which the disk refused."""

    failure: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            written = os.write(self.fileno(), data)
            if not written and len(data):  # no disk should; trying again for ever would be worse
                raise OSError(errno.EIO, "a write took no bytes")
            return written
        except OSError as error:
            self.failure = error
            raise


@contextlib.contextmanager
def whole_file(
    path: Path,
    *,
    before_replace: Callable[[], None] | None = None,
    explain: Explain | None = None,
    durable: bool = True,
) -> Iterator[io.BufferedWriter[RawFile]]:
    """Open a file that appears at ``path`` when the block ends, and only if it ends without an error.

    Missing folders are made, and removed again on an error. ``before_replace`` is called when the new file is
    complete and on the disk, just before the rename. Without ``durable`` nothing is synced, so that a power
    cut may leave less than was written, and what dead writers left is not looked for: for files that are
    checked when they are read, of which there may be many in a folder.

    Raises StorageError when the disk refuses; other errors of the block pass through.
    """
    created: list[Path] = []
    try:
        created = make_folder(path.parent)
        if path.is_dir() and not path.is_symlink():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        if durable:
            sweep(path)
        temporary = temporary_path(path)
        raw = RawFile(open_plain(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "wb")
    except OSError as error:
        remove_empty(created)
        raise _explained(path, error, explain) from error
    file, in_block, renamed = io.BufferedWriter(raw), True, False
    try:
        yield file
        in_block = False
        file.flush()
        _keep_mode(raw.fileno(), path)
        if durable:
            sync_file(raw.fileno())
        if before_replace is not None:
            before_replace()
        _rename(temporary, path, raw.fileno())
        renamed = True
        if durable:
            sync_folder(path.parent)
    except BaseException as error:
        replaced = renamed or _is_at(raw.fileno(), path)
        if not replaced:
            with contextlib.suppress(OSError):
                temporary.unlink()
            remove_empty(created)
        if isinstance(error, OSError) and (error is raw.failure or not in_block):
            if replaced:
                raise storage_error(path, error, True) from error
            raise _explained(path, error, explain) from error
        raise
    finally:
        raw.close()


def write_whole(path: Path, content: bytes, *, explain: Explain | None = None) -> None:
    """Write a file so that at any moment, a power cut included, it is the old one or the new one.

    Raises StorageError.
    """
    with whole_file(path, explain=explain) as file:
        file.write(content)


@contextlib.contextmanager
def whole_folder(path: Path, *, in_use: bool = False) -> Iterator[Path]:
    """Give a folder to fill that appears as ``path`` when the block ends, if it ends without an error.

    ``in_use``: its files are changed in place later, by the group too where that shares the folder above.

    What is in the way is moved aside for the moment of the rename and then removed; a kill right there leaves
    it under the temporary name of ``<path>.replaced``.

    Raises StorageError when the disk refuses; other errors of the block pass through.
    """
    with scratch_folder(path) as scratch:
        yield scratch
        _put_folder(scratch, path, in_use)


def _put_folder(scratch: Path, path: Path, in_use: bool) -> None:
    aside = path.with_name(f"{path.name}.replaced")
    replaced = False
    try:
        sync_tree(scratch)
        (scratch / "mode").mkdir()  # to learn the mode that the umask gives
        mode = stat.S_IMODE((scratch / "mode").stat().st_mode)
        (scratch / "mode").rmdir()
        set_mode(scratch, mode)
        share(scratch, path.parent)
        for file in scratch.iterdir() if in_use else ():
            share(file, scratch)
        old = temporary_path(aside) if os.path.lexists(path) else None
        if old is not None:
            os.rename(path, old)
        try:
            os.rename(scratch, path)
        except BaseException:
            if old is not None:
                _put_back(old, path)
            raise
        replaced = True
        sync_folder(path.parent)
    except OSError as error:
        raise storage_error(path, error, replaced) from error
    finally:
        if replaced:
            with contextlib.suppress(OSError):
                sweep(aside)


def _put_back(aside: Path, path: Path) -> None:
    try:
        os.rename(aside, path)
    except OSError as error:
        reason = error.strerror or error
        raise StorageError(
            f"{shown(path)} could not be replaced, nor put back ({reason}). It lies whole in {shown(aside)}: "
            "rename that."
        ) from error


@contextlib.contextmanager
def scratch_folder(beside: Path, *, blamed: Path | None = None) -> Iterator[Path]:
    """Give an empty folder on the disk of ``beside`` that this user alone can reach; removed in the end.

    Missing folders above it are made, and removed again on an error. Raises StorageError, which names
    ``blamed`` or else ``beside``.
    """
    created: list[Path] = []
    try:
        created = make_folder(beside.parent)
        sweep(beside)
        folder = temporary_path(beside)
        folder.mkdir(mode=0o700)
    except OSError as error:
        remove_empty(created)
        raise storage_error(blamed or beside, error, False) from error
    try:
        yield folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        remove_empty(created)
        raise
    shutil.rmtree(folder, ignore_errors=True)


def try_to_write(folder: Path) -> None:
    """Find out that nothing can be written there before the work is done. Leaves no trace.

    Raises StorageError.
    """
    created = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    with scratch_folder(folder / "trial", blamed=folder):
        pass
    remove_empty(created)


def _explained(path: Path, error: OSError, explain: Explain | None) -> StorageError:
    return explain(path, error) if explain is not None else storage_error(path, error, False)


def _rename(temporary: Path, path: Path, descriptor: int) -> None:
    try:
        os.replace(temporary, path)
    except FileNotFoundError:  # NFS: the answer to the first request was lost, and the second found it done
        if not _is_at(descriptor, path):
            raise


def _is_at(descriptor: int, path: Path) -> bool:
    with contextlib.suppress(OSError):
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    return False


def _keep_mode(descriptor: int, path: Path) -> None:
    """Give the new file the mode of an old one of this user's."""
    with contextlib.suppress(OSError):  # none there, or a file system without modes
        old = os.lstat(path)
        if stat.S_ISREG(old.st_mode) and old.st_uid == os.geteuid():
            os.fchmod(descriptor, stat.S_IMODE(old.st_mode) & 0o777)
