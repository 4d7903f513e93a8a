"""Stopping on a signal without losing anything.

A handler only raises a flag; the loop looks at it between steps, saves, and leaves. A step may take a
minute, so that it stops is said at once, and by a thread: a handler that printed could come in the middle
of a line that is being printed. Whoever presses Ctrl-C twice does not want to wait: the second signal ends
the process at once, and the rolling checkpoint on disk stays as it was (it is written whole or not at all).
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

from nanothink.errors import InterruptedRun

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SHOW_CURSOR = b"\x1b[?25h"
"""To a terminal: whoever drew a progress bar there has no chance any more to bring the cursor back."""


class StopRequest:
    """A context in which SIGINT and SIGTERM raise a flag. Calling it asks whether the flag is up.

    Args:
        say: hears, in another thread, that the run stops. None: somebody else says so.
    """

    def __init__(self, say: Callable[[str], None] | None = None) -> None:
        self._say = say
        self._to_say = threading.Event()
        self._speaker: threading.Thread | None = None
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
            if self._say is not None:
                self._speaker = threading.Thread(target=self._speak, args=(self._say,), daemon=True)
                self._speaker.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
        if self._speaker is not None:
            self._to_say.set()
            self._speaker.join()

    def _speak(self, say: Callable[[str], None]) -> None:
        self._to_say.wait()
        if self._signal is not None:
            with suppress(OSError):  # whoever read it may have gone; the run is saved all the same
                say("Stopping: this step is finished, then all is saved. Once more leaves at once.")

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None:
            if os.isatty(2):
                os.write(2, _SHOW_CURSOR)
            os.write(2, b"\nStopped at once, without saving: a resume goes on from the last state on disk.\n")
            os._exit(InterruptedRun.exit_code)
        self._signal = signal.Signals(number)
        self._to_say.set()
