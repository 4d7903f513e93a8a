r"""Import of other formats into a domain of records.

    .txt .md             a file becomes one record, a long one several, cut at blank lines
    .csv .tsv            one record a row; the delimiter is found, fields may be quoted (delimited.py)
    .json (.gz, .zst)    an array of objects, or of strings; packed also one object a line
    .jsonl (.gz, .zst)   one record a line
    .parquet             one record a row, read batch by batch        pip install 'nanothink[parquet]'
    hf:NAME              a data set of the Hugging Face Hub, streamed   pip install 'nanothink[datasets]'

Several sources become one file, written whole or not at all, and never over a source (sources.py finds them).
The text of a row is one field, a template of several, or a conversation (row_text.py). Rows without text are
counted, and rows that cannot be used are named in the report; a fault of a whole file is an error, or that
file is left out and named if ``skip_bad_files`` asks for it.

Pieces of one file share a ``group``, so that the split keeps them together. The rows' own ``group`` and
``source`` are kept.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import math
import os
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import orjson

from nanothink.data.decoding import AUTO, is_also_utf8, known_encoding
from nanothink.data.delimited import Dialect, known_delimiter, table_rows
from nanothink.data.document_process import DocumentReader
from nanothink.data.documents import DOCUMENT_SUFFIXES
from nanothink.data.import_place import check_place
from nanothink.data.lines import MAX_LINE_BYTES, Problem, shown
from nanothink.data.record_file import record_file
from nanothink.data.records import Conversation, Record
from nanothink.data.row_text import RowText, Turns
from nanothink.data.sources import DOCUMENTS, TABLE_SUFFIXES, Source, find_sources
from nanothink.data.tables import hub_rows, json_array_rows, json_lines_rows, parquet_rows
from nanothink.data.text_files import Findings, Row, text_digest, text_file_rows, text_rows
from nanothink.errors import DataError, UsageError
from nanothink.reporter import SILENT, Reporter

SPLIT_CHARS = 10_000
"""Longest record made from a text file, in characters. A book as one record would leave the split nothing to
choose from."""

PREVIEWED = 5
"""Records of a preview at most: the first of each source, or the first of the only one."""


_TEXTUAL = ("text", "table", "JSON array", "JSON Lines", "HTML")


@dataclass(frozen=True)
class ImportOptions:
    """How sources are read.

    Attributes:
        text: makes the text of a row.
        dialect: how tables are read.
        encoding: of text that is not UTF-8, or ``auto``: the one that each file seems to have.
        split_chars: bound of records made of text files; None leaves each file whole. Rows are never cut.
        config_name, split: part of a Hub data set.
        skip_bad_files: leave out files that cannot be read, and name them.
        documents: reads HTML, Word, EPUB and PDF.
    """

    text: RowText = field(default_factory=RowText)
    dialect: Dialect = field(default_factory=Dialect)
    encoding: str | None = None
    split_chars: int | None = SPLIT_CHARS
    config_name: str | None = None
    split: str = "train"
    skip_bad_files: bool = False
    documents: DocumentReader = field(default_factory=DocumentReader)


@dataclass(frozen=True)
class ImportReport:
    """Result of an import: ``records`` were written to ``path``, ``n_bytes`` long."""

    path: Path
    domain: str
    records: int
    n_bytes: int
    n_sources: int
    """Files that were read, those that were left out included."""
    findings: Findings
    """Texts and files that were left out, with the reasons."""
    seconds: float
    preview: tuple[Record, ...] = ()
    """First records of a preview, which writes nothing."""


def import_source(
    source: str | Path | Sequence[str | Path],
    *,
    domain: str,
    data_dir: str | Path,
    name: str | None = None,
    text_field: str | None = None,
    template: str | None = None,
    delimiter: str | None = None,
    quotes: bool | None = None,
    columns: str | None = None,
    encoding: str | None = None,
    split_chars: int | None = SPLIT_CHARS,
    config_name: str | None = None,
    split: str = "train",
    skip_bad_files: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    reporter: Reporter = SILENT,
) -> ImportReport:
    """Write ``<data_dir>/<domain>/<name>.jsonl`` from one source or several; see the module for their kinds.

    ``name`` is that of a single source when left out, else that of the domain. ``text_field`` or ``template``
    say what the text of a row is; ``delimiter``, ``quotes`` and ``columns`` (names, between commas) how
    tables are read; see ``ImportOptions`` for the others. ``dry_run`` writes nothing and gives the first
    records.

    Raises DataError when a source cannot be found, read or understood, or there is no text; UsageError for
    names and options that cannot be, and for a source that is the file or folder that would be written to;
    StorageError when the file exists (without ``overwrite``) or cannot be written.
    """
    began = time.perf_counter()
    check_domain_name(domain)
    if name is not None and (reason := _why_no_name(name)):
        raise UsageError(f"{name!r} cannot be the name of a file: {reason}. For example: --name letters")
    if split_chars is not None and split_chars < 1:
        raise UsageError(f"A record cannot hold {split_chars} characters; split_chars must be at least 1.")
    names = tuple(map(str, [source] if isinstance(source, (str, Path)) else source))
    dialect = Dialect(
        None if delimiter is None else known_delimiter(delimiter), quotes, _column_names(columns)
    )
    options = ImportOptions(
        RowText(text_field, template),
        dialect,
        None if encoding is None else known_encoding(encoding),
        split_chars,
        config_name,
        split,
        skip_bad_files,
    )
    findings = Findings(reporter)
    data_dir = Path(data_dir)
    own_name, sources = find_sources(names, findings, data_dir, as_tables=delimiter is not None)
    _check_options(options, sources)
    findings.total = sum(found.size for found in sources)
    path = data_dir / domain / f"{name or own_name or domain}.jsonl"
    if not dry_run:
        files = [found.path for found in sources if found.kind != "hub"]
        check_place(path, names, files, domain, overwrite=overwrite)
    n_records, preview = 0, tuple[Record, ...]()
    with options.documents:
        if dry_run:
            preview = tuple(_previewed(sources, options, findings))
        else:
            n_records = _write(path, overwrite, sources, options, findings)
    return ImportReport(
        path=path,
        domain=domain,
        records=n_records,
        n_bytes=0 if dry_run else path.stat().st_size,
        n_sources=len(sources),
        findings=findings,
        seconds=time.perf_counter() - began,
        preview=preview,
    )


def document_texts(place: Path, leave_out: Path, reporter: Reporter = SILENT) -> Iterator[str]:
    """Yield the texts of the records that an import of ``place`` would make, and write nothing.

    Args:
        place: a document, or a folder of them.
        leave_out: folder that is not read.

    Raises:
        DataError: there is no document, or one cannot be read.
        UsageError: the extension of a file is unknown.
    """
    findings, options = Findings(reporter), ImportOptions()
    _, sources = find_sources((str(place),), findings, leave_out)
    findings.total = sum(found.size for found in sources)
    with options.documents:
        for source in sources:
            for record in _records(source, options, findings, first_id=0):
                yield record.text


def _write(
    path: Path, overwrite: bool, sources: list[Source], options: ImportOptions, findings: Findings
) -> int:
    with record_file(path, overwrite=overwrite) as writer:
        for source in sources:
            mark = writer.mark()
            try:
                for record in _records(source, options, findings, first_id=writer.n_records):
                    writer.write(record)
            except DataError as error:
                writer.take_back(mark)
                _leave_out(source, error, options, findings)
        if not writer.n_records:
            raise _no_text(sources, findings)
    return writer.n_records


def _previewed(sources: list[Source], options: ImportOptions, findings: Findings) -> Iterator[Record]:
    n_each, n_records = PREVIEWED if len(sources) == 1 else 1, 0
    for source in sources:
        try:
            records = _records(source, options, findings, first_id=n_records)
            with contextlib.closing(records):
                for record in itertools.islice(records, min(n_each, PREVIEWED - n_records)):
                    yield record
                    n_records += 1
        except DataError as error:
            _leave_out(source, error, options, findings)
        if n_records == PREVIEWED:
            return
    if not n_records:
        raise _no_text(sources, findings)


def _leave_out(source: Source, error: DataError, options: ImportOptions, findings: Findings) -> None:
    """Name a file that cannot be used. Raises the error, unless such files are to be left out."""
    if not options.skip_bad_files:
        raise error
    place = source.origin if source.kind == "hub" else shown(source.path)
    reason = str(error).removeprefix(place).removeprefix(":").strip()
    findings.bad_files.add(Problem(place, 0, 0, reason))


def _no_text(sources: list[Source], findings: Findings) -> DataError:
    first = next(iter([*findings.bad_rows.named(), *findings.bad_files.named()]), None)
    why = f" First problem: {first}." if first else ""
    if first and first.reason.startswith("there is no '"):
        why += " Name the field that holds the text: --text-field NAME"
    where = shown(sources[0].path) if len(sources) == 1 else f"these {len(sources):,} sources"
    return DataError(f"There is no text in {where}; nothing was written.{why}")


def _check_options(options: ImportOptions, sources: list[Source]) -> None:
    kinds = {source.kind for source in sources}
    dialect = options.dialect
    if "table" not in kinds and (dialect.quotes is not None or dialect.columns or dialect.delimiter):
        raise UsageError(
            "--delimiter, --columns, --quotes and --no-quotes say how tables are read, and there is none "
            f"({', '.join(TABLE_SUFFIXES[::3])}). Leave them out."
        )
    if "hub" not in kinds and (options.config_name is not None or options.split != "train"):
        raise UsageError("--config-name and --split choose a part of a Hub data set. Leave them out.")
    if options.text.names and kinds <= DOCUMENTS:
        raise UsageError(
            "--text-field and --template choose fields of tables, and there is none. Leave them out."
        )


def _column_names(columns: str | None) -> tuple[str, ...] | None:
    if columns is None:
        return None
    names = tuple(name.strip() for name in columns.split(","))
    if "" in names or len(set(names)) < len(names):
        raise UsageError(
            f"--columns {columns!r} must name each column of the table once, between commas. For example: "
            "--columns date,title,text"
        )
    return names


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


def _rows(source: Source, options: ImportOptions, findings: Findings) -> Iterator[Row]:
    path, origin, text, encoding = source.path, source.origin, options.text, options.encoding
    if encoding not in (None, AUTO, "utf-8", "utf-8-sig") and source.kind in _TEXTUAL and is_also_utf8(path):
        reason = f"the file is UTF-8 too; is --encoding {encoding} right for it?"
        findings.warnings.add(Problem(shown(path), 0, 0, reason))
    if source.kind == "hub":
        return hub_rows(origin, text, options.config_name, options.split, findings)
    if source.kind in DOCUMENT_SUFFIXES:
        document = options.documents.text(source.kind, path, encoding, findings.read)
        digest = partial(text_digest, io.StringIO(document))
        return text_rows(io.StringIO(document), origin, options.split_chars, digest)
    if source.kind == "text":
        return text_file_rows(path, origin, options.split_chars, encoding, findings)
    if source.kind == "table":
        return table_rows(path, origin, text, options.dialect, encoding, findings)
    if source.kind == "JSON array":
        return json_array_rows(path, origin, text, encoding, findings)
    if source.kind == "JSON Lines":
        return json_lines_rows(path, origin, text, encoding, findings)
    return parquet_rows(path, origin, text, findings)


def _records(
    source: Source, options: ImportOptions, findings: Findings, *, first_id: int
) -> Generator[Record, None, None]:
    is_document = source.kind in DOCUMENTS
    done_before, n_rows, id_ = findings.done, 0, first_id
    for row in _rows(source, options, findings):
        n_rows += 1
        value = row.text
        if value is None or (isinstance(value, str) and (not value or value.isspace())):
            findings.empty += 1
            continue
        try:
            record = _record(value, row.source, id_, _group_name(row.group))
        except ValueError as error:
            findings.bad_rows.add(Problem(shown(source.path), row.number, 1, str(error)))
            continue
        yield record
        id_ += 1
    if is_document and not n_rows:
        findings.empty += 1
    findings.read(source.size - (findings.done - done_before))


def _record(value: object, source: str, id_: int, group: str | None) -> Record:
    """Make a record of a text or of turns. Raises ValueError with the reason why it cannot be one."""
    if isinstance(value, Turns):
        named = {"source": source, "id": id_, "group": group}
        record: Record = Conversation.of({"messages": list(value), **named})
        if reason := _why_unfit(record.text):
            raise ValueError(reason)
        return record
    if reason := _why_unfit(value):
        raise ValueError(reason)
    return Record(text=str(value), source=source, id=id_, group=group)


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
