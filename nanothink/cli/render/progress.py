"""Progress bars with an ETA; plain lines where there is no terminal."""

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
)
from rich.table import Column
from rich.text import Text

from nanothink.cli.render.console import duration, err, note, print_note, redraws
from nanothink.reporter import Reporter


class BarReporter(Reporter):
    """Shows progress as bars with an ETA, and notes above them.

    Where nothing can be redrawn, a stage that takes longer than ten seconds prints a line every ten seconds.
    """

    _PLAIN_SECONDS = 10.0

    def __init__(self, bars: Progress | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}
        self._paces: dict[str, _Pace] = {}
        self._clock = clock
        self._said: set[str] = set()
        self._start = self._last_line = clock()

    def progress(self, stage: str, done: int, total: int) -> None:
        pace = self._paces.setdefault(stage, _Pace(self._clock, done))
        pace.reach(done, total)
        if self._bars is None:
            self._plainly(stage, pace)
        else:
            if stage not in self._tasks:
                self._tasks[stage] = self._bars.add_task(stage, total=None, eta=pace.remaining)
            self._bars.update(self._tasks[stage], completed=done, total=total or None)
        if 0 < total <= done:
            del self._paces[stage]
            if self._bars is not None:
                self._bars.remove_task(self._tasks.pop(stage))

    def _plainly(self, stage: str, pace: _Pace) -> None:
        now = self._clock()
        if not pace.total:
            if now - self._start >= self._PLAIN_SECONDS / 2:  # what goes before it has not been short either
                note(f"{stage}: it cannot be told how long that takes")
        elif pace.done < pace.total and now - max(pace.began, self._last_line) >= self._PLAIN_SECONDS:
            self._last_line = now
            left = pace.remaining()
            eta = "" if left is None else f", ETA {duration(left)}"
            note(f"{stage}: {100 * pace.done / pace.total:.0f} %{eta}")

    def note(self, message: str) -> None:
        """Show a line once, even if several stages report it."""
        if message in self._said:
            return
        self._said.add(message)
        if self._bars is None:
            note(message)
        else:
            print_note(self._bars.console, message)


class _Pace:
    """Remaining time of a stage by its mean speed, counted down between its reports.

    Rich's own estimate stands still between two reports, and knows none that are half a minute apart.
    """

    def __init__(self, clock: Callable[[], float], done: int) -> None:
        self._clock, self._first = clock, done
        self.began = self._reported = clock()
        self.done = self.total = done

    def reach(self, done: int, total: int) -> None:
        self.done, self.total, self._reported = done, total, self._clock()

    def remaining(self) -> float | None:
        """Seconds; None before the second report, and once the stage is later than they said."""
        if self.done <= self._first:
            return None
        per_unit = (self._reported - self.began) / (self.done - self._first)
        left = (self.total - self.done) * per_unit - (self._clock() - self._reported)
        return left if left >= 0 else None


class _Remaining(ProgressColumn):
    """Remaining time: what the task's field ``eta`` returns; unknown where that is None."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        eta = task.fields.get("eta")
        known = eta() if eta is not None else None
        if known is None:
            return Text("-:--:--", style="progress.remaining")
        minutes, seconds = divmod(round(known), 60)
        return Text(f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}", style="progress.remaining")


def progress_columns() -> list[Any]:
    names = max(10, err.width - 40)
    return [
        # A long name of a stage is cut, so that the times beside it are not.
        TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, max_width=names)),
        BarColumn(bar_width=None),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        _Remaining(),
    ]


@dataclass(frozen=True)
class _ShortOfTheEdge:
    """Leaves two columns free: an echoed ``^C`` would begin another line, which is not cleared."""

    drawn: RenderableType

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from console.render(self.drawn, options.update_width(max(1, options.max_width - 2)))


class ProgressBars(Progress):
    """Rich's, with room for a ``^C``."""

    def get_renderable(self) -> RenderableType:
        return _ShortOfTheEdge(super().get_renderable())


@contextmanager
def reporting() -> Iterator[BarReporter]:
    if not redraws():
        yield BarReporter()
        return
    with ProgressBars(*progress_columns(), console=err, transient=True) as bars:
        yield BarReporter(bars)
