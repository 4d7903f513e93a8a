"""Rows of JSON, JSON Lines, Parquet, and data sets of the Hugging Face Hub."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import orjson

from nanothink.data.decoding import encoding_of, reading
from nanothink.data.json_array import array_items, parse_json
from nanothink.data.lines import Problem, iter_lines, shown
from nanothink.data.row_text import Fields, RowFault, RowText
from nanothink.data.source_file import DamagedDataError, SourceFile
from nanothink.data.strict_json import JsonFault
from nanothink.data.text_files import Findings, Row, file_size
from nanothink.errors import DataError
from nanothink.suggestions import install

HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def holds_json_array(path: Path) -> bool:
    """Return whether a file, decompressed by its extension, begins as a JSON array. Raises
    UnreadableError."""
    with SourceFile(path) as file:
        try:
            return next(file.chunks(), b"").removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
        except DamagedDataError:
            return False


def holds_json_lines(path: Path) -> bool:
    """Return whether the first line of several is a JSON object. Raises UnreadableError."""
    with SourceFile(path) as file:
        first, _, rest = next(file.chunks(), b"").removeprefix(b"\xef\xbb\xbf").partition(b"\n")
    try:
        return bool(rest.strip()) and isinstance(orjson.loads(first), dict)
    except ValueError:
        return False


def json_array_rows(
    path: Path, origin: str, text: RowText, encoding: str | None, findings: Findings
) -> Iterator[Row]:
    for number, item in enumerate(array_items(path, encoding, findings.read), 1):
        if isinstance(item, str):
            yield Row(number, f"{origin}:{number}", item)
        else:
            yield from _from_object(number, item, path, origin, text, findings)


def json_lines_rows(
    path: Path, origin: str, text: RowText, encoding: str | None, findings: Findings
) -> Iterator[Row]:
    batches = iter_lines(
        path,
        on_problem=findings.bad_rows.add,
        on_warning=findings.warnings.add,
        on_bytes=findings.read,
        encoding=encoding_of(path, encoding) if encoding else "",
    )
    for first, lines in batches:
        for number, line in enumerate(lines, first):
            if not line or line.isspace():
                continue
            try:
                item = parse_json(line)
            except JsonFault as fault:
                problem = Problem(shown(path), number, fault.position + 1, fault.reason)
                findings.bad_rows.add(problem)
            else:
                yield from _from_object(number, item, path, origin, text, findings)


def _from_object(
    number: int, item: object, path: Path, origin: str, text: RowText, findings: Findings
) -> Iterator[Row]:
    if isinstance(item, dict):
        try:
            yield row_of(number, f"{origin}:{number}", item, text)
            return
        except RowFault as fault:
            reason = str(fault)
    else:
        reason = f"an object with a '{text.text_field or 'text'}' is due, not {type(item).__name__}"
    findings.bad_rows.add(Problem(shown(path), number, 1, reason))


def row_of(number: int, place: str, fields: Fields, text: RowText) -> Row:
    """Make a row of its fields: the text, and the row's own ``source`` and ``group``. Raises RowFault."""
    own, group = (None if name in text.names else fields.get(name) for name in ("source", "group"))
    return Row(number, own if isinstance(own, str) and own else place, text.of(fields), group)


def parquet_rows(path: Path, origin: str, text: RowText, findings: Findings) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"Reading Parquet needs pyarrow: {install('nanothink[parquet]')}") from None
    size = file_size(path)
    with reading(path):
        try:
            table = pyarrow.parquet.ParquetFile(path)
            names = table.schema_arrow.names

            def first_row() -> Fields:
                return next((row for batch in table.iter_batches(1) for row in batch.to_pylist()), {})

            needed = text.columns(shown(path), names, first_row)
            needed += [name for name in ("source", "group") if name in names and name not in needed]
            number = n_told = 0
            for batch in table.iter_batches(batch_size=1024, columns=needed):
                for fields in batch.to_pylist():
                    number += 1
                    try:
                        yield row_of(number, f"{origin}:{number}", fields, text)
                    except RowFault as fault:
                        findings.bad_rows.add(Problem(shown(path), number, 1, str(fault)))
                n_read = size * number // max(table.metadata.num_rows, 1)
                findings.read(n_read - n_told)
                n_told = n_read
        except (pyarrow.ArrowException, UnicodeDecodeError) as error:
            raise DataError(f"{shown(path)} is not sound Parquet: {error}") from None


def hub_rows(
    name: str, text: RowText, config_name: str | None, split: str, findings: Findings
) -> Iterator[Row]:
    try:
        import datasets  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        raise DataError(f"Hub data sets need an extra: {install('nanothink[datasets]')}") from None
    try:
        rows = iter(
            datasets.load_dataset(name, config_name, split=split, streaming=True, trust_remote_code=False)
        )
        first = next(rows, None)
    except Exception as error:  # the library raises dozens of kinds, of its own and of the network
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"Cannot load the data set '{name}', split '{split}': {reason}") from error
    if first is None:
        return
    text.columns(f"The data set '{name}'", first, lambda: first)
    number = 0
    try:
        for number, fields in enumerate(itertools.chain([first], rows), 1):
            try:
                yield row_of(number, f"{name}:{number}", fields, text)
            except RowFault as fault:
                findings.bad_rows.add(Problem(name, number, 1, str(fault)))
            if number % 1000 == 0:
                findings.reporter.progress("importing", number, 0)
    except Exception as error:
        raise DataError(f"The data set '{name}' broke off after row {number:,}: {error}") from error
