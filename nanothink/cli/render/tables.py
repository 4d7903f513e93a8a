"""Tables and small charts of block characters."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence

from rich import box
from rich.cells import cell_len, set_cell_size
from rich.table import Table
from rich.text import Text

from nanothink.cli.render.console import count, out, printable, say

Row = Sequence[str | Text]


def table(
    columns: Sequence[str], rows: Sequence[Row], *, title: str | None = None, total: bool = False
) -> None:
    """A table on standard output. Columns whose name begins with '>' are right-aligned numbers.

    With ``total`` the last row is set off from the others. Piped, a table is a heading and a line a row,
    whatever its width: for ``grep``, ``cut`` and ``awk``.
    """
    if title:
        say(title, "bold")
    if out.is_terminal:
        out.print(_framed(columns, rows, total=total))
        return
    for line in _aligned(columns, rows):
        say(line)


def facts(rows: Iterable[Sequence[str]], *, title: str = "") -> None:
    """Names and what they stand for, a line each."""
    if title:
        say(title, "bold")
    if out.is_terminal:
        grid = Table.grid(padding=(0, 2), pad_edge=True)
        for name, value in rows:
            grid.add_row(Text(name, style="dim", no_wrap=True), Text(printable(value), overflow="fold"))
        out.print(grid)
        out.print()
    else:
        for line in _aligned(["", ""], list(rows), heading=False):
            say(line)


def fits(columns: Sequence[str], rows: Sequence[Row]) -> bool:
    """Whether a table keeps every cell on one line. Piped, every table does."""
    unbounded = out.options.update(width=10_000)
    wanted = out.measure(_framed(columns, rows, total=False), options=unbounded).maximum
    return not out.is_terminal or wanted <= out.width


def _framed(columns: Sequence[str], rows: Sequence[Row], *, total: bool) -> Table:
    built = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for i, column in enumerate(columns):
        right = column.startswith(">")
        # Where there is no room, texts and headings are broken, numbers never.
        least = max((cell_len(str(row[i])) for row in rows), default=0) if right else None
        built.add_column(
            column.lstrip(">"), justify="right" if right else "left", min_width=least, overflow="fold"
        )
    for i, row in enumerate(rows):
        last = total and i == len(rows) - 1
        if last:
            built.add_section()
        built.add_row(
            *(Text(printable(cell)) if isinstance(cell, str) else cell for cell in row),
            style="bold" if last else None,
        )
    return built


def _aligned(columns: Sequence[str], rows: Sequence[Row], *, heading: bool = True) -> Iterator[str]:
    """A line a row, with two blanks between columns."""
    cells = [[" ".join(str(cell).split("\n")) for cell in row] for row in rows]
    if heading:
        cells.insert(0, [column.lstrip(">") for column in columns])
    widths = [max(map(cell_len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        padded = (
            set_cell_size(" " * (width - cell_len(cell)) + cell if name.startswith(">") else cell, width)
            for cell, width, name in zip(line, widths, columns, strict=True)
        )
        yield "  ".join(padded).rstrip()


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
