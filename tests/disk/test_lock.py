"""Locks: one holder at a time, and a line on disks that have none."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from reports import Told

from nanothink.disk import HeldError, held, is_in_use, lock, locked
from nanothink.errors import StorageError

HERE = socket.gethostname()


def without_locks(monkeypatch: pytest.MonkeyPatch, number: int = errno.ENOLCK) -> None:
    def flock(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(lock, "_told", set())


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
def test_one_process_holds_it_and_others_hear_which(tmp_path: Path) -> None:
    path = tmp_path / ".stem.lock"
    with another_process(path) as pid:
        for _ in range(2):
            with (
                pytest.raises(HeldError, match=rf"process {pid} on {HERE}, since 20"),
                held(path),
            ):
                pass
    with (  # killed: what it left is no obstacle
        held(path, Told(pytest.fail)),
        pytest.raises(HeldError, match=f"process {os.getpid()}"),
        held(path),
    ):
        pass
    assert path.read_bytes() == b""
    with locked(tmp_path), another_process(path):
        os.truncate(path, 0)
        path.write_text("\x1b[2J")
        with pytest.raises(HeldError) as caught, held(path):
            pass
        assert "\x1b" not in str(caught.value)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_worker_does_not_keep_the_lock(tmp_path: Path) -> None:
    ready, answer = os.pipe()
    with locked(tmp_path):
        worker = os.fork()
        if not worker:
            os.write(answer, b"x")
            threading.Event().wait(60)
            os._exit(0)
        assert os.read(ready, 1) == b"x"
    try:
        with locked(tmp_path, reporter=Told(pytest.fail)):
            pass
    finally:
        os.kill(worker, 9)
        os.waitpid(worker, 0)


def test_it_is_waited_for_with_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "PATIENCE_SECONDS", 0.0)
    first, notes = contextlib.ExitStack(), list[str]()
    first.enter_context(locked(tmp_path))

    def note(message: str) -> None:
        if "waiting" in message:
            first.close()
        notes.append(message)

    with locked(tmp_path, Told(note)):
        assert len([message for message in notes if "waiting" in message]) == 1


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL])
def test_a_disk_without_locks_is_said_once(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_locks(monkeypatch, number)
    notes: list[str] = []
    for _ in range(2):
        with locked(tmp_path, Told(notes.append)):
            assert os.listdir(tmp_path) == ["lock"]
    assert notes == [f"{tmp_path} is on a disk without file locks: run one command at a time there."]
    assert is_in_use(tmp_path / "lock"), "what cannot be known must not be deleted"


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


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    for target in (victim, tmp_path / "made"):
        (tmp_path / "lock").symlink_to(target)
        with contextlib.suppress(OSError, HeldError), held(tmp_path / "lock"):
            pass
        with contextlib.suppress(StorageError), locked(tmp_path):
            pass
        (tmp_path / "lock").unlink()
    assert victim.read_bytes() == b"precious"
    assert not (tmp_path / "made").exists()
