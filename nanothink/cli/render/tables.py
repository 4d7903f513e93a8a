"""Tables and small charts of block characters."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from nanothink.cli.render.console import count, out, printable

Row = Sequence[RenderableType | None]


def table(
    columns: Sequence[str], rows: Sequence[Row], *, title: str | None = None, total: bool = False
) -> None:
    """A table on standard output. Columns whose name begins with '>' are right-aligned numbers.

    Piped, it has no frame and keeps its width, so that ``cut`` and ``awk`` can read it.
    """
    out.print(build_table(columns, rows, title=title, total=total))


def build_table(
    columns: Sequence[str], rows: Sequence[Row], *, title: str | None = None, total: bool = False
) -> Table:
    """The same table as a renderable. With ``total`` the last row is set off from the others."""
    built = Table(
        title=Text(printable(title)) if title else None,
        title_justify="left",
        title_style="bold",
        box=_box(),
        pad_edge=False,
        header_style="bold",
    )
    for column in columns:
        right = column.startswith(">")
        built.add_column(
            column.lstrip(">"), justify="right" if right else "left", no_wrap=right, overflow="fold"
        )
    for i, row in enumerate(rows):
        last = total and i == len(rows) - 1
        if last:
            built.add_section()
        built.add_row(
            *(escape(printable(cell)) if isinstance(cell, str) else cell for cell in row),
            style="bold" if last else None,
        )
    return built


def _box() -> Any:
    from rich import box

    return box.SIMPLE_HEAD if out.is_terminal else box.SIMPLE


def histogram(title: str, counts: Sequence[int], edges: Sequence[float], *, unit: str) -> None:
    """A horizontal bar chart: how many values fall between neighbouring edges."""
    out.print(Text(title, style="bold"))
    labels = [f"{count(low)} - {count(high)}" for low, high in itertools.pairwise(edges)]
    width = max(map(len, labels))
    number_width = max(len(count(c)) for c in counts)
    room = max(10, min(60, out.width - width - number_width - len(unit) - 8))
    tallest = max([*counts, 1])
    for label, value in zip(labels, counts, strict=True):
        bar = "█" * round(room * value / tallest) or ("▏" if value else "")
        line = Text(f"  {label:>{width}} {unit} ")
        line.append(f"{count(value):>{number_width}} ")
        line.append(bar, style="cyan")
        out.print(line)


_TICKS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """The course of a number as a line of block characters, ``width`` at most."""
    finite = [v for v in values if math.isfinite(v)]
    if not finite:
        return ""
    if len(finite) > width:
        step = len(finite) / width
        groups = [finite[int(i * step) : max(int((i + 1) * step), int(i * step) + 1)] for i in range(width)]
        finite = [sum(g) / len(g) for g in groups]
    low, high = min(finite), max(finite)
    if high == low:
        return _TICKS[0] * len(finite)
    return "".join(_TICKS[round((v - low) / (high - low) * (len(_TICKS) - 1))] for v in finite)
