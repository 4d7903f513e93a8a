"""Rows of JSON, JSON Lines, Parquet, and data sets of the Hugging Face Hub."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import orjson

from nanothink.data import strict_json
from nanothink.data.lines import Problem, iter_lines, shown
from nanothink.data.records import decode_line
from nanothink.data.source_file import DamagedDataError, SourceFile
from nanothink.data.strict_json import JsonFault
from nanothink.data.text_files import (
    Findings,
    Row,
    file_size,
    no_such_field,
    open_text,
    reading,
    where_not_utf8,
)
from nanothink.errors import DataError, did_you_mean

HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def holds_json_array(path: Path) -> bool:
    """Return whether a file, decompressed by its extension, begins as a JSON array. Raises
    UnreadableError."""
    with SourceFile(path) as file:
        try:
            return next(file.chunks(), b"").removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
        except DamagedDataError:
            return False


def json_array_rows(path: Path, text_field: str, findings: Findings) -> Iterator[Row]:
    if path.name.lower().endswith(".json"):
        with reading(path), open_text(path):
            data = path.read_bytes()
    else:
        try:
            with SourceFile(path) as file:
                data = b"".join(file.chunks())
        except DamagedDataError as error:
            raise DataError(f"{shown(path)}: {error}.") from None
    data = data.removeprefix(b"\xef\xbb\xbf")
    try:
        items = _parse(data)
    except JsonFault as fault:
        try:
            before = data.decode("utf-8")[: fault.position]
        except UnicodeDecodeError:
            raise DataError(where_not_utf8(path)) from None
        line = before.count("\n") + 1
        column = len(before) - (before.rfind("\n") + 1) + 1
        place = f"{shown(path)}:{line}:{column}"
        hint = " If it holds one object a line, name it .jsonl." if "second value" in fault.reason else ""
        raise DataError(f"{place}: not valid JSON, {fault.reason}.{hint}") from None
    if not isinstance(items, list):
        found = "an object" if isinstance(items, dict) else "a single value"
        raise DataError(f"{shown(path)} must hold a JSON array of objects or strings, not {found}.")
    total = len(data)
    for number, item in enumerate(items, 1):
        if isinstance(item, str):
            yield Row(number, shown(f"{path.name}:{number}"), item)
        else:
            yield from _from_object(number, item, path, text_field, findings)
        if number % 1000 == 0:
            findings.advance(total * number // len(items), total)
    findings.advance(total, total)


def json_lines_rows(path: Path, text_field: str, findings: Findings) -> Iterator[Row]:
    batches = iter_lines(
        path,
        on_problem=findings.bad_rows.add,
        on_warning=findings.warnings.add,
        on_bytes=findings.reporter.counter("importing", file_size(path)),
    )
    for first, lines in batches:
        for number, line in enumerate(lines, first):
            if not line or line.isspace():
                continue
            try:
                item = _parse(line)
            except JsonFault as fault:
                problem = Problem(shown(path), number, fault.position + 1, fault.reason)
                findings.bad_rows.add(problem)
            else:
                yield from _from_object(number, item, path, text_field, findings)


def _parse(data: bytes) -> Any:
    """Parse any JSON value. Raises JsonFault."""
    try:
        return orjson.loads(data)
    except ValueError:  # not JSON, or a number beyond what the fast parser takes
        return strict_json.parse(decode_line(data))


def _from_object(number: int, item: object, path: Path, text_field: str, findings: Findings) -> Iterator[Row]:
    if isinstance(item, dict) and text_field in item:
        origin = item.get("source")
        if not isinstance(origin, str) or not origin:
            origin = shown(f"{path.name}:{number}")
        group = item.get("group") if text_field != "group" else None
        yield Row(number, origin, item[text_field], group)
        return
    if isinstance(item, dict):
        reason = _no_field(text_field, tuple(str(key) for key in item))
    else:
        reason = f"an object with a '{text_field}' is due, not {type(item).__name__}"
    findings.bad_rows.add(Problem(shown(path), number, 1, reason))


@lru_cache(maxsize=64)  # the rows of a file have the same keys, and the search for a likeness is slow
def _no_field(text_field: str, keys: tuple[str, ...]) -> str:
    likely = did_you_mean(text_field, keys[:20])
    return f"there is no '{text_field}'.{likely} There is: {', '.join(keys[:20])}"


def parquet_rows(path: Path, text_field: str, findings: Findings) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError("Reading Parquet needs pyarrow: pip install 'nanothink[parquet]'") from None
    total = file_size(path)
    with reading(path):
        try:
            table = pyarrow.parquet.ParquetFile(path)
            names = table.schema_arrow.names
            if text_field not in names:
                raise no_such_field(shown(path), text_field, names)
            others = [name for name in ("source", "group") if name in names and name != text_field]
            number = 0
            for batch in table.iter_batches(batch_size=1024, columns=[text_field, *others]):
                texts = batch.column(text_field).to_pylist()
                sources, groups = (
                    batch.column(name).to_pylist() if name in others else itertools.repeat(None)
                    for name in ("source", "group")
                )
                for text, source, group in zip(texts, sources, groups, strict=False):
                    number += 1
                    named = source if isinstance(source, str) and source else f"{path.name}:{number}"
                    yield Row(number, shown(named), text, group)
                findings.advance(total * number // max(table.metadata.num_rows, 1), total)
        except (pyarrow.ArrowException, UnicodeDecodeError) as error:
            raise DataError(f"{shown(path)} is not sound Parquet: {error}") from None


def hub_rows(
    name: str, text_field: str, config_name: str | None, split: str, findings: Findings, note: str
) -> Iterator[Row]:
    try:
        import datasets  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        raise DataError(f"{note}Hub data sets need an extra: pip install 'nanothink[datasets]'") from None
    try:
        rows = iter(
            datasets.load_dataset(name, config_name, split=split, streaming=True, trust_remote_code=False)
        )
        first = next(rows, None)
    except Exception as error:  # the library raises dozens of kinds, of its own and of the network
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"{note}Cannot load the data set '{name}', split '{split}': {reason}") from error
    if first is None:
        return
    if text_field not in first:
        raise no_such_field(f"The data set '{name}'", text_field, first)
    number = 0
    try:
        for number, row in enumerate(itertools.chain([first], rows), 1):
            origin = row.get("source")
            named = origin if isinstance(origin, str) and origin else f"{name}:{number}"
            group = row.get("group") if text_field != "group" else None
            yield Row(number, named, row.get(text_field), group)
            if number % 1000 == 0:
                findings.advance(number, 0)
    except Exception as error:
        raise DataError(f"The data set '{name}' broke off after row {number:,}: {error}") from error
