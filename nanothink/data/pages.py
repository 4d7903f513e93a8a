"""Arrays on the disk in pages with checksums.

    page k: up to 16,380 bytes of content, then their CRC-32 with k in 4 bytes; only the last is shorter

Each page is checked whenever it is read, so a flipped bit is found without reading the whole file first.
Files are read, not mapped: a failing disk or a truncated file raises an error, while touching a mapped page
would kill the process. A mapping would also keep a descriptor open.
"""

from __future__ import annotations

import os
import resource
import weakref
import zlib
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

PAGE_BYTES = 1 << 14
_CONTENT_BYTES = PAGE_BYTES - 4
_PAGES_AT_ONCE = 64


class DamagedPageError(Exception):
    """A page is missing, or differs from what was written."""


def stored_bytes(n_bytes: int) -> int:
    """Size on the disk of ``n_bytes`` of content."""
    return n_bytes + 4 * -(-n_bytes // _CONTENT_BYTES)


class PageWriter:
    """Writer of pages to an open file. Raises OSError if the disk refuses."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._rest = b""
        self._n_pages = 0
        self.n_bytes = 0
        self.checksum = 0
        """CRC-32 of all content."""

    def append(self, content: bytes) -> None:
        self.n_bytes += len(content)
        self.checksum = zlib.crc32(content, self.checksum)
        content = self._rest + content
        whole = len(content) - len(content) % _CONTENT_BYTES
        for start in range(0, whole, _CONTENT_BYTES):
            self._write(content[start : start + _CONTENT_BYTES])
        self._rest = content[whole:]

    def finish(self) -> None:
        if self._rest:
            self._write(self._rest)

    def _write(self, page: bytes) -> None:
        self._file.write(page + _check(self._n_pages, page))
        self._n_pages += 1


def _check(number: int, content: bytes | memoryview) -> bytes:
    return zlib.crc32(content, number).to_bytes(4, "little")


class OpenFiles:
    """A bounded pool of open files; the least recently used is closed first.

    Args:
        at_most: most files open at a time; by default a small part of the process's limit.
    """

    def __init__(self, at_most: int | None = None) -> None:
        if at_most is None:
            at_most = max(1, min(256, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 8))
        self._at_most = at_most
        self._descriptors: OrderedDict[Path, int] = OrderedDict()
        weakref.finalize(self, _close_all, self._descriptors)

    def descriptor(self, path: Path) -> int:
        """Descriptor of a file, opened if needed; valid until the next call. Raises OSError."""
        found = self._descriptors.get(path)
        if found is None:
            found = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self._descriptors[path] = found
            if len(self._descriptors) > self._at_most:
                os.close(self._descriptors.popitem(last=False)[1])
        else:
            self._descriptors.move_to_end(path)
        return found

    def forget(self, path: Path) -> None:
        """Close a file, so that the next call opens whatever has its name then."""
        found = self._descriptors.pop(path, None)
        if found is not None:
            os.close(found)


def _close_all(descriptors: Mapping[Path, int]) -> None:
    for descriptor in descriptors.values():
        os.close(descriptor)


def read_pages(descriptor: int, offset: int, n_bytes: int, start: int, stop: int) -> NDArray[Any]:
    """Read bytes [start, stop) of the ``n_bytes`` of content whose pages begin at ``offset``, as uint8.

    Raises:
        DamagedPageError: a page differs from what was written.
        OSError: the file cannot be read.
    """
    found = np.empty(stop - start, np.uint8)
    last = (stop - 1) // _CONTENT_BYTES
    at = start
    while at < stop:
        first = at // _CONTENT_BYTES
        n_pages = min(last - first + 1, _PAGES_AT_ONCE)
        size = min(n_pages * PAGE_BYTES, stored_bytes(n_bytes) - first * PAGE_BYTES)
        raw = memoryview(os.pread(descriptor, size, offset + first * PAGE_BYTES))
        if len(raw) != size:
            raise DamagedPageError
        for number in range(first, first + n_pages):
            page = raw[(number - first) * PAGE_BYTES : (number - first + 1) * PAGE_BYTES]
            content = page[:-4]
            if _check(number, content) != page[-4:]:
                raise DamagedPageError
            part = content[at - number * _CONTENT_BYTES : stop - number * _CONTENT_BYTES]
            found[at - start : at - start + len(part)] = np.frombuffer(part, np.uint8)
            at += len(part)
    return found
