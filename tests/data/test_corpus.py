"""Which files are data, and what a pass over all lines tells."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from reports import Told

from nanothink.data.corpus import find_corpus, validate_corpus
from nanothink.errors import DataError, UsageError

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "corpora"


def put(root: Path, name: str, *texts: str) -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def said(corpus) -> dict[str, str]:
    return {os.path.relpath(warning.file, corpus.root): warning.reason for warning in corpus.warnings}


# Finding


def test_domains_and_files_come_in_the_order_of_their_names(tmp_path):
    for name in ("b/2.jsonl", "b/10.jsonl", "a/x.jsonl.gz", "b/1.jsonl.zst"):
        put(tmp_path, name, "t")
    corpus = find_corpus(str(tmp_path))
    assert list(corpus.domains) == ["a", "b"]
    names = [(domain, path.name) for domain, path in corpus.files]
    assert names == [("a", "x.jsonl.gz"), ("b", "1.jsonl.zst"), ("b", "10.jsonl"), ("b", "2.jsonl")]
    assert corpus.warnings == ()
    assert corpus.n_bytes == sum(path.stat().st_size for path in tmp_path.rglob("*.jsonl*"))


def test_everything_passed_over_is_named(tmp_path):
    put(tmp_path, "a/x.jsonl", "t")
    put(tmp_path, "stray.jsonl", "t")
    put(tmp_path, "notes.txt", "t")
    put(tmp_path, ".hidden/x.jsonl", "t")
    put(tmp_path, "empty/readme.txt", "t")
    put(tmp_path, "a/deep/er/y.jsonl", "t")
    put(tmp_path, "a/y.JSONL", "t")
    put(tmp_path, "a/.z.jsonl", "t")
    warnings = said(find_corpus(tmp_path))
    assert "lies in no domain folder" in warnings.pop("stray.jsonl")
    assert "one per domain" in warnings.pop("notes.txt")
    assert "begins with a dot" in warnings.pop(".hidden")
    assert "holds no .jsonl file" in warnings.pop("empty")
    assert warnings.keys() == {"a"}
    reasons = [warning.reason for warning in find_corpus(tmp_path).warnings if warning.file.endswith("/a")]
    assert any("must lie in the domain folder itself: deep" in reason for reason in reasons)
    assert any(".z.jsonl, y.JSONL" in reason for reason in reasons)


def test_a_warning_about_a_folder_shows_no_line_number(tmp_path):
    put(tmp_path, "a/x.jsonl", "t")
    put(tmp_path, "notes.txt", "t")
    (warning,) = find_corpus(tmp_path).warnings
    assert str(warning).startswith(f"{tmp_path / 'notes.txt'}: not read")


def test_own_cache_and_readme_are_passed_over_in_silence(tmp_path):
    put(tmp_path, "a/x.jsonl", "t")
    put(tmp_path, ".nanothink/x.jsonl", "t")
    put(tmp_path, "README.md", "t")
    corpus = find_corpus(tmp_path)
    assert list(corpus.domains) == ["a"]
    assert corpus.warnings == ()


def test_domains_asked_for(tmp_path):
    for name in ("code", "law", "poems"):
        put(tmp_path, f"{name}/x.jsonl", "t")
    (tmp_path / "empty").mkdir()
    assert list(find_corpus(tmp_path, ["poems", "code", "code"]).domains) == ["code", "poems"]
    assert find_corpus(tmp_path, ["code"]).warnings == ()
    with pytest.raises(UsageError, match=r"no domain 'coed'.*Did you mean 'code'\?.*code, empty, law, poems"):
        find_corpus(tmp_path, ["coed"])
    with pytest.raises(DataError, match=r"'empty' has no data.*data import --help"):
        find_corpus(tmp_path, ["empty"])


def test_no_data_says_what_to_do(tmp_path):
    with pytest.raises(DataError, match=r"no data folder.*nanothink data sample --data-dir"):
        find_corpus(tmp_path / "missing")
    with pytest.raises(DataError, match=r"no domain in.*nanothink data sample"):
        find_corpus(tmp_path)
    put(tmp_path, "x.jsonl", "t")
    with pytest.raises(DataError, match=r"there is x\.jsonl\. Move such files into a folder"):
        find_corpus(tmp_path)
    with pytest.raises(DataError, match=r"is a file, not a folder"):
        find_corpus(tmp_path / "x.jsonl")


def test_links_may_loop_and_break(tmp_path):
    put(tmp_path, "a/x.jsonl", "t")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "a" / "self").symlink_to(tmp_path / "a" / "self")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    (tmp_path / "again").symlink_to(tmp_path / "a")
    corpus = find_corpus(tmp_path)
    assert list(corpus.domains) == ["a", "again"]
    assert {"loop", "broken"} <= said(corpus).keys()
    assert "the link points to nothing" in said(corpus)["broken"]


def test_a_folder_name_that_is_not_utf8_is_named(tmp_path):
    put(tmp_path, "a/x.jsonl", "t")
    put(tmp_path, os.fsdecode(b"\xff") + "/x.jsonl", "t")
    corpus = find_corpus(tmp_path)
    assert list(corpus.domains) == ["a"]
    assert "not UTF-8" in said(corpus)["\\xff"]


# Validating


def test_a_sound_corpus(tmp_path):
    put(tmp_path, "a/x.jsonl", "t", "u")
    put(tmp_path, "b/x.jsonl", "v")
    put(tmp_path, "notes.txt")
    corpus = find_corpus(tmp_path)
    seen: list[tuple[int, int]] = []
    report = validate_corpus(corpus, reporter=Told(progress=lambda _, *at: seen.append(at)))
    assert report.ok
    assert (report.files, report.records, report.n_bytes) == (2, 3, corpus.n_bytes)
    assert report.seconds > 0
    assert report.warnings == corpus.warnings
    assert seen[-1] == (corpus.n_bytes, corpus.n_bytes)
    assert seen == sorted(seen)


def test_every_problem_is_listed_and_reading_goes_on(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.jsonl").write_bytes(b'{"text": 1}\n\n{"text": "a"}\n{}\n')
    (tmp_path / "a" / "folder.jsonl").mkdir()
    put(tmp_path, "b/x.jsonl", "t")
    corpus = find_corpus(tmp_path)
    seen: list[int] = []
    report = validate_corpus(corpus, reporter=Told(progress=lambda _, done, __: seen.append(done)))
    assert not report.ok
    assert report.records == 2
    places = [(Path(p.file).name, p.line, p.column) for p in report.errors]
    assert places == [("folder.jsonl", 1, 1), ("x.jsonl", 1, 10), ("x.jsonl", 4, 1)]
    assert [w.line for w in report.warnings] == [2]
    assert seen[-1] == corpus.n_bytes


def test_a_domain_without_a_valid_record_is_an_error(tmp_path):
    put(tmp_path, "a/x.jsonl", "t")
    put(tmp_path, "b/x.jsonl")
    report = validate_corpus(find_corpus(tmp_path))
    (error,) = report.errors
    assert str(error) == f"{tmp_path / 'b'}: the domain 'b' has no valid record"
    assert [w.reason for w in report.warnings] == ["the file holds no record"]


def test_a_file_that_vanishes_is_an_error_not_an_exception(tmp_path):
    put(tmp_path, "a/x.jsonl", "t")
    gone = put(tmp_path, "a/y.jsonl", "t")
    corpus = find_corpus(tmp_path)
    gone.unlink()
    report = validate_corpus(corpus)
    assert [(Path(e.file).name, e.reason) for e in report.errors] == [("y.jsonl", "the file is gone")]


def test_memory_does_not_grow_with_the_file(tmp_path):
    code = """if True:
        import resource, sys
        from nanothink.data.corpus import find_corpus, validate_corpus
        report = validate_corpus(find_corpus(sys.argv[1]))
        print(report.records, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    """
    peaks = []
    for times in (1, 60):
        block = b"".join(json.dumps({"text": f"{i} " + "word " * 300}).encode() + b"\n" for i in range(1000))
        (tmp_path / "a").mkdir(exist_ok=True)
        with (tmp_path / "a" / "x.jsonl").open("wb") as file:
            for _ in range(times):
                file.write(block)
        command = [sys.executable, "-c", code, str(tmp_path)]
        records, peak = subprocess.run(command, capture_output=True, check=True).stdout.split()
        assert int(records) == 1000 * times
        peaks.append(int(peak))
    assert peaks[1] - peaks[0] < 8 * 1024  # KiB, where the file grew by 90 MB


@pytest.mark.skipif(not REAL.is_dir(), reason="needs the real corpora")
def test_the_real_corpora_are_sound():
    report = validate_corpus(find_corpus(REAL))
    assert report.ok
    assert report.warnings == ()
    assert report.records == 7425
