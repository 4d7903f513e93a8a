"""Files that grow: whole pieces alone, whatever the disk refuses."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from nanothink.disk import GrowingFile, growing_file


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes that the disk still takes, one at a time."""
    left, really_write = [100], os.write

    def write(descriptor: int, data: memoryview) -> int:
        if not left[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left[0] -= 1
        return really_write(descriptor, data[:1])

    monkeypatch.setattr("nanothink.disk.growing_file.os.write", write)
    return left


def test_a_piece_is_there_as_a_whole_or_waits(room: list[int], tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_bytes(b"zero\n")
    file = GrowingFile(path)
    for n_bytes in range(len(b"one\ntwo\n")):
        room[0] = n_bytes
        if not file.n_waiting:
            file.add(b"one\n")
            file.add(b"two\n")
        with pytest.raises(OSError, match="No space left"):
            file.write_out()
        assert path.read_bytes() == b"zero\n"
        assert file.n_waiting == 2
    room[0] = 100
    file.write_out()
    assert path.read_bytes() == b"zero\none\ntwo\n"
    assert file.n_waiting == 0
    file.close()


def test_a_file_that_another_has_cut_meanwhile_is_added_to_where_it_ends(
    room: list[int], tmp_path: Path
) -> None:
    file = GrowingFile(tmp_path / "lines")
    file.add(b"one\n")
    file.write_out()
    room[0] = 1
    file.add(b"two\n")
    with pytest.raises(OSError, match="No space left"):
        file.write_out()
    (tmp_path / "lines").write_bytes(b"")
    room[0] = 100
    file.write_out()
    assert (tmp_path / "lines").read_bytes() == b"two\n"
    file.close()


def test_what_waits_is_bounded(room: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growing_file, "MOST_WAITING_BYTES", 10)
    room[0] = 0
    file = GrowingFile(tmp_path / "lines")
    for number in range(9):
        file.add(b"%d..\n" % number)
        with pytest.raises(OSError, match="No space left"):
            file.write_out()
    assert (file.n_waiting, file.n_lost) == (2, 7)
    room[0] = 100
    file.write_out()
    assert (tmp_path / "lines").read_bytes() == b"7..\n8..\n"
    file.close()
