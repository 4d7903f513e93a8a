"""A file of any size as complete lines: plain, gzip or zstd, in bounded memory.

    chunks of bytes (decompressed)  →  complete lines in batches

Nothing is raised for what a file holds or for a file that cannot be read: that goes to the caller's
sink as a Problem, and what came before it has been given out by then.
"""

from __future__ import annotations

import os
import stat
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from nanothink.data.strict_json import BARE_CR
from nanothink.disk import shown as shown

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")

MAX_LINE_BYTES = 64 * 2**20
"""Longest line that is read, in bytes without its line end."""

_CHUNK_BYTES = 2**18  # fits the cache of a core; a megabyte was a fifth slower


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with the data. ``line`` and ``column`` count from 1, columns in characters.

    Line 0 means the file or folder as a whole.
    """

    file: str
    line: int
    column: int
    reason: str

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"

    @property
    def place(self) -> str:
        """``file:line:column``, or the file alone when it is meant as a whole."""
        return f"{self.file}:{self.line}:{self.column}" if self.line else self.file


ProblemSink = Callable[[Problem], None]


def column_at(line: bytes, offset: int) -> int:
    """The column, from 1 and in characters, of the byte at ``offset``."""
    return len(line[:offset].decode("utf-8", "replace")) + 1


class _Unreadable(Exception):
    """The rest of the file cannot be had; the message says why."""


def iter_lines(
    path: Path,
    *,
    on_problem: ProblemSink,
    on_warning: ProblemSink,
    on_bytes: Callable[[int], None] | None = None,
) -> Iterator[tuple[int, list[bytes]]]:
    """Stream (number of the first line, lines without their LF) for any of the three kinds of file.

    Lines over MAX_LINE_BYTES, unreadable files and what is no UTF-8 text at all go to ``on_problem``.
    """
    file = shown(path)
    number = 1
    pending: list[bytes] = []
    n_pending = 0  # bytes of the unfinished line, those thrown away included
    too_long = f"the line is longer than {MAX_LINE_BYTES // 2**20} MiB ({MAX_LINE_BYTES:,} bytes)"

    try:
        for chunk in _read_chunks(path, on_bytes):
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
    except _Unreadable as error:
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
    """Whether this can be UTF-8 text; takes a byte-order mark off the first line."""
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


def _read_chunks(path: Path, on_bytes: Callable[[int], None] | None) -> Iterator[bytes]:
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise _Unreadable("it is a folder, not a file; rename or move it")
        if not stat.S_ISREG(mode):  # opening a pipe would wait for ever
            raise _Unreadable("it is not a regular file")
        with open(path, "rb", buffering=0) as file:
            taken = 0
            try:
                for chunk in _decompressed(path.name, file):
                    yield chunk
                    at = file.tell()
                    if on_bytes and at > taken:
                        on_bytes(at - taken)
                    taken = at
            finally:
                at = file.tell()
                if on_bytes and at > taken:
                    on_bytes(at - taken)
    except FileNotFoundError:
        what = "the link points to a file that does not exist" if path.is_symlink() else "the file is gone"
        raise _Unreadable(what) from None
    except PermissionError:
        raise _Unreadable("no permission to read the file; see chmod and chown") from None
    except OSError as error:
        raise _Unreadable(f"the file cannot be read: {error.strerror or error}") from None


def _decompressed(name: str, file: FileIO) -> Iterator[bytes]:
    if name.endswith(".gz"):
        yield from _gathered(_gunzip(file))
    elif name.endswith(".zst"):
        yield from _gathered(_unzstd(file))
    else:
        while chunk := file.read(_CHUNK_BYTES):
            yield chunk


def _gathered(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Small pieces put together to chunks; what came before an error is given out before the error."""
    held: list[bytes] = []
    n_held = 0
    failure: _Unreadable | None = None
    try:
        for piece in pieces:
            held.append(piece)
            n_held += len(piece)
            if n_held >= _CHUNK_BYTES:
                yield b"".join(held)
                held, n_held = [], 0
    except _Unreadable as error:
        failure = error
    if held:
        yield b"".join(held)
    if failure:
        raise failure


def _gunzip(file: FileIO) -> Iterator[bytes]:
    # Not gzip.GzipFile: it drops the good data in front of damage, and this is half as much again faster.
    engine = None
    rest = b""
    n_members = 0
    try:
        while data := rest or file.read(2**17):
            if engine is None:
                if n_members:  # zeros may follow a member, tape drives and some tools pad with them
                    data = data.lstrip(b"\0")
                    rest = b""
                    if not data:
                        continue
                engine = zlib.decompressobj(wbits=31)
            piece = engine.decompress(data, _CHUNK_BYTES)
            rest = engine.unconsumed_tail
            if piece:
                yield piece
            if engine.eof:
                rest = engine.unused_data
                engine = None
                n_members += 1
    except zlib.error as error:
        raise _Unreadable(f"damaged gzip data from here on ({error})") from None
    if engine is not None:
        raise _Unreadable("the gzip data ends too early; the file was cut off")


def _unzstd(file: FileIO) -> Iterator[bytes]:
    # Fed by the kilobyte, because one call gives out all its input holds: 32 MiB at the most this way.
    # (The library's stream reader is bounded too, but takes a cut file for a complete one.)
    import zstandard

    context = zstandard.ZstdDecompressor()
    engine = None
    try:
        while block := file.read(2**17):
            view = memoryview(block)
            for at in range(0, len(block), 1024):
                data: bytes | memoryview = view[at : at + 1024]
                while data:
                    if engine is None:
                        engine = context.decompressobj()
                    piece = engine.decompress(data)
                    data = engine.unused_data
                    if piece:
                        yield piece
                    if engine.eof:
                        engine = None
    except zstandard.ZstdError as error:
        raise _Unreadable(f"damaged zstd data from here on ({error})") from None
    if engine is not None:
        raise _Unreadable("the zstd data ends too early; the file was cut off")
