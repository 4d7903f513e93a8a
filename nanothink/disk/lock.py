"""Locks between processes: the operating system's, which end with their holder, and a file where it has none.

A lock is a file (``lock``, ``.NAME.lock``) that is locked by ``flock`` and never written to. A ``.holder``
file beside it says who holds it. Where the file system has no locks (some network disks), the holder file,
which only one process can make, stands in for them. It outlasts a killed holder, so nobody waits for it
without end.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import shlex
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from nanothink.disk.folders import UNSUPPORTED, open_shared
from nanothink.disk.names import is_alive, shown, temporary_path
from nanothink.disk.write import storage_error
from nanothink.errors import StorageError
from nanothink.reporter import SILENT, Reporter

PATIENCE_SECONDS = 2.0
"""Wait after which a note says so."""

STAND_IN_SECONDS, ALIVE_SECONDS = 30.0, 3600.0
"""Wait for a holder file that stands in for a lock: in general, since its holder may be dead, and if a
process with the holder's number runs on this machine."""

_NO_LOCKS = UNSUPPORTED | {errno.ENOLCK}
_POLL_SECONDS = 0.05

_held: set[int] = set()  # descriptors that this process has locked
_own_tokens: set[str] = set()  # of the locks that this process holds
_told: set[Path] = set()  # folders of which it was said that they have no locks


class HeldError(Exception):
    """Another process holds the lock. The text is a clause that says which, or empty."""


class _NoLocksError(Exception):
    """The file system has no locks."""


@dataclass(frozen=True)
class _Holder:
    pid: int
    host: str
    since: float
    token: str

    @classmethod
    def read(cls, path: Path) -> _Holder | None:
        """Read who holds a lock; None where that is not said."""
        try:
            with open(_open_existing(path), "rb") as file:
                values = json.loads(file.read(4096))
            return cls(int(values["pid"]), str(values["host"]), float(values["since"]), str(values["token"]))
        except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
            return None

    def __str__(self) -> str:
        since = ""
        with contextlib.suppress(ValueError, OverflowError, OSError):
            since = f", since {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(self.since))}"
        return f"process {self.pid} on {shown(self.host[:60])}{since}"

    def is_here(self) -> bool:
        return self.host == socket.gethostname()

    def is_alive(self) -> bool:
        """Return whether the process is known to run. A lock of this process's number may be an earlier
        one's."""
        return self.token in _own_tokens or (
            self.is_here() and self.pid != os.getpid() and is_alive(self.pid)
        )


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

    With ``wait`` it is waited for, else its holder is named in a file for those who find it held.

    Raises HeldError when another process has it and ``wait`` is not set; OSError when the disk refuses;
    StorageError when that has no locks and the file that stands in for one does not go away.
    """
    own = _Holder(os.getpid(), socket.gethostname(), time.time(), secrets.token_hex(8))
    descriptor = _acquire(path, own, reporter, wait)
    _own_tokens.add(own.token)
    try:
        yield
    finally:
        if os.getpid() == own.pid:  # not in a forked worker, which has let go of it
            _own_tokens.discard(own.token)
            _release(path, own, descriptor)


def can_lock(folder: Path) -> bool:
    """Return whether the lock of a folder is open to this user."""
    try:
        os.close(_open(folder / "lock"))
    except OSError:
        return False
    return True


def hold_in_use(descriptor: int) -> None:
    """Mark an open file as in use until it is closed; nothing happens where there are no locks."""
    with contextlib.suppress(_NoLocksError):
        _flock(descriptor, fcntl.LOCK_SH)


def is_in_use(path: Path) -> bool:
    """Return whether any process marked a file as in use, or might have."""
    try:
        with open(path, "rb") as file:
            _flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, _NoLocksError):
        return True
    except OSError:
        return False
    return False


def _acquire(path: Path, own: _Holder, reporter: Reporter, wait: bool) -> int | None:
    """Return the locked file's descriptor; None where a holder file stands in for the lock."""
    holder_path, began, told, clause = _holder_path(path), time.monotonic(), False, ""
    while True:
        stands_in = False
        try:
            descriptor = _try_lock(path)
            if descriptor is not None:
                _held.add(descriptor)
                if not wait:
                    _announce(holder_path, own)
                return descriptor
        except _NoLocksError:
            stands_in = True
            if _try_stand_in(holder_path, own, reporter):
                return None
        holder = _Holder.read(holder_path)
        clause = f" ({holder})" if holder else ""
        if not wait:
            hint = f"; if it has ended, remove {shown(holder_path)}" if stands_in else ""
            raise HeldError(clause + hint)
        waited = time.monotonic() - began
        if not told and waited > PATIENCE_SECONDS:
            reporter.note(
                f"Another process is writing to {shown(path.parent)}{clause}; waiting for it to finish."
            )
            told = True
        if stands_in and waited > (ALIVE_SECONDS if holder and holder.is_alive() else STAND_IN_SECONDS):
            raise StorageError(
                f"{shown(holder_path)} says that another process is writing there{clause}, and this disk has "
                "no locks that end with their process. If no other NanoThink is writing there, remove that "
                f"file and run the command again: rm {shlex.quote(str(holder_path))}"
            )
        time.sleep(_POLL_SECONDS)


def _release(path: Path, own: _Holder, descriptor: int | None) -> None:
    with contextlib.suppress(OSError):
        if _Holder.read(_holder_path(path)) == own:
            _holder_path(path).unlink()
    if descriptor is not None:
        _held.discard(descriptor)
        os.close(descriptor)


def _try_lock(path: Path) -> int | None:
    """Lock the file; None when another process has it. Raises OSError, _NoLocksError."""
    for tries_left in reversed(range(10)):
        descriptor = _open(path)
        try:
            _flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Some network disks number a file anew each time it is asked for.
            if not tries_left or os.path.samestat(os.fstat(descriptor), os.lstat(path)):
                return descriptor
        except FileNotFoundError:
            pass  # removed meanwhile: what is locked has no name any more
        except BaseException as error:
            os.close(descriptor)
            if isinstance(error, BlockingIOError):
                return None
            raise
        os.close(descriptor)
    return None


def _open(path: Path) -> int:
    try:
        return open_shared(path, create=True, heed_umask=False)
    except PermissionError:
        if not os.path.lexists(path):
            raise
        # Another user's, who keeps the group from writing to it: reading is enough to lock it.
        return _open_existing(path)


def _open_existing(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)


def _flock(descriptor: int, how: int) -> None:
    try:
        fcntl.flock(descriptor, how)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            raise _NoLocksError from error
        if error.errno == errno.EBADF:  # NFS locks for writing only what is open for writing
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES)) from error
        raise


def _announce(holder_path: Path, own: _Holder) -> None:
    """Say who holds a lock. It only serves a message, so a full disk does not matter."""
    try:
        holder_path.unlink(missing_ok=True)
        _write_new(holder_path, own)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EROFS):  # nothing else can be written there either
            raise


def _try_stand_in(holder_path: Path, own: _Holder, reporter: Reporter) -> bool:
    found = _Holder.read(holder_path)
    if found is not None and found.is_here() and not found.is_alive():
        reporter.note(f"{shown(holder_path)} was left behind by {found}, which has ended; it is removed.")
        _remove_dead(holder_path, found)
    try:
        _write_new(holder_path, own)
    except FileExistsError:
        return False
    if holder_path.parent not in _told:
        _told.add(holder_path.parent)
        reporter.note(
            f"{shown(holder_path.parent)} is on a disk without file locks: "
            f"{holder_path.name} stands in for one."
        )
    return True


def _write_new(path: Path, own: _Holder) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(path, flags, 0o666), "wb") as file:
        file.write(json.dumps(asdict(own)).encode())


def _remove_dead(path: Path, dead: _Holder) -> None:
    """Remove the file of a holder that has ended, and no other one that takes its place meanwhile."""
    aside = temporary_path(path)
    with contextlib.suppress(OSError):
        os.rename(path, aside)
        if _Holder.read(aside) != dead:
            os.link(aside, path)
        aside.unlink()


def _holder_path(path: Path) -> Path:
    return path.with_suffix(".holder")


def _let_go_in_worker() -> None:
    for descriptor in _held:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_let_go_in_worker)
