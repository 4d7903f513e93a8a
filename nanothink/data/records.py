"""JSON Lines in and out: one record a line, strict, streamed, and every bad line named.

Reading goes through ``.jsonl``, ``.jsonl.gz`` and ``.jsonl.zst`` alike, in three steps:

    chunks of bytes (decompressed)  →  complete lines  →  records

Good lines take a fast path (orjson, then pydantic); a line that fails there gets a slow look that
finds the column and the reason in plain words. Nothing is raised for bad data: a problem goes to the
caller's sink and reading goes on at the next line. Memory is bounded by MAX_LINE_BYTES, not by the file.

What is decided about odd input, each with a test:

    error    invalid UTF-8, escaped lone surrogates, whatever RFC 8259 forbids (NaN, trailing commas,
             comments, ...), nesting beyond 1,024, a line over MAX_LINE_BYTES, bare CR as line end,
             a byte-order mark anywhere but at the file's start, UTF-16, cut or damaged compression,
             a file that cannot be read (line 1, column 1, or the line that was reached)
    warning  byte-order mark at the start, blank lines (one warning a file, with their number),
             an escaped NUL in the text, a repeated key (the last one counts), a file without any record
    fine     CRLF, no newline at the end, other fields whatever they hold, null for source, id or group
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated

import orjson
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict

from nanothink.data.lines import MAX_LINE_BYTES, Problem, ProblemSink, column_at, iter_lines, shown
from nanothink.data.strict_json import JsonFault, Member, decode_string, scan
from nanothink.disk import whole_file
from nanothink.errors import StorageError, did_you_mean

__all__ = ["MAX_LINE_BYTES", "Problem", "ProblemSink", "Record", "iter_records", "shown", "write_records"]

_KEYS = ("text", "source", "id", "group")
_INTEGER = re.compile(r"-?[0-9]+")
_MAX_DIGITS = 4300  # Python refuses to convert longer ones, because that takes quadratic time


def _not_blank(text: str) -> str:
    if not text or text.isspace():
        raise ValueError("text is empty")
    return text


def _group(value: object) -> str | None:
    """The value as the name of a group: a string or an integer; anything else is another program's field."""
    if isinstance(value, float):  # the fast parser's form of integers beyond 64 bits, too
        raise ValueError("a group must be a string or an integer")
    return str(value) or None if isinstance(value, str) or type(value) is int else None


class Record(BaseModel):
    """One document. Other fields of its line are allowed and ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    text: Annotated[str, AfterValidator(_not_blank)]
    """The document itself; not empty, not whitespace alone."""

    source: str | None = None
    """Where the text comes from, in the person's own words."""

    id: int | None = None
    """Any integer; unique within its file by convention, which nothing relies on."""

    group: Annotated[str | None, BeforeValidator(_group)] = None
    """Name of the document that this record is a piece of; the pieces of one are on one side of the split."""


def iter_records(
    path: Path,
    *,
    on_problem: ProblemSink,
    on_warning: ProblemSink | None = None,
    on_bytes: Callable[[int], None] | None = None,
) -> Iterator[tuple[int, Record]]:
    """Stream (line number from 1, record). A bad line goes to ``on_problem`` and is passed over.

    ``on_bytes`` is called every quarter of a megabyte or so with the bytes of the file (compressed ones,
    if it is compressed) taken since the last call. Never raises for what the file holds, or for a file
    that cannot be read.
    """
    file = shown(path)
    warn = on_warning or _ignore
    # The class method does the same behind several argument checks, which cost as much as the work.
    validate = Record.__pydantic_validator__.validate_python
    loads, dumps = orjson.loads, orjson.dumps
    n_records = n_blank = first_blank = 0
    stopped = False

    def report(problem: Problem) -> None:
        nonlocal stopped
        stopped = True
        on_problem(problem)

    for first, lines in iter_lines(path, on_problem=report, on_warning=warn, on_bytes=on_bytes):
        for number, line in enumerate(lines, first):
            try:
                obj = loads(line)
                record = validate(obj)
                # Written out again, a line without repeated keys is as long as before, give or take
                # the blanks between three keys. That costs a tenth of searching the line for them.
                n_known = 1 + ("source" in obj) + ("id" in obj) + ("group" in obj)
                doubtful = len(line) - len(dumps(obj)) > 6 or len(obj) != n_known
            except (ValueError, TypeError):  # TypeError: too deep to be written out
                if not line or line.isspace():
                    n_blank += 1
                    first_blank = first_blank or number
                    continue
                try:
                    record = _look_closely(line)
                except JsonFault as fault:
                    on_problem(Problem(file, number, fault.position + 1, fault.reason))
                    continue
                doubtful = True
            if doubtful:
                _warn_of_repeated_keys(line, file, number, warn)
            if "\0" in record.text:
                column = column_at(line, max(line.find(b"\\u0000"), 0))
                warn(Problem(file, number, column, "`text` holds a NUL character"))
            n_records += 1
            yield number, record

    if n_blank:
        lines_are = "1 blank line was" if n_blank == 1 else f"{n_blank:,} blank lines were"
        warn(Problem(file, first_blank, 1, f"{lines_are} passed over"))
    if not n_records and not stopped:
        warn(Problem(file, 1, 1, "the file holds no record"))


def _ignore(problem: Problem) -> None:
    """The sink for warnings nobody asked for."""


# ---------------------------------------------------------------------------------------------------
# The slow look at one line


def _look_closely(line: bytes) -> Record:
    """The record, or a JsonFault that says where and why it is none.

    Also takes the few lines that are good though the fast path refuses them: an integer beyond 64
    bits as ``id``, a number beyond double precision or deep nesting in a field nobody reads.
    """
    text = decode_line(line)
    members = scan(text)
    if members is None:
        kind = _kind(text.lstrip())
        hint = "; `nanothink data import` reads JSON arrays" if kind == "an array" else ""
        raise JsonFault(0, f"a record must be a JSON object, not {kind}{hint}")
    last = {member.key: member for member in members}
    if "text" not in last:
        raise JsonFault(0, f"the key `text` is missing{_closest_key(last)}")
    value = _string_value(text, last["text"])
    if value is None or not value or value.isspace():
        what = {None: "null", "": "empty"}.get(value, "whitespace alone")
        raise JsonFault(last["text"].start, f"`text` is {what}; a record needs some text")
    source = _string_value(text, last["source"]) if "source" in last else None
    number = _integer_value(text, last["id"]) if "id" in last else None
    group = _group_value(text, last["group"]) if "group" in last else None
    return Record(text=value, source=source, id=number, group=group)


def decode_line(line: bytes) -> str:
    """The line as text; raises JsonFault at the first byte that is not UTF-8."""
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = line[error.start]
        column = len(line[: error.start].decode("utf-8"))
        raise JsonFault(column, f"byte 0x{byte:02x} is not valid UTF-8 here") from None


def _string_value(text: str, member: Member) -> str | None:
    literal = text[member.start : member.end]
    if literal.startswith('"'):
        return decode_string(literal)
    if literal == "null":
        return None
    raise JsonFault(member.start, f"`{member.key}` must be a string, not {_kind(literal)}")


def _integer_value(text: str, member: Member) -> int | None:
    literal = text[member.start : member.end]
    if literal == "null":
        return None
    if not _INTEGER.fullmatch(literal):
        raise JsonFault(member.start, f"`{member.key}` must be an integer, not {_kind(literal)}")
    if len(literal) > _MAX_DIGITS:
        raise JsonFault(member.start, f"`{member.key}` has more than {_MAX_DIGITS:,} digits")
    return int(literal)


def _group_value(text: str, member: Member) -> str | None:
    literal = text[member.start : member.end]
    if literal.startswith('"'):
        return decode_string(literal) or None
    return literal if _INTEGER.fullmatch(literal) else None


def _kind(literal: str) -> str:
    kinds = {'"': "a string", "{": "an object", "[": "an array", "t": "true", "f": "false", "n": "null"}
    if literal[0] in kinds:
        return kinds[literal[0]]
    return "an integer" if _INTEGER.fullmatch(literal.strip()) else "a number with a fraction or exponent"


def _closest_key(keys: Iterable[str]) -> str:
    """What to add to "text is missing": a likely misspelling, else the keys that are there."""
    names = [key for key in keys if len(key) <= 40][:20]
    for name in names:
        suggestion = did_you_mean(name.strip().lower(), ["text"])
        if suggestion:
            return f", but there is `{name}`.{suggestion}"
    if not names:
        return ""
    there_is = ", ".join(f"`{name}`" for name in names[:5])
    return f"; there is {there_is} (to use another key: nanothink data import)"


def _warn_of_repeated_keys(line: bytes, file: str, number: int, warn: ProblemSink) -> None:
    written = [key for key in _KEYS if line.count(b'"%s"' % key.encode()) > 1]
    if not any(len(re.findall(rb'"%s"[ \t\r\n]*:' % key.encode(), line)) > 1 for key in written):
        return
    seen: set[str] = set()
    for member in scan(line.decode("utf-8")) or ():
        if member.key in seen and member.key in _KEYS:
            reason = f"the key `{member.key}` stands more than once; the last one counts"
            warn(Problem(file, number, member.key_start + 1, reason))
        seen.add(member.key)


# ---------------------------------------------------------------------------------------------------
# Writing


def write_records(path: Path, records: Iterable[Record], *, overwrite: bool = False) -> int:
    """Write a JSON Lines file whole or not at all; returns the number of records.

    Whatever goes wrong, also an exception out of ``records``, leaves the folder as it was. Raises
    StorageError when ``path`` exists and ``overwrite`` is not set, or when the disk refuses.
    """
    _refuse_existing(path, overwrite)
    n_records = 0
    with whole_file(path, before_replace=lambda: _refuse_existing(path, overwrite)) as file:
        for record in records:
            file.write(_record_line(record))
            n_records += 1
    return n_records


def _refuse_existing(path: Path, overwrite: bool) -> None:
    if not overwrite and os.path.lexists(path):
        raise StorageError(
            f"{shown(path)} exists already. Add --overwrite to replace it, or choose another domain."
        )


def _record_line(record: Record) -> bytes:
    fields = record.model_dump(exclude_none=True)
    try:
        return orjson.dumps(fields) + b"\n"
    except TypeError:  # an integer beyond 64 bits
        return json.dumps(fields, ensure_ascii=False).encode() + b"\n"
