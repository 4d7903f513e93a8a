"""Files in a domain's folder that are not read, each with a command that makes them readable."""

from __future__ import annotations

import json
import os
import shlex
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

import orjson

from nanothink.data.lines import CONVERSATION
from nanothink.data.records import likely_text_field
from nanothink.disk import shown
from nanothink.suggestions import command, domain_named_after, suggest
from nanothink.wording import some_of

_DOCUMENTS = (
    *(".txt", ".text", ".md", ".markdown"),
    *(".html", ".htm", ".xhtml", ".docx", ".epub", ".pdf"),
)
_TABLES = (".csv", ".tsv", ".tab", ".parquet", ".json")
_IMPORTED = (*_DOCUMENTS, ".csv", ".tsv", ".tab", ".parquet")
_UNPACKED_BY = {
    ".xz": "xz -d",
    ".bz2": "bzip2 -d",
    ".lz4": "lz4 -d -m --rm",
    ".zip": "unzip",
    ".z": "uncompress",
}
_NAMED_AT_MOST = 5
_NAME = "the name does not end in .jsonl, or begins with a dot"
_PEEKED_BYTES = 2**16


def why_not_read(folder: Path, names: Sequence[str]) -> Iterator[str]:
    """Yield a reason for each kind of file among ``names``, with the names and a command for the first."""
    kinds: dict[tuple[str, str], list[str]] = {}
    for name in names:
        kinds.setdefault(_kind(folder, name), []).append(name)
    for (why, remedy), own in kinds.items():
        listed = some_of([shown(name) for name in own], _NAMED_AT_MOST)
        way_in = ""
        if remedy:
            path = shlex.quote(shown(folder / own[0]))
            domain, root = (shlex.quote(shown(part)) for part in (folder.name, folder.parent))
            others = "it" if len(own) == 1 else "it (and so the others)"
            way_in = f". {remedy.format(it=others, path=path, domain=domain, root=root)}"
        yield f"not read, because {why}: {listed}{way_in}"


def import_of(root: Path) -> str:
    """Advice for files below a folder without domains: the start of a sentence, with a command."""
    name, document, table = domain_named_after(root) or "texts", False, ""
    for parent, folders, names in os.walk(root):
        folders[:] = sorted(folder for folder in folders if not folder.startswith("."))
        kinds = {each: Path(each.lower()).suffix for each in sorted(names) if not each.startswith(".")}
        document = document or any(kind in _DOCUMENTS for kind in kinds.values())
        tables = [each for each, kind in kinds.items() if kind in _TABLES]
        table = table or (str(Path(parent, tables[0])) if tables else "")
    if document:
        beside = f"{os.path.normpath(root)}-imported"
        return (
            f"It holds documents: train on them ({suggest('train', root, '--time', '1h')}), import them "
            f"({suggest('data import', root, '--domain', name, '--data-dir', beside)})"
        )
    if table:
        own = domain_named_after(Path(table)) or "texts"
        return f"Import its tables: {suggest('data import', table, '--domain', own, '--data-dir', root)}"
    return f"Put JSON Lines into a folder in it, import text ({suggest('data import --help')})"


_IMPORT = f"Import {{it}}: {command('data import')} {{path}} --domain {{domain}} --data-dir {{root}}"


def _kind(folder: Path, name: str) -> tuple[str, str]:
    """Reason why a file is not read, and a template of the remedy with {path}, {domain} and {root}."""
    suffix = Path(name.lower()).suffix
    if name.startswith("."):
        return _NAME, ""
    if suffix == ".json":
        return _kind_of_json(folder / name)
    if suffix in _UNPACKED_BY:
        return (
            f"{suffix} is a compression that is not read",
            f"Unpack {{it}}: {_UNPACKED_BY[suffix]} {{path}}",
        )
    if suffix in _IMPORTED and not name.lower().startswith(("readme", "license")):
        return f"{suffix} is not JSON Lines", _IMPORT
    return _NAME, ""


def _kind_of_json(path: Path) -> tuple[str, str]:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for ever
            return "it is not a regular file", ""
        with open(path, "rb") as file:
            raw = file.read(_PEEKED_BYTES)
    except OSError as error:
        return f"it cannot be read ({error.strerror})", ""
    start = raw.decode("utf-8-sig", "ignore").lstrip()
    if start.startswith("["):
        return "it is a JSON array", _IMPORT + _field_option(start[1:].lstrip())
    first, _, rest = start.partition("\n")
    try:
        record = orjson.loads(first)
    except ValueError:
        record = None
    if isinstance(record, dict) and (rest.strip() or "text" in record):
        return "it holds JSON Lines, which .json does not say", "Rename {it}: mv -n {path} {path}l"
    return "it is neither JSON Lines nor a JSON array", ""


def _field_option(items: str) -> str:
    """Option ``--text-field`` of the import of an array that begins with ``items``; may be empty."""
    try:
        first = json.JSONDecoder().raw_decode(items)[0]
    except (ValueError, RecursionError):
        return ""
    field = likely_text_field(first) if isinstance(first, dict) and "text" not in first else ""
    if field in ("", CONVERSATION):
        return ""
    return f" --text-field {shlex.quote(field)}".replace("{", "{{").replace("}", "}}")
