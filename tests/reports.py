"""A reporter for tests: hands what it receives to functions, and keeps the notes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nanothink.reporter import Reporter


def _ignored(*_: Any) -> None:
    pass


class Told(Reporter):
    """Calls ``note(message)``, ``progress(stage, done, total)`` and ``event(event)``, each if given."""

    def __init__(
        self,
        note: Callable[[str], Any] = _ignored,
        progress: Callable[[str, int, int], Any] = _ignored,
        event: Callable[[Any], Any] = _ignored,
    ) -> None:
        self._note, self._progress, self._event = note, progress, event

    def note(self, message: str) -> None:
        self._note(message)

    def progress(self, stage: str, done: int, total: int) -> None:
        self._progress(stage, done, total)

    def event(self, event: object) -> None:
        self._event(event)
