"""Standard output and standard error as consoles; single lines, JSON, and numbers for people."""

from __future__ import annotations

import json
import math
import os
import re
import sys
import unicodedata
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from nanothink.cli.suggestions import completed

_PIPED_WIDTH = 200  # a pipe has no width, and a table cut to 80 columns is of no use to grep


def _width() -> int | None:
    return None if sys.stdout.isatty() or "COLUMNS" in os.environ else _PIPED_WIDTH


out = Console(highlight=False, width=_width())
err = Console(stderr=True, highlight=False)


def redraws() -> bool:
    """True if lines on standard error can be redrawn: it is a terminal, and not a dumb one."""
    return err.is_terminal and not err.is_dumb_terminal


def printable(text: str) -> str:
    """Replace characters that control a terminal: file names and generated text must not.

    These are control characters and marks of writing direction. Spaces of every width and joiners stay,
    although ``str.isprintable`` is False for them: Japanese indents with the former, Persian words and emoji
    need the latter, and an emoji may be newer than this Python.
    """
    return "".join(
        c if c.isprintable() or c in "\n\t" or not _drives(c) else "\N{REPLACEMENT CHARACTER}" for c in text
    )


def _drives(char: str) -> bool:
    if unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp"):
        return True
    return unicodedata.bidirectional(char) in _TURNING


_TURNING = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")


_WHOLE = re.compile(
    r"(?:(?<=^  )|(?<=: )|(?<=:  ))(?:nanothink|mkdir|mv|echo|tensorboard|torchrun) .+"
    r"|\s+|\(?`[^`]+`\S*"
    r"|\S*\d\S* (?:%|[KMGT]?B|s|min|h)(?!\w)\S*|\S+"
)
"""Blanks, and pieces that are never broken: a word, a number with its unit, a command to be copied, which
stands in backticks, or alone in its line or after a colon."""


def flowing(text: str, console: Console, used: int = 0) -> str:
    """Break ``text`` between words to the width of ``console``, whose first line has ``used`` cells taken.

    A path or command that is longer than a line is left for the terminal to wrap, so that it copies whole.
    """
    if not console.is_terminal:
        return text
    lines = []
    for line in text.split("\n"):
        current = ""
        for piece in _WHOLE.findall(line):
            if current.strip() and used + cell_len(current + piece.rstrip()) > console.width:
                lines.append(current.rstrip())
                current, used = "", 0
                if piece.isspace():
                    continue
            current += piece
        lines.append(current)
        used = 0
    return "\n".join(lines)


def _shown(message: str) -> str:
    return printable(completed(message))


def note(message: str) -> None:
    print_note(err, message)


def print_note(console: Console, message: str) -> None:
    console.print(Text(flowing(_shown(message), console), style="dim"), soft_wrap=True)


def warning(message: str) -> None:
    _headed("warning: ", "yellow", message)


def error(message: str) -> None:
    _headed("error: ", "bold red", message)


def _headed(head: str, style: str, message: str) -> None:
    body = flowing(_shown(message), err, used=len(head))
    err.print(Text.assemble((head, style), body), soft_wrap=True)


def say(message: str = "", style: str = "") -> None:
    """Print a line of a result on standard output."""
    out.print(Text(flowing(_shown(message), out), style=style), soft_wrap=True)


def chapter(title: str, command: str) -> None:
    """Print a heading and the command below it."""
    out.print()
    out.print(Text(title, style="bold"), soft_wrap=True)
    if command:
        out.print(Text(command, style="cyan"), soft_wrap=True)


def print_json(value: Any) -> None:
    """Print one JSON object on standard output.

    A result has ``to_dict()``, or is a dataclass whose fields are its keys. NaN and infinity become null.
    """
    sys.stdout.write(json_text(value, indent=2) + "\n")


def json_text(value: Any, indent: int | None = None) -> str:
    """Format a value as JSON, with escapes for what the encoding of standard output lacks."""
    text = json.dumps(plain(value), indent=indent, ensure_ascii=False, allow_nan=False)
    return _escaped(text, sys.stdout.encoding or "utf-8")


def _escaped(text: str, encoding: str) -> str:
    """Escape characters that ``encoding`` lacks or that control a terminal; none is lost."""
    odd = [c for c in set(text) if not c.isascii() and (_drives(c) or not _encodable(c, encoding))]
    return text.translate({ord(c): json.dumps(c)[1:-1] for c in odd})


def _encodable(char: str, encoding: str) -> bool:
    try:
        char.encode(encoding)
    except UnicodeEncodeError:
        return False
    return True


def plain(value: Any) -> Any:
    """Convert a result to dicts, lists, strings and numbers, as ``print_json`` prints it."""
    if hasattr(value, "to_dict"):
        return plain(value.to_dict())
    if is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def setting(value: object) -> str:
    """Format the value of a setting as it is typed after ``--set``; "-" for none."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return ", ".join(map(setting, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def count(number: float) -> str:
    """Format 1234567 as 1,234,567."""
    return f"{number:,.0f}"


def size(n_bytes: float) -> str:
    """Format bytes in the unit that keeps the number short."""
    for unit in ("B", "KB", "MB", "GB"):
        if abs(n_bytes) < 1000:
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.1f} TB"


def duration(seconds: float) -> str:
    """Seconds as 12s, 3m 04s or 2h 05m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    return f"{whole // 3600}h {whole % 3600 // 60:02d}m"
