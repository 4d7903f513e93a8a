"""Locks between processes: the operating system's, which end with their holder.

A lock is a file (``lock``, ``.NAME.lock``) that is locked by ``flock``. In it stands who holds it, for the
message of those who find it held. Where the file system has no locks (some network disks), a line says so and
nothing is locked: files are whole all the same, but two runs of one name would take turns in writing them.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from nanothink.disk.folders import UNSUPPORTED, open_shared
from nanothink.disk.names import shown
from nanothink.disk.write import storage_error
from nanothink.reporter import SILENT, Reporter

PATIENCE_SECONDS = 2.0
"""Wait after which a note says so."""

_NO_LOCKS = UNSUPPORTED | {errno.ENOLCK}
_POLL_SECONDS = 0.05
_RENUMBERED = 10

_held: set[int] = set()  # descriptors that this process has locked
_told: set[Path] = set()  # folders of which it was said that they have no locks


class HeldError(Exception):
    """Another process holds the lock. The text is a clause that says which, or empty."""


@contextlib.contextmanager
def locked(folder: Path, reporter: Reporter = SILENT) -> Iterator[None]:
    """Hold the lock of a folder, and wait for it if need be: whoever has it is the only one to write there.

    Raises StorageError.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(held(folder / "lock", reporter, wait=True))
        except OSError as error:
            raise storage_error(folder, error) from error
        yield


@contextlib.contextmanager
def held(path: Path, reporter: Reporter = SILENT, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock ``path``. The lock ends with its holder, and worker processes do not inherit it.

    Raises HeldError when another process has it and ``wait`` is not set; OSError when the disk refuses.
    """
    descriptor, owner = _acquire(path, reporter, wait), os.getpid()
    _held.add(descriptor)
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    _write(descriptor, f"process {owner} on {socket.gethostname()[:60]}, since {since}")
    try:
        yield
    finally:
        if os.getpid() == owner:  # not in a forked worker, which has let go of it
            _write(descriptor, "")
            _held.discard(descriptor)
            os.close(descriptor)


def can_lock(folder: Path) -> bool:
    """Return whether the lock of a folder is open to this user."""
    try:
        os.close(_open(folder / "lock"))
    except OSError:
        return False
    return True


def hold_in_use(descriptor: int) -> None:
    """Mark an open file as in use until it is closed; nothing happens where there are no locks."""
    with _without_locks():
        fcntl.flock(descriptor, fcntl.LOCK_SH)


def is_in_use(path: Path) -> bool:
    """Return whether any process marked a file as in use, or might have."""
    try:
        with open(path, "rb") as file, _without_locks():
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            return False
    except BlockingIOError:
        return True
    except OSError:
        return False
    return True


def _acquire(path: Path, reporter: Reporter, wait: bool) -> int:
    """Return the descriptor of the locked file. Raises OSError, HeldError."""
    began, told, n_renumbered = time.monotonic(), False, 0
    while True:
        descriptor = _open(path)
        try:
            with _without_locks():
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # A file removed meanwhile has no name any more. Some network disks number a file anew each
                # time it is asked for.
                n_renumbered += 1
                if n_renumbered < _RENUMBERED and not _is_at(descriptor, path):
                    os.close(descriptor)
                    continue
                return descriptor
            if path.parent not in _told:
                _told.add(path.parent)
                reporter.note(
                    f"{shown(path.parent)} is on a disk without file locks: run one command at a time there."
                )
            return descriptor
        except BlockingIOError:
            holder = os.pread(descriptor, 200, 0).decode("utf-8", "replace")
            os.close(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        clause = f" ({shown(holder)})" if holder else ""
        if not wait:
            raise HeldError(clause)
        if not told and time.monotonic() - began > PATIENCE_SECONDS:
            told = True
            reporter.note(
                f"Another process is writing to {shown(path.parent)}{clause}; waiting for it to finish."
            )
        time.sleep(_POLL_SECONDS)


def _is_at(descriptor: int, path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    return False


def _open(path: Path) -> int:
    try:
        return open_shared(path, create=True, heed_umask=False)
    except PermissionError:
        if not os.path.lexists(path):
            raise
        # Another user's, who keeps the group from writing to it: reading is enough to lock it.
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)


def _write(descriptor: int, holder: str) -> None:
    with contextlib.suppress(OSError):  # another user's file, or a full disk: it only serves a message
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, holder.encode(), 0)


@contextlib.contextmanager
def _without_locks() -> Iterator[None]:
    """Context that is left at its first lock where the file system has none."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.EBADF:  # NFS locks for writing only what is open for writing
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES)) from error
        if error.errno not in _NO_LOCKS:
            raise


def _let_go_in_worker() -> None:
    for descriptor in _held:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_let_go_in_worker)
