"""Rows of CSV files, with quotes (RFC 4180), and of TSV files, without (IANA text/tab-separated-values).

The delimiter is the one that fits the first rows, whatever the file's name says, unless it is named.

A missing quote merges many rows into one field. Fields that span lines are therefore counted, one that seems
to hold rows is named in a warning, and one that never ends is an error at the line where it begins.
"""

from __future__ import annotations

import csv
import io
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from nanothink.data.decoding import encoding_of, open_text, reading
from nanothink.data.lines import MAX_LINE_BYTES, Problem, shown
from nanothink.data.row_text import RowFault, RowText
from nanothink.data.tables import row_of
from nanothink.data.text_files import Findings, Row
from nanothink.errors import DataError, UsageError
from nanothink.suggestions import again
from nanothink.wording import counted

DELIMITERS = {".csv": ",", ".tsv": "\t", ".tab": "\t"}

_DELIMITER_NAMES = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "vertical bars"}
_ASKED = {r"\t": "\t", "tab": "\t", "comma": ",", "semicolon": ";", "pipe": "|", "space": " "}

_LINE_END = re.compile(r"\r\n|\r|\n")
_MANY_LINES = 100
"""Lines in a quoted field above which a missing quote is more likely than a long text."""
_KEEPS_QUOTES = (
    "the text begins and ends with a double quote, and keeps it; if the file puts its fields in quotes, as "
    "spreadsheets do, import it with --quotes"
)
_NONE = "\x1f"
"""Delimiter of a table of one column: lines may hold any other."""
_SNIFFED_CHARS = 2**16
_SNIFFED_ROWS = 200


@dataclass(frozen=True)
class Dialect:
    """How tables are read. What is None follows from each file.

    Attributes:
        delimiter: one character between two columns.
        quotes: whether a field in double quotes may hold delimiters, line ends, and doubled quotes; otherwise
            a quote is an ordinary character.
        columns: names of the columns of a table that has no header.
    """

    delimiter: str | None = None
    quotes: bool | None = None
    columns: tuple[str, ...] | None = None


def known_delimiter(asked: str) -> str:
    """Return the character that ``--delimiter`` names. Raises UsageError."""
    delimiter = _ASKED.get(asked.lower(), asked)
    if len(delimiter) != 1 or delimiter in '"\r\n':
        raise UsageError(
            f"{asked!r} cannot separate columns: one character can, or {', '.join(_ASKED)}. For example: "
            "--delimiter ';'"
        )
    return delimiter


def table_rows(
    path: Path, origin: str, text: RowText, dialect: Dialect, encoding: str | None, findings: Findings
) -> Iterator[Row]:
    """Yield the rows below the header, each with the line where it begins."""
    encoding = encoding_of(path, encoding)
    with reading(path):
        delimiter, n_skipped = _delimiter(path, text, dialect, encoding)
        quotes = _quotes(path, delimiter, dialect)
        if (
            (usual := DELIMITERS.get(_suffix(path)))
            and delimiter not in (usual, _NONE)
            and not dialect.delimiter
        ):
            named = _DELIMITER_NAMES.get(delimiter, repr(delimiter))
            findings.reporter.note(f"{shown(path)} separates its columns with {named}.")
        yield from _rows(
            path, origin, text, delimiter, quotes, dialect.columns, encoding, n_skipped, findings
        )


def _rows(
    path: Path,
    origin: str,
    text: RowText,
    delimiter: str,
    quotes: bool,
    header: Sequence[str] | None,
    encoding: str,
    n_skipped: int,
    findings: Findings,
) -> Iterator[Row]:
    limit = csv.field_size_limit(MAX_LINE_BYTES)  # belongs to the whole process: put back below
    end_of_last = 0
    try:
        with open_text(path, encoding, newline="", on_bytes=findings.read) as file:
            for _ in range(n_skipped):
                file.readline()
            reader = _reader(_lines(file, path), delimiter, quotes)
            if header is None:
                header = [name.strip() for name in next(reader, [])]
                if not header:
                    return
            needed = _columns(path, header, text, quotes=quotes)
            end_of_last = reader.line_num
            for row in reader:
                line, n_lines = end_of_last + 1 + n_skipped, reader.line_num - end_of_last
                end_of_last = reader.line_num
                if n_lines > 1:
                    _tell_of_spans(path, line, row, len(header), delimiter, findings)
                if not row:
                    findings.empty += 1
                elif len(row) != len(header):
                    reason = f"the row has {counted(len(row), 'field')}, the header has {len(header)}"
                    findings.bad_rows.add(Problem(shown(path), line, 1, reason))
                else:
                    try:
                        found = row_of(line, f"{origin}:{line}", {name: row[i] for name, i in needed}, text)
                    except RowFault as fault:
                        findings.bad_rows.add(Problem(shown(path), line, 1, str(fault)))
                        continue
                    value = found.text
                    if (
                        not quotes
                        and isinstance(value, str)
                        and value[:1] == value[-1:] == '"'
                        and len(value) > 1
                    ):
                        findings.warnings.add(Problem(shown(path), line, 1, _KEEPS_QUOTES))
                    yield found._replace(group=found.group or None)
    except csv.Error as error:
        first, last = end_of_last + 1 + n_skipped, reader.line_num + n_skipped
        raise _unreadable(path, first, last, str(error), quotes) from None
    finally:
        csv.field_size_limit(limit)


def _reader(lines: Iterable[str], delimiter: str, quotes: bool) -> Any:
    return csv.reader(
        lines,
        delimiter=delimiter,
        strict=True,
        quoting=csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE,
    )


def _lines(file: TextIO, path: Path) -> Iterator[str]:
    for number in itertools.count(1):
        line = file.readline(MAX_LINE_BYTES + 1)
        if len(line) > MAX_LINE_BYTES:
            size = f"{MAX_LINE_BYTES // 2**20} MiB"
            raise DataError(
                f"{shown(path)}, line {number}: longer than {size}, and no record is. Cut its text."
            )
        if not line:
            return
        yield line


def _columns(path: Path, header: Sequence[str], text: RowText, *, quotes: bool) -> list[tuple[str, int]]:
    """Names and indices of the columns that are needed."""
    missing = [name for name in text.names or ("text",) if name not in header]
    if not quotes and missing and f'"{missing[0]}"' in header:
        raise DataError(
            f"{shown(path)} has no '{missing[0]}', but a '\"{missing[0]}\"': its fields are in quotes. "
            "Import it with --quotes."
        )
    try:
        needed = text.columns(shown(path), header)
    except DataError as error:
        raise DataError(
            f"{error}. If its first row is no header, name the columns: {_name_them(header)}"
        ) from None
    needed += [name for name in ("source", "group") if name in header and name not in needed]
    for name in needed:
        if header.count(name) > 1:
            raise DataError(f"{shown(path)} has {header.count(name)} columns '{name}'. Rename all but one.")
    return [(name, header.index(name)) for name in needed]


def _name_them(header: Sequence[str]) -> str:
    """Option that names the columns of a table without a header: the text is likely the longest."""
    longest = max(range(len(header)), key=lambda i: len(header[i]), default=0)
    return "--columns " + ",".join("text" if i == longest else f"c{i + 1}" for i in range(len(header)))


def _delimiter(path: Path, text: RowText, dialect: Dialect, encoding: str) -> tuple[str, int]:
    """Return the delimiter of a table, and the number of lines above its header."""
    with open_text(path, encoding, newline="") as file:
        start = file.read(_SNIFFED_CHARS)
    named = re.match(r"sep=(.)\r?\n", start)  # Excel's way to name it
    if named:
        return dialect.delimiter or named.group(1), 1
    if dialect.delimiter:
        return dialect.delimiter, 0
    usual = DELIMITERS.get(_suffix(path), ",")
    whole = start if len(start) < _SNIFFED_CHARS else start[: start.rfind("\n") + 1] or start
    fits = {
        delimiter: _fit(whole, delimiter, _quotes(path, delimiter, dialect), text, dialect.columns)
        for delimiter in (usual, *(other for other in _DELIMITER_NAMES if other != usual))
    }
    best = max(fits, key=lambda delimiter: fits[delimiter])
    has_one_column = not dialect.columns and all(n_columns < 2 for _, _, n_columns in fits.values())
    return (_NONE if has_one_column else best), 0


def _suffix(path: Path) -> str:
    return Path(path.name.lower().removesuffix(".gz").removesuffix(".zst")).suffix


def _quotes(path: Path, delimiter: str, dialect: Dialect) -> bool:
    if dialect.quotes is not None:
        return dialect.quotes
    return _suffix(path) == ".csv" or delimiter not in ("\t", _NONE)


def _fit(
    start: str, delimiter: str, quotes: bool, text: RowText, columns: Sequence[str] | None
) -> tuple[bool, float, int]:
    """Measure how well a delimiter fits the start of a table: whether the header then has the needed columns,
    the share of rows that are as long as it, if that is more than one column, and its length.
    """
    rows = []
    try:
        for row in itertools.islice(
            _reader(io.StringIO(start, newline=""), delimiter, quotes), _SNIFFED_ROWS
        ):
            rows.append(row)
    except csv.Error:  # the sample may end in a quoted field
        pass
    header = columns or [name.strip() for name in (rows[0] if rows else [])]
    below = [row for row in rows[0 if columns else 1 :] if row]
    share = sum(len(row) == len(header) for row in below) / len(below) if below else 1.0
    has_names = columns is None and text.has_columns(header)
    return has_names, share if len(header) > 1 else 0.0, len(header)


def _tell_of_spans(
    path: Path, line: int, row: list[str], n_columns: int, delimiter: str, findings: Findings
) -> None:
    """Count the fields of a row from this line on that span lines, and name those that seem to be rows."""
    for field in row:
        lines = _LINE_END.split(field)
        if len(lines) > 1:
            findings.n_spanning += 1
            findings.first_spanning = findings.first_spanning or line
            like_rows = n_columns > 1 and all(inner.count(delimiter) == n_columns - 1 for inner in lines[1:])
            if like_rows or len(lines) > _MANY_LINES:
                looks = ", and every further one of them looks like a row" if like_rows else ""
                reason = (
                    f"one quoted field takes {len(lines):,} lines from here on{looks}: is a quote missing?"
                )
                findings.warnings.add(Problem(shown(path), line, 1, reason))
        line += len(lines) - 1


def _unreadable(path: Path, first: int, last: int, why: str, quotes: bool) -> DataError:
    """Make the error for a row that begins in line ``first`` and could not be read beyond line ``last``."""
    if "field limit" in why:
        why = f"a field takes more than {MAX_LINE_BYTES // 2**20} MiB, and no record is that long"
    remedy = (
        "Close the quote that is open there, or write a quote that belongs to the text twice. If quotes are "
        f"text like any other in this file: {again('--no-quotes')}"
    )
    begins = f"the row that begins in line {first} cannot be read"
    return DataError(f"{shown(path)}, line {last}: {begins} ({why}). {remedy if quotes else 'Cut its text.'}")
