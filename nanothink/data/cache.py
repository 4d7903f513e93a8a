"""The cache folder of a corpus: tokens, and everything else that is derived from it.

    <data root>/.nanothink/            or <user's cache>/nanothink/<hash of root>/ if that is not writable
        lock                           held by whoever is writing here
        manifest.json                  digests of the corpus's files (token_files.py)
        tokenizer/                     trained when the one asked for could not be reached (tokenizer.py)
        tokens/                        tokenised files (token_files.py)
        states/                        states of frozen experts (training/expert_states.py)
        targets/                       a teacher's predictions (training/distillation.py)

Everything here can be deleted at any time; the next run makes it again.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from pathlib import Path

from nanothink.disk import (
    can_lock,
    make_folder,
    storage_error,
    sweep,
    temporary_path,
    user_folders,
)
from nanothink.errors import StorageError
from nanothink.reporter import SILENT, Reporter

FOLDER = ".nanothink"


def cache_folder(root: Path, reporter: Reporter = SILENT) -> Path:
    """Return the cache folder of the corpus in ``root``; create it if needed.

    Raises:
        StorageError: neither the data root nor any folder of the user can be written to.
    """
    first = root / FOLDER
    if _writable(first):
        return first
    name = hashlib.blake2b(os.fsencode(root.resolve()), digest_size=8).hexdigest()
    tried = [first]
    for base in user_folders():
        folder = base / "nanothink" / name
        if _writable(folder):
            reporter.note(f"{first} cannot be written to; tokens are kept in {folder} instead.")
            return folder
        tried.append(folder)
    raise StorageError(
        f"No place to keep the tokens of {root}: none of {', '.join(map(str, tried))} can be written to. "
        "Make one of them writable, or set XDG_CACHE_HOME to a folder that is."
    )


def _writable(folder: Path) -> bool:
    """Return whether a folder can be written to. Tried, since permissions do not show read-only mounts or
    root."""
    try:
        make_folder(folder, within=folder.parent)
        sweep(folder / "probe")
        probe = temporary_path(folder / "probe")
        probe.mkdir()
        probe.rmdir()
        with contextlib.suppress(FileExistsError), open(folder / ".gitignore", "x") as file:
            file.write("*\n")
        return can_lock(folder)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise storage_error(folder, error) from error
        return False
