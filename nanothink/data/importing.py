"""Import of other formats into a domain of records.

    .txt .md             a file becomes one record, a long one several, cut at blank lines
    a folder             every such file below it, sorted by name
    .csv                 one record a row, text from the column ``text_field``; fields may be quoted
    .tsv                 the same; quotes are text unless ``quotes`` is set
    .json (.gz, .zst)    an array of objects, or of strings; packed also one object a line
    .jsonl (.gz, .zst)   one record a line, text from the key ``text_field``
    .parquet             one record a row, read batch by batch        pip install 'nanothink[parquet]'
    hf:NAME              a data set of the Hugging Face Hub, streamed   pip install 'nanothink[datasets]'

One file is written, whole or not at all, and never over its source. Rows without text are counted, and rows
that cannot be used are named in the report; only a fault of the whole source is an error.

Pieces of one file share a ``group``, so that the split keeps them together. The rows' own ``group`` and
``source`` are kept.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import orjson

from nanothink.data.delimited import DELIMITERS, table_rows
from nanothink.data.import_place import ImportCommand, check_place
from nanothink.data.lines import MAX_LINE_BYTES, SUFFIXES, Problem, shown
from nanothink.data.problems import Problems
from nanothink.data.records import Record, write_records
from nanothink.data.tables import (
    HUB_NAME,
    holds_json_array,
    hub_rows,
    json_array_rows,
    json_lines_rows,
    parquet_rows,
)
from nanothink.data.text_files import TEXT_SUFFIXES, Findings, Row, folder_rows, text_file_rows
from nanothink.errors import DataError, UsageError
from nanothink.reporter import SILENT, Reporter

SPLIT_CHARS = 10_000
"""Longest record made from a text file, in characters. A book as one record would leave the split nothing to
choose from."""


PACKED_JSON = (".json.gz", ".json.zst")
_KNOWN_SUFFIXES = (*TEXT_SUFFIXES, *DELIMITERS, ".json", *SUFFIXES, ".parquet")


@dataclass(frozen=True)
class ImportReport:
    """Result of an import: ``records`` were written to ``path``, ``n_bytes`` long."""

    path: Path
    domain: str
    records: int
    n_bytes: int
    empty: int
    """Rows or files without text, left out."""
    found_bad_rows: Problems
    """Rows that could not be used, left out."""
    found_warnings: Problems
    seconds: float
    n_spanning: int = 0
    """Quoted fields of a table that span several lines."""
    first_spanning: int | None = None
    """The line where the first of them begins."""

    @property
    def bad_rows(self) -> tuple[Problem, ...]:
        """The first of each kind, in the order found."""
        return tuple(self.found_bad_rows.named())

    @property
    def warnings(self) -> tuple[Problem, ...]:
        return tuple(self.found_warnings.named())


def import_source(
    source: str | Path,
    *,
    domain: str,
    data_dir: str | Path,
    name: str | None = None,
    text_field: str = "text",
    quotes: bool | None = None,
    split_chars: int | None = SPLIT_CHARS,
    overwrite: bool = False,
    config_name: str | None = None,
    split: str = "train",
    reporter: Reporter = SILENT,
) -> ImportReport:
    """Write ``<data_dir>/<domain>/<name>.jsonl`` from ``source``; see the module for kinds of sources.

    ``name`` is that of the source when left out. ``quotes`` says whether fields of a CSV or TSV may be
    quoted; None: in CSV. ``split_chars`` bounds records made of text files, None leaves each file whole; rows
    of tables are never cut. ``config_name`` and ``split`` choose a part of a Hub data set.

    Raises DataError when the source cannot be found, read or understood, or holds no text; UsageError for
    names that cannot be, and for a source that is the file or folder that would be written to; StorageError
    when the file exists (without ``overwrite``) or cannot be written.
    """
    began = time.perf_counter()
    check_domain_name(domain)
    if name is not None and (reason := _why_no_name(name)):
        raise UsageError(f"{name!r} cannot be the name of a file: {reason}. For example: --name letters")
    if split_chars is not None and split_chars < 1:
        raise UsageError(f"A record cannot hold {split_chars} characters; split_chars must be at least 1.")
    findings = Findings(reporter)
    data_dir = Path(data_dir)
    own_name, rows = _open(
        str(source), text_field, quotes, split_chars, config_name, split, findings, data_dir
    )
    path = data_dir / domain / f"{name or own_name}.jsonl"
    options: tuple[str, ...] = ("--text-field", text_field) if text_field != "text" else ()
    options += () if quotes is None else ("--quotes",) if quotes else ("--no-quotes",)
    check_place(ImportCommand(str(source), domain, data_dir, name, options, overwrite), path)
    n_records = write_records(path, _records(rows, str(source), findings), overwrite=overwrite)
    return ImportReport(
        path,
        domain,
        n_records,
        path.stat().st_size,
        findings.empty,
        findings.bad_rows,
        findings.warnings,
        time.perf_counter() - began,
        findings.n_spanning,
        findings.first_spanning,
    )


def check_domain_name(domain: str) -> None:
    """Raise UsageError for a name that ``find_corpus`` or ``--domains`` could not handle."""
    if reason := _why_no_name(domain):
        raise UsageError(f"{domain!r} cannot be the name of a domain: {reason}. For example: --domain novels")


def _why_no_name(name: str) -> str:
    if not name or name != name.strip():
        return "it must not be empty or begin or end with a blank"
    if name.startswith("."):
        return "it must not begin with a dot: what does is not read"
    if any(char in name for char in "/\\,") or not name.isprintable():
        return "it must not hold a slash, a backslash, a comma or a control character"
    return "it is too long" if len(os.fsencode(name)) > 200 else ""


# ---------------------------------------------------------------------------------------------------
# From any kind of row to records


def _records(rows: Iterable[Row], source: str, findings: Findings) -> Iterator[Record]:
    n_records = 0
    for number, origin, value, group in rows:
        if value is None or (isinstance(value, str) and (not value or value.isspace())):
            findings.empty += 1
            continue
        reason = _why_unfit(value)
        if reason:
            findings.bad_rows.add(Problem(shown(source), number, 1, reason))
            continue
        yield Record(text=str(value), source=origin, id=n_records, group=_group_name(group))
        n_records += 1
    if not n_records:
        first = findings.bad_rows.named()[:1]
        why = "".join(f" First problem: {problem}." for problem in first)
        if any(problem.reason.startswith("there is no '") for problem in first):
            why += " Name the field that holds the text: --text-field NAME"
        raise DataError(f"There is no text in {shown(source)}; nothing was written.{why}")


def _group_name(value: object) -> str | None:
    """Convert a row's group to text. Tables store integers as floats if some are missing."""
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return str(int(value)) if value.is_integer() else str(value)
    return str(value) if isinstance(value, str) or type(value) is int else None


def _why_unfit(value: object) -> str:
    if not isinstance(value, str):
        return f"the text must be a string, not {type(value).__name__}"
    # An escape takes six bytes at the most, so that only huge texts need to be written out to know.
    if len(value) * 6 > MAX_LINE_BYTES - 10_000 and len(orjson.dumps(value)) > MAX_LINE_BYTES - 10_000:
        return f"the text is longer than a record can be ({MAX_LINE_BYTES // 2**20} MiB)"
    try:
        value.encode()
    except UnicodeEncodeError:
        return "the text holds half of a surrogate pair, which cannot be written as UTF-8"
    return ""


def _open(
    source: str,
    text_field: str,
    quotes: bool | None,
    split_chars: int | None,
    config_name: str | None,
    split: str,
    findings: Findings,
    data_dir: Path,
) -> tuple[str, Iterator[Row]]:
    """Return a name for the file to write, and the rows of the source."""
    if source.startswith("hf:"):
        return _hub(source[3:], text_field, config_name, split, findings, note="")
    path = Path(source).expanduser()
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
    except (OSError, ValueError) as error:
        raise DataError(f"Cannot look at {source!r}: {error}.") from None
    if is_folder:
        return _stem(path.resolve().name), folder_rows(path, split_chars, findings, data_dir)
    suffix = _suffix(path)
    if not is_file:
        if not suffix and not path.exists() and source != "-" and HUB_NAME.fullmatch(source):
            note = f"There is no file or folder {source!r} here, so it was taken for a Hub data set. "
            return _hub(source, text_field, config_name, split, findings, note=note)
        if path.exists() or source == "-":
            raise DataError(
                f"{source!r} is not a regular file, and an import reads its source more than once. Write the "
                "text to a file and import it."
            )
        raise DataError(f"There is no file or folder {shown(path)}. Check the path.")
    if quotes is not None and suffix not in DELIMITERS:
        raise UsageError(
            f"--quotes and --no-quotes say how {' and '.join(DELIMITERS)} are read. Leave them out."
        )
    stem = _stem(path.name[: len(path.name) - len(suffix)])
    if suffix in TEXT_SUFFIXES:
        return stem, text_file_rows([(path, path.name)], split_chars, findings)
    if suffix in DELIMITERS:
        quoted = suffix == ".csv" if quotes is None else quotes
        return stem, table_rows(path, DELIMITERS[suffix], text_field, findings, quotes=quoted)
    if suffix == ".json" or (suffix in PACKED_JSON and holds_json_array(path)):
        return stem, json_array_rows(path, text_field, findings)
    if suffix in SUFFIXES:
        return stem, json_lines_rows(path, text_field, findings)
    if suffix == ".parquet":
        return stem, parquet_rows(path, text_field, findings)
    known = ", ".join(_KNOWN_SUFFIXES)
    raise UsageError(f"The format of {shown(path)} is unknown. Formats are recognised by extension: {known}.")


def _suffix(path: Path) -> str:
    """The known extension of a file, in lower case; empty if it has none."""
    lower = path.name.lower()
    return next((suffix for suffix in _KNOWN_SUFFIXES if lower.endswith(suffix)), "")


def _stem(name: str) -> str:
    """Turn a string into a name that ``_why_no_name`` allows, with room for a number."""
    name = name.replace("/", "--")
    kept = "".join(char if char.isprintable() and char not in "\\," else "-" for char in name)
    return os.fsencode(kept)[:180].decode(errors="ignore").strip(". ") or "imported"


def _hub(
    name: str, text_field: str, config_name: str | None, split: str, findings: Findings, *, note: str
) -> tuple[str, Iterator[Row]]:
    if not HUB_NAME.fullmatch(name):
        raise UsageError(f"'{name}' is not the name of a Hub data set. For example: hf:owner/name")
    return _stem(name), hub_rows(name, text_field, config_name, split, findings, note)
