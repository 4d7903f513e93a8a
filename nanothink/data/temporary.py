"""Temporary files and folders: what a write under way is called, and which of them nobody writes any more.

A file that must be whole or not there is written beside its place as ``.<file name>.<host>.<pid>.tmp`` and
renamed. A killed process leaves that behind; the next to write the same file removes it.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import time
from pathlib import Path

FOREIGN_TEMPORARY_SECONDS = 24 * 3600.0
"""A temporary file whose writer can't be asked (another host) counts as dead when this old."""

_TEMPORARY = re.compile(r"\.(?P<file>.+)\.(?P<host>[A-Za-z0-9-]+)\.(?P<pid>[0-9]+)\.tmp", re.DOTALL)
_MOST_NAME_BYTES = 180  # a file name may have 255, and host and pid need room too


def temporary_path(path: Path) -> Path:
    """Where this process writes ``path`` before renaming it into place."""
    return path.with_name(f".{_shortened(path.name)}.{_host()}.{os.getpid()}.tmp")


def sweep(path: Path) -> None:
    """Remove what dead writers of ``path`` have left beside it. Raises OSError."""
    for entry in os.scandir(path.parent):
        if left_behind(entry) == _shortened(path.name):
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)
            else:
                Path(entry.path).unlink(missing_ok=True)


def left_behind(entry: os.DirEntry[str]) -> str | None:
    """The name of what a dead writer was writing here; None of anything else.

    A writer on another host can't be asked whether it lives; its file counts as left behind when nothing was
    written to it for a day.
    """
    match = _TEMPORARY.fullmatch(entry.name)
    if match is None:
        return None
    try:
        age_seconds = time.time() - entry.stat(follow_symlinks=False).st_mtime
    except FileNotFoundError:  # its writer has just finished
        return None
    writer_lives = match["host"] != _host() or _is_alive(int(match["pid"]))
    return None if writer_lives and age_seconds <= FOREIGN_TEMPORARY_SECONDS else match["file"]


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())[:40] or "localhost"


def _is_alive(pid: int) -> bool:
    """Whether another process of this number runs here.

    This process itself doesn't count: it writes one file at a time, so a file with its number is left
    over from an earlier one (the first process of a container always has the same number).
    """
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _shortened(name: str) -> str:
    return os.fsdecode(os.fsencode(name)[:_MOST_NAME_BYTES])
