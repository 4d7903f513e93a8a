"""A corpus: a folder with one folder per domain, and the validation of its records.

    <data root>/<domain>/*.jsonl, *.ndjson, each also .gz or .zst; *.json.gz, *.json.zst

The folder's name is the domain. Anything else in the root or in a domain's folder is named in a warning, so
that no data is left out silently.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nanothink.data.lines import SUFFIXES, Problem, ProblemSink, shown
from nanothink.data.problems import Problems
from nanothink.data.records import iter_records
from nanothink.data.source_file import unreadable
from nanothink.data.unread import import_of, why_not_read
from nanothink.errors import BadRecordsError, DataError, UnreadableError, UsageError
from nanothink.reporter import SILENT, Reporter
from nanothink.suggestions import did_you_mean, domain_named_after, suggest
from nanothink.wording import counted, some_of

_SILENT_IN_ROOT = (".nanothink", "README.md")
_NAMED_AT_MOST = 5


@dataclass(frozen=True)
class Corpus:
    """The files of each domain, both sorted by name."""

    root: Path
    domains: dict[str, tuple[Path, ...]]
    warnings: tuple[Problem, ...]

    @property
    def files(self) -> Iterator[tuple[str, Path]]:
        for domain, paths in self.domains.items():
            for path in paths:
                yield domain, path

    @property
    def n_bytes(self) -> int:
        """Size of all files, read from the disk at each call; a file that is gone counts as 0."""
        return sum(_size(path) for _, path in self.files)


@dataclass(frozen=True)
class ValidationReport:
    """Result of reading every line of a corpus. ``n_bytes`` are bytes on disk.

    All errors and warnings are counted; the first ones of each kind are kept.
    """

    files: int
    records: int
    n_bytes: int
    seconds: float
    found_errors: Problems
    found_warnings: Problems
    unreadable: tuple[UnreadableError, ...]
    """Files that the machine could not read; each is an error too."""

    @property
    def ok(self) -> bool:
        return not self.found_errors

    @property
    def errors(self) -> tuple[Problem, ...]:
        """The kept errors, in the order found."""
        return tuple(self.found_errors.named())

    @property
    def warnings(self) -> tuple[Problem, ...]:
        return tuple(self.found_warnings.named())


def find_corpus(data_dir: str | Path, domains: Sequence[str] | None = None) -> Corpus:
    """Find the domains below ``data_dir``: all of them, or those named in ``domains``.

    Raises:
        DataError: there is no such folder, no domain in it, or no data in a named domain.
        UsageError: a named domain does not exist; the message has a suggestion.
    """
    root = Path(data_dir)
    warnings: list[Problem] = []
    stray: list[str] = []
    folders: dict[str, os.DirEntry[str]] = {}
    for entry in _list_root(root):
        if entry.name in _SILENT_IN_ROOT:
            continue
        if not _is_folder(entry):
            stray.append(entry.name)
            warnings.append(_whole(entry.path, _why_stray(entry)))
        elif entry.name.startswith("."):
            warnings.append(_whole(entry.path, "not read, because the folder's name begins with a dot"))
        elif not _is_utf8(entry.name):
            warnings.append(_whole(entry.path, "not read, because the folder's name is not UTF-8; rename it"))
        else:
            folders[entry.name] = entry

    if domains is not None:
        wanted = dict.fromkeys(domains)
        for name in wanted:
            if name not in folders:
                known = ", ".join(folders) or "none"
                message = f"There is no domain '{name}' in {shown(root)}.{did_you_mean(name, folders)}"
                raise UsageError(f"{message} Known domains: {known}.")
        folders = {name: entry for name, entry in folders.items() if name in wanted}

    found: dict[str, tuple[Path, ...]] = {}
    not_read: list[Problem] = []
    for name, entry in folders.items():
        paths, notes = _read_domain(root / name)
        warnings += notes
        if paths:
            found[name] = paths
            continue
        not_read += notes[:-1]
        if domains is not None:
            reason = f" ({notes[-1].reason})" if notes else ""
            raise DataError(
                f"The domain '{name}' has no data: {shown(entry.path)} holds no .jsonl file{reason}. "
                f"Put JSON Lines there, or import text ({suggest('data import --help')})" + _listed(not_read)
            )
    if not found:
        raise DataError(_nothing_here(root, stray) + _listed(not_read))
    return Corpus(root, found, tuple(warnings))


_NAMED_PROBLEMS = 5


def bad_records_error(root: Path, problems: Problems) -> BadRecordsError:
    """Make the error for a corpus with bad lines; it names a few of them, of different kinds."""
    named = problems.some(_NAMED_PROBLEMS)
    alike = {id(group.first): group.count for group in problems.groups}
    lines = [f"{counted(len(problems), 'bad line')} in the corpus:"]
    for problem in named:
        count = alike.get(id(problem), 1)
        lines.append(f"  {problem}" + (f" ({count:,} such lines)" if count > 1 else ""))
    if len(problems) > len(named):
        lines.append(f"  and {len(problems) - len(named):,} more")
    lines += [group.hint for group in problems.groups if group.hint]
    lines.append(
        f"{suggest('data validate', shown(root))} shows them by kind, with --all one by one; "
        "--skip-bad-records leaves them out."
    )
    return BadRecordsError("\n".join(lines))


def left_out(problems: Problems, root: Path) -> str:
    """Describe bad lines that are skipped: how many, why, where, and the command that lists them."""
    return (
        f"{counted(len(problems), 'bad line')} of {shown(root)}: {problems.sentence()}. "
        f"All of them: {suggest('data validate', shown(root))}"
    )


def validate_corpus(
    corpus: Corpus,
    *,
    reporter: Reporter = SILENT,
    on_error: ProblemSink | None = None,
) -> ValidationReport:
    """Read and check every line of every file, in bounded memory.

    A file that cannot be read and a domain without a valid record are errors too.

    Args:
        on_error: receives each error as it is found.
    """
    began = time.perf_counter()
    errors, warnings = Problems(), Problems()
    unreadable_files: list[UnreadableError] = []

    def error(problem: Problem) -> None:
        errors.add(problem)
        if on_error:
            on_error(problem)

    for warning in corpus.warnings:
        warnings.add(warning)
    sizes = {path: _size(path) for _, path in corpus.files}
    total = sum(sizes.values())
    n_records = done = 0

    for domain, paths in corpus.domains.items():
        n_valid = 0
        for path in paths:
            at = done

            def advance(n_bytes: int) -> None:
                nonlocal at
                at += n_bytes
                reporter.progress("validating", min(at, total), total)

            try:
                for _ in iter_records(path, on_problem=error, on_warning=warnings.add, on_bytes=advance):
                    n_valid += 1
            except UnreadableError as failure:
                unreadable_files.append(failure)
                error(Problem(failure.file, max(failure.line, 1), 1, failure.reason))
            # A file that could not be read to its end is done with all the same.
            done += sizes[path]
            reporter.progress("validating", done, total)
        n_records += n_valid
        if not n_valid:
            folder = paths[0].parent if paths else corpus.root / domain
            error(_whole(folder, f"the domain '{shown(domain)}' has no valid record"))

    seconds = time.perf_counter() - began
    return ValidationReport(len(sizes), n_records, total, seconds, errors, warnings, tuple(unreadable_files))


# ---------------------------------------------------------------------------------------------------
# Looking around


def _list_root(root: Path) -> list[os.DirEntry[str]]:
    starter = suggest("data sample --data-dir", shown(root))
    make_one = f"To try things out, make a starter corpus: {starter}"
    try:
        with os.scandir(root) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except FileNotFoundError:
        raise DataError(f"There is no data folder {shown(root)}. {make_one}") from None
    except NotADirectoryError:
        message = f"{shown(root)} is a file, not a folder of domains. Give the folder above its domain"
        name = domain_named_after(root) or "texts"
        way_in = suggest("data import", shown(root), "--domain", name, "--data-dir", "data")
        raise DataError(f"{message}, or import it: {way_in}") from None
    except OSError as error:
        raise unreadable(root, error) from error


def _read_domain(folder: Path) -> tuple[tuple[Path, ...], list[Problem]]:
    """Return the data files of one domain, and warnings about the other files in its folder."""
    paths: list[Path] = []
    others: list[str] = []
    nested: list[str] = []
    try:
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if entry.name.endswith(SUFFIXES) and not entry.name.startswith("."):
                    paths.append(folder / entry.name)  # a folder too: whoever reads it says what is wrong
                elif not _is_folder(entry):
                    others.append(entry.name)
                elif _holds_data(Path(entry.path)):
                    nested.append(entry.name)
    except OSError as error:
        raise unreadable(folder, error) from error
    notes = []
    if nested:
        names = _enumerate(nested)
        notes.append(_whole(folder, f"not read, because data must lie in the domain folder itself: {names}"))
    notes += [_whole(folder, reason) for reason in why_not_read(folder, others)]
    if not paths:
        notes.append(_whole(folder, "the folder holds no .jsonl file, so it is no domain"))
    return tuple(paths), notes


def _holds_data(folder: Path) -> bool:
    """Return whether a folder holds data at any depth, or cannot be searched. Links are not followed."""
    refused: list[OSError] = []
    holds = any(
        name.endswith(SUFFIXES) for _, _, names in os.walk(folder, onerror=refused.append) for name in names
    )
    return holds or bool(refused)


def _why_stray(entry: os.DirEntry[str]) -> str:
    if entry.is_symlink() and not os.path.exists(entry.path):
        return "not read, because the link points to nothing; fix or remove it"
    if entry.name.endswith(SUFFIXES):
        return "not read, because it lies in no domain folder; move it into one"
    return "not read; data lies in folders, one per domain"


def _nothing_here(root: Path, stray: list[str]) -> str:
    data = [name for name in stray if name.endswith(SUFFIXES)]
    if data:
        return (
            f"There is no domain in {shown(root)}, but there is {_enumerate(data)}. "
            f"Move such files into a folder named after their domain: {shown(root / 'NAME' / data[0])}"
        )
    return (
        f"There is no domain in {shown(root)}: no folder in it holds a .jsonl file. {import_of(root)}, "
        f"or make a starter corpus: {suggest('data sample --data-dir', shown(root))}"
    )


def _listed(notes: Sequence[Problem]) -> str:
    """Notes on the files that are not read, one per line."""
    shown_notes = [f"\n  {note}" for note in notes[:_NAMED_AT_MOST]]
    rest = len(notes) - len(shown_notes)
    return "".join(shown_notes) + (f"\n  and {rest:,} more" if rest else "")


def _enumerate(names: Sequence[str]) -> str:
    return some_of([shown(name) for name in names], _NAMED_AT_MOST)


def _whole(path: str | Path, reason: str) -> Problem:
    return Problem(shown(path), 0, 0, reason)


def _is_utf8(name: str) -> bool:
    return not any("\udc80" <= char <= "\udcff" for char in name)  # how Python spells stray bytes


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno == errno.ELOOP:  # a link that leads back to itself
            return False
        raise unreadable(entry.path, error) from error


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
