"""The starter corpus: enough of it, sound, the same every time, all of it or none."""

from __future__ import annotations

import ast
import json
import sys
import tokenize
from pathlib import Path

import pytest
from reports import Told

from nanothink.data.corpus import find_corpus, validate_corpus
from nanothink.data.starter import write_starter_corpus
from nanothink.errors import StorageError

SMALL = 60_000


@pytest.fixture(scope="module")
def starter(tmp_path_factory):
    root = tmp_path_factory.mktemp("starter")
    return root, write_starter_corpus(root, max_bytes_per_domain=400_000)


def texts_of(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def contents(root: Path) -> dict[str, bytes]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()
    }


def test_three_domains_of_some_size_under_the_cap(starter):
    _, report = starter
    assert [domain.name for domain in report.domains] == ["code", "manual", "docstrings"]
    assert all(300_000 <= domain.n_bytes <= 400_000 for domain in report.domains)
    assert report.notes == ()


def test_it_is_a_corpus_and_every_record_is_sound(starter):
    root, report = starter
    corpus = find_corpus(root)
    assert corpus.warnings == ()
    assert list(corpus.domains) == ["code", "docstrings", "manual"]
    found = validate_corpus(corpus)
    assert found.errors == found.warnings == ()
    assert found.records == sum(domain.records for domain in report.domains)
    assert found.n_bytes == sum(domain.n_bytes for domain in report.domains)
    for _, path in corpus.files:
        records = [json.loads(line) for line in path.read_text().splitlines()]
        assert [record["id"] for record in records] == list(range(len(records)))
        assert all(record["source"] for record in records)


def test_no_text_comes_twice(starter):
    root, _ = starter
    texts = [text for _, path in find_corpus(root).files for text in texts_of(path)]
    assert len(set(texts)) == len(texts)


def test_code_is_cut_between_definitions_and_loses_nothing(starter):
    root, _ = starter
    by_source: dict[str, str] = {}
    n_whole = n_records = 0
    for line in (root / "code" / "starter.jsonl").read_text().splitlines():
        record = json.loads(line)
        by_source[record["source"]] = by_source.get(record["source"], "") + record["text"]
        n_records += 1
        try:
            compile(record["text"], "record", "exec", ast.PyCF_ONLY_AST)
            n_whole += 1
        except SyntaxError:  # a piece of a definition that is too long for one record
            pass
    assert len(by_source) > 10
    assert n_whole > n_records / 2
    library = Path(ast.__file__).parent
    whole = list(by_source)[:-1]  # the last file met the cap
    for source in whole:
        with tokenize.open(library / source.removeprefix("python/")) as file:
            assert "".join(by_source[source].split()) == "".join(file.read().split()), source


def test_the_same_installation_gives_the_same_corpus(tmp_path):
    write_starter_corpus(tmp_path / "a", max_bytes_per_domain=SMALL)
    write_starter_corpus(tmp_path / "b", max_bytes_per_domain=SMALL)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert contents(tmp_path / "a").keys() == {
        "code/starter.jsonl",
        "docstrings/starter.jsonl",
        "manual/starter.jsonl",
    }


def test_without_the_manual_there_are_three_domains_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    report = write_starter_corpus(tmp_path, max_bytes_per_domain=SMALL)
    assert [domain.name for domain in report.domains] == ["code", "docstrings", "library"]
    assert "no manual" in report.notes[0]
    assert validate_corpus(find_corpus(tmp_path)).ok


def test_progress_ends_where_it_aims(tmp_path):
    seen: list[tuple[int, int]] = []
    report = write_starter_corpus(
        tmp_path, max_bytes_per_domain=SMALL, reporter=Told(progress=lambda _, *at: seen.append(at))
    )
    assert seen == sorted(seen)
    assert seen[-1] == (sum(domain.n_bytes for domain in report.domains), 3 * SMALL)


@pytest.mark.parametrize("name", ["code", "library"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_never_mixes_with_data_that_is_there(tmp_path, name, overwrite):
    mine = tmp_path / name / "mine.jsonl"
    mine.parent.mkdir()
    mine.write_text('{"text": "mine"}\n')
    with pytest.raises(StorageError, match=r"holds data already \(mine\.jsonl\)"):
        write_starter_corpus(tmp_path, max_bytes_per_domain=SMALL, overwrite=overwrite)
    assert contents(tmp_path) == {f"{name}/mine.jsonl": b'{"text": "mine"}\n'}


def test_replaces_its_own_files_when_told(tmp_path):
    write_starter_corpus(tmp_path, max_bytes_per_domain=SMALL)
    before = contents(tmp_path)
    with pytest.raises(StorageError, match="holds data already"):
        write_starter_corpus(tmp_path, max_bytes_per_domain=SMALL // 2)
    assert contents(tmp_path) == before
    write_starter_corpus(tmp_path, max_bytes_per_domain=SMALL // 2, overwrite=True)
    after = contents(tmp_path)
    assert after.keys() == before.keys()
    assert all(len(after[name]) < len(before[name]) for name in before)


def test_a_place_that_cannot_be_written_is_said_before_anything_is_gathered(tmp_path):
    (tmp_path / "file").write_text("")
    seen = []
    with pytest.raises(StorageError, match="is a file, not a folder"):
        write_starter_corpus(
            tmp_path / "file" / "data", reporter=Told(progress=lambda *said: seen.append(said))
        )
    assert seen == []


def test_a_disk_that_refuses_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="is a file, not a folder"):
        write_starter_corpus(tmp_path / "file", max_bytes_per_domain=SMALL)
    # A file where one domain's folder should be stops all three.
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "manual").write_text("x")
    with pytest.raises(StorageError, match="Cannot write"):
        write_starter_corpus(tmp_path / "data", max_bytes_per_domain=SMALL)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["data", "file", "manual"]
