from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from queue import Queue

from nanothink.training.interruption import StopRequest


def test_a_signal_raises_the_flag_and_nothing_else() -> None:
    with StopRequest() as stop:
        assert not stop()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop()
        assert stop.name == "SIGTERM"


def test_it_is_said_at_once_and_in_another_thread() -> None:
    said: Queue[tuple[str, threading.Thread]] = Queue()
    with StopRequest(lambda message: said.put((message, threading.current_thread()))):
        os.kill(os.getpid(), signal.SIGINT)
        message, thread = said.get(timeout=10)
    assert message.startswith("Stopping: ")
    assert thread is not threading.current_thread()
    assert not thread.is_alive()


def test_nothing_is_said_where_nothing_came() -> None:
    said: list[str] = []
    with StopRequest(said.append):
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
