"""Stopping on a signal without losing anything.

A handler only raises a flag, and says so, since a step may take a minute; the loop looks at it between steps,
saves, and leaves. Whoever presses
Ctrl-C twice does not want to wait: the second signal ends the process at once, and the rolling
checkpoint on disk stays as it was (it is written whole or not at all).
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from nanothink.errors import InterruptedRun

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """A context in which SIGINT and SIGTERM raise a flag. Calling it asks whether the flag is up.

    Args:
        quiet: leave it to another process of the run to say that it stops.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._signal: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __call__(self) -> bool:
        return self._signal is not None

    @property
    def name(self) -> str:
        return self._signal.name if self._signal is not None else "a signal to another process"

    def __enter__(self) -> StopRequest:
        # Python delivers signals to the main thread only; elsewhere somebody else decides when to stop.
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None:
            os.write(2, b"\nStopped at once, without saving: a resume goes on from the last state on disk.\n")
            os._exit(InterruptedRun.exit_code)
        self._signal = signal.Signals(number)
        if not self._quiet:
            os.write(2, b"\nStopping: this step is finished, then all is saved. Once more leaves at once.\n")
