"""The starter corpus: three domains of text that come with the package, to try things out without a download.

    code         modules of Python's standard library
    manual       the topics of Python's help()
    docstrings   docstrings of the modules that ``code`` leaves out

The files are the same on every machine, so figures measured on them can be repeated. Source and licence:
starter_corpus/README.md.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import zstandard

from nanothink.data.lines import SUFFIXES, shown
from nanothink.disk import storage_error, try_to_write, write_whole
from nanothink.errors import StorageError
from nanothink.suggestions import again

DOMAINS = ("code", "manual", "docstrings")
FILE_NAME = "starter.jsonl"


@dataclass(frozen=True)
class StarterDomain:
    """A domain that was written."""

    name: str
    path: Path
    n_records: int
    n_bytes: int


def write_starter_corpus(data_dir: str | Path, *, overwrite: bool = False) -> tuple[StarterDomain, ...]:
    """Write ``<data_dir>/<domain>/starter.jsonl`` for each of DOMAINS.

    Raises:
        StorageError: a domain's folder holds data already (``overwrite`` allows to replace a starter file,
            nothing else), or the disk refuses.
    """
    root = Path(data_dir)
    for name in DOMAINS:
        _refuse_data(root / name, overwrite)
    try_to_write(root)
    domains = []
    for name in DOMAINS:
        path, content = root / name / FILE_NAME, _content(name)
        write_whole(path, content)
        domains.append(StarterDomain(name, path, content.count(b"\n"), len(content)))
    return tuple(domains)


def _content(name: str) -> bytes:
    packed = files("nanothink.data") / "starter_corpus" / f"{name}.jsonl.zst"
    return zstandard.decompress(packed.read_bytes())


def _refuse_data(folder: Path, overwrite: bool) -> None:
    mine = {FILE_NAME} if overwrite else set()
    try:
        taken = sorted(
            entry for entry in os.listdir(folder) if entry.endswith(SUFFIXES) and entry not in mine
        )
    except FileNotFoundError:
        return
    except OSError as error:
        raise storage_error(folder, error) from error
    if taken:
        raise StorageError(
            f"{shown(folder)} holds data already ({shown(taken[0])}). Choose another folder for the starter "
            f"corpus, or replace an earlier starter corpus: {again('--overwrite')}"
        )
