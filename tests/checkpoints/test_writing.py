"""Checkpoints whose writing is killed, or refused by the disk."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from nanothink.checkpoints import (
    verify_checkpoint,
    write_checkpoint,
)
from nanothink.errors import (
    StorageError,
)

KILL_POINTS = [
    *(("byte", at) for at in (0, 1, 300, 2_500, 6_000)),
    ("byte", "seal"),
    ("byte", -1),
    ("before", "fsync", 1),
    ("after", "fsync", 1),
    ("before", "replace", 1),
    ("after", "replace", 1),
    ("after", "fsync", 2),
]


@pytest.mark.parametrize("point", KILL_POINTS, ids=lambda point: "-".join(map(str, point)))
def test_killed_during_a_write(tmp_path, make_payload, crash_server, point):
    target, source = tmp_path / "a.pt", tmp_path / "new.pt"
    write_checkpoint(target, make_payload(seed=1))
    write_checkpoint(source, make_payload(seed=2))
    old, new = target.read_bytes(), source.read_bytes()
    if point == ("byte", "seal"):  # all but that
        point = ("byte", new.index(b"nanothink-sha256:") - 2)
    elif point[0] == "byte" and point[1] < 0:
        point = ("byte", len(new) + point[1])
    crash_server.start("write", target=str(target), source=str(source), point=list(point))
    crash_server.kill(crash_server.answer()["paused"])

    renamed = tuple(point[:2]) == ("after", "replace") or tuple(point) == ("after", "fsync", 2)
    assert target.read_bytes() == (new if renamed else old)
    assert verify_checkpoint(target).step == (9 if renamed else 8)
    orphans = [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]
    assert len(orphans) == (0 if renamed else 1)

    write_checkpoint(target, make_payload(seed=3))
    assert sorted(os.listdir(tmp_path)) == ["a.pt", "new.pt"]
    assert verify_checkpoint(target).step == 10


def test_killed_at_random_moments_of_endless_writing(tmp_path, make_payload, crash_server):
    target, sources = tmp_path / "a.pt", [tmp_path / "1.pt", tmp_path / "2.pt"]
    for seed, source in enumerate(sources):
        write_checkpoint(source, make_payload(seed=seed))
    allowed = {source.read_bytes() for source in sources}
    write_checkpoint(target, make_payload(seed=0))
    chance, n_orphans = random.Random(1), 0
    for _ in range(15):
        crash_server.start("write_slowly_for_ever", target=str(target), sources=[str(s) for s in sources])
        pid = crash_server.answer()["paused"]
        time.sleep(chance.uniform(0.001, 0.06))
        crash_server.kill(pid)
        assert target.read_bytes() in allowed
        verify_checkpoint(target)
        n_orphans += any(name.endswith(".tmp") for name in os.listdir(tmp_path))
    assert n_orphans >= 5, "too few of the kills fell into a write to show anything"


def test_the_temporary_file_of_a_living_writer_is_left_alone(tmp_path, make_payload, crash_server):
    target, source = tmp_path / "a.pt", tmp_path / "new.pt"
    write_checkpoint(source, make_payload())
    crash_server.start("write", target=str(target), source=str(source), point=["byte", 1000])
    pid = crash_server.answer()["paused"]
    write_checkpoint(target, make_payload())
    assert sum(name.endswith(".tmp") for name in os.listdir(tmp_path)) == 1
    crash_server.kill(pid)


def test_an_interrupt_inside_a_write_comes_through_and_leaves_nothing(written, make_payload, monkeypatch):
    before, really_write = written.read_bytes(), os.write

    def interrupted_write(descriptor: int, data: Any) -> int:
        signal.raise_signal(signal.SIGINT)
        return really_write(descriptor, data)

    monkeypatch.setattr(os, "write", interrupted_write)
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(written, make_payload(seed=5))
    assert written.read_bytes() == before
    assert os.listdir(written.parent) == [written.name]


def test_a_complete_new_file_exists_before_the_old_one_goes(written, make_payload):
    before, seen = written.read_bytes(), []

    def look() -> None:
        (temporary,) = written.parent.glob(".*.tmp")
        shutil.copy(temporary, written.parent / "copy.pt")
        seen.append((verify_checkpoint(written.parent / "copy.pt").step, written.read_bytes() == before))

    write_checkpoint(written, make_payload(seed=5), before_replace=look)
    assert seen == [(12, True)]


@pytest.mark.parametrize("limit", [0, 1_000, 5_000, -100, -1])
def test_a_write_cut_short_by_a_limit(tmp_path, make_payload, crash_server, limit):
    target, source = tmp_path / "a.pt", tmp_path / "new.pt"
    write_checkpoint(target, make_payload(seed=1))
    write_checkpoint(source, make_payload(seed=2))
    old = target.read_bytes()
    limit = limit if limit >= 0 else source.stat().st_size + limit
    answer = crash_server.run("write_with_file_limit", target=str(target), source=str(source), limit=limit)
    assert answer["error"] == "StorageError"
    assert "File too large" in answer["message"]
    assert "intact" in answer["message"]
    assert target.read_bytes() == old
    assert sorted(os.listdir(tmp_path)) == ["a.pt", "new.pt"]


@pytest.mark.parametrize("largest", [1, 700, 1 << 30])
def test_short_writes_make_the_same_file(tmp_path, make_payload, monkeypatch, largest):
    """A disk may take less than it is given; what is left is given again."""
    write_checkpoint(tmp_path / "whole.pt", make_payload())
    really_write, chance = os.write, random.Random(0)

    def short_write(descriptor: int, data: Any) -> int:
        return really_write(descriptor, bytes(data[: chance.randint(1, largest)]))

    monkeypatch.setattr(os, "write", short_write)
    write_checkpoint(tmp_path / "short.pt", make_payload())
    assert (tmp_path / "short.pt").read_bytes() == (tmp_path / "whole.pt").read_bytes()


REFUSALS = {
    errno.ENOSPC: "No space left on device.*Make room",
    errno.EDQUOT: "Disk quota exceeded.*Make room",
    errno.EROFS: "Read-only file system.*choose another --checkpoint-dir",
    errno.EACCES: "Permission denied.*who may write there",
    errno.EPERM: "Operation not permitted.*who may write there",
    errno.EIO: "Input/output error.*Check the disk",
    errno.ESTALE: "Stale file handle.*Check the disk",
}


@pytest.mark.parametrize("call", ["open", "write", "fsync", "replace"])
@pytest.mark.parametrize("number", REFUSALS, ids=errno.errorcode.get)
def test_a_refusal_at_any_point_leaves_the_old_file(written, make_payload, monkeypatch, call, number):
    before, really = written.read_bytes(), getattr(os, call)
    n_calls = 0

    def refuse(*arguments: Any) -> Any:
        nonlocal n_calls
        n_calls += 1
        if n_calls > (5 if call == "write" else 0):  # not the first write: something is half there
            raise OSError(number, os.strerror(number))
        return really(*arguments)

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(StorageError, match=REFUSALS[number].replace(".*", "(?s:.*)")) as caught:
        write_checkpoint(written, make_payload(seed=5))
    monkeypatch.undo()
    assert "The checkpoint that was there is intact" in str(caught.value)
    assert str(written) in str(caught.value)
    assert written.read_bytes() == before
    assert os.listdir(written.parent) == [written.name]


def test_a_disk_that_takes_nothing_is_not_asked_for_ever(written, make_payload, monkeypatch):
    monkeypatch.setattr(os, "write", lambda descriptor, data: 0)
    with pytest.raises(StorageError, match="intact"):
        write_checkpoint(written, make_payload(seed=5))
    monkeypatch.undo()
    assert verify_checkpoint(written).step == 7


def test_a_folder_that_cannot_be_synced_is_said_of_a_file_that_is_there(written, make_payload, monkeypatch):
    really_fsync, n_calls = os.fsync, 0

    def refuse_the_folder(descriptor: int) -> None:
        nonlocal n_calls
        n_calls += 1
        if n_calls == 2:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        really_fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse_the_folder)
    with pytest.raises(StorageError, match="The new file is complete, but might not survive a power cut"):
        write_checkpoint(written, make_payload(seed=5))
    assert verify_checkpoint(written).step == 12


def test_a_full_disk(tmp_path, make_payload, server_in_own_mounts):
    disk, small, large = tmp_path / "disk", tmp_path / "small.pt", tmp_path / "large.pt"
    disk.mkdir()
    write_checkpoint(small, make_payload())
    write_checkpoint(large, make_payload(model_state={"a": torch.zeros(100_000)}))
    answer = server_in_own_mounts.run(
        "write_to_small_disk", folder=str(disk), sources=[str(small), str(large)], kilobytes=200
    )
    assert answer["error"] == "StorageError"
    for part in ("No space left", "bytes are needed", "bytes are free", "intact", "checkpoints prune"):
        assert part in answer["message"]
    assert answer["intact"]
    assert answer["files"] == ["a.pt"]


def test_a_read_only_disk(tmp_path, make_payload, server_in_own_mounts):
    disk, source = tmp_path / "disk", tmp_path / "new.pt"
    disk.mkdir()
    write_checkpoint(source, make_payload())
    answer = server_in_own_mounts.run("write_to_read_only_disk", folder=str(disk), source=str(source))
    assert answer["error"] == "StorageError"
    assert "Read-only" in answer["message"]


def test_no_permission(make_payload, crash_server):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        target, source = folder / "a.pt", folder / "new.pt"
        write_checkpoint(target, make_payload(seed=1))
        write_checkpoint(source, make_payload(seed=2))
        old = target.read_bytes()
        folder.chmod(0o555)
        answer = crash_server.run("write_as_nobody", target=str(target), source=str(source))
        folder.chmod(0o755)
        assert answer["error"] == "StorageError"
        assert "Permission denied" in answer["message"]
        assert target.read_bytes() == old


def test_something_in_the_way(tmp_path, make_payload):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="cannot be written"):
        write_checkpoint(tmp_path / "file" / "a.pt", make_payload())
    (tmp_path / "b.pt").mkdir()
    with pytest.raises(StorageError, match="cannot be written"):
        write_checkpoint(tmp_path / "b.pt", make_payload())
    assert sorted(os.listdir(tmp_path)) == ["b.pt", "file"]
