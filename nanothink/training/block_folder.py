"""Folders of computed blocks beside the tokens of a corpus, one for each identity.

    <cache>/<family>/<key>/
        identity.json     everything that the blocks depend on; a folder with another identity is not used
        ...               the files of a BlockFile (disk/block_file.py): of their full size, with holes

A folder appears whole. The least recently used ones of a family make room for a new one, unless a
run is using them.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import orjson

from nanothink.data.cache import cache_folder
from nanothink.disk import is_in_use, locked, make_folder, sweep_folder, whole_folder
from nanothink.reporter import Reporter

SPARE_BYTES = 10**9
"""Disk space left free, above all for checkpoints."""

MARKS = "marks.u64"
"""The file of marks; locked while a run uses the blocks."""


T = TypeVar("T")


class NoFolderError(Exception):
    """The folder cannot be made or opened; the message says why, to follow "they take ..., and"."""


def open_folder(
    root: Path,
    family: str,
    identity: Mapping[str, Any],
    sizes: Mapping[str, int],
    opened: Callable[[Path], T],
    *,
    budget_bytes: int,
    begin: bool,
    reporter: Reporter,
) -> T | None:
    """Open the folder of this identity; None if there is none and ``begin`` is False.

    Args:
        root: the data's folder.
        identity: plain values, everything that a bit of the blocks depends on.
        sizes: bytes of each file, by name; one of them is MARKS.
        opened: called with the folder while no other process can delete it; marks it as in use.
        budget_bytes: limit for all folders of the family together.
        begin: make a folder if there is none.

    Raises:
        NoFolderError: there is no room for it.
        OSError, StorageError: the disk refused.
    """
    described = orjson.dumps({"order": sys.byteorder, **identity}, option=orjson.OPT_SORT_KEYS)
    key = hashlib.blake2b(described, digest_size=16).hexdigest()
    needed = sum(sizes.values())
    cache = cache_folder(root)
    folder = cache / family / key
    if not (begin or folder.exists()):
        return None
    with locked(cache, reporter):
        make_folder(folder.parent, within=cache)
        sweep_folder(folder.parent)
        whole = _is_whole(folder, described, sizes)
        if folder.exists() and not whole:
            reporter.note(f"The {family} kept in {folder} are damaged; they are made again.")
            shutil.rmtree(folder)
        if not _make_room(folder, budget_bytes - needed):
            raise NoFolderError("other runs just now use what is allowed beside that")
        free = shutil.disk_usage(cache).free
        if free < needed - (taken(folder) if whole else 0) + SPARE_BYTES:
            room, spare = in_words(free), in_words(SPARE_BYTES)
            raise NoFolderError(f"{cache} has {room} free, of which {spare} are left for checkpoints")
        if not whole:
            _make(folder, described, sizes)
        os.utime(folder)
        return opened(folder)


def taken(folder: Path) -> int:
    """Bytes on the disk, without holes."""
    return sum(512 * path.stat().st_blocks for path in folder.iterdir())


def in_words(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e7 else f"{n_bytes / 1e6:.2f} MB"


def _make(folder: Path, described: bytes, sizes: Mapping[str, int]) -> None:
    with whole_folder(folder, in_use=True) as work:
        for name, size in sizes.items():
            with open(work / name, "wb") as file:
                file.truncate(size)
        (work / "identity.json").write_bytes(described)


def _is_whole(folder: Path, described: bytes, sizes: Mapping[str, int]) -> bool:
    try:
        same = (folder / "identity.json").read_bytes() == described
        return same and all((folder / name).stat().st_size == size for name, size in sizes.items())
    except OSError:
        return False


def _make_room(own: Path, allowed_bytes: int) -> bool:
    """Delete other folders, least recently used first, down to the limit; False if that is not enough."""
    others = [path for path in own.parent.iterdir() if path != own and path.is_dir()]
    used = {path for path in others if is_in_use(path / MARKS)}
    allowed_bytes -= sum(map(taken, used))
    for path in sorted(set(others) - used, key=lambda path: path.stat().st_mtime, reverse=True):
        allowed_bytes -= (n_bytes := taken(path))
        if allowed_bytes < 0:
            allowed_bytes += n_bytes
            shutil.rmtree(path, ignore_errors=True)
    return allowed_bytes >= 0
