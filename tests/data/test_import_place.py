"""The file that an import writes: whole or not at all, and never over a source."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
from imports import Import, put, refused

from nanothink.cli.app import run
from nanothink.data.importing import import_source
from nanothink.errors import DataError, StorageError, UsageError


@pytest.mark.parametrize("domain", ["", " ", ".x", "a/b", "..", "a\\b", "a,b", "a\n", "x" * 300])
def test_names_that_cannot_be_domains(tmp_path, domain):
    refused(
        tmp_path, put(tmp_path, "a.txt", "a"), UsageError, "cannot be the name of a domain", domain=domain
    )


def test_a_source_that_is_not_there_or_of_no_known_kind(tmp_path):
    refused(tmp_path, tmp_path / "gone.txt", DataError, "no file or folder.*gone.txt")
    refused(tmp_path, tmp_path / "gone", DataError, "no file or folder")
    refused(tmp_path, put(tmp_path, "a.odt", "x"), UsageError, r"format of .*a\.odt.*\.txt.*\.parquet")
    refused(tmp_path, "hf:a/b/c", UsageError, "not the name of a Hub data set")
    refused(tmp_path, put(tmp_path, "a.txt", "a"), UsageError, "at least 1", split_chars=0)


def test_a_source_that_is_no_regular_file_is_named(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    for source in ("-", "/dev/null", tmp_path / "pipe.txt"):
        refused(tmp_path, source, DataError, "is not a regular file")


def test_a_source_without_text_writes_nothing(tmp_path):
    refused(tmp_path, put(tmp_path, "a.txt", "\n \n"), DataError, "no text in")
    refused(
        tmp_path, put(tmp_path, "a.json", "[5]"), DataError, r"no text in.*First problem: .*a\.json:1:1: "
    )
    (tmp_path / "empty").mkdir()
    refused(tmp_path, tmp_path / "empty", DataError, "no document")


def test_an_existing_file_is_replaced_only_when_told(tmp_path):
    path = put(tmp_path, "a.txt", "old")
    Import(tmp_path, path)
    path.write_text("new")
    with pytest.raises(StorageError, match="exists already"):
        Import(tmp_path, path)
    assert '"old"' in (tmp_path / "out" / "d" / "a.jsonl").read_text()
    assert Import(tmp_path, path, overwrite=True).texts == ["new"]
    path.write_bytes(b"\xff")
    with pytest.raises(DataError):
        Import(tmp_path, path, overwrite=True)
    assert [entry.name for entry in (tmp_path / "out" / "d").iterdir()] == ["a.jsonl"]
    assert '"new"' in (tmp_path / "out" / "d" / "a.jsonl").read_text()


def typed_instead(said: Any, *words: str) -> str:
    """The message of an import that is refused."""
    assert run(["data", "import", *words]) in (1, 2)
    return str(said.readouterr().err)


def as_typed(message: str, label: str = "") -> str:
    """The commands that a message says to type."""
    lines = [line.strip() for line in message.splitlines()[1:] if line.strip().startswith(label)]
    return " && ".join(line.removeprefix(label).strip().strip("`") for line in lines)


def run_typed(command: str, folder: Path) -> None:
    """Run it in a shell, with the import itself in this process: starting another takes seconds."""
    first, _, words = command.rpartition("nanothink ")
    subprocess.run(f"{first}true", shell=True, check=True, cwd=folder)
    assert run(shlex.split(words)) in (0, 1)


@pytest.mark.parametrize(
    "way", ["itself", "symlink", "hardlink", "folder link", "named", "dots", "its domain", "hardlink in it"]
)
def test_the_file_that_would_be_written_is_no_source(tmp_path, monkeypatch, capsys, way):
    monkeypatch.chdir(tmp_path)
    lines = '{"body": "one", "title": "T"}\n{"bodies": 3}\n'
    target = put(tmp_path, "data/in p/a.jsonl", lines)
    source = {
        "itself": target,
        "dots": Path("data/in p/../in p/a.jsonl"),
        "folder link": Path("other/a.jsonl"),
        "named": Path("b.jsonl"),
        "its domain": target,
    }.get(way, Path("a.jsonl"))
    if way in ("symlink", "named"):
        source.symlink_to(target)
    elif way.startswith("hardlink"):
        source.hardlink_to(target)
    elif way == "folder link":
        source.parent.symlink_to(target.parent)
    name = "c" if way.endswith(("domain", "it")) else "a"
    words = [str(source), "--domain", "in p", "--text-field", "body", "--name", name]
    for overwrite in ([], ["--overwrite"]):
        message = typed_instead(capsys, *words, *overwrite)
        assert "Move it out of the data folder" in message
        assert target.read_text() == lines
    run_typed(as_typed(message), tmp_path)
    written = target.with_name(f"{name}.jsonl")
    assert [json.loads(line)["text"] for line in written.read_text().splitlines()] == ["one"]
    assert (tmp_path / "data-originals" / "in p" / "a.jsonl").read_text() == lines


def test_a_link_in_the_place_of_the_file_is_moved_and_its_file_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    source = put(tmp_path, "mine/a.jsonl", '{"body": "one"}\n')
    (tmp_path / "data" / "d").mkdir(parents=True)
    (tmp_path / "data" / "d" / "a.jsonl").symlink_to(source)
    message = typed_instead(capsys, str(source), "--domain", "d", "--text-field", "body", "--overwrite")
    run_typed(as_typed(message), tmp_path)
    assert source.read_text() == '{"body": "one"}\n'
    assert '"one"' in (tmp_path / "data" / "d" / "a.jsonl").read_text()


@pytest.mark.parametrize("source", ["data/d", "data", "data/../data/d/", "link"])
def test_the_folder_that_would_be_written_into_is_no_source(tmp_path, monkeypatch, capsys, source):
    monkeypatch.chdir(tmp_path)
    put(tmp_path, "data/d/a.txt", "A text.")
    (tmp_path / "link").symlink_to(tmp_path / "data" / "d")
    message = typed_instead(capsys, source, "--domain", "d")
    assert "is the folder that the import writes into" in message
    assert [path.name for path in (tmp_path / "data" / "d").iterdir()] == ["a.txt"]
    run_typed(message.partition("Write to another: `")[2].partition("`")[0], tmp_path)
    (written,) = (tmp_path / "data-imported" / "d").iterdir()
    assert json.loads(written.read_text())["text"] == "A text."


def test_the_data_folder_inside_a_source_is_left_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    put(tmp_path, "data/d/a.txt", "Not a source.")
    put(tmp_path, "data/README.md", "Nor this.")
    with pytest.raises(DataError, match=r"no document .* in \. outside data\."):
        import_source(".", domain="d", data_dir="data")
    put(tmp_path, "notes/b.txt", "A source.")
    report = import_source(".", domain="d", data_dir="data")
    assert report.records == 1
    assert any("it is the data folder" in warning.reason for warning in report.findings.warnings.named())


def test_two_sources_of_one_name_are_both_kept_by_the_command_that_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for folder in ("x", "y y", "z"):
        put(tmp_path, f"{folder}/notes.csv", f"id,body\n1,{folder}\n")
    words = ["--domain", "d", "--data-dir", "my data", "--text-field", "body", "--no-quotes"]
    assert run(["data", "import", "x/notes.csv", *words]) == 0
    for source in ("y y/notes.csv", "z/notes.csv"):
        message = typed_instead(capsys, source, *words)
        run_typed(as_typed(message, "keep both:"), tmp_path)
    written = {path.name: json.loads(path.read_text())["text"] for path in Path("my data/d").iterdir()}
    assert written == {"notes.jsonl": "x", "notes-2.jsonl": "y y", "notes-3.jsonl": "z"}
    run_typed(as_typed(message, "replace it:"), tmp_path)
    assert json.loads(Path("my data/d/notes.jsonl").read_text())["text"] == "z"


@pytest.mark.parametrize("name", ["Smith, J.txt", "a\nb.txt", "a\\b.txt", "é" * 122 + ".txt"])
def test_whatever_the_name_of_a_source_the_command_that_keeps_both_works(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    for text in ("one", "two"):
        Path(name).write_text(text)
        with contextlib.suppress(StorageError):
            import_source(name, domain="d", data_dir="data")
    message = typed_instead(capsys, name, "--domain", "d")
    typed = message.partition("keep both:")[2].partition("\n  replace it:")[0].strip().strip("`")
    assert run(shlex.split(typed)[1:]) == 0
    assert sorted(json.loads(p.read_text())["text"] for p in Path("data/d").iterdir()) == ["one", "two"]


@pytest.mark.parametrize("name", ["", ".x", "a/b", "..", " a", "a\n", "x" * 300])
def test_names_that_no_file_can_have(tmp_path, name):
    path = put(tmp_path, "a.txt", "a")
    refused(tmp_path, path, UsageError, "cannot be the name of a file", name=name)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le"])
@pytest.mark.parametrize("name", ["a b.txt", "a.csv", "a.tsv", "a.json"])
def test_text_in_wider_units_is_refused_with_an_option_that_works(tmp_path, monkeypatch, name, encoding):
    monkeypatch.chdir(tmp_path)
    content = '["Plain words."]' if name == "a.json" else "text\nPlain words.\n"
    path = put(tmp_path, name, content.encode(encoding))
    with pytest.raises(DataError, match="is not UTF-8 text") as error:
        import_source(path.name, domain="d", data_dir="out")
    option = str(error.value).rpartition("--encoding ")[2]
    report = import_source(path.name, domain="d", data_dir="out", encoding=option)
    assert "Plain words." in report.path.read_text()


def test_the_name_of_the_file_is_never_hidden(tmp_path):
    assert Import(tmp_path, put(tmp_path, ".notes.txt", "a")).report.path.name == "notes.jsonl"
    assert Import(tmp_path, put(tmp_path, ".txt", "a")).report.path.name == "imported.jsonl"
