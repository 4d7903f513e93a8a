"""Folders that are made, shared by a group and synced, and files that are opened without following links.

A folder that its group may write to stays shared: what is made in it and changed in place later (folders,
locks, block files) the group may write to as well.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

UNSUPPORTED = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS})
"""Errors that say that a file system lacks an operation, not that the operation failed."""


def make_folder(folder: Path, *, within: Path | None = None) -> list[Path]:
    """Make a folder and those above it that are missing; return the new ones, inner ones first.

    Folders below ``within`` have names that NanoThink chose, so a symbolic link among them that somebody
    else made is not followed.

    Raises OSError.
    """
    created: list[Path] = []
    try:
        for path in [*reversed(folder.parents), folder]:
            if within is not None and within in path.parents:
                _refuse_strangers_link(path)
            if os.path.lexists(path) and path.is_dir():
                continue
            try:
                path.mkdir()
            except FileExistsError:
                if not path.is_dir():  # else another process has just made it
                    raise
            else:
                created.insert(0, path)
                share(path, path.parent)
    except BaseException:
        remove_empty(created)
        raise
    return created


def new_folder(wanted: Path, *, within: Path) -> Path:
    """Make a folder that is not there yet, under this name or else with ``-2``, ``-3``, ... at its end.

    ``within`` as in ``make_folder``. Raises OSError.
    """
    make_folder(wanted.parent, within=within)
    for attempt in itertools.count(1):
        path = wanted.with_name(f"{wanted.name}-{attempt}") if attempt > 1 else wanted
        with contextlib.suppress(FileExistsError):
            path.mkdir()
            share(path, path.parent)
            return path
    raise AssertionError


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove those folders, inner ones first in the list, that are there and hold nothing."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def open_shared(path: Path, *, create: bool, heed_umask: bool = True) -> int:
    """Open a file that several processes change in place, never through a symbolic link.

    One that is made in a folder shared by a group can be opened by the group. Raises OSError.
    """
    flags = os.O_RDWR
    if create:
        with contextlib.suppress(FileExistsError):
            descriptor = open_plain(path, flags | os.O_CREAT | os.O_EXCL)
            share(descriptor, path.parent, heed_umask=heed_umask)
            return descriptor
    return open_plain(path, flags)


def sync_folder(folder: Path) -> None:
    """Make renames and removals in ``folder`` outlast a power cut, where the disk can. Raises OSError."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    except PermissionError:  # a folder that may be written to but not listed
        return
    try:
        sync_file(descriptor, errno.EBADF)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Make everything in ``folder`` outlast a power cut. Raises OSError."""
    for entry in list(os.scandir(folder)):
        if entry.is_dir(follow_symlinks=False):
            sync_tree(Path(entry.path))
        else:
            with _opened(Path(entry.path)) as descriptor:
                sync_file(descriptor)
    sync_folder(folder)


def sync_file(descriptor: int, *also_unsupported: int) -> None:
    """Make an open file outlast a power cut, where the disk can. Raises OSError."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED and error.errno not in also_unsupported:
            raise


def open_plain(path: Path, flags: int) -> int:
    """Open a file, never through a symbolic link. Raises OSError."""
    try:
        return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, "a symbolic link is in the way", str(path)) from None
        raise


def share(target: int | Path, folder: Path, *, heed_umask: bool = True) -> None:
    """Let the group of ``folder``, if it may write there, write to what was just made in it.

    What the umask hides from the group altogether stays hidden, unless the umask does not matter.
    """
    with contextlib.suppress(OSError):  # not a member of the group, or a file system without modes
        above = os.stat(folder)
        if not above.st_mode & stat.S_IWGRP:
            return
        with contextlib.nullcontext(target) if isinstance(target, int) else _opened(target) as descriptor:
            made = os.fstat(descriptor)
            if made.st_uid != os.geteuid() or (heed_umask and not made.st_mode & stat.S_IRGRP):
                return
            if made.st_gid != above.st_gid:
                os.fchown(descriptor, -1, above.st_gid)
            mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
            os.fchmod(descriptor, mode | (0o070 if stat.S_ISDIR(made.st_mode) else 0o060))


def set_mode(folder: Path, mode: int) -> None:
    """Change the mode of a folder of this user's, never through a symbolic link. Raises OSError."""
    with _opened(folder) as descriptor:
        os.fchmod(descriptor, mode)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = open_plain(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _refuse_strangers_link(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        status = os.lstat(path)
        if stat.S_ISLNK(status.st_mode) and status.st_uid not in (0, os.geteuid()):
            raise OSError(errno.ELOOP, "it is a symbolic link of another user", str(path))
