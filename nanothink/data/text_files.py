"""Rows of text files, cut into records, in a stream."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TextIO

from nanothink.data.decoding import encoding_of, open_text, reading
from nanothink.data.problems import Problems
from nanothink.errors import DataError
from nanothink.reporter import Reporter
from nanothink.suggestions import again, did_you_mean


class Row(NamedTuple):
    """One document of a source, as found there."""

    number: int
    """Number of the row, or of the line where it begins, from 1."""
    source: str
    text: object
    """The text, or the value of any type that stands in its place."""
    group: object = None
    """Name of the document that this is a piece of."""


_LEADING_BLANK_LINES = re.compile(r"(?:[ \t\f\v]*\n)+")
_BLANK_LINE = re.compile(r"\n[ \t\f\v]*\n")


@dataclass
class Findings:
    """Counts and problems that the readers collect beside the rows."""

    reporter: Reporter
    total: int = 0
    """Bytes of all sources."""
    done: int = 0
    """Bytes read so far."""
    empty: int = 0
    bad_rows: Problems = field(default_factory=Problems)
    warnings: Problems = field(default_factory=Problems)
    bad_files: Problems = field(default_factory=Problems)
    """Files that were left out, each with its reason."""
    n_spanning: int = 0
    """Quoted fields of a table that span several lines; an unbalanced quote makes one of several rows."""
    first_spanning: int | None = None
    """The line where the first of them begins."""

    def read(self, n_bytes: int) -> None:
        """Report bytes of the sources that have been read."""
        self.done = min(self.done + n_bytes, self.total)
        self.reporter.progress("importing", self.done, self.total)


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


def text_rows(file: TextIO, origin: str, limit: int | None, digest: Callable[[], str]) -> Iterator[Row]:
    """Yield the pieces of a text. ``digest`` is called for their group if there are several."""
    pieces = cut_text(file, limit)
    first = list(itertools.islice(pieces, 2))
    group = digest() if len(first) == 2 else None
    for number, piece in enumerate(itertools.chain(first, pieces), 1):
        yield Row(number, origin, piece, group)


def text_file_rows(
    path: Path, origin: str, limit: int | None, encoding: str | None, findings: Findings
) -> Iterator[Row]:
    actual = encoding_of(path, encoding)

    def digest() -> str:
        with open_text(path, actual) as again:
            return text_digest(again)

    # Reading as text turns CR LF and CR into LF.
    with reading(path), open_text(path, actual, on_bytes=findings.read) as file:
        yield from text_rows(file, origin, limit, digest)


def text_digest(file: TextIO) -> str:
    """Digest of a text, 16 hexadecimal digits; line ends do not matter."""
    digest = hashlib.blake2b(digest_size=8)
    while chunk := file.read(2**20):
        digest.update(chunk.encode())
    return digest.hexdigest()


def no_such_field(
    where: str,
    name: str,
    fields: Iterable[object],
    *,
    in_template: bool = False,
    texts: Sequence[str] | None = None,
) -> DataError:
    """Make the error for a table without a column or key that is needed.

    ``texts`` are the fields that can be text; None: any of them.
    """
    names = [str(name) for name in fields]
    listed = ", ".join(f"{name:.60}" for name in names[:20]) or "none"
    message = f"{where} has no '{name}'.{did_you_mean(name, names)} It has: {listed}."
    if in_template:
        return DataError(f"{message} Correct the name in --template")
    # A file of another kind has a whole line for a name, which nobody types.
    names = [name for name in (names if texts is None else texts) if len(name) <= 60]
    one = again("--text-field", names[-1]) if names else "--text-field NAME"
    several = again("--template", r"\n\n".join(f"{{{name}}}" for name in names[-2:])) if names[1:] else ""
    return DataError(
        f"{message} Name the one that holds the text, as in {one}"
        + (f", or several, as in {several}" if several else "")
    )


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
