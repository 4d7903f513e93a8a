from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from queue import Queue

import pytest
from reports import Told

from nanothink.training.interruption import STOPPING, StopRequest, StopRequests


@pytest.mark.parametrize("sent", STOPPING)
def test_a_signal_raises_the_flag_and_nothing_else(sent: signal.Signals) -> None:
    with StopRequest() as stop:
        assert not stop()
        os.kill(os.getpid(), sent)
        assert stop()
        assert stop.name == sent.name


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("sent", "after_seconds", "forwarded", "is_second"),
    [
        ("SIGTERM SIGTERM", 0.01, False, False),  # timeout(1)
        ("SIGTERM SIGTERM", 2.0, False, True),
        ("SIGHUP SIGHUP", 2.0, False, False),  # a terminal that is closed
        ("SIGXCPU SIGXCPU", 2.0, False, False),  # each second
        ("SIGTERM SIGHUP", 0.01, False, False),  # systemd
        ("SIGUSR1 SIGTERM", 0.01, False, False),
        ("SIGUSR1 SIGTERM", 60.0, False, True),
        ("SIGHUP SIGINT", 0.01, False, True),
        ("SIGINT SIGINT", 0.01, False, True),
        ("SIGINT SIGINT", 0.01, True, False),  # the terminal's, and torchrun's
        ("SIGINT SIGINT", 2.0, True, True),
    ],
)
def test_signals_of_one_request_are_no_second_one(
    sent: str, after_seconds: float, forwarded: bool, is_second: bool
) -> None:
    now = [100.0]
    requests = StopRequests(forwarded=forwarded, clock=lambda: now[0])
    first, then = (signal.Signals[name] for name in sent.split())
    assert not requests.is_second(first)
    now[0] += after_seconds
    assert requests.is_second(then) == is_second


def test_a_second_request_does_not_wait_for_a_call_of_a_library() -> None:
    """pbkdf2 computes for minutes and never lets the main thread run a handler, but other threads run."""
    code = (
        "import hashlib\n"
        "from nanothink.reporter import Reporter\n"
        "from nanothink.training.interruption import StopRequest\n"
        "class Printer(Reporter):\n"
        "    def note(self, message): print(message, flush=True)\n"
        "with StopRequest(Printer()):\n"
        "    print('computing', flush=True)\n"
        "    hashlib.pbkdf2_hmac('sha256', b'', b'', 1 << 30)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "computing\n"
        process.send_signal(signal.SIGUSR1)
        assert process.stdout.readline().startswith("Stopping: SIGUSR1 came.")
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130


def test_a_reader_that_has_stopped_does_not_hold_up_the_end() -> None:
    code = (
        "import os, signal\n"
        "from nanothink.training.interruption import StopRequest\n"
        "os.set_blocking(2, False)\n"
        "try:\n"
        "    while True: os.write(2, bytes(4096))\n"
        "except BlockingIOError: os.set_blocking(2, True)\n"
        "with StopRequest():\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
    )
    read, write = os.pipe()
    done = subprocess.run([sys.executable, "-c", code], stderr=write, timeout=30, check=False)
    os.close(write)
    os.close(read)
    assert done.returncode == 130


def test_a_signal_to_a_forked_child_is_none_to_its_parent() -> None:
    heard: list[str] = []
    with StopRequest(Told(heard.append)) as stop:
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)
        os.waitpid(child, 0)
        assert not stop()
    assert heard == []


def test_it_is_said_at_once_and_in_another_thread() -> None:
    said: Queue[tuple[str, threading.Thread]] = Queue()
    with StopRequest(Told(lambda message: said.put((message, threading.current_thread())))):
        os.kill(os.getpid(), signal.SIGINT)
        message, thread = said.get(timeout=10)
    assert message.startswith("Stopping: ")
    assert thread is not threading.current_thread()
    assert not thread.is_alive()


def test_nothing_is_said_where_nothing_came() -> None:
    said: list[str] = []
    with StopRequest(Told(said.append)):
        pass
    assert said == []


def test_the_second_signal_brings_the_cursor_back_on_a_terminal() -> None:
    code = (
        "import os, signal\n"
        "from nanothink.training.interruption import StopRequest\n"
        "with StopRequest():\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
    )
    ours, theirs = os.openpty()
    done = subprocess.run([sys.executable, "-c", code], stderr=theirs, timeout=30, check=False)
    os.close(theirs)
    assert done.returncode == 130
    assert b"\x1b[?25h" in os.read(ours, 1000)
    os.close(ours)


def test_the_handlers_of_before_come_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    with StopRequest():
        assert signal.getsignal(signal.SIGINT) != before
    assert signal.getsignal(signal.SIGINT) == before


def test_the_second_signal_leaves_at_once() -> None:
    code = (
        "import os, signal, time\n"
        "from nanothink.training.interruption import StopRequest\n"
        "with StopRequest():\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('once', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(60)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False
    )
    assert (done.returncode, done.stdout) == (130, "once\n")
    assert "Stopped at once" in done.stderr
