"""Bad lines and warnings: by kind with the first ones named, or one by one as they are found."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from nanothink.cli.render.console import json_text, printable, say

if TYPE_CHECKING:
    from nanothink.data.lines import Problem
    from nanothink.data.problems import Problems


_FEW = 5
"""Problems of one reason that still get a line each."""


def problems(found: Problems, tell: Callable[[str], None]) -> None:
    """Print a line for each problem, or one for all that have the same reason."""
    lines: list[tuple[float, str]] = []
    for group in found.groups:
        if group.is_uniform and group.count > _FEW:
            lines.append((group.named[0][0], f"{group.first} ({group.count:,} times: {group.where()})"))
            continue
        lines += [(number, str(problem)) for number, problem in group.named]
        more = group.count - len(group.named)
        if more:
            last = group.named[-1][0]
            lines.append((last + 0.5, f"{group.first.place}: {more:,} more like this: {group.where()}"))
    for _, line in sorted(lines):
        tell(line)


def bad_lines(found: Problems) -> dict[str, Any]:
    """Count and kinds of the bad lines that were left out, for ``--json``."""
    return {"n_bad_lines": len(found), "bad_lines": found.groups}


def hints(found: Problems) -> None:
    """Print the commands that fix problems, where there are any."""
    for group in found.groups:
        if group.hint:
            say(group.hint)


class ErrorStream:
    """Writes each error as it is found, or as JSON the first part of one object."""

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json
        self._n_written = 0

    def add(self, problem: Problem) -> None:
        if not self._as_json:
            sys.stdout.write(printable(f"error: {problem}") + "\n")
        else:
            sys.stdout.write(('{"errors": [\n' if not self._n_written else ",\n") + json_text(problem))
        self._n_written += 1

    def end_json(self, rest: dict[str, Any]) -> None:
        """Complete the object with the other keys."""
        head = "\n], " if self._n_written else '{"errors": [], '
        sys.stdout.write(head + json_text(rest).removeprefix("{") + "\n")
