"""Two consoles, single lines, and numbers as people read them."""

from __future__ import annotations

import json
import math
import os
import re
import sys
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

_PIPED_WIDTH = 200  # a pipe has no width, and a table cut to 80 columns is of no use to grep


def _width() -> int | None:
    return None if sys.stdout.isatty() or "COLUMNS" in os.environ else _PIPED_WIDTH


out = Console(highlight=False, width=_width())
err = Console(stderr=True, highlight=False)


def redraws() -> bool:
    """Whether standard error can be drawn over: a terminal, and not one that only takes lines."""
    return err.is_terminal and not err.is_dumb_terminal


def printable(text: str) -> str:
    """The text without what drives a terminal: names in a file, or a model, must not.

    Control characters go, and what turns the direction of writing around. Spaces of every width and joiners
    stay, which ``str.isprintable`` counts out: Japanese indents with the former, Persian words and emoji are
    made with the latter, and an emoji may be younger than this Python.
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
    r"\s+|`[^`]+`\S*"
    r"|nanothink (?:data|tokenizer|pretrain|train-mla|resume|eval|generate|store|report|checkpoints|config)"
    r" .*?(?=\. [A-Z]|[.)]*$|, )"
    r"|\S*\d\S* (?:%|[KMGT]?B|s|min|h)(?!\w)\S*|\S+"
)
"""Blanks; and what is not broken: a word, a number with its unit, and a command, which one copies whole."""


def flowing(text: str, console: Console, used: int = 0) -> str:
    """``text`` broken between words to the width of ``console``, of whose first line ``used`` are taken.

    A path or command that is longer than a line is left to the terminal, which knows that it is one line.
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


def note(message: str) -> None:
    print_note(err, message)


def print_note(console: Console, message: str) -> None:
    console.print(Text(flowing(printable(message), console), style="dim"), soft_wrap=True)


def warning(message: str) -> None:
    _headed("warning: ", "yellow", message)


def error(message: str) -> None:
    _headed("error: ", "bold red", message)


def _headed(head: str, style: str, message: str) -> None:
    body = flowing(printable(message), err, used=len(head))
    err.print(Text.assemble((head, style), body), soft_wrap=True)


def say(message: str = "", style: str = "") -> None:
    """A sentence of a result; or a line of it."""
    out.print(Text(flowing(printable(message), out), style=style), soft_wrap=True)


def chapter(title: str, command: str) -> None:
    """A heading among the results, and the command that it is about."""
    out.print()
    out.print(Text(title, style="bold"), soft_wrap=True)
    if command:
        out.print(Text(command, style="cyan"), soft_wrap=True)


def print_json(value: Any) -> None:
    """One JSON object on standard output. What JSON cannot say (NaN, infinity) becomes null."""
    sys.stdout.write(json_text(value, indent=2) + "\n")


def json_text(value: Any, indent: int | None = None) -> str:
    """A value as JSON that standard output can take."""
    text = json.dumps(_jsonable(value), indent=indent, ensure_ascii=False, allow_nan=False)
    return _escaped(text, sys.stdout.encoding or "utf-8")


def _escaped(text: str, encoding: str) -> str:
    """JSON with escapes for what ``encoding`` lacks or what drives a terminal: nothing of it is lost."""
    odd = [c for c in set(text) if not c.isascii() and (_drives(c) or not _encodable(c, encoding))]
    return text.translate({ord(c): json.dumps(c)[1:-1] for c in odd})


def _encodable(char: str, encoding: str) -> bool:
    try:
        char.encode(encoding)
    except UnicodeEncodeError:
        return False
    return True


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def setting(value: object) -> str:
    """The value of a setting as one types it after ``--set``; "-" for one that is empty."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return ", ".join(map(setting, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def count(number: float) -> str:
    """1234567 -> 1,234,567."""
    return f"{number:,.0f}"


def size(n_bytes: float) -> str:
    """Bytes in the unit that keeps the number short."""
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
