from __future__ import annotations

import os
import signal
import subprocess
import sys

from nanothink.training.interruption import StopRequest


def test_a_signal_raises_the_flag_and_nothing_else() -> None:
    with StopRequest() as stop:
        assert not stop()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop()
        assert stop.name == "SIGTERM"


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
