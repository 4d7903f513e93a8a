"""A corpus to try things out on, from text that every Python installation carries; no download.

    code         standard-library modules, cut between top-level definitions
    manual       the topics of Python's own help (pydoc_data)
    docstrings   docstrings of installed packages and of standard-library modules that ``code`` left
    library      docstrings of the standard library alone, when there is no manual to be had

Files are drawn in the order of a hash of their names, so that a domain that is full before all files
are read has a bit of everything, and the same installation always gives the same corpus. No text comes
twice, within a domain or across them; nothing is imported, only parsed.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import io
import os
import sysconfig
import time
import tokenize
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import orjson

from nanothink.data.lines import SUFFIXES, shown
from nanothink.data.records import Record, write_records
from nanothink.data.text_files import cut_text
from nanothink.disk import (
    make_folder,
    remove_empty,
    scratch_folder,
    storage_error,
    sync_folder,
    try_to_write,
)
from nanothink.errors import DataError, StorageError, counted
from nanothink.reporter import SILENT, Reporter

MAX_BYTES_PER_DOMAIN = 2 * 2**20
"""Text per domain, as bytes of its file; a few minutes of training for the smallest preset."""

FILE_NAME = "starter.jsonl"

_CODE_CHARS = 6_000
_PROSE_CHARS = 3_000
_MIN_CHARS = 200  # shorter docstrings say little more than the name of what they describe
_MAX_SOURCE_BYTES = 500_000
_LEFT_OUT = {
    *("test", "tests", "testing", "_vendor", "site-packages", "dist-packages"),
    *("idlelib", "turtledemo", "lib2to3", "encodings", "pydoc_data"),
}

Piece = tuple[str, str]
"""(source, text)"""


@dataclass(frozen=True)
class StarterDomain:
    """One file written; ``n_bytes`` on disk."""

    name: str
    path: Path
    records: int
    n_bytes: int


@dataclass(frozen=True)
class StarterReport:
    """What was written, and what this installation lacks, in sentences."""

    domains: tuple[StarterDomain, ...]
    notes: tuple[str, ...]
    seconds: float


def write_starter_corpus(
    data_dir: str | Path,
    *,
    reporter: Reporter = SILENT,
    max_bytes_per_domain: int = MAX_BYTES_PER_DOMAIN,
    overwrite: bool = False,
) -> StarterReport:
    """Write ``<data_dir>/<domain>/starter.jsonl`` for at least one domain, as a rule three.

    All files are written or none. Raises
    StorageError when a domain folder holds data already (``overwrite`` allows to replace a starter file,
    nothing else) or the disk refuses; DataError when the installation carries no text at all.
    """
    began = time.perf_counter()
    root = Path(data_dir)
    for name in ("code", "manual", "docstrings", "library"):
        _refuse_data(root, name, overwrite)
    try_to_write(root)
    gathered, notes = _gather(max_bytes_per_domain, reporter)
    if not gathered:
        raise DataError(
            "This Python installation carries no source text (no .py files in its standard library). "
            "Import text of your own: nanothink data import SOURCE --domain NAME"
        )
    domains = _write(root, gathered)
    return StarterReport(domains, tuple(notes), time.perf_counter() - began)


# ---------------------------------------------------------------------------------------------------
# Gathering


class _Domain:
    """Records of one domain, up to a number of bytes, none of a text that was seen before."""

    def __init__(self, limit: int, seen: set[bytes], tick: Callable[[int], None]) -> None:
        self.records: list[Record] = []
        self.n_bytes = 0
        self._limit, self._seen, self._tick = limit, seen, tick

    def add(self, pieces: Iterable[Piece]) -> bool:
        """Takes pieces while there is room; False when there is none left."""
        for source, text in pieces:
            digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
            if digest in self._seen:
                continue
            record = Record(text=text, source=source, id=len(self.records))
            size = len(orjson.dumps(record.model_dump(exclude_none=True))) + 1
            if self.n_bytes + size > self._limit:
                return False
            self._seen.add(digest)
            self.records.append(record)
            self.n_bytes += size
            self._tick(size)
        return True


def _gather(limit: int, reporter: Reporter) -> tuple[dict[str, list[Record]], list[str]]:
    notes: list[str] = []
    seen: set[bytes] = set()
    tick = reporter.counter("collecting", 3 * limit)

    def new() -> _Domain:
        return _Domain(limit, seen, tick)

    paths = sysconfig.get_paths()
    library = list(_sources(Path(paths["stdlib"]), "python"))
    installed = sorted({paths["purelib"], paths["platlib"]})
    packages = [pair for folder in installed for pair in _sources(Path(folder), "packages")]
    domains: dict[str, _Domain] = {"code": new(), "manual": new(), "docstrings": new()}

    rest = iter(library)
    for name, path in rest:
        if not domains["code"].add(_code_pieces(name, path)):
            break
    unused = list(rest)

    domains["manual"].add(_manual_pieces())
    in_library = domains["docstrings"]
    if not domains["manual"].records:
        notes.append(
            "This Python installation carries no manual (pydoc_data); "
            "docstrings of the standard library stand in for it."
        )
        in_library = domains["library"] = new()
    for name, path in packages:
        if not domains["docstrings"].add(_docstring_pieces(name, path)):
            break
    for name, path in unused:
        if not in_library.add(_docstring_pieces(name, path)):
            break

    if not packages:
        notes.append("No installed packages were found; docstrings come from the standard library alone.")
    found = {name: domain.records for name, domain in domains.items() if domain.records}
    if 0 < len(found) < 3:
        notes.append(f"This installation gives only {counted(len(found), 'domain')}: {', '.join(found)}.")
    return found, notes


def _sources(folder: Path, prefix: str) -> Iterator[tuple[str, Path]]:
    """(name to show, path) of the Python files below, in the order of a hash of their names."""
    found: list[tuple[bytes, str, Path]] = []
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in _LEFT_OUT and name[0] not in "_.")
        for name in names:
            if name.endswith(".py") and not name.startswith(("test_", "_sysconfigdata")):
                path = Path(parent, name)
                shown_name = f"{prefix}/{path.relative_to(folder).as_posix()}"
                digest = hashlib.blake2b(os.fsencode(shown_name), digest_size=8).digest()
                found.append((digest, shown(shown_name), path))
    for _, shown_name, path in sorted(found):
        yield shown_name, path


def _parse(path: Path) -> tuple[str, ast.Module] | None:
    """Source and syntax tree, or None for a file that is not worth an error: another version's, say."""
    try:
        if path.stat().st_size > _MAX_SOURCE_BYTES:
            return None
        with tokenize.open(path) as file:
            source = file.read()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
        source.encode()
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    return source, tree


def _code_pieces(name: str, path: Path) -> Iterator[Piece]:
    """Runs of neighbouring top-level statements, as many as fit; one that is too long is cut."""
    parsed = _parse(path)
    if parsed is None:
        return
    source, tree = parsed
    lines = [line + "\n" for line in source.split("\n")]  # splitlines() would count form feeds too
    starts = [0]
    for node in tree.body[1:]:
        decorators = getattr(node, "decorator_list", [])
        first = min([node.lineno, *(decorator.lineno for decorator in decorators)]) - 1
        while first > starts[-1] and lines[first - 1].lstrip().startswith("#"):
            first -= 1  # a comment belongs to what it stands above
        if first > starts[-1]:
            starts.append(first)
    run = ""
    for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
        block = "".join(lines[start:end])
        if run and len(run) + len(block) > _CODE_CHARS:
            yield from _cut(name, run, _CODE_CHARS)
            run = ""
        run += block
    yield from _cut(name, run, _CODE_CHARS)


def _docstring_pieces(name: str, path: Path) -> Iterator[Piece]:
    parsed = _parse(path)
    if parsed is None:
        return
    module = name.removesuffix(".py").removesuffix("/__init__")
    stack: list[tuple[str, ast.AST]] = [(module, parsed[1])]
    while stack:
        where, node = stack.pop()
        body = getattr(node, "body", [])
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = inspect.cleandoc(ast.get_docstring(node, clean=False) or "")
            if len(text) >= _MIN_CHARS:
                yield from _cut(where, text, _PROSE_CHARS)
        stack.extend(
            (f"{where}.{child.name}", child)
            for child in reversed(body)
            if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        )


def _manual_pieces() -> Iterator[Piece]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions leave it out
        return
    for topic in sorted(topics):
        yield from _cut(f"manual/{topic}", topics[topic], _PROSE_CHARS)


def _cut(source: str, text: str, limit: int) -> Iterator[Piece]:
    for piece in cut_text(io.StringIO(text), limit):
        if "\0" not in piece and _is_unicode(piece):
            yield source, piece


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # a docstring may hold "\\ud800"
        return False
    return True


# ---------------------------------------------------------------------------------------------------
# Writing


def _refuse_data(root: Path, name: str, overwrite: bool) -> None:
    folder = root / name
    mine = {FILE_NAME} if overwrite else set()
    try:
        taken = sorted(
            entry for entry in os.listdir(folder) if entry.endswith(SUFFIXES) and entry not in mine
        )
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise storage_error(folder, error) from error
    if taken:
        raise StorageError(
            f"{shown(folder)} holds data already ({shown(taken[0])}). Choose another folder for the starter "
            "corpus, or add --overwrite to replace an earlier starter corpus."
        )


def _write(root: Path, gathered: dict[str, list[Record]]) -> tuple[StarterDomain, ...]:
    """All files are written aside first, so that only renames are left when the first one appears."""
    created = [path for path in (root, *root.parents) if not os.path.lexists(path)]
    domains: list[StarterDomain] = []
    path = root
    try:
        with scratch_folder(root / "starter", blamed=root) as staging:
            for name, records in gathered.items():
                write_records(staging / name / FILE_NAME, records)
            for name in gathered:
                created = [*make_folder(root / name), *created]
            for name, records in gathered.items():
                path = root / name / FILE_NAME
                os.replace(staging / name / FILE_NAME, path)
                domains.append(StarterDomain(name, path, len(records), path.stat().st_size))
                sync_folder(path.parent)
    except OSError as error:
        raise storage_error(path, error, None if domains else False) from error
    finally:
        if not domains:
            remove_empty(created)
    return tuple(domains)
