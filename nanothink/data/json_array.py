"""Items of a JSON array: a small one parsed as a whole, a large one item by item in bounded memory."""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson

from nanothink.data import strict_json
from nanothink.data.decoding import encoding_of, reading, where_not_utf8
from nanothink.data.lines import MAX_LINE_BYTES, shown
from nanothink.data.records import decode_line
from nanothink.data.source_file import SourceFile
from nanothink.data.strict_json import JsonFault
from nanothink.errors import DataError

WHOLE_BYTES = 32 * 2**20
"""Largest array that is parsed as a whole; its objects take some ten times as much memory."""

_TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|["{}\[\],]', re.DOTALL)


def parse_json(data: bytes) -> Any:
    """Parse any JSON value. Raises JsonFault."""
    try:
        return orjson.loads(data)
    except ValueError:  # not JSON, or a number beyond what the fast parser takes
        return strict_json.parse(decode_line(data))


def array_items(path: Path, encoding: str | None, on_bytes: Callable[[int], None]) -> Iterator[Any]:
    """Yield the items of the array in a file; none of an empty file.

    Raises:
        DataError: the file holds no JSON array, or a fault, with its place.
    """
    with (
        reading(path),
        SourceFile(path, on_bytes=on_bytes, encoding=encoding_of(path, encoding)) as file,
    ):
        chunks = file.chunks()
        data = next(chunks, b"").removeprefix(b"\xef\xbb\xbf")
        parts, n_bytes = [data], len(data)
        while n_bytes <= WHOLE_BYTES and (chunk := next(chunks, b"")):
            parts.append(chunk)
            n_bytes += len(chunk)
        data = b"".join(parts)
        if n_bytes > WHOLE_BYTES and data.lstrip()[:1] == b"[":
            yield from _streamed(path, data, chunks)
            return
        data += b"".join(chunks)
    yield from _whole(path, data)


def _whole(path: Path, data: bytes) -> Iterator[Any]:
    if not data or data.isspace():
        return
    try:
        items = parse_json(data)
    except JsonFault as fault:
        try:
            before = data.decode("utf-8")[: fault.position]
        except UnicodeDecodeError:
            raise DataError(where_not_utf8(path)) from None
        raise _fault(path, before, fault.reason) from None
    if isinstance(items, list):
        yield from items
        return
    found, way_in = "a single value", ""
    if isinstance(items, dict):
        found = "an object"
        inner = [key for key, value in items.items() if isinstance(value, list)]
        if inner:
            query = shlex.quote(f".[{orjson.dumps(inner[0]).decode()}]")
            way_in = f" Take the array under '{inner[0]}': jq {query} {shlex.quote(str(path))} > array.json"
    raise DataError(f"{shown(path)} must hold a JSON array of objects or strings, not {found}.{way_in}")


def _fault(path: Path, before: str, reason: str, lines_before: int = 0) -> DataError:
    line = lines_before + before.count("\n") + 1
    column = len(before) - (before.rfind("\n") + 1) + 1
    return DataError(f"{shown(path)}:{line}:{column}: {reason}.")


def _streamed(path: Path, data: bytes, chunks: Iterator[bytes]) -> Iterator[Any]:
    """Yield items while the rest is read. Columns of faults count from the start of the item."""
    begin = at = data.index(b"[") + 1
    n_lines, depth, ended = data[:begin].count(b"\n"), 1, False
    while not ended:
        n_done = begin
        for token in _TOKEN.finditer(data, at):
            sign = token.group()
            if sign == b'"':  # the string goes on beyond what has been read
                break
            at = token.end()
            depth += (sign in (b"[", b"{")) - (sign in (b"]", b"}"))
            if depth == 0 or (depth == 1 and sign == b","):
                item = data[begin : token.start()]
                if depth or not item.isspace():
                    yield _item(path, item, n_lines)
                n_lines += item.count(b"\n")
                begin, ended = at, depth == 0
                if ended:
                    break
        if ended:
            break
        if begin == n_done and len(data) - begin > 2 * MAX_LINE_BYTES:
            raise DataError(
                f"{shown(path)}, line {n_lines + 1}: an item takes more than 128 MiB. Cut its text."
            )
        # As much again as is held, so that a long string is not searched anew for each chunk.
        more = bytearray()
        while len(more) < max(1, len(data) - begin) and (chunk := next(chunks, b"")):
            more += chunk
        if not more:
            raise DataError(f"{shown(path)}, line {n_lines + 1}: the array has no end; the file was cut off.")
        data, at, begin = data[begin:] + more, at - begin, 0
    if any(rest.strip() for rest in itertools.chain([data[begin:]], chunks)):
        raise DataError(f"{shown(path)}, line {n_lines + 1}: text follows the end of the array.")


def _item(path: Path, item: bytes, n_lines: int) -> Any:
    try:
        return parse_json(item)
    except JsonFault as fault:
        raise _fault(path, item.decode("utf-8", "replace")[: fault.position], fault.reason, n_lines) from None
