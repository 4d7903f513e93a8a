"""Folders of this user alone, and files that nobody else can have put there.

A path is safe when nobody but this user and root can make it lead elsewhere: each folder above it belongs to
one of them and is not writable by others, or is sticky, so that others cannot rename what is in it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def user_folders() -> Iterator[Path]:
    """Folders for what can be made again: the user's cache, and one of their own beside temporary files."""
    if os.environ.get("XDG_CACHE_HOME"):
        yield Path(os.environ["XDG_CACHE_HOME"])
    else:
        with contextlib.suppress(RuntimeError):  # no home folder at all
            yield Path.home() / ".cache"
    folder = Path(tempfile.gettempdir()) / f"nanothink-{os.getuid()}"
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, exist_ok=True)
        if _is_own(os.lstat(folder)):  # its name can be guessed, so somebody else may have made it
            yield folder


def private_folder(*names: str) -> Path | None:
    """Return a folder of this user's on a safe path, made if need be; None where there is no such place."""
    for base in user_folders():
        with contextlib.suppress(OSError):
            folder = base.joinpath(*names)
            for path in (*reversed(folder.parents), folder):
                if not path.exists():
                    path.mkdir(mode=0o700, exist_ok=True)
            folder = folder.resolve()
            if is_safe(folder) and _is_own(os.stat(folder)) and os.access(folder, os.W_OK):
                return folder
    return None


def is_safe(folder: Path) -> bool:
    """Return whether nobody but this user and root can change where an absolute path without links leads."""
    for path in (folder, *folder.parents):
        status = os.lstat(path)
        if not stat.S_ISDIR(status.st_mode) or status.st_uid not in (0, os.geteuid()):
            return False
        if status.st_mode & _OTHERS_WRITE and not status.st_mode & stat.S_ISVTX:
            return False
    return True


def open_private(path: Path) -> int:
    """Open a file of this user's or root's that nobody else can write to. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    status = os.fstat(descriptor)
    if (
        stat.S_ISREG(status.st_mode)
        and status.st_uid in (0, os.geteuid())
        and not status.st_mode & _OTHERS_WRITE
    ):
        return descriptor
    os.close(descriptor)
    raise PermissionError(errno.EPERM, "another user can write to it", str(path))


def _is_own(status: os.stat_result) -> bool:
    return (
        stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & _OTHERS_WRITE
    )
