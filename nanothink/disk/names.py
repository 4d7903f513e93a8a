"""Names of files and folders that are being written, and the removal of those that nobody writes any more.

A file that must be whole or not there is written beside its place as ``.<name>.<host>.<pid>-<random>.tmp``
and renamed. A killed process leaves that behind; the next one to write the same file removes it.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import socket
import time
from pathlib import Path

FOREIGN_TEMPORARY_SECONDS = 24 * 3600.0
"""Age at which a temporary file of another host counts as left behind; its processes cannot be checked."""

# The random part is missing from names that versions before 0.1.0 made.
_TEMPORARY = re.compile(
    r"\.(?P<name>.+)\.(?P<host>[A-Za-z0-9-]+)\.(?P<pid>[0-9]+)(?:-[0-9a-f]{12})?\.tmp", re.DOTALL
)
_MOST_NAME_BYTES = 180  # a file name may have 255; host, pid and random part need room too


def temporary_path(path: Path) -> Path:
    """Return a new name beside ``path`` to write it under: other users cannot guess it beforehand."""
    return path.with_name(f".{_shortened(path.name)}.{host()}.{os.getpid()}-{secrets.token_hex(6)}.tmp")


def leftovers(folder: Path) -> list[tuple[Path, str]]:
    """List what dead writers left in ``folder``: the path, and the name that was being written.

    A writer on another host cannot be asked; its file counts as left behind when nothing was written to it
    for a day. Raises OSError.
    """
    found = ((Path(entry.path), _left_behind(entry)) for entry in list(os.scandir(folder)))
    return sorted((path, name) for path, name in found if name is not None)


def sweep(path: Path) -> None:
    """Remove what dead writers of ``path`` left beside it. Raises OSError."""
    with contextlib.suppress(PermissionError):  # a folder that may be written to but not listed
        for left, name in leftovers(path.parent):
            if name == _shortened(path.name):
                remove(left)


def sweep_folder(folder: Path) -> None:
    """Remove what dead writers of anything in ``folder`` left there. Raises OSError."""
    with contextlib.suppress(FileNotFoundError, PermissionError):
        for left, _ in leftovers(folder):
            remove(left)


def remove(path: Path) -> None:
    """Remove a file, a link or a whole folder, unless it is gone or belongs to somebody else."""
    with contextlib.suppress(FileNotFoundError, PermissionError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def host() -> str:
    """Name of this machine, in letters, digits and hyphens."""
    return re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())[:40] or "localhost"


def is_alive(pid: int) -> bool:
    """Return whether a process of this number runs on this machine."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def shown(path: str | os.PathLike[str]) -> str:
    """Return the path on one line, as it can be printed and written as JSON, whatever bytes are in it."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _left_behind(entry: os.DirEntry[str]) -> str | None:
    """Return the name that a dead writer was writing here; None for anything else.

    This process itself does not count as alive: it writes one file at a time, so a file with its number is
    left over from an earlier process (the first process of a container always has the same number).
    """
    match = _TEMPORARY.fullmatch(entry.name)
    if match is None:
        return None
    try:
        age_seconds = time.time() - entry.stat(follow_symlinks=False).st_mtime
    except FileNotFoundError:  # its writer has just finished
        return None
    pid = int(match["pid"])
    may_live = match["host"] != host() or (pid != os.getpid() and is_alive(pid))
    return None if may_live and age_seconds <= FOREIGN_TEMPORARY_SECONDS else match["name"]


def _shortened(name: str) -> str:
    return os.fsdecode(os.fsencode(name)[:_MOST_NAME_BYTES])
