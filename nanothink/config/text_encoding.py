"""Text files that are not UTF-8: their encoding, and the command that converts them."""

from __future__ import annotations

import codecs
import shlex

_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),  # begins with UTF-16's, so it is looked for first
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)


def wide_encoding(start: bytes) -> str:
    """Return UTF-16 or UTF-32 (with its byte order) if a file begins so; else an empty string."""
    for mark, name in _MARKS:
        if start.startswith(mark):
            return name
    if start[:1] == b"\0":
        return "UTF-32BE" if start[1:2] == b"\0" else "UTF-16BE"
    if start[1:2] == b"\0":
        return "UTF-32LE" if start[2:4] == b"\0\0" else "UTF-16LE"
    return ""


def conversion(encoding: str, old: str, new: str) -> str:
    """Return the command that converts ``old`` to UTF-8 in ``new``."""
    return f"iconv -f {encoding} -t UTF-8 {shlex.quote(old)} > {shlex.quote(new)}"
