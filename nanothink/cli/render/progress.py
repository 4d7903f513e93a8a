"""Progress bars with ETA, and what stands for them where there is no terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from nanothink.cli.render.console import duration, err, note, print_note, redraws


class Bars:
    """Progress bars with ETA for (label, done, total), and notes above them.

    A total of 0 is one that nobody knows. Where nothing can be redrawn a bar is silent unless it runs long;
    then it says so every ten seconds.
    """

    _PLAIN_SECONDS = 10.0

    def __init__(self, progress: Progress | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}
        self._clock = clock
        self._said: set[str] = set()
        self._began: dict[str, tuple[float, int]] = {}
        self._start = self._last_line = clock()

    def __call__(self, label: str, done: int, total: int) -> None:
        if self._progress is None:
            self._plainly(label, done, total)
            return
        if label not in self._tasks:
            self._tasks[label] = self._progress.add_task(label, total=total or None)
        self._progress.update(self._tasks[label], completed=done, total=total or None)
        if 0 < total <= done:  # the same label may come again, and begins anew then
            self._progress.remove_task(self._tasks.pop(label))

    def _plainly(self, label: str, done: int, total: int) -> None:
        now = self._clock()
        if not total:
            if now - self._start >= self._PLAIN_SECONDS / 2:  # what goes before it has not been short either
                note(f"{label}: it cannot be told how long that takes")
            return
        since, first = self._began.setdefault(label, (now, done))
        if done >= total:
            del self._began[label]
        elif now - self._last_line >= self._PLAIN_SECONDS:
            self._last_line = now
            eta = f", ETA {duration((total - done) * (now - since) / (done - first))}" if done > first else ""
            note(f"{label}: {100 * done / total:.0f} %{eta}")

    def note(self, message: str) -> None:
        """A line; once, though several steps of the work should say it."""
        if message in self._said:
            return
        self._said.add(message)
        if self._progress is None:
            note(message)
        else:
            print_note(self._progress.console, message)


class _Label(ProgressColumn):
    """What the bar is of. A long name is cut: the times beside it would be otherwise."""

    _OTHERS = 40

    def render(self, task: Task) -> Text:
        label = Text(task.description, no_wrap=True)
        label.truncate(max(10, err.width - self._OTHERS), overflow="ellipsis")
        return label


class _Remaining(TimeRemainingColumn):
    """Rich's estimate, or that of whoever knows better: a task's field ``eta_seconds``."""

    def render(self, task: Task) -> Text:
        known = task.fields.get("eta_seconds")
        if known is None:
            return super().render(task)
        minutes, seconds = divmod(round(known), 60)
        return Text(f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}", style="progress.remaining")


def progress_columns() -> list[Any]:
    return [
        _Label(),
        BarColumn(bar_width=None),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        _Remaining(),
    ]


@dataclass(frozen=True)
class _ShortOfTheEdge:
    """Two columns are left free.

    A terminal echoes Ctrl-C as ``^C``. After a full line that begins a new one, and the bar is not erased.
    """

    drawn: RenderableType

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from console.render(self.drawn, options.update_width(max(1, options.max_width - 2)))


class ProgressBars(Progress):
    """Rich's, with room for a ``^C``."""

    def get_renderable(self) -> RenderableType:
        return _ShortOfTheEdge(super().get_renderable())


@contextmanager
def progress() -> Iterator[Bars]:
    if not redraws():
        yield Bars(None)
        return
    with ProgressBars(*progress_columns(), console=err, transient=True) as bars:
        yield Bars(bars)
