"""Problems grouped by reason: all counted, a few kept, in bounded memory."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from nanothink.data.lines import CONVERSATION, Problem
from nanothink.suggestions import command
from nanothink.wording import counted

PLACES = 20
"""Problems kept of one kind, and spans of lines."""

_GROUPS = 100
_REASONS = 1000
_OTHER = "other reasons"

# Parts of a reason that differ between problems of one kind: names, values, numbers, characters of the data.
_VARIABLE = re.compile(
    r"(?:`[^`]*`(?:, )?)+"
    r"|'[^']*'|(?<=, found )\S+|U\+[0-9A-F]+|0x[0-9a-f]+|\\u\w+|-?\d[\d,.]*"
)


_NO_TEXT = "the key `text` is missing"
_KEYS = frozenset(("`text`", "`source`", "`id`", "`group`"))  # of a record, which are no accident of the data


def _masked(found: re.Match[str]) -> str:
    return found.group() if found.group() in _KEYS else "…"


@dataclass(slots=True)
class Span:
    """Consecutive lines of a file, both ends included; 0 for the whole file."""

    file: str
    first: int
    last: int

    @property
    def lines(self) -> str:
        if not self.first:
            return ""
        return f"{self.first}-{self.last}" if self.last > self.first else f"{self.first}"


@dataclass
class ProblemGroup:
    """Problems of one kind."""

    count: int = 0
    n_files: int = 0
    named: list[tuple[int, Problem]] = field(default_factory=list)
    """The first ones, each with the number of problems before it."""
    spans: list[Span] = field(default_factory=list)
    """Lines of the problems, at most PLACES spans."""
    n_spanned: int = 0
    """Problems in those spans."""
    is_uniform: bool = True
    """True if all have exactly the same reason."""
    last_file: str = ""

    def add(self, problem: Problem, number: int) -> None:
        if len(self.named) < PLACES:
            self.named.append((number, problem))
        self.is_uniform &= problem.reason == self.reason
        if problem.file != self.last_file:
            self.last_file = problem.file
            self.n_files += 1
        last = self.spans[-1] if self.spans else None
        if last and last.file == problem.file and last.last <= problem.line <= last.last + 1:
            if self.n_spanned == self.count:
                last.last = problem.line
                self.n_spanned += 1
        elif len(self.spans) < PLACES and self.n_spanned == self.count:
            self.spans.append(Span(problem.file, problem.line, problem.line))
            self.n_spanned += 1
        self.count += 1

    @property
    def first(self) -> Problem:
        return self.named[0][1]

    @property
    def reason(self) -> str:
        return self.first.reason if self.named else ""

    @property
    def hint(self) -> str:
        """Sentence that says how to fix them, with commands if there are any; empty where the reason does."""
        if self.first.text_field:
            return _how_to_import(self.first, self.n_files)
        return _NO_STRING if self.reason.startswith("the key `text` is missing; there is") else ""

    def where(self) -> str:
        """Lines and files: ``a.jsonl: 1-30; b.jsonl: 3, 7-9; and 12 more``."""
        files: dict[str, list[str]] = {}
        for span in self.spans:
            files.setdefault(span.file, []).append(span.lines)
        told = [f"{file}: {', '.join(lines)}" if any(lines) else file for file, lines in files.items()]
        rest = self.count - self.n_spanned
        return "; ".join([*told, *([f"and {rest:,} more"] if rest else [])])

    def summary(self) -> str:
        """The reason, the count, and the place of the first, in one sentence."""
        if self.count == 1:
            return f"{self.reason} ({self.first.place})"
        return f"{self.reason} ({self.count:,}, the first at {self.first.place})"

    def to_dict(self) -> dict[str, Any]:
        return {
            "reason": self.reason,
            "n_problems": self.count,
            "n_files": self.n_files,
            "first": self.first.place,
            "lines": [[span.file, span.first, span.last] for span in self.spans],
            "hint": self.hint or None,
        }


class Problems:
    """A sink for problems: ``iter_records(path, on_problem=problems.add)``."""

    def __init__(self) -> None:
        self._groups: dict[str, ProblemGroup] = {}
        self._by_reason: dict[str, ProblemGroup] = {}  # spares most problems the search for what is variable
        self.count = 0

    def add(self, problem: Problem) -> None:
        self._group(problem).add(problem, self.count)
        self.count += 1

    def extend(self, groups: Iterable[tuple[int, Sequence[Problem]]]) -> None:
        """Add groups of ``named_groups``: counts, each with at least one of its problems."""
        for count, named in groups:
            group = self._group(named[0])
            for problem in named:
                group.add(problem, self.count)
            group.count += count - len(named)
            self.count += count

    def _group(self, problem: Problem) -> ProblemGroup:
        group = self._by_reason.get(problem.reason)
        if group is None:
            kind = problem.reason
            # The keys of a record without text tell its shape, and each shape is imported in its own way.
            if not kind.startswith(_NO_TEXT):
                kind = _VARIABLE.sub(_masked, kind)
            if kind not in self._groups and len(self._groups) >= _GROUPS:
                kind = _OTHER
            group = self._groups.setdefault(kind, ProblemGroup())
            if len(self._by_reason) >= _REASONS:
                self._by_reason.clear()
            self._by_reason[problem.reason] = group
        return group

    def __len__(self) -> int:
        return self.count

    @property
    def groups(self) -> list[ProblemGroup]:
        """All groups, the most frequent first."""
        return sorted(self._groups.values(), key=lambda group: -group.count)

    def named_groups(self) -> list[tuple[int, list[Problem]]]:
        return [(group.count, [problem for _, problem in group.named]) for group in self._groups.values()]

    def named(self) -> list[Problem]:
        """The kept problems, in the order found."""
        found = sorted((at for group in self._groups.values() for at in group.named), key=lambda at: at[0])
        return [problem for _, problem in found]

    def some(self, at_most: int) -> list[Problem]:
        """At most ``at_most`` of the kept problems, of as many kinds as possible, by file and line."""
        chosen = list(islice(self._firsts(), at_most))
        return sorted(chosen, key=lambda problem: (problem.file, problem.line, problem.column))

    def _firsts(self) -> Iterator[Problem]:
        """Yield the first problem of each kind, then the second of each, and so on."""
        kept = [group.named for group in self.groups]
        for place in range(PLACES):
            for named in kept:
                if place < len(named):
                    yield named[place][1]

    def sentence(self, at_most: int = 3) -> str:
        """The most frequent kinds, on one line."""
        groups = self.groups
        told = "; ".join(group.summary() for group in groups[:at_most])
        rest = sum(group.count for group in groups[at_most:])
        return told + (f"; and {rest:,} for other reasons" if rest else "")


_NO_STRING = (
    "No field of these records is a string that could be imported. Give each record a `text`, for example "
    "the messages of a conversation one after the other."
)


def set_aside(path: Path) -> tuple[str, Path]:
    """A shell command that moves a file of a domain out of the data folder, and where it is then."""
    root = path.parent.parent if path.parent.parent.name else path.parent.parent.resolve()
    aside = root.parent / f"{root.name}-originals" / path.parent.name
    folder = shlex.quote(str(aside))
    return f"mkdir -p {folder} && mv -n {shlex.quote(str(path))} {folder}/", aside / path.name


def _how_to_import(problem: Problem, n_files: int) -> str:
    path = Path(problem.file)
    step, moved = set_aside(path)
    is_text = problem.text_field != CONVERSATION
    field = ("--text-field", problem.text_field) if is_text else ()
    put = ("--domain", path.parent.name, *field, "--data-dir", path.parent.parent)
    moved_in = f"{step} && {command('data import', moved, *put)}"
    each = f" (and so each of {counted(n_files, 'file')})" if n_files > 1 else ""
    what = f"If `{problem.text_field}` is all of the text" if is_text else "These are conversations"
    return f"{what}{',' if is_text else ':'} move the file away and import it{each}: {moved_in}"
