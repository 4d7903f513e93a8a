"""Text files as rows: read strictly as UTF-8, cut into records, never all in memory."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from nanothink.data.lines import Problem, shown
from nanothink.errors import DataError

TEXT_SUFFIXES = (".txt", ".text", ".md", ".markdown")

Progress = Callable[[int, int], None]
"""(bytes of the source done, bytes in all); for a data set of the Hub (rows done, 0)."""

Row = tuple[int, str, object]
"""Number of the row or line from 1, where it comes from, and what stands where its text should be."""

_LEADING_BLANK_LINES = re.compile(r"(?:[ \t\f\v]*\n)+")
_BLANK_LINE = re.compile(r"\n[ \t\f\v]*\n")


@dataclass
class Findings:
    """What the readers have to say besides the rows."""

    advance: Progress
    empty: int = 0
    bad_rows: list[Problem] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)


def cut_text(file: TextIO, limit: int | None) -> Iterator[str]:
    """A text in pieces of at most ``limit`` characters, cut at blank lines where there are any.

    Failing those at line ends, failing those at blanks, and inside a word only if it alone is too long.
    Blank lines at the start and white space at the end of a piece are dropped; every other character is
    in exactly one piece. Pieces of white space alone are left out. Reads no more than a few pieces ahead.
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
    """Where a piece that begins at ``start`` and must end by ``end`` ends, and where the next begins."""
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
        with reading(path), path.open(encoding="utf-8-sig") as file:
            # Reading as text turns CR LF and CR into LF.
            for piece in cut_text(file, limit):
                number += 1
                yield number, shown(origin), piece
                findings.advance(done + min(file.buffer.raw.tell(), size), total)  # type: ignore[attr-defined]
        if not number:
            findings.empty += 1
        done += size
        findings.advance(done, total)


def folder_rows(folder: Path, limit: int | None, findings: Findings) -> Iterator[Row]:
    files: list[tuple[Path, str]] = []
    others: Counter[str] = Counter()

    def refuse(error: OSError) -> None:
        raise DataError(f"Cannot look into {shown(error.filename)}: {error.strerror}. Check its permissions.")

    for parent, folders, names in os.walk(folder, onerror=refuse):
        others["hidden folder"] += sum(name.startswith(".") for name in folders)
        # Not followed: links may lead round in circles, or out of the folder a person has named.
        others["link to a folder"] += sum(Path(parent, name).is_symlink() for name in folders)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            path = Path(parent, name)
            if name.startswith("."):
                others["hidden file"] += 1
            elif not path.is_file():
                others["not a regular file"] += 1
            elif name.lower().endswith(TEXT_SUFFIXES):
                files.append((path, path.relative_to(folder).as_posix()))
            else:
                others[path.suffix or "without a suffix"] += 1
    if not files:
        raise DataError(f"There is no text file ({', '.join(TEXT_SUFFIXES)}) in {shown(folder)}.")
    others = +others  # drops the kinds that were counted but not met
    if others:
        kinds = ", ".join(f"{shown(kind)} ({n:,})" for kind, n in others.most_common(8))
        reason = f"left out, because only {', '.join(TEXT_SUFFIXES)} are read from a folder: {kinds}"
        findings.warnings.append(Problem(shown(folder), 0, 0, reason))
    files.sort(key=lambda pair: pair[1])
    yield from text_file_rows(files, limit, findings)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns what reading a file can raise into a DataError that says where and what to do."""
    try:
        yield
    except UnicodeDecodeError:
        raise DataError(where_not_utf8(path)) from None
    except OSError as error:
        raise DataError(f"Cannot read {shown(path)}: {error.strerror or error}. Check the file.") from None


def where_not_utf8(path: Path) -> str:
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
    guess = "for example with: iconv -f ISO-8859-1 -t UTF-8 OLD > NEW"
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        guess = "for example with: iconv -f UTF-16 -t UTF-8 OLD > NEW"
    return (
        f"{shown(path)} is not UTF-8 text: byte 0x{rest[:1].hex()} at offset {offset:,} does not fit. "
        f"Convert the file, {guess}"
    )


def file_size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
