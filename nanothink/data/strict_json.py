"""Strict JSON (RFC 8259) by the standard library's decoder, with the place and the reason of a fault.

For the few lines that the fast parser (orjson) refuses. This module refuses what the decoder accepts against
the standard (NaN, lone surrogates), and adds to the decoder's reason what stands at its place.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

MAX_DIGITS = 4300
"""Most digits of an integer: Python converts no longer ones, because that takes quadratic time."""

BARE_CR = "lines end in a bare carriage return (CR); end each line with LF or CR LF"

_BLANKS = " \t\n\r"
_SPACE = re.compile(r"[ \t\n\r]*")
_STRING_OR_CONSTANT = re.compile(r'"(?:\\.|[^"\\])*"|(?P<constant>NaN|-?Infinity)', re.DOTALL)
_ESCAPE = re.compile(
    r"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|(?P<lone>u[dD][89a-fA-F]..)|.)", re.DOTALL
)
_WORD = re.compile(r'[^\s,:\[\]{}"]{1,24}')


class JsonFault(ValueError):
    """The text stops being JSON (or a record) at ``position``, counted in characters from 0."""

    def __init__(self, position: int, reason: str) -> None:
        super().__init__(reason)
        self.position = position
        self.reason = reason


class _NotFiniteError(Exception):
    """The decoder met NaN or an infinity."""


def parse(text: str) -> Any:
    """Decode a JSON text. Numbers beyond double precision or MAX_DIGITS become infinite floats.

    Raises:
        JsonFault: at what RFC 8259 forbids, at an escaped lone surrogate (it cannot be written as UTF-8), and
            for nesting deeper than Python's decoder goes, some 900 levels.
    """
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise _fault(text, error) from None
    except RecursionError:
        raise JsonFault(0, "nested too deeply") from None
    except _NotFiniteError:
        found = next(found for found in _STRING_OR_CONSTANT.finditer(text) if found["constant"])
        raise JsonFault(found.start(), f"{found.group()} is not JSON: a number must be finite") from None
    for escape in _ESCAPE.finditer(text):
        if escape["lone"]:
            reason = f"{escape.group()} is half of a surrogate pair and cannot be written as UTF-8"
            raise JsonFault(escape.start(), reason)
    return value


def _fault(text: str, error: json.JSONDecodeError) -> JsonFault:
    """The decoder's reason and what it found, with a few faults at the character to change."""
    pos, before = error.pos, len(text[: error.pos].rstrip(_BLANKS))
    if error.msg.startswith("Illegal trailing comma"):  # Python 3.13 and later
        before, pos = pos + 1, _skip(text, pos + 1)
    if text[before - 1 : before] == "," and text[pos : pos + 1] in ("]", "}"):
        return JsonFault(before - 1, f"not JSON: a comma before '{text[pos]}'")
    if "\r" in text[before:pos] and error.msg.startswith("Extra data"):
        return JsonFault(text.index("\r", before), BARE_CR)
    reason = re.sub(r"( starting)? at$", "", error.msg[:1].lower() + error.msg[1:])
    return JsonFault(pos, f"not JSON: {reason}, found {_shown(text, pos)}")


def _shown(text: str, pos: int) -> str:
    """The word or the character at a place, as an error message can show it."""
    if pos >= len(text):
        return "the end"
    word = _WORD.match(text, pos)
    if word and word.group().isascii() and word.group().isprintable():
        return f"`{word.group()}`"
    char = text[pos]
    if char == "\ufeff":
        return "a byte-order mark"
    return f"'{char}'" if char.isascii() and char.isprintable() else f"U+{ord(char):04X}"


def _skip(text: str, pos: int) -> int:
    match = _SPACE.match(text, pos)
    assert match is not None
    return match.end()


def _refuse(constant: str) -> None:
    raise _NotFiniteError(constant)


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) <= MAX_DIGITS else math.inf


_DECODER = json.JSONDecoder(parse_constant=_refuse, parse_int=_integer)
