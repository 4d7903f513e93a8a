"""Processes that wait for each other say for whom, and not for ever."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from datetime import timedelta

import pytest
from reports import Told

from nanothink.cli.app import run
from nanothink.errors import DistributedError, NanoThinkError, RankError, UsageError
from nanothink.reporter import SILENT
from nanothink.training import launch
from nanothink.training.launch import Launch, meet

SOON = timedelta(seconds=5)
TOLD = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "MEETING_SECONDS", 1.0)
    monkeypatch.setattr(launch, "FIRST_WORD_SECONDS", 0.3)
    monkeypatch.setattr(launch, "NEXT_WORD_SECONDS", 0.4)


@pytest.fixture
def port() -> int:
    """One that is free."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        number: int = found.getsockname()[1]
    return number


def of(rank: int, port: int, size: int = 3) -> Launch:
    return Launch(rank, rank, size, "127.0.0.1", port)


def test_the_first_says_who_is_missing_and_gives_up(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(launch, "_RUNS", itertools.repeat(0))  # each in a process of its own

    def second() -> None:
        with suppress(NanoThinkError):
            meet(of(1, port), SILENT, SOON)

    thread = threading.Thread(target=second)
    thread.start()  # the third does not come
    with pytest.raises(DistributedError, match=r"did not come to 127\.0\.0\.1:.* within 1 s") as error:
        meet(of(0, port), Told(said.append), SOON)
    thread.join()
    assert not isinstance(error.value, RankError)  # the first says it for all
    assert said[-1] == f"Waiting for 1 of 3 processes (rank 2) at 127.0.0.1:{port}."
    assert 2 <= len(said) <= 3
    assert "1 of 3 processes (rank 2)" in str(error.value)


def test_another_says_that_the_first_does_not_answer(port: int) -> None:
    said: list[str] = []
    with pytest.raises(RankError, match=r"Process 2 of 3, on .*Connection refused.*MASTER_ADDR"):
        meet(of(2, port), Told(said.append), SOON)
    assert "waits for the first process at" in said[0]
    assert "Connection refused" in said[0]
    with pytest.raises(RankError, match=r"no-such-machine\.invalid"):
        meet(Launch(1, 1, 2, "no-such-machine.invalid", port), SILENT, SOON)


def test_a_port_that_is_taken_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        with pytest.raises(RankError, match="choose another MASTER_PORT"):
            meet(of(0, taken.getsockname()[1]), SILENT, SOON)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("RANK", "first", "RANK is 'first', not a number"),
        ("MASTER_PORT", "70000", "ports from 1 to 65535"),
        ("RANK", "2", "ranks are below the world size"),
    ],
)
def test_an_environment_that_makes_no_sense_is_refused(
    name: str, value: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told = {**TOLD, name: value}
    with pytest.raises(UsageError, match=said):
        Launch.of(told)
    for key, word in told.items():
        monkeypatch.setenv(key, word)
    assert run(["pretrain", "transformer"]) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_the_command_that_starts_as_many_again() -> None:
    assert Launch.of({**TOLD, "WORLD_SIZE": "1"}) is None
    here = Launch.of({**TOLD, "LOCAL_WORLD_SIZE": "2"})
    assert here is not None
    assert here.command == ["torchrun", "--nproc-per-node=2", "-m"]
    elsewhere = Launch.of(TOLD)
    assert elsewhere is not None
    assert elsewhere.command == []


def test_a_signal_ends_the_waiting(port: int) -> None:
    code = (
        "from nanothink.training import launch; launch.FIRST_WORD_SECONDS = 0\n"
        "from nanothink.cli import app\n"
        "from nanothink.reporter import Reporter\n"
        "from nanothink.training.distributed import join\n"
        "class Printer(Reporter):\n"
        "    def note(self, message): print(message, flush=True)\n"
        "def command(args):\n"
        "    with join('cpu', Printer()): pass\n"
        "app._run = command\n"
        "app.main([])\n"
    )
    environment = {**os.environ, **TOLD, "MASTER_PORT": str(port)}
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == f"Waiting for 1 of 2 processes (rank 1) at 127.0.0.1:{port}.\n"
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said == "error: Interrupted; there was nothing to save.\n"
