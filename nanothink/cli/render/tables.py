"""Tables and small charts of block characters."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.cells import cell_len, set_cell_size
from rich.table import Table
from rich.text import Text

from nanothink.cli.render.console import count, out, print_json, printable, say, warning

Row = Sequence[str | Text]


def table(
    columns: Sequence[str], rows: Iterable[Sequence[object]], *, title: str | None = None, total: bool = False
) -> None:
    """Print a table on standard output. Columns whose name begins with '>' are right-aligned numbers.

    With ``total`` the last row is set off from the others. On a narrow terminal text is broken between words
    and parts of names; if that is not enough, the columns are split over several tables, each with the first
    column, so nothing is left out. Piped, a table is a heading and a line a row, whatever its width, for
    ``grep``, ``cut`` and ``awk``.
    """
    if title:
        say(title, "bold")
    texts = _texts(rows)
    if not out.is_terminal:
        for line in _aligned(columns, texts):
            say(line)
        return
    measured = _measure(columns, texts)
    for band in _bands([one.least for one in measured], out.width):
        widths = _widths([measured[i] for i in band], out.width - _frame_width(len(band)))
        cells = [[row[i] for i in band] for row in texts]
        out.print(_framed([columns[i] for i in band], cells, widths, total=total))


def _texts(rows: Iterable[Sequence[object]]) -> list[Row]:
    """Cells as they are shown: a number as a count, None as "-", anything else as its text."""

    def shown(cell: object) -> str | Text:
        if isinstance(cell, (int, float)):
            return count(cell)
        return cell if isinstance(cell, Text) else "-" if cell is None else str(cell)

    return [[shown(cell) for cell in row] for row in rows]


def facts(rows: Iterable[Sequence[object]], *, title: str = "") -> None:
    """Print names and values, a line each."""
    if title:
        say(title, "bold")
    texts = _texts(rows)
    if out.is_terminal:
        named = [(str(name), Text(printable(str(value)))) for name, value in texts]
        room = out.width - 4 - max((cell_len(name) for name, _ in named), default=0)
        grid = Table.grid(padding=(0, 2, 0, 0))
        for name, value in named:
            grid.add_row("", Text(name, style="dim", no_wrap=True), broken(value, room))
        out.print(grid)
        out.print()
    else:
        for line in _aligned(["", ""], texts, heading=False):
            say(line)


def result(
    found: Any, rows: Iterable[Sequence[object]], *, title: object, as_json: bool, notes: Iterable[str] = ()
) -> None:
    """Print what a command has made: as JSON, or as names and values; ``notes`` are warnings before it."""
    for line in notes:
        warning(line)
    if as_json:
        print_json(found)
    else:
        facts(rows, title=str(title))


def fits(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> bool:
    """True if a table keeps every cell on one line. Piped, every table does."""
    wanted = sum(one.natural for one in _measure(columns, _texts(rows))) + _frame_width(len(columns))
    return not out.is_terminal or wanted <= out.width


@dataclass(frozen=True)
class _Measured:
    """Least widths of a column: without a break, broken at blanks only, and broken at every joint."""

    natural: int
    words: int
    least: int
    is_number: bool


_PROSE = 24
"""Least width of a column of sentences before names are broken."""


def _measure(columns: Sequence[str], rows: Sequence[Row]) -> list[_Measured]:
    found = []
    for i, column in enumerate(columns):
        right = column.startswith(">")
        heading = column.lstrip(">")
        cells = [str(row[i]) for row in rows]
        natural = max(cell_len(line) for text in [heading, *cells] for line in text.split("\n"))
        if right:  # numbers are never broken, their headings are
            least = max(map(cell_len, [*cells, *_pieces(heading)]), default=0)
            found.append(_Measured(natural, least, least, is_number=True))
            continue
        texts = [heading, *cells]
        words = max((cell_len(word.strip()) for text in texts for word in _WORDS.findall(text)), default=0)
        words = max(words, min(natural, _PROSE))
        pieces = (cell_len(piece) for text in texts for piece in _pieces(text))
        found.append(_Measured(natural, words, max(pieces, default=0), is_number=False))
    return found


def _frame_width(n_columns: int) -> int:
    return 2 + 3 * (n_columns - 1)


def _bands(least: Sequence[int], room: int) -> Iterator[list[int]]:
    """Split columns into tables that fit; each has the first column."""
    band = [0]
    for i in range(1, len(least)):
        if len(band) > 1 and sum(least[j] for j in [*band, i]) + _frame_width(len(band) + 1) > room:
            yield band
            band = [0]
        band.append(i)
    yield band


def _widths(columns: Sequence[_Measured], room: int) -> list[int]:
    """Width of each column in ``room``: sentences are narrowed first, then names, numbers never."""
    widths = [column.natural for column in columns]
    floors = (
        [column.words for column in columns],
        [column.least for column in columns],
        [column.least if column.is_number else 1 for column in columns],
    )
    for floor in floors:
        while sum(widths) > room:
            spare = [i for i, width in enumerate(widths) if width > floor[i]]
            if not spare:
                break
            widths[max(spare, key=lambda i: widths[i])] -= 1
    return widths


def _pieces(text: str) -> list[str]:
    return [piece.strip() for word in _WORDS.findall(text) for piece in _JOINT.split(word)]


_WORDS = re.compile(r"\s*\d\S*\s(?:[KMGT]?B|%|s)\b\S*\s*|\s*\S+\s*|\s+")
"""Words; a number and its unit are one."""
_JOINT = re.compile(r"(?<=[^\W_][_=])(?=\w)|(?<=[\w.]/)(?=\w)|(?<=\w[.-])(?=[^\W\d])")
"""Points at which a name or a path may be broken."""


def broken(text: Text, width: int) -> Text:
    """Break ``text`` into lines of ``width`` cells between words, and a longer word at its joints."""
    lines = []
    for line in text.split("\n", allow_blank=True):
        offsets, used, at = [], 0, 0
        for word in _WORDS.findall(line.plain):
            for piece in [word] if cell_len(word.rstrip()) <= width else _JOINT.split(word):
                if used and used + cell_len(piece.rstrip()) > width:
                    offsets.append(at)
                    used = 0
                used += cell_len(piece)
                at += len(piece)
        for part in line.divide(offsets):
            part.rstrip()
            lines.append(part)
    return Text("\n", overflow="fold").join(lines)


def _framed(columns: Sequence[str], rows: Sequence[Row], widths: Sequence[int], *, total: bool) -> Table:
    built = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for column, width in zip(columns, widths, strict=True):
        built.add_column(
            broken(Text(column.lstrip(">")), width),
            justify="right" if column.startswith(">") else "left",
            width=width,
            overflow="fold",
        )
    for i, row in enumerate(rows):
        last = total and i == len(rows) - 1
        if last:
            built.add_section()
        cells = (Text(printable(cell)) if isinstance(cell, str) else cell for cell in row)
        built.add_row(
            *(broken(cell, width) for cell, width in zip(cells, widths, strict=True)),
            style="bold" if last else None,
        )
    return built


def _aligned(columns: Sequence[str], rows: Sequence[Row], *, heading: bool = True) -> Iterator[str]:
    """Yield a line for each row, with two blanks between columns."""
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
    """Print a horizontal bar chart of the number of values between neighbouring edges."""
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
    """Draw a series as a line of at most ``width`` block characters."""
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
