"""Where things derived from a corpus are kept, and how they get there whole or not at all.

    <data root>/.nanothink/            or <user's cache>/nanothink/<hash of root>/ if that is not writable
        lock                           held by whoever is writing here
        manifest.json                  digests of the corpus's files (token_files.py)
        tokenizer/                     trained when the one asked for could not be reached (tokenizer.py)
        tokens/                        tokenised files (token_files.py)
        states/                        states of frozen experts (training/expert_states.py)

Everything here can be deleted at any time; the next run makes it again.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from nanothink.data.temporary import sweep, temporary_path
from nanothink.errors import StorageError

Note = Callable[[str], None]

FOLDER = ".nanothink"
_PATIENCE_SECONDS = 2.0


def silent(_message: str) -> None:
    """A note nobody reads."""


def cache_folder(root: Path, note: Note = silent) -> Path:
    """The folder for things derived from the corpus in ``root``, created if need be.

    Raises StorageError when neither the data root nor any folder of the user can be written to.
    """
    first = root / FOLDER
    if _writable(first):
        return first
    name = hashlib.blake2b(os.fsencode(root.resolve()), digest_size=8).hexdigest()
    others = [base / "nanothink" / name for base in user_folders()]
    for folder in others:
        if _writable(folder):
            note(f"{root} cannot be written to; tokens are kept in {folder} instead.")
            return folder
    tried = ", ".join(str(folder) for folder in [first, *others])
    raise StorageError(
        f"No place to keep the tokens of {root}: none of {tried} can be written to. Make one of them "
        "writable, or set XDG_CACHE_HOME to a folder that is."
    )


def user_folders() -> Iterator[Path]:
    if os.environ.get("XDG_CACHE_HOME"):
        yield Path(os.environ["XDG_CACHE_HOME"])
    else:
        with contextlib.suppress(RuntimeError):  # no home folder at all
            yield Path.home() / ".cache"
    yield Path(tempfile.gettempdir()) / f"nanothink-{os.getuid()}"


def _writable(folder: Path) -> bool:
    """Tries it: permissions alone say nothing about read-only mounts, or about root."""
    probe = folder / "probe"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        sweep(probe)
        temporary_path(probe).touch()
        temporary_path(probe).unlink()
        ignore = folder / ".gitignore"
        if not ignore.exists():
            ignore.write_text("*\n")
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise storage_error(error, folder) from error
        return False
    return True


@contextlib.contextmanager
def locked(folder: Path, note: Note = silent) -> Iterator[None]:
    """Holds the folder's lock; whoever has it is the only one to write there.

    The operating system drops the lock when its holder dies, however it dies.
    """
    lock = FileLock(str(folder / "lock"))
    try:
        try:
            lock.acquire(timeout=_PATIENCE_SECONDS)
        except Timeout:
            note(f"Another process is writing to {folder}; waiting for it to finish.")
            lock.acquire()
    except OSError as error:
        raise storage_error(error, folder) from error
    try:
        yield
    finally:
        lock.release()


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file so that at any moment, a power cut included, it is the old one or the new one."""
    temporary = temporary_path(path)
    try:
        sweep(path)
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise storage_error(error, path) from error
        raise


def sync_folder(folder: Path) -> None:
    """Makes renames inside ``folder`` outlast a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def storage_error(error: OSError, path: Path) -> StorageError:
    """The error for a failed write: what, where, and what to do about it."""
    reason = error.strerror or str(error)
    remedies = {
        errno.ENOSPC: "Free some space, or move the data to a larger disk, and run the command again.",
        errno.EDQUOT: "Your quota is used up: free some space and run the command again.",
        errno.EFBIG: "It would be larger than allowed here: raise the limit (ulimit -f) or split the data.",
        errno.EACCES: "Check who may write there.",
        errno.EPERM: "Check who may write there.",
        errno.EROFS: "The disk is mounted read-only.",
        errno.EEXIST: "A part of this path is a file, not a folder: choose another place.",
        errno.ENOTDIR: "A part of this path is a file, not a folder: choose another place.",
    }
    remedy = remedies.get(error.errno or 0, "Check the disk and run the command again.")
    return StorageError(f"Cannot write {path}: {reason}. {remedy}")
