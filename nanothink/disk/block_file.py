"""Blocks of one size on the disk, each whole or not there.

Two files: the blocks, one after the other, a hole where none was written yet; and a mark a block, 0 or 2^32
plus the CRC-32 of its number and bytes. A block's mark is written after it, and held against it whenever it
is read. So a killed process, a power cut or a damaged file costs the blocks in question and no others, and
processes that write the same blocks cannot harm one another.

The files are read and written, not mapped: a disk that is full or a file that was cut off is an error which
can be answered, where touching a mapped page would kill the process.
"""

from __future__ import annotations

import os
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nanothink.disk.folders import open_shared
from nanothink.disk.lock import hold_in_use

Parts = list[NDArray[Any]]
"""A block in memory: arrays that lie one after the other on the disk, each contiguous."""

_FILLED = 1 << 32


class BlockFile:
    """Open blocks.

    Args:
        blocks, marks: the two files.
        create: make them where they are not.

    Raises:
        OSError: they cannot be opened.
    """

    def __init__(self, blocks: Path, marks: Path, *, create: bool = False) -> None:
        self.damaged = False
        """Whether a block was found that does not go with its mark."""
        self._marks_path = marks
        self._files: list[int] = []
        try:
            for path in (blocks, marks):
                self._files.append(open_shared(path, create=create))
        except OSError:
            self.close()
            raise

    def hold(self) -> None:
        """Mark the blocks as in use until they are closed; see ``is_in_use`` of the file of marks."""
        hold_in_use(self._files[1])

    def filled(self, n_blocks: int) -> NDArray[np.bool_]:
        """(n_blocks,) which claim to be there."""
        marks = np.fromfile(self._marks_path, "u8", n_blocks)
        there = np.zeros(n_blocks, np.bool_)
        there[: len(marks)] = marks != 0
        return there

    def read(self, number: int, into: Parts) -> bool:
        """Fill the parts with a block, if it is there and whole."""
        mark = int.from_bytes(os.pread(self._files[1], 8, 8 * number), sys.byteorder)
        if not mark:  # asked of the file each time: another process may be filling it too
            return False
        size = sum(part.nbytes for part in into)
        if (
            os.preadv(self._files[0], [part.data for part in into], number * size) == size
            and _mark(number, into) == mark
        ):
            return True
        self.damaged = True
        return False

    def write(self, number: int, block: Parts) -> None:
        """Raises OSError when the disk refuses."""
        size = sum(part.nbytes for part in block)
        if os.pwritev(self._files[0], [part.data for part in block], number * size) != size:
            raise OSError("the disk is full")
        os.pwrite(self._files[1], _mark(number, block).to_bytes(8, sys.byteorder), 8 * number)

    def close(self) -> None:
        for file in self._files:
            os.close(file)
        self._files = []


def _mark(number: int, parts: Parts) -> int:
    """Never 0, and another for the same bytes in another place."""
    check = number
    for part in parts:
        check = zlib.crc32(part.data, check)
    return _FILLED | check
