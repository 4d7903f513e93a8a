"""A name is held by one process at a time, and by no dead one."""

from __future__ import annotations

import os
import signal
import time

import pytest

from nanothink.checkpoints import (
    CheckpointStore,
)
from nanothink.errors import CheckpointBusyError, StorageError


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path / "checkpoints", "transformer_expert")


def test_two_processes_never_hold_one_name(store, crash_server):
    crash_server.start("hold_lock", folder=str(store.folder), stem=store.stem, with_worker=False)
    pid = crash_server.answer()["paused"]
    started = time.perf_counter()
    with pytest.raises(CheckpointBusyError) as caught, store.lock():
        raise AssertionError("both hold the lock")
    assert time.perf_counter() - started < 2
    for part in (f"process {pid} on {os.uname().nodename}, since 20", "--name", str(store.folder)):
        assert part in str(caught.value)
    with CheckpointStore(store.folder, "other_expert").lock():
        pass
    with pytest.raises(CheckpointBusyError, match=f"process {pid}"), store.lock():
        pass  # the refused attempt has not worn the lock out, nor its message
    crash_server.kill(pid)
    with store.lock():
        pass


def test_a_killed_holder_never_blocks_even_when_its_worker_lives(store, crash_server):
    crash_server.start("hold_lock", folder=str(store.folder), stem=store.stem, with_worker=True)
    answer = crash_server.answer()
    try:
        crash_server.kill(answer["paused"])
        with store.lock():
            pass
    finally:
        os.kill(answer["worker"], signal.SIGKILL)


def test_one_process_holds_a_name_once_and_gives_it_back(store):
    with pytest.raises(RuntimeError, match="from inside"), store.lock():
        with pytest.raises(CheckpointBusyError, match=f"process {os.getpid()}"), store.lock():
            pass
        raise RuntimeError("from inside")
    with store.lock():
        assert store.existing() == []


def test_a_lock_in_an_impossible_place(tmp_path):
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(StorageError, match="is a file, or lies below one"),
        CheckpointStore(tmp_path / "file", "a").lock(),
    ):
        pass
