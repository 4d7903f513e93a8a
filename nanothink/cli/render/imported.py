"""Result of ``data import``: what was left out and why, and the file written, or its first records."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nanothink.cli.render.console import error, printable, say, size, warning
from nanothink.cli.render.problems import problems
from nanothink.wording import counted

if TYPE_CHECKING:
    from nanothink.data.importing import ImportReport
    from nanothink.data.records import Record

_SHOWN_CHARS = 600
_SHOWN_LINES = 12


def imported(report: ImportReport) -> None:
    """Print an import's problems, then the file and its size, or the records of a preview."""
    findings = report.findings
    problems(findings.warnings, warning)
    problems(findings.bad_rows, error)
    problems(findings.bad_files, error)
    if findings.bad_files:
        warning(
            f"{len(findings.bad_files):,} of {counted(report.n_sources, 'file')} left out, as said above."
        )
    if findings.bad_rows:
        warning(f"{counted(len(findings.bad_rows), 'row')} left out, as said above.")
    if findings.empty:
        warning(f"{counted(findings.empty, 'row')} left out: no text.")
    if report.preview:
        for record in report.preview:
            _preview(record)
        say(f"Nothing was written. Without --dry-run the records go to {report.path}.")
        return
    say(f"{report.path}: {counted(report.records, 'record')}, {size(report.n_bytes)}.")
    if findings.n_spanning:
        fields = "1 field spans" if findings.n_spanning == 1 else f"{findings.n_spanning:,} fields span"
        first = "it begins" if findings.n_spanning == 1 else "the first begins"
        say(
            f"{fields} several lines; {first} in line {findings.first_spanning:,}. A quote that is missing "
            "would merge rows: is the number of records right?"
        )


def _preview(record: Record) -> None:
    turns = "\n\n".join(f"{message.role}: {message.content}" for message in record.messages)
    text = turns or record.text
    lines = text[:_SHOWN_CHARS].split("\n")[:_SHOWN_LINES]
    shown = "\n".join(f"  {line}".rstrip() for line in lines)
    rest = len(text) - len("\n".join(lines))
    more = f"\n  ({counted(rest, 'more character')})" if rest > 0 else ""
    say(f"{record.source}", style="bold")
    say(printable(shown) + more)
