"""Lines of a file of any size, plain, gzip or zstd, in bounded memory.

    chunks of bytes, decompressed (source_file.py)  →  complete lines in batches

Bad content is not raised but passed to the caller's sink as a Problem, after the lines before it. A file that
the machine cannot read raises UnreadableError.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanothink.data.source_file import DamagedDataError, Digest, SourceFile, unreadable
from nanothink.data.strict_json import BARE_CR
from nanothink.disk import shown as shown
from nanothink.errors import UnreadableError

SUFFIXES = tuple(
    f".{name}{packed}"
    for name in ("jsonl", "ndjson", "json")
    for packed in ("", ".gz", ".zst")
    if name != "json" or packed
)
"""Extensions of JSON Lines. A plain ``.json`` is usually an array or settings; compressed, as in Dolma and
C4, it is JSON Lines."""

MAX_LINE_BYTES = 64 * 2**20
"""Longest line that is read, in bytes without its line end."""


CONVERSATION = "(a conversation)"
"""In place of a key: `nanothink data import` makes messages of the record."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with the data. ``line`` and ``column`` count from 1, columns in characters.

    Line 0: the whole file or folder.
    """

    file: str
    line: int
    column: int
    reason: str
    text_field: str = ""
    """Key that seems to hold the text of a record without `text`; CONVERSATION if several make one."""

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"

    @property
    def place(self) -> str:
        """``file:line:column``, or the file alone for line 0."""
        return f"{self.file}:{self.line}:{self.column}" if self.line else self.file

    def to_dict(self) -> dict[str, Any]:
        return {"file": self.file, "line": self.line, "column": self.column, "reason": self.reason}


ProblemSink = Callable[[Problem], None]


def column_at(line: bytes, offset: int) -> int:
    """The column, from 1 and in characters, of the byte at ``offset``."""
    return len(line[:offset].decode("utf-8", "replace")) + 1


def iter_lines(
    path: Path,
    *,
    on_problem: ProblemSink,
    on_warning: ProblemSink,
    on_bytes: Callable[[int], None] | None = None,
    digest: Digest | None = None,
    encoding: str = "",
) -> Iterator[tuple[int, list[bytes]]]:
    """Yield batches: the number of the first line, and the lines without their LF.

    Lines over MAX_LINE_BYTES, damaged compression and text that is not UTF-8 go to ``on_problem``. ``digest``
    is updated with every byte of the file on the disk, used or not. Another ``encoding`` is converted.

    Raises:
        UnreadableError: the machine could not read the file to its end.
    """
    reached = 1
    try:
        with SourceFile(path, on_bytes=on_bytes, digest=digest, encoding=encoding) as file:
            for first, lines in _lines(file, shown(path), on_problem, on_warning):
                reached = first
                yield first, lines
                reached = first + len(lines)
            if digest is not None:
                file.drain()
    except MemoryError as error:
        raise unreadable(path, error, reached) from error
    except UnreadableError as error:
        raise UnreadableError(error.file, error.reason, error.remedy, reached) from error.__cause__


def _lines(
    source: SourceFile, file: str, on_problem: ProblemSink, on_warning: ProblemSink
) -> Iterator[tuple[int, list[bytes]]]:
    number = 1
    pending: list[bytes] = []
    n_pending = 0  # bytes of the unfinished line, those thrown away included
    too_long = f"the line is longer than {MAX_LINE_BYTES // 2**20} MiB ({MAX_LINE_BYTES:,} bytes)"

    try:
        for chunk in source.chunks():
            lines = chunk.split(b"\n")
            tail = lines.pop()
            if lines:
                if n_pending:
                    n_pending += len(lines[0])
                    if n_pending > MAX_LINE_BYTES:
                        on_problem(Problem(file, number, 1, too_long))
                        number += 1
                        del lines[0]
                    else:
                        lines[0] = b"".join([*pending, lines[0]])
                    pending, n_pending = [], 0
                if number == 1 and lines and not _accept_start(lines, file, on_problem, on_warning):
                    return
                if lines:
                    yield number, lines
                number += len(lines)
            if tail:
                n_pending += len(tail)
                if n_pending > MAX_LINE_BYTES:
                    pending = []
                else:
                    pending.append(tail)
    except DamagedDataError as error:
        on_problem(Problem(file, number, 1, str(error)))
        return

    if n_pending > MAX_LINE_BYTES:
        on_problem(Problem(file, number, 1, too_long))
    elif n_pending:
        lines = [b"".join(pending)]
        if number == 1 and not _accept_start(lines, file, on_problem, on_warning):
            return
        last = lines[0]
        if last.endswith(b"\r") and not last.isspace():
            on_problem(Problem(file, number, column_at(last, last.index(b"\r")), BARE_CR))
        else:
            yield number, lines


def _accept_start(lines: list[bytes], file: str, on_problem: ProblemSink, on_warning: ProblemSink) -> bool:
    """Return whether this can be UTF-8 text. Removes a byte-order mark from the first line."""
    start = lines[0]
    reason = ""
    if start.startswith((b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")):
        reason = "the file is UTF-16 or UTF-32 text; save it as UTF-8"
    elif start.startswith(b"\x1f\x8b"):
        reason = "the file is gzip data; its name must end in .jsonl.gz"
    elif start.startswith(b"\x28\xb5\x2f\xfd"):
        reason = "the file is zstd data; its name must end in .jsonl.zst"
    if reason:
        on_problem(Problem(file, 1, 1, reason))
        return False
    if start.startswith(b"\xef\xbb\xbf"):
        on_warning(Problem(file, 1, 1, "the file begins with a byte-order mark, which is ignored"))
        lines[0] = start[3:]
    return True
