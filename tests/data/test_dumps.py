"""Text as the large collections publish it: read as it comes, or the way in is a command that works."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard

from nanothink.cli.app import run
from nanothink.data.corpus import find_corpus, validate_corpus
from nanothink.data.split import SplitRule
from nanothink.data.tokenizer import load_tokenizer
from nanothink.data.tokens import tokenise
from nanothink.errors import DataError

Maker = Callable[[int], dict[str, Any]]


def passage(i: int) -> str:
    return f"Passage {i} speaks of a garden wall, and of the weather there on day {7 * i}."


DUMPS: dict[str, tuple[str, Maker]] = {
    "dolma": (
        "books-0000.json.gz",
        lambda i: {"id": f"http://x/{i}", "text": passage(i), "source": "gutenberg", "metadata": {"n": i}},
    ),
    "wikipedia": ("train.jsonl", lambda i: {"id": str(i), "url": "u", "title": "T", "text": passage(i)}),
    "pes2o": (
        "part.jsonl.gz",
        lambda i: {"id": str(i), "text": passage(i), "source": "s2orc", "created": "2001"},
    ),
    "c4": ("c4-train.00000-of-01024.json.gz", lambda i: {"text": passage(i), "timestamp": "t", "url": "u"}),
    "pile": ("00.jsonl.zst", lambda i: {"text": passage(i), "meta": {"pile_set_name": "X"}}),
    "redpajama": ("arxiv.ndjson", lambda i: {"text": passage(i), "source": {"name": "arxiv", "text": 1}}),
    "scraped": ("a.ndjson.gz", lambda i: {"id": [i], "text": passage(i), "source": ["a", "b"]}),
    "packed": ("a.json.zst", lambda i: {"id": None, "text": passage(i), "source": 7}),
}


def long_window(content: bytes) -> bytes:
    """As `zstd --long=31` packs: the reader must be allowed to look 2 GiB back."""
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=31)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return packer.compress(content) + packer.flush()


def put(folder: Path, name: str, make: Maker, n: int = 30) -> Path:
    content = b"".join(json.dumps(make(i)).encode() + b"\n" for i in range(n))
    if name.endswith(".gz"):
        content = gzip.compress(content)
    elif name.endswith(".zst"):
        content = long_window(content)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
    return folder / name


def test_dumps_are_read_as_they_come(tmp_path: Path, tiny_tokenizer: Path) -> None:
    for domain, (name, make) in DUMPS.items():
        put(tmp_path / domain, name, make)
    corpus = find_corpus(tmp_path)
    assert corpus.warnings == ()
    report = validate_corpus(corpus)
    assert (report.errors, report.warnings) == ((), ())
    assert (report.files, report.records) == (len(DUMPS), 30 * len(DUMPS))
    tokens = tokenise(corpus, load_tokenizer(str(tiny_tokenizer)), split=SplitRule(0.2))
    for domain in DUMPS:
        assert tokens.train[domain].n_documents + tokens.val[domain].n_documents == 30


@pytest.mark.parametrize(
    ("name", "make", "field"),
    [
        (
            "file-0001.jsonl",
            lambda i: {"repo_name": "a/b", "content": passage(i), "license": "mit"},
            "content",
        ),
        ("it's.jsonl", lambda i: {"title": "T", "lyrics of it": passage(i)}, "lyrics of it"),
    ],
)
def test_records_without_text_are_one_error_with_the_commands_that_import_them(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    make: Maker,
    field: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    put(Path("data/my code"), name, make, 400)
    assert run(["data", "validate"]) == 1
    told = capsys.readouterr().out
    assert told.count("the key `text` is missing") == 1
    assert f"(400 times: data/my code/{name}: 1-400)" in told
    (hint,) = re.findall(
        rf"^If `{field}` is all of the text, move the file away and import it: (.*)$", told, re.M
    )
    moving, _, importing = hint.rpartition(" && ")
    subprocess.run(["sh", "-c", moving], check=True)
    words = subprocess.run(
        ["sh", "-c", f"printf '%s\\n' {importing}"], check=True, capture_output=True, text=True
    ).stdout.splitlines()
    assert words[0] == "nanothink"
    assert run(words[1:]) == 0
    capsys.readouterr()
    assert run(["data", "validate", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["n_records"] == 400


def test_records_without_any_string_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path / "chat", "sft.jsonl", lambda i: {"turns": [{"from": "user", "value": passage(i)}]})
    assert run(["data", "validate", str(tmp_path)]) == 1
    told = capsys.readouterr().out
    assert told.count("the key `text` is missing") == 1
    assert "No field of these records is a string" in told


def test_other_files_are_named_with_a_command_that_brings_them_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = "".join(json.dumps({"text": passage(i)}) + "\n" for i in range(5))
    array = [{"instruction": passage(i), "output": "Yes."} for i in range(5)]
    files: dict[str, bytes] = {
        "array.json": json.dumps(array).encode(),
        "lines.json": lines.encode(),
        "strings.json": json.dumps([passage(i) for i in range(5)], indent=1).encode(),
        "notes.txt": passage(0).encode(),
        "other.txt": passage(1).encode(),
        "table.csv": b"text\nA wall stood there.\n",
        "packed.jsonl.xz": lzma.compress(lines.encode()),
        "packed2.jsonl.bz2": bz2.compress(lines.encode()),
        "settings.json": b'{\n  "a": 1\n}\n',
        "picture.png": b"\x89PNG",
        "README.md": b"# About",
    }
    for name, content in files.items():
        Path("data/all").mkdir(parents=True, exist_ok=True)
        Path("data/all", name).write_bytes(content)
    os.mkfifo("data/all/pipe.json")
    with pytest.raises(DataError, match=r"no domain in data(?s:.*)data/all: not read, because"):
        find_corpus("data")
    put(Path("data/all"), "good.jsonl", lambda i: {"text": f"good {i}"}, 2)
    reasons = [warning.reason for warning in find_corpus("data").warnings]
    done = set()
    for number, reason in enumerate(reasons):
        command = re.search(r"\. Import it(?: \(and so the others\))?: nanothink (.*)$", reason)
        if not command:
            assert "does not end in .jsonl" in reason or reason.partition(": ")[0].endswith("unpack it")
            continue
        assert run([*command.group(1).split(), "--name", f"import{number}"]) == 0
        done.add(Path(command.group(1).split()[2]).suffix)
    assert done == {".json", ".txt", ".csv"}
    named = " ".join(reasons)
    assert all(name in named for name in [*files, "pipe.json"])
    assert run(["data", "validate", "data"]) == 0
    capsys.readouterr()


@pytest.mark.parametrize("indent", [None, 1])
def test_a_packed_array_is_one_error_and_can_be_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], indent: int | None
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data/all").mkdir(parents=True)
    items = [{"text": passage(i)} for i in range(5)]
    Path("data/all/a.json.gz").write_bytes(gzip.compress(json.dumps(items, indent=indent).encode()))
    assert run(["data", "validate"]) == 1
    told = capsys.readouterr().out
    assert told.count("error: ") == 2  # the file, and its domain
    assert "`nanothink data import` reads JSON arrays" in told
    assert run(["data", "import", "data/all/a.json.gz", "--domain", "new", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["n_records"] == 5


def test_a_place_that_is_no_domain_says_what_lies_there(tmp_path: Path) -> None:
    (tmp_path / "alpaca").mkdir()
    (tmp_path / "alpaca" / "data.json").write_text(
        json.dumps([{"instruction": passage(1), "output": "Yes."}])
    )
    for domains in (None, ["alpaca"]):
        with pytest.raises(DataError) as caught:
            find_corpus(tmp_path, domains)
        assert str(caught.value).endswith(
            f"Import it: nanothink data import {tmp_path}/alpaca/data.json --domain alpaca "
            f"--data-dir {tmp_path}"
        )
