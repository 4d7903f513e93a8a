"""Checks of the file that an import writes: it must be free, and not part of the source."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from nanothink.data.lines import SUFFIXES, shown
from nanothink.data.problems import set_aside
from nanothink.data.text_files import same_file
from nanothink.errors import StorageError, UsageError
from nanothink.suggestions import again, suggest


def check_place(
    path: Path, sources: Sequence[str], files: Sequence[Path], domain: str, *, overwrite: bool
) -> None:
    """Refuse a ``path`` that is one of the ``files`` read, or a file that exists (unless ``overwrite``).

    Files are compared by device and inode, so links and the case of names do not matter. ``sources`` are what
    was typed. Raises UsageError or StorageError with commands that work.
    """
    data_dir = path.parent.parent
    more = ["--domain", domain, *(["--overwrite"] if overwrite else [])]
    for source in (Path(name).expanduser() for name in sources):
        if source.is_dir() and any(same_file(source, folder) for folder in (path.parent, data_dir)):
            real = data_dir.resolve()
            elsewhere = os.path.relpath(real.with_name(f"{real.name}-imported"))
            way_in = suggest("data import", *sources, *more, "--data-dir", elsewhere)
            raise UsageError(
                f"{shown(source)} is the folder that the import writes into: its result would lie among its "
                f"sources. Write to another: {way_in}"
            )
    data = _by_inode(path)
    for file in files:
        if moved := data.get(_inode(file)):
            step, moved_to = set_aside(moved)
            # A link is moved out of the way; what it leads to stays where it is.
            found = file.resolve() if moved.is_symlink() else moved_to
            typed = [str(found) if Path(name).expanduser() == file else name for name in sources]
            if str(found) not in typed:  # reached by a pattern, which does not reach it any more
                typed.append(str(found))
            what = (
                "is the file that the import writes to: its other fields and refused rows would be lost"
                if moved == path
                else "is data of that domain already: its texts would be there twice"
            )
            raise UsageError(
                f"{shown(file)} {what}. Move it out of the data folder first:\n"
                f"  {step}\n  {suggest('data import', *typed, *more)}"
            )
    if os.path.lexists(path) and not overwrite:
        free = next(number for number in range(2, 10**9) if not os.path.lexists(_numbered(path, number)))
        raise StorageError(
            f"{shown(path)} exists already.\n"
            f"  keep both:  {again('--name', _numbered(path, free).stem)}\n"
            f"  replace it: {again('--overwrite')}"
        )


def _numbered(path: Path, number: int) -> Path:
    stem = os.fsencode(path.name.removesuffix(".jsonl"))[:180].decode(errors="ignore")
    return path.with_name(f"{stem}-{number}.jsonl")


def _by_inode(path: Path) -> dict[tuple[int, int] | None, Path]:
    """The data of the domain that ``path`` is in."""
    data: dict[tuple[int, int] | None, Path] = {}
    with suppress(OSError):  # the folder is not there yet, or writing to it will say what is wrong
        data = {_inode(entry): entry for entry in path.parent.iterdir() if entry.name.endswith(SUFFIXES)}
        data[_inode(path)] = path
    data.pop(None, None)
    return data


def _inode(path: Path) -> tuple[int, int] | None:
    with suppress(OSError):
        status = path.stat()
        return status.st_dev, status.st_ino
    return None
