"""Progress bars with ETA, and what stands for them where there is no terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from nanothink.cli.render.console import err, note, printable


class Bars:
    """Progress bars with ETA for (label, done, total), and notes above them.

    Without a terminal a bar is silent unless it runs long; then it says so every ten seconds.
    """

    _PLAIN_SECONDS = 10.0

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}
        self._last_line = time.monotonic()

    def __call__(self, label: str, done: int, total: int) -> None:
        if self._progress is None:
            if time.monotonic() - self._last_line >= self._PLAIN_SECONDS:
                self._last_line = time.monotonic()
                note(f"{label}: {100 * done / max(1, total):.0f} %")
            return
        if label not in self._tasks:
            self._tasks[label] = self._progress.add_task(label, total=total)
        self._progress.update(self._tasks[label], completed=done, total=total)
        if done >= total:
            self._progress.update(self._tasks[label], visible=False)

    def note(self, message: str) -> None:
        if self._progress is None:
            note(message)
        else:
            self._progress.console.print(Text(printable(message), style="dim"), soft_wrap=True)


def progress_columns() -> list[Any]:
    return [
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    ]


@contextmanager
def progress() -> Iterator[Bars]:
    if not err.is_terminal:
        yield Bars(None)
        return
    with Progress(*progress_columns(), console=err, transient=True) as bars:
        yield Bars(bars)
