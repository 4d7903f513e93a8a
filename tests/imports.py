"""Imports in a test, and what they wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from reports import Told

from nanothink.data.corpus import find_corpus, validate_corpus
from nanothink.data.importing import import_source


class Import:
    """One import into ``out``, and what it wrote."""

    def __init__(self, folder: Path, source: Any, **options) -> None:
        self.progress: list[tuple[int, int]] = []
        options.setdefault("domain", "d")
        self.report = import_source(
            source,
            data_dir=folder / "out",
            reporter=Told(progress=lambda _, *at: self.progress.append(at)),
            **options,
        )
        self.findings = self.report.findings
        self.records = [json.loads(line) for line in self.report.path.read_text("utf-8").splitlines()]
        self.texts = [record["text"] for record in self.records]
        self.sources = [record["source"] for record in self.records]
        assert [record["id"] for record in self.records] == list(range(len(self.records)))
        assert self.report.records == len(self.records)
        assert self.report.n_bytes == self.report.path.stat().st_size
        assert validate_corpus(find_corpus(folder / "out")).ok


def put(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def refused(folder: Path, source: Any, error: type[Exception], match: str, **options) -> None:
    """The import fails with this message, and leaves nothing behind."""
    options.setdefault("domain", "d")
    with pytest.raises(error, match=match):
        import_source(source, data_dir=folder / "out", **options)
    assert not (folder / "out").exists()
