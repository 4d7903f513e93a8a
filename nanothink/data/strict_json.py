"""Strict JSON (RFC 8259) by the standard library's decoder, with the reason for each refusal in plain words.

For the few lines that the fast parser (orjson) refuses or that hold something doubtful. The decoder finds
where a text stops being JSON. This module refuses what the decoder accepts against the standard (NaN, lone
surrogates), bounds the depth, locates the keys and values of the outer object, and words the reasons.
"""

from __future__ import annotations

import json
import math
import re
import string
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

MAX_DEPTH = 1024
"""Most arrays and objects inside one another; the limit of the fast parser."""

MAX_DIGITS = 4300
"""Most digits of an integer: Python converts no longer ones, because that takes quadratic time."""

BARE_CR = "lines end in a bare carriage return (CR); end each line with LF or CR LF"

_BLANKS = " \t\n\r"
_SPACE = re.compile(r"[ \t\n\r]*")
_STRUCTURE = re.compile(r'\\.|["\[\]{}]|NaN|-?Infinity', re.DOTALL)
_ESCAPE = re.compile(
    r"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|(?P<lone>u[dD][89a-fA-F]..)|.)", re.DOTALL
)
_WORD = re.compile(r'[^\s,:\[\]{}"]+')


class JsonFault(ValueError):
    """The text stops being JSON (or a record) at ``position``, counted in characters from 0."""

    def __init__(self, position: int, reason: str) -> None:
        super().__init__(reason)
        self.position = position
        self.reason = reason


class Member(NamedTuple):
    """A key and its value in the outer object; positions are characters from 0."""

    key: str
    key_start: int
    value: Any
    start: int
    """Position of the value."""


class _NotFiniteError(Exception):
    """The decoder met NaN or an infinity."""


def parse(text: str) -> Any:
    """Decode a JSON text. Numbers beyond double precision or MAX_DIGITS become infinite floats.

    Raises:
        JsonFault: at what RFC 8259 forbids, at an escaped lone surrogate (it cannot be written as UTF-8), and
            at nesting deeper than MAX_DEPTH.
    """
    with _levels_allowed(text):
        try:
            value = _DECODER.decode(text)
        except json.JSONDecodeError as error:
            raise _fault(text, error) from None
        except _NotFiniteError:
            word = next(found for found in _outside_strings(text) if found.group() not in "[]{}")
            raise JsonFault(word.start(), _why_not_a_value(word.group())) from None
    for found in _ESCAPE.finditer(text):
        if found["lone"]:
            half = found.group()
            raise JsonFault(
                found.start(), f"{half} is half of a surrogate pair and cannot be written as UTF-8"
            )
    return value


def members(text: str) -> list[Member]:
    """Members of an object in the order written, repeated keys included. ``parse`` must accept the text."""
    found: list[Member] = []
    with _levels_allowed(text):
        pos = _skip(text, text.index("{") + 1)
        while text[pos] != "}":
            key_start = pos
            key, pos = _DECODER.raw_decode(text, pos)
            start = _skip(text, text.index(":", pos) + 1)
            value, pos = _DECODER.raw_decode(text, start)
            found.append(Member(key, key_start, value, start))
            pos = _skip(text, pos)
            if text[pos] == ",":
                pos = _skip(text, pos + 1)
    return found


def describe(char: str) -> str:
    """A character as an error message can show it: 'x' if it can be seen, else its code point."""
    if char == "\ufeff":
        return "a byte-order mark (U+FEFF), which is allowed at the very start of a file only"
    if char.isascii() and char.isprintable():
        return f"'{char}'"
    return f"U+{ord(char):04X}"


def _refuse(constant: str) -> None:
    raise _NotFiniteError(constant)


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) <= MAX_DIGITS else math.inf


_DECODER = json.JSONDecoder(parse_constant=_refuse, parse_int=_integer)


@contextmanager
def _levels_allowed(text: str) -> Iterator[None]:
    """Bound the depth by MAX_DEPTH, and let the decoder go that deep: up to Python 3.11 a level is a call."""
    if text.count("[") + text.count("{") < 100:
        yield
        return
    depth = 0
    for found in _outside_strings(text):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(found.group(), 0)
        if depth > MAX_DEPTH:
            raise JsonFault(found.start(), f"nested deeper than {MAX_DEPTH:,} levels")
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(limit + 2 * MAX_DEPTH)
    try:
        yield
    finally:
        sys.setrecursionlimit(limit)


def _outside_strings(text: str) -> Iterator[re.Match[str]]:
    """Brackets, NaN and infinities that are not part of a string."""
    in_string = False
    for found in _STRUCTURE.finditer(text):
        if found.group() == '"':
            in_string = not in_string
        elif not in_string:
            yield found


def _skip(text: str, pos: int) -> int:
    match = _SPACE.match(text, pos)
    assert match is not None
    return match.end()


# ---------------------------------------------------------------------------------------------------
# Reasons


def _fault(text: str, error: json.JSONDecodeError) -> JsonFault:
    """The decoder's error in plain words, at the character to change."""
    pos = error.pos
    if error.msg.startswith("Unterminated string"):
        return JsonFault(pos, "the string that begins here has no closing quote")
    if error.msg.startswith("Invalid control character"):
        char = text[pos]
        escape = {"\t": "\\t", "\r": "\\r", "\n": "\\n"}.get(char, f"\\u{ord(char):04x}")
        return JsonFault(pos, f"raw control character {describe(char)} in a string; write it as {escape}")
    if error.msg.startswith("Invalid \\"):
        pos = text.rindex("\\", 0, pos + 1)
        if text[pos + 1] == "u":
            if pos + 6 >= len(text) and '"' not in text[pos:]:
                return JsonFault(len(text), "it ends within a string, whose closing quote is missing")
            return JsonFault(pos, "\\u must be followed by four hexadecimal digits")
        return JsonFault(pos, f"a backslash before {describe(text[pos + 1])} is not an escape JSON knows")

    before = len(text[:pos].rstrip(_BLANKS))
    char = text[pos : pos + 1]
    if error.msg.startswith("Illegal trailing comma"):  # Python 3.13 and later
        before, char = pos + 1, text[_skip(text, pos + 1)]
    if char and char in "]}" and text[:before].endswith(","):
        return JsonFault(before - 1, f"a comma before '{char}' is not allowed")
    word = _WORD.match(text, pos)
    if word and word.group().startswith(("//", "/*", "#")):
        return JsonFault(pos, "comments are not allowed in JSON")
    if cut := _cut_word(text, pos):
        return JsonFault(cut.start(), _why_not_a_value(cut.group()))
    if error.msg.startswith("Extra data"):
        return _extra_data(text, before, pos)
    return JsonFault(pos, _what_is_due(text, error.msg, pos, word.group() if word else ""))


def _cut_word(text: str, pos: int) -> re.Match[str] | None:
    """The word that the decoder left at ``pos``, after a valid beginning: 01 after the 0."""
    start = len(text[:pos].rstrip(string.ascii_letters + string.digits + "+-."))
    word = _WORD.match(text, start)
    return word if word and word.end() > pos > start else None


def _extra_data(text: str, end: int, pos: int) -> JsonFault:
    """A fault for what follows the outer value, which ended before ``end``."""
    if "\r" in text[end:pos]:
        return JsonFault(text.index("\r", end), BARE_CR)
    if text[pos] in "{[":
        return JsonFault(pos, "a second value on the same line; each record needs a line of its own")
    if text[pos] == ",":
        return JsonFault(pos, "a comma after the value; records are separated by line ends alone")
    return JsonFault(pos, f"extra data after the value, beginning with {describe(text[pos])}")


def _what_is_due(text: str, message: str, pos: int, word: str) -> str:
    found = describe(text[pos]) if pos < len(text) else "the end"
    if word.startswith("'"):
        return "strings need double quotes, not single ones"
    if "property name" in message:
        if pos == len(text):
            return "it ends where a key is due; a closing '}' is missing"
        if word and word[0].isascii() and word[0].isprintable():
            return f"a key must stand in double quotes, found {_shorten(word)}"
        return f"a key in double quotes is due, found {found}"
    if "':' delimiter" in message:
        return f"a colon must follow the key, found {found}"
    if "',' delimiter" in message:
        closing = _innermost(text[:pos])
        if pos == len(text):
            return f"it ends too early: a closing '{closing}' is missing"
        return f"a comma or '{closing}' is due, found {found}"
    if pos == len(text):
        return "it ends where a value is due"
    return _why_not_a_value(word) if word else f"a value is due, found {found}"


def _innermost(text: str) -> str:
    """The bracket that closes the innermost array or object open at the end of a text."""
    opened: list[str] = []
    for found in _outside_strings(text):
        if found.group() in "[{":
            opened.append(found.group())
        else:
            opened.pop()
    return {"[": "]", "{": "}"}[opened[-1]]


def _why_not_a_value(word: str) -> str:
    shown, lower = _shorten(word), word.lower()
    if lower.lstrip("+-") in ("nan", "inf", "infinity"):
        return f"{shown} is not JSON: a number must be finite (null stands for none)"
    if lower in ("true", "false", "null", "none"):
        return f"{shown} is not JSON: write true, false or null"
    if re.match(r"-?0[0-9]", word):
        return f"the number {shown} has a leading zero"
    if word.startswith("+"):
        return f"the number {shown} must not begin with '+'"
    if re.match(r"-?\.?[0-9]", word):
        return f"{shown} is not a number as JSON writes them"
    if not word[0].isprintable() or not word[0].isascii():
        return f"a value is due, found {describe(word[0])}"
    return f"`{shown}` is not a JSON value; text must stand in double quotes"


def _shorten(word: str) -> str:
    visible = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in word[:24])
    return visible + ("…" if len(word) > 24 else "")
