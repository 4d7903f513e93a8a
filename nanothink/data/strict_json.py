"""Where and why a text is not JSON, in words for the person who wrote it (RFC 8259).

This is the slow look at the few lines that the fast parser refuses or that hold something doubtful:
it knows where each key and value of the outer object begins, which no parser at hand tells. It goes
through the text once without recursion, so neither depth nor length can exhaust the stack.
"""

from __future__ import annotations

import json
import re
from typing import NamedTuple

MAX_DEPTH = 1024
"""Arrays and objects inside one another; the fast parser's own limit."""

BARE_CR = "lines end in a bare carriage return (CR); end each line with LF or CR LF"

_SPACE = re.compile(r"[ \t\n\r]*")
_BLANKS = frozenset(" \t\n\r")
# At most a thousand steps a match: the regex engine keeps a record of each one until the match ends.
_PLAIN = re.compile(r'(?:[^"\\\x00-\x1f]+|\\["\\/bfnrt]|\\u(?![dD][89a-fA-F])[0-9a-fA-F]{4}){1,1000}')
_HEX = re.compile(r"[0-9a-fA-F]{4}")
_LOW_SURROGATE = re.compile(r"\\u[dD][c-fC-F][0-9a-fA-F]{2}")
_WORD = re.compile(r'[^\s,:\[\]{}"]+')
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_CLOSING = {"{": "}", "[": "]"}


class JsonFault(ValueError):
    """The text stops being JSON (or a record) at ``position``, counted in characters from 0."""

    def __init__(self, position: int, reason: str) -> None:
        super().__init__(reason)
        self.position = position
        self.reason = reason


class Member(NamedTuple):
    """One key of the outer object; positions are characters from 0, ``end`` is exclusive."""

    key: str
    key_start: int
    start: int
    end: int


def scan(text: str) -> list[Member] | None:
    """The members of the outer object in the order written, duplicates included; None if it is no object.

    Raises JsonFault at the first thing RFC 8259 forbids, at escaped lone surrogates (they cannot be
    written as UTF-8), and at nesting deeper than MAX_DEPTH.
    """
    pos = _skip(text, 0)
    outer_is_object = text.startswith("{", pos)
    members: list[Member] = []
    open_brackets: list[str] = []
    key, key_start, start = "", 0, 0
    while True:
        # Here a value is due at pos.
        if len(open_brackets) == 1:
            start = pos
        char = text[pos : pos + 1]
        if char in _CLOSING:
            if len(open_brackets) == MAX_DEPTH:
                raise JsonFault(pos, f"nested deeper than {MAX_DEPTH:,} levels")
            open_brackets.append(char)
            pos = _skip(text, pos + 1)
            if not text.startswith(_CLOSING[char], pos):
                if char == "{":
                    name, name_start, pos = _key(text, pos)
                    if len(open_brackets) == 1:
                        key, key_start = name, name_start
                continue
            open_brackets.pop()
            pos += 1
        else:
            pos = _scalar(text, pos)
        # Here a value has just ended before pos; close what closes with it.
        while True:
            if not open_brackets:
                _nothing_more(text, pos)
                return members if outer_is_object else None
            if len(open_brackets) == 1 and outer_is_object:
                members.append(Member(key, key_start, start, pos))
            pos = _skip(text, pos)
            closing = _CLOSING[open_brackets[-1]]
            if text.startswith(closing, pos):
                open_brackets.pop()
                pos += 1
                continue
            if not text.startswith(",", pos):
                raise _missing_comma(text, pos, closing)
            comma, pos = pos, _skip(text, pos + 1)
            if text.startswith(closing, pos):
                raise JsonFault(comma, f"a comma before '{closing}' is not allowed")
            if closing == "}":
                name, name_start, pos = _key(text, pos)
                if len(open_brackets) == 1:
                    key, key_start = name, name_start
            break


def _skip(text: str, pos: int) -> int:
    if text[pos : pos + 1] not in _BLANKS:
        return pos
    match = _SPACE.match(text, pos)
    assert match is not None
    return match.end()


def _key(text: str, pos: int) -> tuple[str, int, int]:
    """The key at pos, where it starts, and where its value is due."""
    char = text[pos : pos + 1]
    if char != '"':
        if not char:
            raise JsonFault(pos, "it ends where a key is due; a closing '}' is missing")
        if char == "'":
            raise JsonFault(pos, "strings need double quotes, not single ones")
        word = _WORD.match(text, pos)
        if word and _is_comment(word.group()):
            raise JsonFault(pos, "comments are not allowed in JSON")
        if word and char.isascii() and char.isprintable():
            raise JsonFault(pos, f"a key must stand in double quotes, found {_shorten(word.group())}")
        raise JsonFault(pos, f"a key in double quotes is due, found {describe(char)}")
    end = _string(text, pos)
    colon = _skip(text, end)
    if not text.startswith(":", colon):
        found = describe(text[colon]) if colon < len(text) else "the end"
        raise JsonFault(colon, f"a colon must follow the key, found {found}")
    return decode_string(text[pos:end]), pos, _skip(text, colon + 1)


def _string(text: str, start: int) -> int:
    """The position after the string that opens at ``start``."""
    pos = start + 1
    while True:
        run = _PLAIN.match(text, pos)
        if run:
            pos = run.end()
            continue
        char = text[pos : pos + 1]
        if char == '"':
            return pos + 1
        if not char or (char == "\\" and pos + 1 == len(text)):
            raise JsonFault(start, "the string that begins here has no closing quote")
        if char != "\\":
            escape = {"\t": "\\t", "\r": "\\r", "\n": "\\n"}.get(char, f"\\u{ord(char):04x}")
            raise JsonFault(pos, f"raw control character {describe(char)} in a string; write it as {escape}")
        if text[pos + 1] != "u":
            raise JsonFault(pos, f"a backslash before {describe(text[pos + 1])} is not an escape JSON knows")
        if not _HEX.match(text, pos + 2):
            raise JsonFault(pos, "\\u must be followed by four hexadecimal digits")
        # Only surrogates are left: _PLAIN takes every other escape.
        if int(text[pos + 2 : pos + 6], 16) >= 0xDC00 or not _LOW_SURROGATE.match(text, pos + 6):
            half = text[pos : pos + 6]
            raise JsonFault(pos, f"{half} is half of a surrogate pair and cannot be written as UTF-8")
        pos += 12


def _scalar(text: str, pos: int) -> int:
    char = text[pos : pos + 1]
    if char == '"':
        return _string(text, pos)
    if not char:
        raise JsonFault(pos, "it ends where a value is due")
    match = _WORD.match(text, pos)
    if not match:
        raise JsonFault(pos, f"a value is due, found {describe(char)}")
    word = match.group()
    if word in ("true", "false", "null") or _NUMBER.fullmatch(word):
        return match.end()
    raise JsonFault(pos, _why_not_a_value(word))


def _why_not_a_value(word: str) -> str:
    shown, lower = _shorten(word), word.lower()
    if lower.lstrip("+-") in ("nan", "inf", "infinity"):
        return f"{shown} is not JSON: a number must be finite (null stands for none)"
    if lower in ("true", "false", "null", "none"):
        return f"{shown} is not JSON: write true, false or null"
    if word.startswith("'"):
        return "strings need double quotes, not single ones"
    if _is_comment(word):
        return "comments are not allowed in JSON"
    if re.match(r"-?0[0-9]", word):
        return f"the number {shown} has a leading zero"
    if word.startswith("+"):
        return f"the number {shown} must not begin with '+'"
    if re.match(r"[-.]?[0-9]", word) or re.match(r"-?\.[0-9]", word):
        return f"{shown} is not a number as JSON writes them"
    if not word[0].isprintable() or not word[0].isascii():
        return f"a value is due, found {describe(word[0])}"
    return f"`{shown}` is not a JSON value; text must stand in double quotes"


def _missing_comma(text: str, pos: int, closing: str) -> JsonFault:
    if pos == len(text):
        return JsonFault(pos, f"it ends too early: a closing '{closing}' is missing")
    word = _WORD.match(text, pos)
    if word and _is_comment(word.group()):
        return JsonFault(pos, "comments are not allowed in JSON")
    return JsonFault(pos, f"a comma or '{closing}' is due, found {describe(text[pos])}")


def _nothing_more(text: str, end: int) -> None:
    pos = _skip(text, end)
    if pos == len(text):
        return
    char = text[pos]
    if "\r" in text[end:pos]:
        raise JsonFault(text.index("\r", end), BARE_CR)
    if char in _CLOSING:
        raise JsonFault(pos, "a second value on the same line; each record needs a line of its own")
    if char == ",":
        raise JsonFault(pos, "a comma after the value; records are separated by line ends alone")
    word = _WORD.match(text, pos)
    if word and _is_comment(word.group()):
        raise JsonFault(pos, "comments are not allowed in JSON")
    raise JsonFault(pos, f"extra data after the value, beginning with {describe(char)}")


def decode_string(literal: str) -> str:
    """The value of a string literal that ``scan`` has let through, quotes included."""
    if "\\" not in literal:
        return literal[1:-1]
    value = json.loads(literal)
    assert isinstance(value, str)
    return value


def describe(char: str) -> str:
    """A character as an error message can show it: 'x' if it can be seen, else its code point."""
    if char == "\ufeff":
        return "a byte-order mark (U+FEFF), which is allowed at the very start of a file only"
    if char.isascii() and char.isprintable():
        return f"'{char}'"
    return f"U+{ord(char):04X}"


def _is_comment(word: str) -> bool:
    return word.startswith(("//", "/*", "#"))


def _shorten(word: str) -> str:
    visible = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in word[:24])
    return visible + ("…" if len(word) > 24 else "")
