"""Results of ``data inspect`` and ``data import``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from nanothink.cli.render.console import count, error, printable, say, size, warning
from nanothink.cli.render.problems import problems
from nanothink.cli.render.tables import table
from nanothink.wording import counted

if TYPE_CHECKING:
    from nanothink.data.importing import ImportReport
    from nanothink.data.near_duplicates import NearDuplicates, Place
    from nanothink.data.records import Record

_SIDES = {"train": "training", "val": "validation", "test": "test"}
_SHOWN_PAIRS = 5
_SHOWN_CHARS = 600  # of a record
_SHOWN_LINES = 12


def near_duplicates(found: NearDuplicates, root: Path) -> None:
    """Print how many documents are nearly the same, how many across the split, and the first pairs."""
    straddling = [_share(found.n_val_in_training, found.n_val, "validation text")]
    if found.n_test:
        straddling.append(_share(found.n_test_in_training, found.n_test, "test text"))
    say(
        f"Near-duplicates: {_share(found.n_near_duplicates, found.n_documents, 'text')} have one; "
        f"{' and '.join(straddling)} have one in training."
    )
    if not found.pairs:
        return

    def place(of: Place) -> str:
        return f"{root / of.file}:{of.line} ({_SIDES[of.side]})"

    across = found.n_val_in_training + found.n_test_in_training > 0
    table(
        [">similarity", "document", "near-duplicate"],
        [
            [f"{pair.similarity:.2f}", place(pair.first), place(pair.second)]
            for pair in found.pairs[:_SHOWN_PAIRS]
            if not across or pair.straddles
        ],
        title="Across the split" if across else "The most alike",
    )
    if across:
        say(
            "A held-out document that is nearly the same as one in training is easier than other text. Give "
            'such documents one "group", or delete one of each pair.'
        )


def _share(n: int, of: int, what: str) -> str:
    return f"{count(n)} of {counted(of, what)}"


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
