"""The starter corpus is sound, the same on every machine, and written whole or not at all."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from nanothink.data.corpus import find_corpus, validate_corpus
from nanothink.data.starter import DOMAINS, write_starter_corpus
from nanothink.errors import StorageError


@pytest.fixture(scope="module")
def starter(tmp_path_factory):
    root = tmp_path_factory.mktemp("starter")
    return root, write_starter_corpus(root)


def contents(root: Path) -> dict[str, bytes]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()
    }


def test_every_record_is_sound_and_has_a_source(starter):
    root, domains = starter
    corpus = find_corpus(root)
    assert corpus.warnings == ()
    assert sorted(corpus.domains) == sorted(DOMAINS) == sorted(domain.name for domain in domains)
    found = validate_corpus(corpus)
    assert found.errors == found.warnings == ()
    assert found.records == sum(domain.n_records for domain in domains)
    assert found.n_bytes == sum(domain.n_bytes for domain in domains)
    records = [[json.loads(line) for line in path.read_text().split("\n")[:-1]] for _, path in corpus.files]
    assert all([record["id"] for record in own] == list(range(len(own))) for own in records)
    assert all(record["source"] for own in records for record in own)
    texts = [record["text"] for own in records for record in own]
    assert len(set(texts)) == len(texts)


def test_it_is_the_corpus_that_figures_were_measured_on(starter):
    """Other text makes every figure in the documents another one: measure them again with it."""
    root, _ = starter
    digests = {name: hashlib.sha256(content).hexdigest()[:16] for name, content in contents(root).items()}
    assert digests == {
        "code/starter.jsonl": "da95903ad9684dbe",
        "docstrings/starter.jsonl": "f086f1bc2fc65ecf",
        "manual/starter.jsonl": "3f92a9b75c679bb1",
    }


@pytest.mark.parametrize("overwrite", [False, True])
def test_never_mixes_with_data_that_is_there(tmp_path, overwrite):
    mine = tmp_path / "manual" / "mine.jsonl"
    mine.parent.mkdir()
    mine.write_text('{"text": "mine"}\n')
    with pytest.raises(StorageError, match=r"holds data already \(mine\.jsonl\)"):
        write_starter_corpus(tmp_path, overwrite=overwrite)
    assert contents(tmp_path) == {"manual/mine.jsonl": b'{"text": "mine"}\n'}


def test_replaces_its_own_files_when_told(starter, tmp_path):
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "starter.jsonl").write_text('{"text": "of an earlier version"}\n')
    before = contents(tmp_path)
    with pytest.raises(StorageError, match="holds data already"):
        write_starter_corpus(tmp_path)
    assert contents(tmp_path) == before
    write_starter_corpus(tmp_path, overwrite=True)
    assert contents(tmp_path) == contents(starter[0])


def test_a_disk_that_refuses_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "file", tmp_path / "file" / "data"):
        with pytest.raises(StorageError, match="is a file, not a folder"):
            write_starter_corpus(place)
    # A file where one domain's folder should be stops all three.
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "manual").write_text("x")
    with pytest.raises(StorageError, match="Cannot write"):
        write_starter_corpus(tmp_path / "data")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["data", "file", "manual"]
