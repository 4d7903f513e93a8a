"""Checks of the file that an import writes: it must be free, and not part of the source."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from nanothink.data.lines import SUFFIXES, shown
from nanothink.data.text_files import same_file
from nanothink.errors import StorageError, UsageError


@dataclass(frozen=True)
class ImportCommand:
    """An import as typed on the command line, for messages that suggest another one."""

    sources: tuple[str, ...]
    domain: str
    data_dir: Path
    name: str | None
    options: tuple[str, ...] = ()
    overwrite: bool = False

    def __str__(self) -> str:
        sources = [f"./{source}" if source.startswith("-") else source for source in self.sources]
        words = ["nanothink", "data", "import", *sources, "--domain", self.domain]
        if str(self.data_dir) != "data":
            words += ["--data-dir", str(self.data_dir)]
        if self.name is not None:
            words += ["--name", self.name]
        words += [*self.options, *(["--overwrite"] if self.overwrite else [])]
        return shlex.join(words)


def check_place(command: ImportCommand, path: Path, files: Sequence[Path]) -> None:
    """Refuse a ``path`` that is one of the ``files`` read, or a file that exists (unless ``overwrite``).

    Files are compared by device and inode, so links and the case of names do not matter. Raises UsageError or
    StorageError with commands that work.
    """
    for source in command.sources:
        if Path(source).expanduser().is_dir():
            _check_folder(command, Path(source).expanduser(), path.parent)
    for file in files:
        _check_file(command, file, path)
    if command.overwrite or not os.path.lexists(path):
        return
    free = next(number for number in range(2, 10**9) if not os.path.lexists(_numbered(path, number)))
    raise StorageError(
        f"{shown(path)} exists already.\n"
        f"  keep both:  {replace(command, name=_numbered(path, free).stem)}\n"
        f"  replace it: {replace(command, overwrite=True)}"
    )


def _numbered(path: Path, number: int) -> Path:
    stem = os.fsencode(path.name.removesuffix(".jsonl"))[:180].decode(errors="ignore")
    return path.with_name(f"{stem}-{number}.jsonl")


def _check_folder(command: ImportCommand, source: Path, domain_folder: Path) -> None:
    if not any(same_file(source, folder) for folder in (domain_folder, command.data_dir)):
        return
    elsewhere = _beside(command.data_dir, "imported", lambda folder: True)
    raise UsageError(
        f"{shown(source)} is the folder that the import writes into: its result would lie among its sources. "
        f"Write to a data folder of its own:\n  {replace(command, data_dir=elsewhere)}"
    )


def _check_file(command: ImportCommand, source: Path, path: Path) -> None:
    """Refuse a source that is the file to be written, or data of the domain already."""
    is_target = same_file(source, path)
    moved = path if is_target else _same_data(source, path.parent)
    if moved is None:
        return
    aside = _beside(command.data_dir, "originals", lambda folder: not os.path.lexists(folder / moved.name))
    # A link is moved out of the way; what it leads to stays where it is.
    found = source.resolve() if moved.is_symlink() else aside / moved.name
    moving = [["mkdir", "-p", str(aside)], ["mv", str(moved), f"{aside}/"]]
    named = [Path(name).expanduser() for name in command.sources]
    sources = [
        str(found) if name == source else typed for typed, name in zip(command.sources, named, strict=True)
    ]
    if source not in named:  # reached by a pattern, which does not reach it any more
        sources.append(str(found))
    steps = [*map(shlex.join, moving), str(replace(command, sources=tuple(sources)))]
    what = (
        "is the file that the import writes to: its other fields and refused rows would be lost"
        if is_target
        else "is data of that domain already: its texts would be there twice"
    )
    listed = "\n  ".join(steps)
    raise UsageError(f"{shown(source)} {what}. Move it out of the data folder first:\n  {listed}")


def _same_data(source: Path, domain_folder: Path) -> Path | None:
    """The domain's data file that is the same file as the source; None if there is none."""
    try:
        inode = source.stat().st_ino
        with os.scandir(domain_folder.resolve()) as entries:
            alike = [
                Path(entry.path)
                for entry in entries
                if entry.name.endswith(SUFFIXES) and (entry.inode() == inode or entry.is_symlink())
            ]
    except OSError:  # the folder is not there yet, or writing to it will say what is wrong
        return None
    return next((data for data in alike if same_file(source, data)), None)


def _beside(data_dir: Path, word: str, fits: Callable[[Path], bool]) -> Path:
    """A folder outside the data folder, beside it if possible, as a path to type."""
    real = data_dir.resolve()
    parents = [folder for folder in (real.parent, Path.home()) if os.access(folder, os.W_OK)]
    named = (parents or [real.parent])[0] / f"{real.name}-{word}"
    number = 1
    while not fits(folder := named if number == 1 else Path(f"{named}-{number}")):
        number += 1
    return Path(min(os.path.relpath(folder), str(folder), key=len))
