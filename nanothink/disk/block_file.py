"""Blocks of one size on the disk, each whole or not there.

Two files: the blocks, with a hole where none is written yet, and a mark per block: 0, or 2^32 plus the CRC-32
of its number and bytes. The mark is written after the block and checked at each read. So a killed process, a
power cut or a damaged file costs only the blocks concerned, and processes that write the same blocks do not
conflict.

The files are read and written, not mapped: a full disk or a truncated file raises an error, while touching a
mapped page would kill the process.
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
"""A block in memory: contiguous arrays, stored one after the other."""

_FILLED = 1 << 32


class BlockFile:
    """Two open files of blocks and marks.

    Args:
        blocks, marks: the paths.
        create: create missing files.

    Raises:
        OSError: they cannot be opened.
    """

    def __init__(self, blocks: Path, marks: Path, *, create: bool = False) -> None:
        self.damaged = False
        """True once a block did not match its mark."""
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
        """Mask (n_blocks,) of the blocks whose mark says that they are there."""
        marks = np.fromfile(self._marks_path, "u8", n_blocks)
        there = np.zeros(n_blocks, np.bool_)
        there[: len(marks)] = marks != 0
        return there

    def read(self, number: int, into: Parts) -> bool:
        """Read a block into the parts; return False if it is missing or damaged."""
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
        """Write a block, then its mark. Raises OSError if the disk refuses."""
        size = sum(part.nbytes for part in block)
        if os.pwritev(self._files[0], [part.data for part in block], number * size) != size:
            raise OSError("the disk is full")
        os.pwrite(self._files[1], _mark(number, block).to_bytes(8, sys.byteorder), 8 * number)

    def close(self) -> None:
        for file in self._files:
            os.close(file)
        self._files = []


def _mark(number: int, parts: Parts) -> int:
    """Checksum seeded with the block's number. 0 means "not written" and is never returned."""
    check = number
    for part in parts:
        check = zlib.crc32(part.data, check)
    return _FILLED | check
