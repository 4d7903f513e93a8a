"""Rows of text files: strict UTF-8, cut into records, in a stream."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TextIO

from nanothink.config.text_encoding import conversion, wide_encoding
from nanothink.data.lines import Problem, shown
from nanothink.data.problems import Problems
from nanothink.data.source_file import unreadable
from nanothink.errors import DataError, did_you_mean
from nanothink.reporter import Reporter

TEXT_SUFFIXES = (".txt", ".text", ".md", ".markdown")


class Row(NamedTuple):
    """One document of a source, as found there."""

    number: int
    """Number of the row, or of the line where it begins, from 1."""
    source: str
    text: object
    """Value of the text field, of any type."""
    group: object = None
    """Name of the document that this is a piece of."""


_LEADING_BLANK_LINES = re.compile(r"(?:[ \t\f\v]*\n)+")
_BLANK_LINE = re.compile(r"\n[ \t\f\v]*\n")


@dataclass
class Findings:
    """Counts and problems that the readers collect beside the rows."""

    reporter: Reporter
    empty: int = 0
    bad_rows: Problems = field(default_factory=Problems)
    warnings: Problems = field(default_factory=Problems)
    n_spanning: int = 0
    """Quoted fields of a table that span several lines; an unbalanced quote makes one of several rows."""
    first_spanning: int | None = None
    """The line where the first of them begins."""

    def advance(self, done: int, total: int) -> None:
        """Report bytes of the source, or rows of a data set of the Hub, whose ``total`` is unknown (0)."""
        self.reporter.progress("importing", done, total)


def cut_text(file: TextIO, limit: int | None) -> Iterator[str]:
    """Cut a text into pieces of at most ``limit`` characters.

    Cuts at blank lines where possible, else at line ends, else at blanks, and inside a word only if it is too
    long alone. Blank lines at the start and white space at the end of a piece are dropped; every other
    character is in exactly one piece. Pieces of white space alone are left out. Reads a few pieces ahead at
    most.
    """
    buffer, ended = "", False
    while True:
        while not ended and (limit is None or len(buffer) <= limit):
            more = file.read(-1 if limit is None else max(4 * limit, 2**16))
            ended = not more
            buffer += more
        leading = _LEADING_BLANK_LINES.match(buffer)
        start = leading.end() if leading else 0
        if limit is None or len(buffer) - start <= limit:
            buffer = buffer[start:]
            if not ended:
                continue
            if buffer and not buffer.isspace():
                yield buffer.rstrip()
            return
        end, start_of_next = _cut_place(buffer, start, start + limit)
        piece = buffer[start:end].rstrip()
        if piece:
            yield piece
        buffer = buffer[start_of_next:]


def _cut_place(text: str, start: int, end: int) -> tuple[int, int]:
    """End of the piece that begins at ``start`` and must end by ``end``, and start of the next one."""
    last = None
    for last in _BLANK_LINE.finditer(text, start, end + 1):  # noqa: B007 - the last one is wanted
        pass
    if last:
        return last.start(), last.end()
    for blank in ("\n", " ", "\t"):
        place = text.rfind(blank, start + 1, end + 1)
        if place > 0:
            return place, place + 1
    return end, end


def text_file_rows(files: list[tuple[Path, str]], limit: int | None, findings: Findings) -> Iterator[Row]:
    sizes = [file_size(path) for path, _ in files]
    done, total = 0, sum(sizes)
    for (path, origin), size in zip(files, sizes, strict=True):
        number = 0
        with reading(path), open_text(path) as file:
            # Reading as text turns CR LF and CR into LF.
            pieces = cut_text(file, limit)
            first = list(itertools.islice(pieces, 2))
            group = _content_digest(path) if len(first) == 2 else None
            for number, piece in enumerate(itertools.chain(first, pieces), 1):
                yield Row(number, shown(origin), piece, group)
                findings.advance(done + min(file.buffer.raw.tell(), size), total)  # type: ignore[attr-defined]
        if not number:
            findings.empty += 1
        done += size
        findings.advance(done, total)


def _content_digest(path: Path) -> str:
    """Digest of a text file, 16 hexadecimal digits; line ends do not matter."""
    digest = hashlib.blake2b(digest_size=8)
    with open_text(path) as file:
        while chunk := file.read(2**20):
            digest.update(chunk.encode())
    return digest.hexdigest()


def folder_rows(folder: Path, limit: int | None, findings: Findings, leave_out: Path) -> Iterator[Row]:
    """Yield the rows of the text files below ``folder``, except those below ``leave_out``."""
    files: list[tuple[Path, str]] = []
    others: Counter[str] = Counter()

    def refuse(error: OSError) -> None:
        raise unreadable(error.filename, error) from None

    for parent, folders, names in os.walk(folder, onerror=refuse):
        others["hidden folder"] += sum(name.startswith(".") for name in folders)
        # Not followed: links may lead round in circles, or out of the folder a person has named.
        others["link to a folder"] += sum(Path(parent, name).is_symlink() for name in folders)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        own = [name for name in folders if same_file(Path(parent, name), leave_out)]
        for name in own:
            folders.remove(name)
            reason = "left out: it is the data folder, which the import writes to"
            findings.warnings.add(Problem(shown(Path(parent, name)), 0, 0, reason))
        for name in names:
            path = Path(parent, name)
            with reading(path):
                is_file = path.is_file()
            if name.startswith("."):
                others["hidden file"] += 1
            elif not is_file:
                others["not a regular file"] += 1
            elif name.lower().endswith(TEXT_SUFFIXES):
                files.append((path, path.relative_to(folder).as_posix()))
            else:
                others[path.suffix or "without a suffix"] += 1
    if not files:
        beside = f" outside {shown(leave_out)}" if findings.warnings else ""
        raise DataError(f"There is no text file ({', '.join(TEXT_SUFFIXES)}) in {shown(folder)}{beside}.")
    others = +others  # drops the kinds that were counted but not met
    if others:
        kinds = ", ".join(f"{shown(kind)} ({n:,})" for kind, n in others.most_common(8))
        reason = f"left out, because only {', '.join(TEXT_SUFFIXES)} are read from a folder: {kinds}"
        findings.warnings.add(Problem(shown(folder), 0, 0, reason))
    files.sort(key=lambda pair: pair[1])
    yield from text_file_rows(files, limit, findings)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn the errors of reading a file into a DataError with the place and a remedy."""
    try:
        yield
    except UnicodeDecodeError:
        raise DataError(where_not_utf8(path)) from None
    except OSError as error:
        raise unreadable(path, error) from None


def open_text(path: Path, newline: str | None = None) -> TextIO:
    """Open a file as UTF-8, after a byte-order mark. Raises DataError for UTF-16 and UTF-32."""
    with path.open("rb") as file:
        start = file.read(4096)
    # Without a mark such text may be valid UTF-8 all the same, every second character of it a NUL.
    if 0 in start[:2] and start.count(0) * 4 >= len(start) and (encoding := wide_encoding(start)):
        raise DataError(_not_utf8(path, f"it looks like {encoding}", encoding))
    return path.open(encoding="utf-8-sig", newline=newline)


def where_not_utf8(path: Path) -> str:
    """Message for a file that is not UTF-8, with the place and a command that converts it."""
    # The decoder's own error counts from the start of some buffer, so the place is looked for again.
    offset, rest = 0, b""
    with path.open("rb") as file:
        start = file.read(4)
        file.seek(0)
        while chunk := file.read(2**20):
            block = rest + chunk
            try:
                block.decode()
                taken = len(block)
            except UnicodeDecodeError as error:
                taken = error.start
                if error.reason != "unexpected end of data":
                    rest = block[taken:]
                    offset += taken
                    break
            offset += taken
            rest = block[taken:]
    place = f"byte 0x{rest[:1].hex()} at offset {offset:,} does not fit"
    return _not_utf8(path, place, wide_encoding(start) or "ISO-8859-1")


def _not_utf8(path: Path, why: str, encoding: str) -> str:
    command = conversion(encoding, str(path), f"{path.stem}-utf8{path.suffix}")
    return f"{shown(path)} is not UTF-8 text: {why}. Convert it, for example with: {command}"


def no_such_field(where: str, text_field: str, fields: Iterable[object]) -> DataError:
    """Make the error for a table without the column or key of the text."""
    names = [str(name) for name in fields]
    listed = ", ".join(names[:20]) or "none"
    message = f"{where} has no '{text_field}'.{did_you_mean(text_field, names)} It has: {listed}."
    return DataError(f"{message} Name the one that holds the text: --text-field NAME")


def same_file(a: Path, b: Path) -> bool:
    """Return whether both paths exist and are the same file or folder, through any links."""
    try:
        return a.samefile(b)
    except OSError:
        return False


def file_size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
