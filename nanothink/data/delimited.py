"""Rows of CSV files, with quotes (RFC 4180), and of TSV files, without (IANA text/tab-separated-values).

A missing quote merges many rows into one field. Fields that span lines are therefore counted, one that seems
to hold rows is named in a warning, and one that never ends is an error at the line where it begins.
"""

from __future__ import annotations

import csv
import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from nanothink.data.lines import MAX_LINE_BYTES, Problem, shown
from nanothink.data.text_files import Findings, Row, file_size, no_such_field, open_text, reading
from nanothink.errors import DataError, counted

DELIMITERS = {".csv": ",", ".tsv": "\t"}

_DELIMITER_NAMES = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "vertical bars"}

_LINE_END = re.compile(r"\r\n|\r|\n")
_MANY_LINES = 100
"""Lines in a quoted field above which a missing quote is more likely than a long text."""
_NAMED = 3


def table_rows(
    path: Path, delimiter: str, text_field: str, findings: Findings, *, quotes: bool
) -> Iterator[Row]:
    """Yield the rows below the header, each with the line where it begins.

    With ``quotes`` a field in double quotes may hold delimiters, line ends, and doubled quotes; without, a
    quote is an ordinary character.
    """
    total = file_size(path)
    limit = csv.field_size_limit(MAX_LINE_BYTES)  # belongs to the whole process: put back below
    spans = _Spans(path, delimiter, findings)
    end_of_last = n_quoted = first_quoted = 0
    try:
        with reading(path), open_text(path, newline="") as file:
            reader = csv.reader(
                file,
                delimiter=delimiter,
                strict=True,
                quoting=csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE,
            )
            header = next(reader, [])
            column, source, group = _columns(path, header, text_field, delimiter, quotes=quotes)
            end_of_last = reader.line_num
            for count, row in enumerate(reader, 1):
                line, end_of_last, n_lines = end_of_last + 1, reader.line_num, reader.line_num - end_of_last
                if count % 1000 == 0:
                    findings.advance(file.buffer.raw.tell(), total)  # type: ignore[attr-defined]
                if n_lines > 1:
                    spans.look(line, row, len(header))
                if not row:
                    findings.empty += 1
                elif len(row) != len(header):
                    reason = f"the row has {counted(len(row), 'field')}, the header has {len(header)}"
                    findings.bad_rows.add(Problem(shown(path), line, 1, reason))
                else:
                    text = row[column]
                    if not quotes and text[:1] == text[-1:] == '"' and len(text) > 1:
                        n_quoted += 1
                        first_quoted = first_quoted or line
                    origin = row[source] if source is not None else ""
                    own_group = row[group] if group is not None else None
                    yield Row(line, origin or shown(f"{path.name}:{line}"), text, own_group)
    except csv.Error as error:
        raise _unreadable(path, delimiter, end_of_last + 1, reader.line_num, str(error), quotes) from None
    finally:
        csv.field_size_limit(limit)
    spans.tell()
    if n_quoted:
        findings.warnings.add(_kept_quotes(path, n_quoted, first_quoted))
    findings.advance(total, total)


def _columns(
    path: Path, header: list[str], text_field: str, delimiter: str, *, quotes: bool
) -> tuple[int, int | None, int | None]:
    """Indices of the columns of text, source and group."""
    if text_field not in header:
        if other := _other_delimiter(header, delimiter):
            raise DataError(_wrong_delimiter(path, delimiter, other, named=header[0].startswith("sep=")))
        if not quotes and f'"{text_field}"' in header:
            raise DataError(
                f"{shown(path)} has no '{text_field}', but a '\"{text_field}\"': its fields are in quotes. "
                "Import it with --quotes."
            )
        raise no_such_field(shown(path), text_field, header)
    if header.count(text_field) > 1:
        raise DataError(
            f"{shown(path)} has {header.count(text_field)} columns '{text_field}'. Rename all but one."
        )
    source, group = (
        header.index(name) if name in header and name != text_field else None for name in ("source", "group")
    )
    return header.index(text_field), source, group


def _other_delimiter(header: list[str], delimiter: str) -> str:
    """The likely delimiter of a header that ``delimiter`` does not split; empty if there is none."""
    if header == ["sep=", ""]:
        return delimiter
    if len(header) != 1:
        return ""
    if header[0].startswith("sep=") and len(header[0]) == 5:  # Excel's way to name it
        return header[0][4]
    others = [other for other in _DELIMITER_NAMES if other != delimiter]
    most = max(others, key=header[0].count)
    return most if most in header[0] else ""


def _wrong_delimiter(path: Path, delimiter: str, other: str, *, named: bool) -> str:
    """Message with the command that converts the file. ``named``: its first line is Excel's ``sep=``."""
    means = f"{path.suffix.lower()} means {_DELIMITER_NAMES[delimiter]}"
    what = f"{shown(path)} separates its columns with {_DELIMITER_NAMES.get(other, repr(other))}, and {means}"
    for suffix, own in DELIMITERS.items():
        if own == other and not named:
            return f"{what}. Rename it to {path.stem}{suffix}."
    skip = "sys.stdin.readline(); " if named else ""
    rows = f"csv.reader(sys.stdin, delimiter={other!r}, strict=True)"
    program = f"import csv, sys; {skip}csv.writer(sys.stdout).writerows({rows})"
    command = f"PYTHONUTF8=1 python3 -c {shlex.quote(program)} < {shlex.quote(str(path))}"
    return f"{what}. Convert it: {command} > {shlex.quote(f'{path.stem}-commas.csv')}"


class _Spans:
    """Counts fields that span lines, and names those that look like rows merged by a missing quote."""

    def __init__(self, path: Path, delimiter: str, findings: Findings) -> None:
        self._path, self._delimiter, self._findings = path, delimiter, findings
        self._n_odd = 0

    def look(self, line: int, row: list[str], n_columns: int) -> None:
        """Count the fields of a row that begins in this line."""
        for field in row:
            lines = _LINE_END.split(field)
            if len(lines) > 1:
                self._findings.n_spanning += 1
                self._findings.first_spanning = self._findings.first_spanning or line
                like_rows = n_columns > 1 and all(
                    inner.count(self._delimiter) == n_columns - 1 for inner in lines[1:]
                )
                if like_rows or len(lines) > _MANY_LINES:
                    self._name(line, len(lines), like_rows)
            line += len(lines) - 1

    def _name(self, line: int, n_lines: int, like_rows: bool) -> None:
        self._n_odd += 1
        if self._n_odd <= _NAMED:
            looks = ", and every further one of them looks like a row" if like_rows else ""
            reason = f"one quoted field takes {n_lines:,} lines from here on{looks}: is a quote missing?"
            self._findings.warnings.add(Problem(shown(self._path), line, 1, reason))

    def tell(self) -> None:
        if self._n_odd > _NAMED:
            reason = f"{self._n_odd - _NAMED:,} more fields take as many lines or look like rows"
            self._findings.warnings.add(Problem(shown(self._path), 0, 0, reason))


def _kept_quotes(path: Path, n_texts: int, first: int) -> Problem:
    """Warning about quoted texts in a table read without quotes: a spreadsheet may have added the quotes."""
    texts = "1 text begins and ends" if n_texts == 1 else f"{n_texts:,} texts begin and end"
    reason = (
        f"{texts} with a double quote, from here on, and keeps it; if the file puts its fields in "
        "quotes, as spreadsheets do, import it with --quotes"
    )
    return Problem(shown(path), first, 1, reason)


def _unreadable(path: Path, delimiter: str, first: int, last: int, why: str, quotes: bool) -> DataError:
    """Make the error for a row that begins in line ``first`` and could not be read beyond line ``last``."""
    place = f"{shown(path)}, line {last}"
    if not quotes:
        if "field limit" in why:
            size = f"{MAX_LINE_BYTES // 2**20} MiB"
            return DataError(
                f"{place}: a field takes more than {size}, and no record is that long. Cut its text."
            )
        return DataError(f"{place}: {why}.")
    began = _open_quote(path, delimiter, first, last)
    field = f"the quoted field that begins in line {began}"
    remedy = (
        "Close its quote, or write a quote that belongs to the text twice. If quotes are text like any "
        "other in this file, add --no-quotes"
    )
    if "unexpected end" in why:
        return DataError(f"{shown(path)}, line {began}: {field} has no end. {remedy}")
    if "field limit" in why:
        size = f"{MAX_LINE_BYTES // 2**20} MiB"
        return DataError(f"{shown(path)}, line {began}: {field} takes more than {size}. {remedy}")
    if "expected after" in why:
        return DataError(f"{place}: text follows the end of {field}. {remedy}")
    return DataError(f"{place}: {why}. Check the quotes there.")


def _open_quote(path: Path, delimiter: str, first: int, last: int) -> int:
    """Find the line where the last quoted field of these lines begins, by RFC 4180's rules."""
    began, at_start, inside = first, True, False
    with open_text(path, newline="") as file:
        for number, line in enumerate(itertools.islice(file, first - 1, last), first):
            place = 0
            while place < len(line):
                if inside:
                    place = line.find('"', place)
                    if place < 0:
                        break
                    if line[place + 1 : place + 2] == '"':
                        place += 1
                    else:
                        inside = False
                elif at_start and line[place] == '"':
                    inside, began = True, number
                at_start = not inside and line[place] in (delimiter, "\r", "\n")
                place += 1
    return began
