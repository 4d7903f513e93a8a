"""Files in a data folder that are not read, with a command that makes them readable where there is one."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from nanothink.disk import shown
from nanothink.suggestions import command, domain_named_after, suggest
from nanothink.wording import some_of

_DOCUMENTS = (
    *(".txt", ".text", ".md", ".markdown"),
    *(".html", ".htm", ".xhtml", ".docx", ".epub", ".pdf"),
)
_TABLES = (".csv", ".tsv", ".tab", ".parquet", ".json")
_PACKED = (".xz", ".bz2", ".lz4", ".zip", ".z", ".7z", ".tar", ".tgz")
_NAMED_AT_MOST = 5


def why_not_read(folder: Path, names: Sequence[str]) -> Iterator[str]:
    """Yield a reason for each kind of file among ``names``, with the names and a command for the first."""
    kinds: dict[tuple[str, bool], list[str]] = {}
    for name in names:
        kinds.setdefault(_why(name), []).append(name)
    for (why, can_import), own in kinds.items():
        way_in = ""
        if can_import:
            put = ("--domain", shown(folder.name), "--data-dir", shown(folder.parent))
            others = "" if len(own) == 1 else " (and so the others)"
            way_in = f". Import it{others}: {command('data import', shown(folder / own[0]), *put)}"
        yield f"not read, because {why}: {some_of([shown(name) for name in own], _NAMED_AT_MOST)}{way_in}"


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


def _why(name: str) -> tuple[str, bool]:
    """Reason why a file is not read, and whether it can be imported."""
    suffix = Path(name.lower()).suffix
    if suffix in _PACKED:
        return f"{suffix} is not read; unpack it", False
    if suffix in (*_DOCUMENTS, *_TABLES) and not name.lower().startswith((".", "readme", "license")):
        return f"{suffix} is not JSON Lines", True
    return "the name does not end in .jsonl, or begins with a dot", False
