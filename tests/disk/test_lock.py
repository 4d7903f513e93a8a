"""Locks: one holder at a time, on disks that have locks and on disks that have none."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from reports import Told

from nanothink.disk import HeldError, held, is_in_use, lock, locked
from nanothink.errors import StorageError

HERE = socket.gethostname()
DEAD = 2**22 + 1  # above any process number that Linux gives out


@pytest.fixture(params=["locks", "no locks"])
def disk(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    if request.param == "no locks":
        without_locks(monkeypatch)
    return tmp_path


def without_locks(monkeypatch: pytest.MonkeyPatch, number: int = errno.ENOLCK) -> None:
    def flock(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(lock, "STAND_IN_SECONDS", 0.3)
    monkeypatch.setattr(lock, "_told", set())


def holder(pid: int, host: str) -> str:
    return json.dumps({"pid": pid, "host": host, "since": 1e9, "token": "abc"})


@contextlib.contextmanager
def another_process(path: Path) -> Iterator[int]:
    """Let a fork hold a lock."""
    ready, answer = os.pipe()
    child = os.fork()
    if not child:
        with held(path):
            os.write(answer, b"x")
            threading.Event().wait(60)
        os._exit(0)
    assert os.read(ready, 1) == b"x"
    try:
        yield child
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
        os.close(ready)
        os.close(answer)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_one_process_holds_it_and_others_hear_which(disk: Path) -> None:
    path, notes = disk / ".stem.lock", list[str]()
    with another_process(path) as pid:
        for _ in range(2):
            with (
                pytest.raises(HeldError, match=rf"process {pid} on {HERE}, since 20"),
                held(path),
            ):
                pass
        assert (disk / ".stem.holder").exists()
    with held(path, Told(notes.append)):  # killed: what it left is no obstacle
        assert json.loads((disk / ".stem.holder").read_text())["pid"] == os.getpid()
        with pytest.raises(HeldError, match=f"process {os.getpid()}"), held(path):
            pass
    assert not (disk / ".stem.holder").exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_worker_does_not_keep_the_lock(disk: Path) -> None:
    ready, answer = os.pipe()
    with locked(disk):
        worker = os.fork()
        if not worker:
            os.write(answer, b"x")
            threading.Event().wait(60)
            os._exit(0)
        assert os.read(ready, 1) == b"x"
    try:
        with locked(disk, reporter=Told(pytest.fail)):
            pass
    finally:
        os.kill(worker, 9)
        os.waitpid(worker, 0)


def test_it_is_waited_for_with_one_line(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "PATIENCE_SECONDS", 0.0)
    first, notes = contextlib.ExitStack(), list[str]()
    first.enter_context(locked(disk))

    def note(message: str) -> None:
        if "waiting" in message:
            first.close()
        notes.append(message)

    with locked(disk, Told(note)):
        assert len([message for message in notes if "waiting" in message]) == 1


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL])
def test_a_disk_without_locks_is_said_once(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_locks(monkeypatch, number)
    notes: list[str] = []
    for _ in range(2):
        with locked(tmp_path, Told(notes.append)):
            assert sorted(os.listdir(tmp_path)) == ["lock", "lock.holder"]
    assert os.listdir(tmp_path) == ["lock"]
    assert notes == [f"{tmp_path} is on a disk without file locks: lock.holder stands in for one."]
    assert is_in_use(tmp_path / "lock"), "what cannot be known must not be deleted"


@pytest.mark.parametrize("content", ["", "{}", "\x1b[2J", holder(1, "elsewhere"), holder(1, HERE)])
def test_what_may_be_held_is_waited_for_a_while_and_named(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_locks(monkeypatch)
    monkeypatch.setattr(lock, "ALIVE_SECONDS", 0.6)
    (tmp_path / "lock.holder").write_text(content)
    began = time.monotonic()
    with pytest.raises(StorageError, match=f"rm {tmp_path}/lock.holder") as caught, locked(tmp_path):
        pass
    assert 0.3 <= time.monotonic() - began < 5
    assert ("process 1 on" in str(caught.value)) == ("pid" in content)
    assert "\x1b" not in str(caught.value)
    with (
        pytest.raises(HeldError, match=f"if it has ended, remove {tmp_path}/lock.holder"),
        held(tmp_path / "lock"),
    ):
        pass
    assert (tmp_path / "lock.holder").read_text() == content
    (tmp_path / "lock.holder").unlink()  # as the message says
    with locked(tmp_path):
        pass


def test_what_a_dead_process_of_this_machine_left_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_locks(monkeypatch)
    for pid in (DEAD, os.getpid()):  # the first process of a container always has the same number
        (tmp_path / "lock.holder").write_text(holder(pid, HERE))
        notes: list[str] = []
        with locked(tmp_path, Told(notes.append)):
            assert json.loads((tmp_path / "lock.holder").read_text())["token"] != "abc"
        assert f"{tmp_path / 'lock.holder'} was left behind by process {pid}" in notes[0]
        assert os.listdir(tmp_path) == ["lock"]


def test_a_holder_that_came_meanwhile_is_not_removed_for_a_dead_one(tmp_path: Path) -> None:
    path = tmp_path / "lock.holder"
    path.write_text(holder(DEAD, HERE))
    dead = lock._Holder.read(path)
    assert dead is not None
    path.write_text(holder(1, "elsewhere"))
    lock._remove_dead(path, dead)
    assert path.read_text() == holder(1, "elsewhere")
    assert os.listdir(tmp_path) == ["lock.holder"]


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_an_error_of_the_disk_is_no_lack_of_locks(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_locks(monkeypatch, number)
    with pytest.raises(StorageError, match=os.strerror(number)), locked(tmp_path):
        pass


def test_a_lock_file_that_is_removed_while_it_is_held_is_made_anew(tmp_path: Path) -> None:
    with locked(tmp_path):
        (tmp_path / "lock").unlink()
    with locked(tmp_path), pytest.raises(HeldError), held(tmp_path / "lock"):
        pass


@pytest.mark.parametrize("name", ["lock", "lock.holder"])
def test_nothing_is_written_through_a_link(name: str, disk: Path) -> None:
    victim = disk / "victim"
    victim.write_bytes(b"precious")
    for target in (victim, disk / "made"):
        (disk / name).symlink_to(target)
        with contextlib.suppress(OSError, HeldError), held(disk / "lock"):
            pass
        with contextlib.suppress(StorageError), locked(disk):
            pass
        (disk / name).unlink(missing_ok=True)
    assert victim.read_bytes() == b"precious"
    assert not (disk / "made").exists()
