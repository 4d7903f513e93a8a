"""Stopping on a signal without losing anything.

A handler only raises a flag; the loop looks at it between steps, saves, and leaves. A second request ends the
process at once, and the rolling checkpoint on disk stays as it was (it is written whole or not at all).

Python runs a handler between two operations of the main thread, and one operation may take a minute, or wait
for another machine. ``SignalListener`` hears of a signal at once, in a thread of its own: that the run stops
is said there, and a second request does not wait.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

from nanothink.errors import InterruptedRun
from nanothink.reporter import SILENT, Reporter

STOPPING = (
    *(signal.SIGINT, signal.SIGTERM, signal.SIGHUP),
    *(signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU),  # a scheduler's warning that time is nearly up
)
"""Signals that ask a process to stop."""

_INSISTING = (signal.SIGINT, signal.SIGTERM)
_ONE_REQUEST_SECONDS = 1.0
_SHOW_CURSOR = b"\x1b[?25h"
"""Escape that shows a terminal's cursor, which a progress bar has hidden and cannot show any more."""


def stopping_signals() -> list[signal.Signals]:
    """Signals of STOPPING that this process may handle: one that it inherited as ignored (nohup) stays so."""
    # None: a handler that is not Python's, which could not be put back.
    return [number for number in STOPPING if signal.getsignal(number) not in (signal.SIG_IGN, None)]


class StopRequests:
    """Distinguishes a second request from further signals of the first one.

    One request often comes as several signals: ``timeout`` sends SIGTERM twice, a terminal that is closed
    sends SIGHUP twice, systemd sends SIGTERM and SIGHUP, SIGXCPU comes each second, and ``torchrun`` passes
    on what its processes have got already. So a second request is SIGINT, or SIGTERM more than a second
    after the first signal.

    Args:
        forwarded: signals may come a second time by way of another process (torchrun).
        clock: seconds.
    """

    def __init__(self, *, forwarded: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        self._forwarded, self._clock = forwarded, clock
        self._asked_at: float | None = None

    def is_second(self, number: int) -> bool:
        now = self._clock()
        if self._asked_at is None:
            self._asked_at = now
            return False
        late = now - self._asked_at > _ONE_REQUEST_SECONDS
        return number in _INSISTING and (late or (number == signal.SIGINT and not self._forwarded))


class SignalListener:
    """Context in which another thread calls ``hear`` with each signal of STOPPING that has a handler.

    It does so at once, even while the main thread is in a long call of a library that lets other threads
    run. Outside the main thread it does nothing.
    """

    n_active = 0

    def __init__(self, hear: Callable[[signal.Signals], None]) -> None:
        self._hear = hear
        self._thread: threading.Thread | None = None

    def __enter__(self) -> SignalListener:
        if threading.current_thread() is threading.main_thread():
            self._to_read, self._to_write = os.pipe()
            os.set_blocking(self._to_write, False)
            self._previous = signal.set_wakeup_fd(self._to_write, warn_on_full_buffer=False)
            self._thread = threading.Thread(target=self._listen, daemon=True)
            self._thread.start()
            SignalListener.n_active += 1
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread is None:
            return
        SignalListener.n_active -= 1
        signal.set_wakeup_fd(self._previous)
        os.write(self._to_write, b"\0")
        self._thread.join()
        os.close(self._to_read)
        os.close(self._to_write)
        self._thread = None

    def _listen(self) -> None:
        while number := os.read(self._to_read, 1)[0]:
            if number in STOPPING:
                self._hear(signal.Signals(number))


def _stop_listening() -> None:
    if SignalListener.n_active:
        signal.set_wakeup_fd(-1)


# The pipe is the parent's: a signal to a child is none to it.
os.register_at_fork(after_in_child=_stop_listening)


class StopRequest:
    """Context in which the signals of STOPPING set a flag; calling it reads the flag.

    Args:
        reporter: gets a note, from another thread, that the run stops.
        forwarded: see ``StopRequests``.
    """

    def __init__(self, reporter: Reporter = SILENT, *, forwarded: bool = False) -> None:
        self._reporter = reporter
        self._signal: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}
        # Two views of the same signals: each thread has its own.
        self._handled, self._heard = (StopRequests(forwarded=forwarded) for _ in range(2))
        self._listener = SignalListener(self._hear)
        self._said = False

    def __call__(self) -> bool:
        return self._signal is not None

    @property
    def name(self) -> str:
        return self._signal.name if self._signal is not None else "a signal to another process"

    def __enter__(self) -> StopRequest:
        # Python delivers signals to the main thread only; elsewhere somebody else decides when to stop.
        if threading.current_thread() is threading.main_thread():
            self._listener.__enter__()
            for number in stopping_signals():
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
        self._listener.__exit__()

    def _hear(self, number: signal.Signals) -> None:
        if self._heard.is_second(number):
            _leave_at_once()
        if not self._said:
            self._said = True
            with suppress(OSError):  # whoever read it may have gone; the run is saved all the same
                self._reporter.note(
                    f"Stopping: {number.name} came. This step is finished, then everything is saved. A "
                    "second Ctrl-C or SIGTERM ends at once."
                )

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._handled.is_second(number):
            _leave_at_once()
        if self._signal is None:
            self._signal = signal.Signals(number)


def _leave_at_once() -> None:
    last_words("\nStopped at once, without saving: a resume continues from the last state on disk.\n")
    os._exit(InterruptedRun.exit_code)


def last_words(message: str = "") -> None:
    """Write to standard error past all buffers, and bring a terminal's cursor back."""
    with suppress(OSError, ValueError):
        if select.select([], [2], [], 0)[1]:  # not to wait for a reader that has stopped
            os.write(2, (_SHOW_CURSOR if os.isatty(2) else b"") + message.encode())
