"""Token files: the tokens of one text file on the disk, whole or not there.

    tokens/<tokenizer>/<content>.tokens
        ids of all documents, each followed by EOS, in pages (pages.py); smallest unsigned type that fits
        one DOCUMENT row per document, in pages
        with conversations: a bit per token, set if it is trained on, in pages
        summary: counts, checksums, and the bad lines that were left out, as JSON
        length and checksum of the summary, and the format

A file is written under a temporary name and renamed when complete, so nothing that a killed process leaves is
read. Every page and the summary are checked whenever they are read: a flipped bit would be trained on, or
give an id without an embedding. The same check finds what a power cut leaves, so nothing is synced. Names are
fingerprints, so nothing here is ever out of date.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import orjson
from numpy.typing import NDArray

from nanothink.data.lines import Problem
from nanothink.data.pages import DamagedPageError, OpenFiles, read_pages, stored_bytes
from nanothink.data.problems import Problems
from nanothink.data.source_file import SourceFile, unreadable
from nanothink.disk import sweep, write_whole
from nanothink.errors import StorageError, UnreadableError

DOCUMENT = np.dtype([("end", "<i8"), ("n_bytes", "<i8"), ("key", "<u8"), ("group", "<u8"), ("line", "<i8")])
"""Row of a document: the end of its tokens (they begin at the end of the one before), its size in UTF-8
bytes (of a conversation's answers alone), the keys of its text and group (split.text_key, split.group_key),
and its line."""

SUFFIX = ".tokens"

FORMAT = 4
TRAILER = struct.Struct("<8sIII")
MAGIC = b"NTtokens"
_PLACES = 5  # of each kind of bad line, kept for the next time that someone asks


BadLines = Sequence[tuple[int, Sequence[tuple[int, int, str, str]]]]
"""Bad lines of a file by kind: the count, and line, column, reason and text field of the first few."""


def bad_lines_of(problems: Problems) -> BadLines:
    return [
        (count, [(p.line, p.column, p.reason, p.text_field) for p in named[:_PLACES]])
        for count, named in problems.named_groups()
    ]


def named_in(file: str, bad: BadLines) -> list[tuple[int, list[Problem]]]:
    """Convert bad lines to problems of ``file``, for ``Problems.extend``."""
    return [(count, [Problem(file, *place) for place in named]) for count, named in bad]


class Array(Protocol):
    """A 1-D array that is read in slices."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> NDArray[Any]: ...


@dataclass(frozen=True)
class TokenFile:
    """The tokens of one text file."""

    tokens: Array
    """(number of tokens,) unsigned"""
    rows: Array
    """(number of documents,) DOCUMENT"""
    bits: Array | None = None
    """(number of tokens / 8,) uint8, the lowest bit first: tokens that are trained on; None: all are."""
    bad: BadLines = ()
    """Lines that are not records."""
    checksum: str = ""
    """Checksum of tokens and rows."""
    path: str = ""
    """The text file, relative to the data root; empty if not known."""

    @property
    def documents(self) -> NDArray[Any]:
        """(number of documents,) DOCUMENT, read from the disk at each call."""
        return self.rows[:]

    def trained(self, start: int, stop: int) -> NDArray[np.bool_]:
        """Which of the tokens [start, stop) are trained on."""
        if self.bits is None:
            return np.ones(stop - start, np.bool_)
        first = start // 8
        bits = np.unpackbits(self.bits[first : -(-stop // 8)], bitorder="little")
        return bits[start - 8 * first : stop - 8 * first].astype(np.bool_)


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Smallest unsigned type that holds every id, little-endian."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


@dataclass(frozen=True)
class _PagedArray:
    """An ``Array`` in the pages of a token file, which is opened when read and rebuilt if damaged or gone."""

    path: Path
    files: OpenFiles
    make_again: Callable[[], None] | None
    offset: int
    dtype: np.dtype[Any]
    length: int

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, part: slice) -> NDArray[Any]:
        start, stop, step = part.indices(self.length)
        assert step == 1
        if start >= stop:
            return np.empty(0, self.dtype)
        try:
            return self._read(start, stop)
        except DamagedPageError:
            self.files.forget(self.path)
        if self.make_again is not None:
            self.make_again()
            with contextlib.suppress(DamagedPageError):
                return self._read(start, stop)
        raise StorageError(
            f"The tokens in {self.path} are damaged. Check the disk. If the file is deleted, the next run "
            "makes it again."
        )

    def _read(self, start: int, stop: int) -> NDArray[Any]:
        size = self.dtype.itemsize
        try:
            file = self.files.descriptor(self.path)
            content = read_pages(file, self.offset, self.length * size, start * size, stop * size)
        except OSError as error:
            raise _damaged_or_unreadable(self.path, error) from error
        return content.view(self.dtype)


def _damaged_or_unreadable(path: Path, error: OSError) -> DamagedPageError | UnreadableError:
    """Classify an error: a file that is gone or a bad sector can be rebuilt; missing permissions cannot."""
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO):
        return DamagedPageError()
    return unreadable(path, error)


def open_token_file(
    path: Path, files: OpenFiles, make_again: Callable[[], None] | None = None
) -> TokenFile | None:
    """Open the token file at ``path``; None if there is none, or its summary is damaged.

    Args:
        files: pool that keeps it open while it is read.
        make_again: called if a page is damaged; it must leave a valid file at ``path``.

    Raises:
        UnreadableError: the machine could not read it.
    """
    try:
        summary = _read_summary(files.descriptor(path))
        dtype = np.dtype(summary["dtype"])
        n_tokens, n_documents = int(summary["tokens"]), int(summary["documents"])
        bad = [(int(count), [tuple(place) for place in named]) for count, named in summary["bad"]]
    except OSError as error:
        failure = _damaged_or_unreadable(path, error)
        if isinstance(failure, UnreadableError):
            raise failure from error
        return None
    except (DamagedPageError, ValueError, KeyError, TypeError):
        files.forget(path)
        return None
    after_tokens = stored_bytes(n_tokens * dtype.itemsize)
    after_rows = after_tokens + stored_bytes(n_documents * DOCUMENT.itemsize)
    bits = _PagedArray(path, files, make_again, after_rows, np.dtype("u1"), -(-n_tokens // 8))
    return TokenFile(
        _PagedArray(path, files, make_again, 0, dtype, n_tokens),
        _PagedArray(path, files, make_again, after_tokens, DOCUMENT, n_documents),
        bits if summary.get("bits") else None,
        bad,
        summary["checksum"],
    )


def _read_summary(descriptor: int) -> dict[str, Any]:
    size = os.fstat(descriptor).st_size
    end = os.pread(descriptor, 4096, max(0, size - 4096))
    if len(end) < TRAILER.size:
        raise DamagedPageError
    magic, length, checksum, version = TRAILER.unpack(end[-TRAILER.size :])
    if magic != MAGIC or version != FORMAT:
        raise DamagedPageError
    start = size - TRAILER.size - length
    if length + TRAILER.size > len(end):
        end = os.pread(descriptor, length + TRAILER.size, max(0, start))
    content = end[-TRAILER.size - length : -TRAILER.size]
    if start < 0 or zlib.crc32(content) != checksum:
        raise DamagedPageError
    summary: dict[str, Any] = orjson.loads(content)
    tokens = stored_bytes(summary["tokens"] * np.dtype(summary["dtype"]).itemsize)
    bits = stored_bytes(-(-summary["tokens"] // 8)) if summary.get("bits") else 0
    if tokens + stored_bytes(summary["documents"] * DOCUMENT.itemsize) + bits != start:
        raise DamagedPageError
    return summary


def is_whole(path: Path, files: OpenFiles) -> bool:
    """Return whether every page of a token file is as it was written."""
    found = open_token_file(path, files)
    if found is None:
        return False
    step = 1 << 20
    try:
        for array in (found.tokens, found.rows, *([] if found.bits is None else [found.bits])):
            for start in range(0, len(array), step):
                array[start : start + step]
    except StorageError:
        return False
    return True


class Manifest:
    """Cache of files' digests by size and times, so that unchanged files are not read.

    A file may change twice within the resolution of its times, so a digest is kept only if the file had not
    changed for two seconds (FAT's resolution).
    """

    _SETTLED_NS = 2 * 10**9

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known = self._load()
        self._fresh: dict[str, list[Any]] = {}

    def _load(self) -> dict[str, list[Any]]:
        try:
            content = orjson.loads(self._path.read_bytes())
        except (OSError, orjson.JSONDecodeError):
            return {}
        return content if isinstance(content, dict) else {}

    def digest(self, path: Path, root: Path, now_ns: int) -> tuple[str, int]:
        """BLAKE2b of the file's bytes, as 32 hex digits, and its size. Raises UnreadableError."""
        name = os.path.relpath(path, root)
        status = stamp(path)
        known = self._fresh.get(name) or self._known.get(name)
        if isinstance(known, list) and known[:-1] == status:
            return str(known[-1]), status[0]
        hashed = new_digest()
        with SourceFile(path, digest=hashed) as file:
            file.drain()
        digest = hashed.hexdigest()
        if now_ns - max(status[1], status[2]) > self._SETTLED_NS:
            self._fresh[name] = [*status, digest]
        return digest, status[0]

    @property
    def has_news(self) -> bool:
        return bool(self._fresh)

    def save(self) -> None:
        """Add new digests to the file on disk. The caller must hold the cache's lock."""
        with contextlib.suppress(OSError):
            sweep(self._path)
        if self._fresh:
            with contextlib.suppress(StorageError):  # costs the next run a second reading, nothing else
                write_whole(self._path, orjson.dumps({**self._load(), **self._fresh}))
                self._fresh = {}


def new_digest() -> hashlib.blake2b:
    """Hash function of a file's content."""
    return hashlib.blake2b(digest_size=16)


def stamp(path: Path) -> list[int]:
    """Size, times and inode, which change with the file's content. Raises UnreadableError."""
    try:
        status = path.stat()
    except OSError as error:
        raise unreadable(path, error) from error
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
