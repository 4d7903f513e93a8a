"""Records: strict JSON Lines, read in a stream.

    chunks of bytes (decompressed)  →  complete lines  →  records

Good lines take a fast path (orjson, then pydantic). A line that fails there is parsed again by a slower
parser, which gives the column and the reason (strict_json.py). Bad data is not raised: a problem goes to the
caller's sink, and reading continues with the next line. A file that the machine cannot read raises. Memory is
bounded by MAX_LINE_BYTES, not by the file.

Odd input, each case with a test:

    error    invalid UTF-8, escaped lone surrogates, whatever RFC 8259 forbids (NaN, trailing commas,
             comments, ...), nesting beyond some 900, a line over MAX_LINE_BYTES, bare CR as line end,
             a byte-order mark anywhere but at the file's start, UTF-16, cut or damaged compression,
             JSON that is spread over several lines (one error for the file), messages in an odd order
    warning  byte-order mark at the start, blank lines (one warning a file, with their number),
             an escaped NUL in the text, a file without any record, `text` beside `messages` (the text
             counts), `text` or `messages` more than once (the last counts)
    fine     CRLF, no newline at the end, other fields whatever they hold, source and id of any type
    raised   a file that is gone, that may not be read or is none, an I/O error (UnreadableError)
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Annotated

import orjson
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict

from nanothink.data import strict_json
from nanothink.data.lines import (
    CONVERSATION,
    Problem,
    ProblemSink,
    column_at,
    iter_lines,
    shown,
)
from nanothink.data.messages import Message, answer_bytes, conversation_fields, read_messages, text_of
from nanothink.data.source_file import Digest
from nanothink.data.strict_json import JsonFault
from nanothink.suggestions import did_you_mean, suggest

_SPREAD = (
    "the file holds JSON that is spread over several lines, not one record a line; "
    f"{suggest('data import')} reads JSON arrays"
)
_TEXT_FIELDS = ("content", "body", "article", "document", "passage", "story", "raw_content", "markdown")


def _not_blank(text: str) -> str:
    if not text or text.isspace():
        raise ValueError("text is empty")
    return text


def _source(value: object) -> str | None:
    """Ignore a source that is not a string: the field is informational, and other programs use other
    types."""
    return value if isinstance(value, str) else None


def _id(value: object) -> int | str | None:
    if isinstance(value, float):  # the fast parser's form of integers beyond 64 bits, too
        raise ValueError("an id that must be looked at closely")
    return value if isinstance(value, (int, str)) and not isinstance(value, bool) else None


def _group(value: object) -> str | None:
    """Name of a group: a string or an integer. Other types are ignored, as fields of other programs."""
    if isinstance(value, float):  # the fast parser's form of integers beyond 64 bits, too
        raise ValueError("a group must be a string or an integer")
    return str(value) or None if isinstance(value, str) or type(value) is int else None


class Record(BaseModel):
    """One document. Other fields of its line are allowed and ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    text: Annotated[str, AfterValidator(_not_blank)]
    """The document; neither empty nor white space alone."""

    source: Annotated[str | None, BeforeValidator(_source)] = None
    """Origin of the text, for people. Ignored unless it is a string."""

    id: Annotated[int | str | None, BeforeValidator(_id)] = None
    """A number or name by convention; nothing relies on it. Ignored unless it is one."""

    group: Annotated[str | None, BeforeValidator(_group)] = None
    """Name of the document that this record is a piece of. All pieces are on one side of the split."""

    @property
    def messages(self) -> tuple[Message, ...]:
        """The messages of a conversation; none of a text."""
        return ()

    @property
    def n_bytes(self) -> int:
        """UTF-8 bytes of what is trained on."""
        return len(self.text.encode())


class Conversation(Record):
    """A record of messages. Its text is that of all of them; the assistant's are trained on."""

    turns: tuple[Message, ...]
    """See data/messages.py."""

    @classmethod
    def of(cls, fields: Mapping[str, object]) -> Conversation:
        """The record of a JSON object with ``messages``. Raises ValueError with the reason why it is none."""
        turns = read_messages(fields["messages"])
        named = {name: fields.get(name) for name in ("source", "id", "group")}
        return cls.model_validate({"text": text_of(turns), "turns": turns, **named})

    @property
    def messages(self) -> tuple[Message, ...]:
        return self.turns

    @property
    def n_bytes(self) -> int:
        return answer_bytes(self.turns)


def iter_records(
    path: Path,
    *,
    on_problem: ProblemSink,
    on_warning: ProblemSink | None = None,
    on_bytes: Callable[[int], None] | None = None,
    digest: Digest | None = None,
) -> Iterator[tuple[int, Record]]:
    """Yield (line number from 1, record). A bad line goes to ``on_problem`` and is skipped.

    ``on_bytes`` is called about every quarter of a megabyte with the bytes of the file (compressed, if it is)
    read since the last call. ``digest`` is updated with all bytes of the file.

    Raises:
        UnreadableError: the machine could not read the file to its end. Never for its content.
    """
    file = shown(path)
    warn = on_warning or ignored
    # The class method does the same behind several argument checks, which cost as much as the work.
    validate = Record.__pydantic_validator__.validate_python
    loads = orjson.loads
    n_records = n_blank = first_blank = 0
    stopped = is_spread = False

    def report(problem: Problem) -> None:
        nonlocal stopped
        stopped = True
        on_problem(problem)

    batches = iter_lines(path, on_problem=report, on_warning=warn, on_bytes=on_bytes, digest=digest)
    for first, lines in batches:
        if is_spread:
            continue
        for number, line in enumerate(lines, first):
            obj = None
            try:
                obj = loads(line)
                record = validate(obj) if "text" in obj or "messages" not in obj else Conversation.of(obj)
            except (ValueError, TypeError):  # TypeError: a number or null
                if not line or line.isspace():
                    n_blank += 1
                    first_blank = first_blank or number
                    continue
                try:
                    record = _look_closely(line, obj)
                except JsonFault as fault:
                    is_spread = number == 1 and line.strip() in (b"[", b"{")
                    if is_spread:
                        report(Problem(file, 1, 1, _SPREAD))
                        break
                    field = fault.text_field if isinstance(fault, _NoText) else ""
                    on_problem(Problem(file, number, fault.position + 1, fault.reason, field))
                    continue
            if not record.messages and isinstance(obj, dict) and isinstance(obj.get("messages"), list):
                warn(Problem(file, number, 1, "there are `text` and `messages`; the text counts"))
            if line.count(b'"text"') + line.count(b'"messages"') > 1:  # most often in a value
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


def ignored(problem: Problem) -> None:
    """Sink for problems that are ignored, or reported elsewhere."""


# ---------------------------------------------------------------------------------------------------
# The slow parser, for one line


class _NoText(JsonFault):
    """A valid object without the key `text`.

    Attributes:
        text_field: key that seems to hold the text instead; empty if none does.
    """

    def __init__(self, record: Mapping[str, object]) -> None:
        super().__init__(0, f"the key `text` is missing{_closest_key(tuple(record))}")
        self.text_field = likely_text_field(record)


def likely_text_field(record: Mapping[str, object]) -> str:
    """Guess the key that holds the text of an object without `text`; CONVERSATION if several make one.

    Empty if there is none.
    """
    if conversation_fields(record):
        return CONVERSATION
    strings = {key: value for key, value in record.items() if isinstance(value, str) and value}
    known = [field for field in _TEXT_FIELDS if field in strings]
    return known[0] if known else max(strings, key=lambda key: len(strings[key]), default="")


def _look_closely(line: bytes, obj: object) -> Record:
    """Parse a line that the fast path refused. Raises JsonFault with the place and the reason.

    A few such lines are valid: with an integer beyond 64 bits as ``id``, or a number beyond double precision
    or deep nesting in another field. ``obj`` is the fast parser's result; None if it refused the line.
    """
    if isinstance(obj, dict) and "text" not in obj and "messages" not in obj:
        raise _NoText(obj)
    text = decode_line(line)
    outer = strict_json.parse(text)
    if not isinstance(outer, dict):
        hint = f"; {suggest('data import')} reads JSON arrays" if isinstance(outer, list) else ""
        raise JsonFault(0, f"a record must be a JSON object, not {_kind(outer)}{hint}")
    # A float is no id and no group, and a sign for the fast path that a closer look is due.
    known = {
        key: value for key, value in outer.items() if key not in ("id", "group") or type(value) is not float
    }
    if "text" not in outer:
        if "messages" not in outer:
            raise _NoText(outer)
        try:
            return Conversation.of(known)
        except ValueError as error:
            raise JsonFault(_last(text, "messages").end(), str(error)) from None
    value = outer["text"]
    if not isinstance(value, str) or not value or value.isspace():
        raise JsonFault(_last(text, "text").end(), _why_no_text(value))
    return Record(text=value, **{key: known.get(key) for key in ("source", "id", "group")})


def _last(text: str, key: str) -> re.Match[str]:
    """A key as it stands last, up to its value; the beginning of the text if it is written with escapes."""
    *_, found = chain([re.match("", text)], re.finditer(rf'"{key}"\s*:\s*', text))
    assert found is not None
    return found


def _warn_of_repeated_keys(line: bytes, file: str, number: int, warn: ProblemSink) -> None:
    text = line.decode("utf-8")
    try:
        keys = [key for key, _ in json.loads(text, object_pairs_hook=list)]
    except RecursionError:
        return
    for key in ("text", "messages"):
        if keys.count(key) > 1:
            reason = f"the key `{key}` stands more than once; the last one counts"
            warn(Problem(file, number, _last(text, key).start() + 1, reason))


def _why_no_text(value: object) -> str:
    if value is not None and not isinstance(value, str):
        return f"`text` must be a string, not {_kind(value)}"
    what = "null" if value is None else "whitespace alone" if value else "empty"
    return f"`text` is {what}; a record needs some text"


def decode_line(line: bytes) -> str:
    """Decode a line. Raises JsonFault at the first byte that is not UTF-8."""
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = line[error.start]
        column = len(line[: error.start].decode("utf-8"))
        raise JsonFault(column, f"byte 0x{byte:02x} is not valid UTF-8 here") from None


def _kind(value: object) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    kinds = {str: "a string", dict: "an object", list: "an array", int: "an integer"}
    return kinds.get(type(value), "a number with a fraction or exponent")


@lru_cache(maxsize=64)  # the lines of a file have the same keys, and the search for a likeness is slow
def _closest_key(keys: tuple[str, ...]) -> str:
    """Addition to "text is missing": a likely misspelling, else the keys that are present."""
    names = [key for key in keys if len(key) <= 40][:20]
    for name in names:
        suggestion = did_you_mean(name.strip().lower(), ["text"])
        if suggestion:
            return f", but there is `{name}`.{suggestion}"
    if not names:
        return ""
    there_is = ", ".join(f"`{name}`" for name in names[:5])
    return f"; there is {there_is} (to use another key: {suggest('data import')})"
