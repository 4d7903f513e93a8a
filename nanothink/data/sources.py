"""The files that an import reads: named one by one, found below folders, or by a pattern.

    FILE      by its extension, in any case
    FOLDER    the documents below it, sorted by name; hidden ones and links to folders are left out
    'a/*.csv' a pattern that the shell left alone; ``**`` stands for any folders
    hf:NAME   a data set of the Hugging Face Hub

A folder gives its documents alone. Its tables are imported by name or pattern, because options say which of
their columns are text. A file that is reached twice is read once.
"""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from nanothink.data.decoding import reading
from nanothink.data.delimited import DELIMITERS
from nanothink.data.documents import DOCUMENT_SUFFIXES
from nanothink.data.lines import SUFFIXES, Problem, shown
from nanothink.data.source_file import unreadable
from nanothink.data.tables import HUB_NAME, holds_json_array, holds_json_lines
from nanothink.data.text_files import Findings, file_size, same_file
from nanothink.errors import DataError, UsageError
from nanothink.reporter import SILENT
from nanothink.suggestions import suggest

TEXT_SUFFIXES = tuple(
    f".{name}{packed}" for name in ("txt", "text", "md", "markdown") for packed in ("", ".gz", ".zst")
)
TABLE_SUFFIXES = tuple(f"{suffix}{packed}" for suffix in DELIMITERS for packed in ("", ".gz", ".zst"))
_KINDS = {
    "text": TEXT_SUFFIXES,
    "table": TABLE_SUFFIXES,
    "JSON array": (".json",),
    "JSON Lines": SUFFIXES,
    "Parquet": (".parquet",),
    **DOCUMENT_SUFFIXES,
}
DOCUMENTS = frozenset(("text", *DOCUMENT_SUFFIXES))
"""Kinds of which a file is one text."""
_PACKED_JSON = (".json.gz", ".json.zst")


@dataclass(frozen=True)
class Source:
    """One file, or one data set of the Hub, that is read by itself."""

    kind: str
    """A key of ``_KINDS``, or ``hub``."""
    path: Path
    origin: str
    """Its name in the records, printable."""
    size: int = 0


def find_sources(
    names: Sequence[str], findings: Findings, leave_out: Path, *, as_tables: bool = False
) -> tuple[str, list[Source]]:
    """Return a name for the file to write (of a single source; else empty), and what is to be read.

    Files below ``leave_out`` are not read from a folder that holds it. With ``as_tables`` text files are
    tables.

    Raises:
        DataError: there is no such file, no document in a folder, or a file that cannot be looked at.
        UsageError: the extension of a file is unknown.
    """
    if not names:
        raise UsageError(
            f"There is nothing to import. Name a file or a folder: {suggest('data import --help')}"
        )
    found = [source for name in names for source in _found(name, findings, leave_out)]
    if as_tables:
        found = [replace(s, kind="table") if s.kind == "text" else s for s in found]
    sources = _once(found)
    if len(names) == 1 and not _is_pattern(names[0]):
        return _own_name(names[0], sources), sources
    files = [source.path.absolute() for source in sources if source.kind != "hub"]
    if files:
        common = Path(os.path.commonpath([path.parent for path in files]))
        sources = [
            s
            if s.kind == "hub"
            else replace(s, origin=shown(s.path.absolute().relative_to(common).as_posix()))
            for s in sources
        ]
    return "", sources


def has_documents(place: Path, leave_out: Path) -> bool:
    """True for a document, and for a folder that holds one outside ``leave_out``."""
    try:
        _, sources = find_sources((str(place),), Findings(SILENT), leave_out)
    except (DataError, UsageError):
        return False
    return all(source.kind in DOCUMENTS for source in sources)


def _own_name(name: str, sources: list[Source]) -> str:
    path = Path(name).expanduser()
    if sources[0].kind == "hub":
        return stem(sources[0].origin)
    if path.is_dir():
        return stem(path.resolve().name)
    return stem(path.name[: len(path.name) - len(_suffix(path))])


def _once(sources: list[Source]) -> list[Source]:
    """The sources without files that stand before them under another name."""
    found: dict[object, Source] = {}
    for source in sources:
        with reading(source.path):
            status = None if source.kind == "hub" else source.path.stat()
        found.setdefault(source if status is None else (status.st_dev, status.st_ino), source)
    return list(found.values())


def _is_pattern(name: str) -> bool:
    return not name.startswith("hf:") and glob.has_magic(name) and not os.path.lexists(name)


def _found(name: str, findings: Findings, leave_out: Path) -> Iterator[Source]:
    if name.startswith("hf:"):
        if not HUB_NAME.fullmatch(name[3:]):
            raise UsageError(f"'{name[3:]}' is not the name of a Hub data set. For example: hf:owner/name")
        yield Source("hub", Path(name[3:]), name[3:])
        return
    if _is_pattern(name):
        matches = sorted(glob.glob(os.path.expanduser(name), recursive=True))
        matches = [match for match in matches if not os.path.isdir(match)]
        if not matches:
            raise DataError(f"No file matches {name!r}. Check the pattern.")
        for match in matches:
            yield _file(Path(match), match)
        return
    path = Path(name).expanduser()
    try:
        is_folder = path.is_dir()
    except (OSError, ValueError) as error:
        raise DataError(f"Cannot look at {name!r}: {error}.") from None
    if is_folder:
        yield from _folder(path, findings, leave_out)
    else:
        yield _file(path, name)


def _file(path: Path, name: str) -> Source:
    try:
        exists, is_file = path.exists(), path.is_file()
    except (OSError, ValueError) as error:
        raise DataError(f"Cannot look at {name!r}: {error}.") from None
    suffix = _suffix(path)
    if not is_file:
        if path.is_symlink() and not exists:
            raise DataError(f"{shown(path)} is a link that leads nowhere. Fix or remove it.")
        if exists or name == "-":
            raise DataError(
                f"{name!r} is not a regular file, and an import reads its source more than once. Write the "
                "text to a file and import it."
            )
        hub = f" A data set of the Hub is hf:{name}." if HUB_NAME.fullmatch(name) and "/" in name else ""
        raise DataError(f"There is no file or folder {shown(path)}. Check the path.{hub}")
    kind = _kind(path, suffix)
    if not kind:
        raise UsageError(
            f"The format of {shown(path)} is not read. Convert or unpack it to one of {_listed(_KINDS)}; "
            "those of text also with .gz or .zst."
        )
    return Source(kind, path, shown(path.name), file_size(path))


def _listed(kinds: Iterable[str]) -> str:
    """The extensions of some kinds, without those of packed files."""
    return ", ".join(s for kind in kinds for s in _KINDS[kind] if not s.endswith((".gz", ".zst")))


def _suffix(path: Path) -> str:
    """The known extension of a file, in lower case; empty if it has none."""
    lower = path.name.lower()
    known = (suffix for suffixes in _KINDS.values() for suffix in suffixes)
    return max((suffix for suffix in known if lower.endswith(suffix)), key=len, default="")


def _kind(path: Path, suffix: str) -> str:
    if suffix in _PACKED_JSON and holds_json_array(path):
        return "JSON array"
    if suffix == ".json" and holds_json_lines(path):
        return "JSON Lines"
    return next((kind for kind, suffixes in _KINDS.items() if suffix in suffixes), "")


def stem(name: str) -> str:
    """Turn a string into a name that a file of a domain can have, with room for a number."""
    name = name.replace("/", "--")
    kept = "".join(char if char.isprintable() and char not in "\\," else "-" for char in name)
    return os.fsencode(kept)[:180].decode(errors="ignore").strip(". ") or "imported"


def _folder(folder: Path, findings: Findings, leave_out: Path) -> list[Source]:
    """The documents below a folder, except those below ``leave_out``."""
    sources: list[Source] = []
    others: Counter[str] = Counter()
    tables: Counter[str] = Counter()

    def refuse(error: OSError) -> None:
        raise unreadable(error.filename, error) from None

    for parent, folders, names in os.walk(folder, onerror=refuse):
        others["hidden folder"] += sum(name.startswith(".") for name in folders)
        # Not followed: links may lead round in circles, or out of the folder a person has named.
        others["link to a folder"] += sum(Path(parent, name).is_symlink() for name in folders)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        own = [name for name in folders if same_file(Path(parent, name), leave_out)]
        for name in own:
            folders.remove(name)
            reason = "left out: it is the data folder, which the import writes to"
            findings.warnings.add(Problem(shown(Path(parent, name)), 0, 0, reason))
        for name in names:
            path = Path(parent, name)
            with reading(path):
                is_file = path.is_file()
            suffix = _suffix(path)
            kind = next((kind for kind, suffixes in _KINDS.items() if suffix in suffixes), "")
            if name.startswith("."):
                others["hidden file"] += 1
            elif not is_file:
                others["not a regular file"] += 1
            elif kind in DOCUMENTS:
                origin = path.relative_to(folder).as_posix()
                sources.append(Source(kind, path, shown(origin), file_size(path)))
            else:
                others[path.suffix or "without a suffix"] += 1
                if kind:
                    tables[suffix] += 1
    known = _listed(kind for kind in _KINDS if kind in DOCUMENTS)
    way_in = ""
    if tables:
        pattern = f"{glob.escape(str(folder))}/**/*{tables.most_common(1)[0][0]}"
        way_in = f" Tables are imported by name or pattern: {suggest('data import', pattern)}"
    if not sources:
        beside = f" outside {shown(leave_out)}" if findings.warnings else ""
        raise DataError(f"There is no document ({known}) in {shown(folder)}{beside}.{way_in}")
    others = +others  # drops the kinds that were counted but not met
    if others:
        kinds = ", ".join(f"{shown(kind)} ({n:,})" for kind, n in others.most_common(8))
        reason = f"left out, because only {known} are read from a folder: {kinds}.{way_in}".removesuffix(".")
        findings.warnings.add(Problem(shown(folder), 0, 0, reason))
    return sorted(sources, key=lambda source: source.origin)
