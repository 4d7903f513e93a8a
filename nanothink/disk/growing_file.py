"""A file that grows at its end, a whole piece at a time. A piece that the disk refuses waits for the next
try.

A write that fails half-way is taken back: the file ends as it did before, so a reader never meets half a
line, and the retry adds the whole of it.
"""

from __future__ import annotations

import os
from collections import deque
from contextlib import suppress
from pathlib import Path

from nanothink.disk.folders import open_plain

MOST_WAITING_BYTES = 64 << 20
"""Most bytes that wait; beyond it the oldest pieces are dropped, since a disk may stay full for weeks."""


class GrowingFile:
    """Writer that appends to ``path``.

    Raises:
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._waiting: deque[bytes] = deque()
        self._waiting_bytes = 0
        self.n_lost = 0
        """Pieces dropped."""
        self._descriptor: int | None = _open(path)
        self._end = os.fstat(self._descriptor).st_size

    @property
    def n_waiting(self) -> int:
        """Pieces that are not in the file yet."""
        return len(self._waiting)

    def add(self, piece: bytes) -> None:
        """Append ``piece`` with the next ``write_out``."""
        self._waiting.append(piece)
        self._waiting_bytes += len(piece)
        while self._waiting_bytes > MOST_WAITING_BYTES:
            self._waiting_bytes -= len(self._waiting.popleft())
            self.n_lost += 1

    def write_out(self) -> None:
        """Write all waiting pieces, or none of them.

        Raises:
            OSError: the disk refused; the call may be repeated.
        """
        if not self._waiting:
            return
        data = memoryview(b"".join(self._waiting))
        try:
            if self._descriptor is None:
                # Opened anew: a handle of a network disk that has gone stale stays so.
                self._descriptor = _open(self._path)
                self._end = min(self._end, os.fstat(self._descriptor).st_size)
                os.ftruncate(self._descriptor, self._end)
            left = data
            while left:
                left = left[os.write(self._descriptor, left) :]
        except OSError:
            if self._descriptor is not None:
                with suppress(OSError):
                    os.ftruncate(self._descriptor, self._end)
            self.close()
            raise
        self._end += len(data)
        self._waiting.clear()
        self._waiting_bytes = 0

    def close(self) -> None:
        """Close the file. Pieces that are still waiting are lost, unless ``write_out`` is called again."""
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            with suppress(OSError):
                os.close(descriptor)


def _open(path: Path) -> int:
    return open_plain(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
