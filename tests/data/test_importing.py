"""Every kind of source becomes sound records, whole or not at all, and nothing is dropped unsaid."""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import os
import shlex
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reports import Told

from nanothink.cli.app import run
from nanothink.data.corpus import find_corpus, validate_corpus
from nanothink.data.importing import SPLIT_CHARS, import_source
from nanothink.data.records import MAX_LINE_BYTES
from nanothink.data.text_files import cut_text
from nanothink.errors import DataError, StorageError, UsageError


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


# Text files


def test_a_text_file_is_one_record(tmp_path):
    done = Import(
        tmp_path, put(tmp_path, "note.txt", "\n\n  Indented é.\r\n\r\nMore.\r\n\n"), domain="letters"
    )
    assert done.report.path == tmp_path / "out" / "letters" / "note.jsonl"
    assert done.records == [{"text": "  Indented é.\n\nMore.", "source": "note.txt", "id": 0}]
    assert done.progress[-1][0] == done.progress[-1][1] == (tmp_path / "note.txt").stat().st_size
    assert (done.report.empty, done.report.bad_rows, done.report.warnings) == (0, (), ())


def test_a_long_text_file_is_cut_at_blank_lines(tmp_path):
    paragraphs = [f"Paragraph {i}. " + "word " * 150 for i in range(300)]
    done = Import(tmp_path, put(tmp_path, "book.md", "\n\n".join(paragraphs)))
    assert len(done.texts) > 20
    assert all(SPLIT_CHARS * 0.8 < len(text) <= SPLIT_CHARS for text in done.texts[:-1])
    found = [paragraph.strip() for text in done.texts for paragraph in text.split("\n\n")]
    assert found == [paragraph.strip() for paragraph in paragraphs]
    whole = Import(tmp_path, tmp_path / "book.md", split_chars=None, domain="whole")
    assert len(whole.texts) == 1


PARTS = ["a", "bb", "ccc" * 9, "\n", "\n\n", "\n \n", " ", "\t", "é", "\u2028", "x" * 40]


@settings(max_examples=500, deadline=None)
@given(st.lists(st.sampled_from(PARTS)).map("".join), st.integers(1, 60))
def test_cutting_neither_loses_nor_doubles_a_character(text, limit):
    pieces = list(cut_text(io.StringIO(text, newline="\n"), limit))
    assert "".join("".join(piece.split()) for piece in pieces) == "".join(text.split())
    assert all(piece.strip() and len(piece) <= limit for piece in pieces)


@pytest.mark.parametrize(
    ("text", "limit", "pieces"),
    [
        ("a b\n\nc d\n\ne f", 9, ["a b\n\nc d", "e f"]),
        ("a b\n  \nc d", 7, ["a b", "c d"]),
        ("one two\nthree four", 12, ["one two", "three four"]),
        ("one two three", 8, ["one two", "three"]),
        ("abcdef", 4, ["abcd", "ef"]),
        ("  a\n\n\n\n    b", 6, ["  a", "    b"]),
        (" \n\t\n", 6, []),
    ],
)
def test_where_a_text_is_cut(text, limit, pieces):
    assert list(cut_text(io.StringIO(text), limit)) == pieces


def test_cutting_does_not_depend_on_how_much_is_read_at_once():
    text = "".join(f"{i} word{'s' * (i % 17)}{chr(10) * (i % 13 // 5)} " for i in range(60_000))

    class Slow(io.StringIO):
        def read(self, size=-1):
            return super().read(min(size, 77))

    assert list(cut_text(Slow(text), 500)) == list(cut_text(io.StringIO(text), 500))


def test_the_pieces_of_a_text_have_a_group_of_their_own(tmp_path):
    paragraphs = [f"Paragraph {i}. " + "word " * 150 for i in range(60)]
    put(tmp_path, "books/one.txt", "\n\n".join(paragraphs))
    put(tmp_path, "books/two.txt", "\n\n".join(reversed(paragraphs)))
    put(tmp_path, "books/short.txt", "A few words.")
    done = Import(tmp_path, tmp_path / "books")
    groups: dict[str, set[str | None]] = {source: set() for source in done.sources}
    for record in done.records:
        groups[record["source"]].add(record.get("group"))
    assert groups["short.txt"] == {None}
    (one,), (two,) = groups["one.txt"], groups["two.txt"]
    assert isinstance(one, str)
    assert one != two
    # It depends on the text alone: not on name, folder, domain, line ends or a byte-order mark.
    copy = put(tmp_path, "copy.md", b"\xef\xbb\xbf" + "\r\n\r\n".join(paragraphs).encode())
    assert {record["group"] for record in Import(tmp_path, copy, domain="other").records} == {one}
    whole = Import(tmp_path, copy, domain="whole", split_chars=None)
    assert "group" not in whole.records[0]


def test_a_folder_is_read_in_the_order_of_names_and_says_what_it_left_out(tmp_path):
    put(tmp_path, "books/b.txt", "B")
    put(tmp_path, "books/a/z.md", "Z")
    put(tmp_path, "books/a/blank.txt", " \n")
    put(tmp_path, "books/A.TXT", "capital")
    put(tmp_path, "books/cover.png", b"\x89PNG")
    put(tmp_path, "books/.hidden.txt", "no")
    put(tmp_path, "books/.git/x.txt", "no")
    (tmp_path / "books" / "loop").symlink_to(tmp_path / "books")
    os.mkfifo(tmp_path / "books" / "pipe.txt")
    done = Import(tmp_path, str(tmp_path / "books"))
    assert done.report.path.name == "books.jsonl"
    assert list(zip(done.sources, done.texts, strict=True)) == [
        ("A.TXT", "capital"),
        ("a/z.md", "Z"),
        ("b.txt", "B"),
    ]
    assert done.report.empty == 1
    (warning,) = done.report.warnings
    for kind in (".png", "hidden file", "hidden folder", "link to a folder", "not a regular file"):
        assert f"{kind} (1)" in warning.reason


@pytest.mark.parametrize(
    ("content", "byte", "offset", "hint"),
    [
        (b"abc\xe9def", "0xe9", "3", "looks like cp1252 \\('abcédef'\\): `--encoding cp1252`"),
        ("é".encode() * 700_000 + b"\xff\n", "0xff", "1,400,000", "UTF-8 stands before it.*iconv -c"),
        (b"abc\xc3", "0xc3", "3", "looks like cp1252"),
        ("日本語のテキストです。".encode("shift_jis"), "0x93", "0", "--encoding shift_jis"),
    ],
)
def test_text_that_is_not_utf8_is_refused_with_the_place(tmp_path, content, byte, offset, hint):
    path = put(tmp_path, "a.txt", content)
    refused(tmp_path, path, DataError, f"not UTF-8 text: byte {byte} at offset {offset} does.*{hint}")


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    assert Import(tmp_path, put(tmp_path, "a.txt", b"\xef\xbb\xbfabc")).texts == ["abc"]


# Tables


@pytest.mark.parametrize(("name", "dialect"), [("a.csv", "excel"), ("b.tsv", "excel-tab")])
def test_a_quoted_table_gives_a_record_a_row(tmp_path, name, dialect):
    buffer = io.StringIO()
    texts = ["body", 'He said, "hi"\nand\tleft', " ", "é" * 200_000]
    rows = [[f"id {i}", text, ""] for i, text in enumerate(texts)]
    csv.writer(buffer, dialect=dialect).writerows(rows)
    limit = csv.field_size_limit()
    quotes = True if name.endswith(".tsv") else None
    done = Import(tmp_path, put(tmp_path, name, buffer.getvalue()), text_field="body", quotes=quotes)
    assert done.texts == [texts[1], texts[3]]
    assert done.sources == [f"{name}:2", f"{name}:5"]  # the line where a row begins
    assert (done.report.n_spanning, done.report.first_spanning) == (1, 2)
    assert done.report.empty == 1
    assert csv.field_size_limit() == limit
    assert done.progress[-1][0] == done.progress[-1][1]


def test_a_source_column_is_kept_and_odd_rows_are_named(tmp_path):
    path = put(tmp_path, "a.csv", "\ufefftext,source\none,here\ntwo,\nthree\nfour,x,y\n\nfive,there\n")
    done = Import(tmp_path, path)
    assert done.texts == ["one", "two", "five"]
    assert done.sources == ["here", "a.csv:3", "there"]
    assert [(bad.line, bad.reason) for bad in done.report.bad_rows] == [
        (4, "the row has 1 field, the header has 2"),
        (5, "the row has 3 fields, the header has 2"),
    ]
    assert done.report.empty == 1


def test_a_table_without_the_column_says_which_there_are(tmp_path):
    path = put(tmp_path, "a.csv", "id,txt\n1,a\n")
    refused(tmp_path, path, DataError, r"no 'text'\. Did you mean 'txt'\? It has: id, txt\..*--text-field")
    refused(tmp_path, put(tmp_path, "b.csv", ""), DataError, "There is no text")


TABLES: list[tuple[str, str | bytes, dict[str, Any], list[str]]] = [
    # The delimiter that fits, whatever the name says
    ("a.csv", 'id;text\n1;"x, y; ""é"\n2;1,5\n', {}, ['x, y; "é', "1,5"]),
    ("a.csv", 'sep=;\nid;text\n1;"x, y"\n', {}, ["x, y"]),
    ("a.csv", "sep=,\r\nid,text\r\n1,x\r\n", {}, ["x"]),
    ("a.TSV", "id|text\n1|x, y\n", {}, ["x, y"]),
    ("a.csv", 'id\ttext\n1\t"x, ""y"""\n', {}, ['x, "y"']),
    ("a.tsv", 'id,text\n1,"x, y"\n', {}, ["x, y"]),
    ("a.csv", 'text\none; "only", x\n"a ""b"""\n', {}, ['one; "only", x', 'a "b"']),
    ("a.csv", "name;body\na;1,5\nb;2,5\n", {"text_field": "body"}, ["1,5", "2,5"]),
    ("a.csv", "id^text\n1^x\n", {"delimiter": "^"}, ["x"]),
    ("a.txt", "id\ttext\n1\tx\n", {"delimiter": r"\t"}, ["x"]),
    ("a.csv", "1;x\n2;y\n", {"columns": "id,text"}, ["x", "y"]),
    ("a.csv.gz", gzip.compress(b"id;text\n1;x\n"), {}, ["x"]),
    # Encodings
    ("a.csv", "id;text\n1;Größe\n".encode("cp1252"), {"encoding": "Windows-1252"}, ["Größe"]),
    ("a.csv", "id;text\n1;Größe über alles, Müller\n".encode("latin-1"), {"encoding": "auto"},
        ["Größe über alles, Müller"]),
    ("a.csv", "id,text\n1,中文\n".encode("gb18030"), {"encoding": "gb18030"}, ["中文"]),
    ("a.jsonl", '{"text": "日本"}\n'.encode("shift_jis"), {"encoding": "shift_jis"}, ["日本"]),
    ("a.json", '["Łódź"]'.encode("utf-16-be"), {"encoding": "utf-16-be"}, ["Łódź"]),
    ("a.csv", "id\ttext\n1\té\n".encode("utf-16"), {}, ["é"]),
    ("a.txt", "\ufeffÉtude".encode("utf-32"), {}, ["Étude"]),
    ("a.txt", "Привет, мир".encode("koi8-r"), {"encoding": "KOI8-R"}, ["Привет, мир"]),
    # Templates
    ("a.csv", "subject,body\nHi,Yes.\n,No.\n ,\n", {"template": r"Re: {subject}\n\n{body}"},
        ["Re: Hi\n\nYes.", "No."]),
    ("a.csv", "First name,n\nAda,1\n", {"template": r"{{{First name}}}\t\\n{n}"}, ["{Ada}\t\\n1"]),
    ("a.json", '[{"m":{"t":"T"},"tags":["a","b"],"ps":["x","y"],"n":1.5,"z":null}]',
        {"template": r"{m.t} {n}{z}\n{tags} and\n{ps}"}, ["T 1.5\na, b and\nx\n\ny"]),
    ("a.json", '{"text":"one"}\n{"text":"two"}\n', {}, ["one", "two"]),  # JSON Lines
    ("a.csv", "id, text \n1,x\n", {}, ["x"]),
    ("a.json", '[{"text":[]},{"text":["a",null,"b"]}]', {}, ["a\n\nb"]),
    ("a.json", '[{"m":{"t":["one","two"]}}]', {"text_field": "m.t"}, ["one\n\ntwo"]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "options", "texts"), TABLES, ids=range(len(TABLES)))
def test_every_shape_of_rows_becomes_text(tmp_path, name, content, options, texts):
    done = Import(tmp_path, put(tmp_path, name, content), **options)
    assert done.texts == texts
    assert not done.report.bad_rows


CONVERSATIONS = [
    ("a.json", '[{"instruction":"Add.","input":"1+1","output":"2"}]', "user Add.\n\n1+1, assistant 2"),
    ("a.json", '[{"instruction":"Go.","input":"","output":"OK"}]', "user Go., assistant OK"),
    ("a.jsonl", '{"prompt":"Q","completion":" A"}\n', "user Q, assistant  A"),
    ("a.jsonl", '{"prompt":[{"role":"user","content":"Q"}],"response":[{"role":"assistant","content":"A"}]}',
        "user Q, assistant A"),
    ("a.jsonl",
        '{"messages":[{"role":"developer","content":"S"},{"role":"user","content":[{"text":"Q"}]},'
        '{"role":"assistant","content":"A"}]}\n', "system S, user Q, assistant A"),
    ("a.json", '[{"conversations":[{"from":"human","value":"Q"},{"from":"gpt","value":"A"}]}]',
        "user Q, assistant A"),
    ("a.csv", "prompt,response\nQ,A\n", "user Q, assistant A"),
    ("a.parquet", [{"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}],
        "user Q, assistant A"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "messages"), CONVERSATIONS, ids=range(len(CONVERSATIONS)))
def test_every_shape_of_conversation_becomes_messages(tmp_path, name, content, messages):
    if isinstance(content, list):
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet")
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(content), tmp_path / name)
    else:
        put(tmp_path, name, content)
    report = import_source(tmp_path / name, domain="d", data_dir=tmp_path / "out")
    (record,) = [json.loads(line) for line in report.path.read_text("utf-8").splitlines()]
    assert ", ".join(f"{turn['role']} {turn['content']}" for turn in record["messages"]) == messages
    assert "text" not in record
    assert validate_corpus(find_corpus(tmp_path / "out")).ok


MISTAKES: list[tuple[str, str | bytes, dict[str, Any], type[Exception], str]] = [
    ("a.csv", "title,body\nx,y\n", {"template": "{titel}"}, DataError, "no 'titel'. Did you mean 'title'"),
    ("a.jsonl", '{"title":"x"}\n', {"template": "{titel}"}, DataError, "no 'titel'. Did you mean 'title'"),
    ("a.csv", "a,b\n", {"template": "{a"}, UsageError, "a brace that belongs to no field"),
    ("a.csv", "a,b\n", {"template": "plain"}, UsageError, "names no field"),
    ("a.csv", "a,b\n", {"template": "{a}", "text_field": "a"}, UsageError, "Leave one out"),
    ("a.csv", "a,b\n", {"encoding": "cp125"}, UsageError, "no encoding 'cp125'. Did you mean 'cp125"),
    ("a.csv", "a,b\n", {"encoding": "rot13"}, UsageError, "no encoding 'rot13'"),
    ("a.csv", "a,b\n", {"delimiter": ";;"}, UsageError, "cannot separate columns"),
    ("a.csv", "a,b\n", {"columns": "x,x"}, UsageError, "must name each column of the table once"),
    ("a.csv", "1,Some words\n", {}, DataError, "no header, name the columns: --columns c1,text"),
    ("a.txt", b"caf\x81", {"encoding": "cp1252"}, DataError, "byte 0x81 at offset 3 does not fit the enc"),
    ("a.txt", "é", {"encoding": "utf-16"}, DataError, "no byte-order mark; name utf-16-le or utf-16-be"),
    ("a.json", '[{"m":{"title":1}}]', {"text_field": "m.titel"}, DataError, "Did you mean 'm.title'"),
    ("a.txt", b"%PDF-1.4", {}, DataError, "no text but a PDF file.*Rename it to a.pdf"),
    ("a.txt", "x", {"columns": "a,b"}, UsageError, "how tables are read, and there is none"),
    ("a.txt", "x", {"split": "test"}, UsageError, "part of a Hub data set"),
    ("a.txt", "x", {"text_field": "body"}, UsageError, "fields of tables, and there is none"),
    ("a.jsonl", '{"messages":[{"role":"tool","content":"x"}]}\n', {}, DataError, "has the role 'tool', and"),
    ("a.jsonl", '{"prompt":"Q","completion":""}\n', {}, DataError, "the `content` of message 2 is empty"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "options", "error", "said"), MISTAKES, ids=range(len(MISTAKES)))
def test_a_mistake_is_named_with_what_to_do(tmp_path, name, content, options, error, said):
    refused(tmp_path, put(tmp_path, name, content), error, said, **options)


def test_several_sources_become_one_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, text in {
        "a/x.txt": "one",
        "b/x.MD": "two",
        "b/c/y.txt": "three",
        "z z é.csv": "text\nfour\n",
    }.items():
        put(tmp_path, name, text)
    done = Import(tmp_path, ["a/x.txt", "b", "*.csv", "b/c/y.txt", "./a/../a/x.txt"])
    assert done.report.path.name == "d.jsonl"
    assert done.sources == ["a/x.txt", "b/c/y.txt", "b/x.MD", "z z é.csv:2"]
    assert done.texts == ["one", "three", "two", "four"]
    assert "read once, and so 1 more" in done.report.warnings[0].reason
    assert done.progress[-1][0] == done.progress[-1][1]
    refused(tmp_path / "q", ["a/x.txt", "none*.txt"], DataError, "No file matches 'none")
    refused(tmp_path / "q", [], UsageError, "nothing to import")
    put(tmp_path, "t/a.CSV", "text\nx\n")
    with pytest.raises(DataError, match="There is no document") as error:
        import_source("t", domain="d", data_dir="out2")
    pattern = shlex.split(str(error.value).rpartition("`nanothink data import ")[2].rstrip("`"))[0]
    assert import_source(pattern.replace("csv", "CSV"), domain="d", data_dir="out2").records == 1


def test_bad_files_are_left_out_only_when_asked(tmp_path):
    for name, content in {
        "a.txt": b"A",
        "b.txt": b"caf\xe9 " * 9,
        "c.csv": b'text\nfirst\n"open',
        "d.txt": b"D",
    }.items():
        put(tmp_path, f"in/{name}", content)
    sources = [str(tmp_path / "in" / "*.txt"), tmp_path / "in" / "c.csv"]
    refused(tmp_path, sources, DataError, "b.txt is not UTF-8 text.*--encoding cp1252")
    done = Import(tmp_path, sources, skip_bad_files=True)
    assert done.texts == ["A", "D"]  # of the table not even the row before the fault
    assert [Path(bad.file).name for bad in done.report.bad_files] == ["b.txt", "c.csv"]
    assert done.report.bad_files[0].reason.startswith("is not UTF-8 text")
    refused(
        tmp_path / "q", tmp_path / "in" / "b.txt", DataError, "no text in.*b.txt: is not", skip_bad_files=True
    )


def test_a_preview_shows_the_first_records_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    put(tmp_path, "a.csv", "id;subject;text\n" + "".join(f"{i};S{i};T{i}\n" for i in range(90)))
    put(tmp_path, "b.txt", "A note.")
    typed = [
        "data",
        "import",
        "a.csv",
        "b.txt",
        "--domain",
        "d",
        "--template",
        r"{subject}:\n{text}",
        "--dry-run",
    ]
    assert run(typed) == 0
    out = capsys.readouterr().out
    assert "a.csv:2\n  S0:\n  T0\nb.txt\n  A note.\nNothing was written." in out
    assert run([*typed, "--text-field", "text"]) == 2
    assert run(["data", "import", "a.csv", "--domain", "d", "--dry-run", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [record["text"] for record in shown["preview"]] == [f"T{i}" for i in range(5)]
    assert not (tmp_path / "data").exists()


def test_a_header_that_has_the_column_twice_is_refused(tmp_path):
    refused(tmp_path, put(tmp_path, "a.csv", "text,text\n1,a\n"), DataError, "2 columns 'text'. Rename")


QUOTED_TSV = [
    ('"Well," he said, and left.', "A quote in the middle"),
    ('"Well, he said and left.', 'Fifth said so"'),
    ('An inch is 1".', '"'),
    ('""', '"a""b"'),
    ("'", "a,b;c|d"),
    ("back\\slash", "\\"),
]


@pytest.mark.parametrize("texts", QUOTED_TSV)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("name", ["a.tsv", "A.TSV"])
def test_a_quote_in_a_tsv_is_a_character_like_any_other(tmp_path, texts, end, name):
    rows = ["id\ttext", *(f"{i}\t{text}" for i, text in enumerate(texts)), "9\tlast"]
    done = Import(tmp_path, put(tmp_path, name, end.join(rows) + end))
    assert done.texts == [*texts, "last"]
    assert done.report.bad_rows == ()
    assert done.report.n_spanning == 0


def test_a_tsv_that_seems_to_be_quoted_says_how_to_read_it(tmp_path):
    path = put(tmp_path, "a.tsv", 'id\ttext\n1\tplain\n2\t"in quotes"\n3\t"and so"\n4\t"\n')
    done = Import(tmp_path, path)
    assert done.texts == ["plain", '"in quotes"', '"and so"', '"']
    (warning,) = done.report.warnings
    assert warning.line == 3
    assert "2 texts begin and end with a double quote" in warning.reason
    assert "--quotes" in warning.reason
    quoted = put(tmp_path, "b.tsv", 'id\ttext\n1\t"a\tb ""c""\nd"\n')
    assert Import(tmp_path, quoted, quotes=True).texts == ['a\tb "c"\nd']
    csv_file = put(tmp_path, "c.csv", 'id,text\n1,"Well\n2,he said"\n')
    assert Import(tmp_path, csv_file, quotes=False).texts == ['"Well', 'he said"']
    refused(tmp_path / "x", put(tmp_path, "d.txt", "a"), UsageError, "Leave them out", quotes=True)
    refused(tmp_path / "x", put(tmp_path, "e.tsv", '"id"\t"text"\n"1"\t"x"\n'), DataError, "with --quotes")


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ('text\nfine\n"open\nmore\n', 3),
        ('id,text\n1,"two\nlines"\n2,"open\n\n3,x\n', 4),
        ('id,text\n1,"a ""b"" c"\n2,"x ""y\r\n3,z\r\n', 3),
        ('id,text\r1,fine\r2,"open\r3,x', 3),
        ('"id","te\nxt"\n"1","a"\n"2","b', 4),
    ],
)
def test_a_quote_that_never_closes_is_an_error_that_names_where_it_began(tmp_path, content, line):
    field = "text" if "te\nxt" not in content else "te\nxt"
    said = rf"a\.csv, line {line}: the quoted field that begins in line {line} has no end"
    refused(tmp_path, put(tmp_path, "a.csv", content), DataError, said, text_field=field)


def test_a_quote_that_swallows_a_whole_file_is_named_where_it_began(tmp_path, monkeypatch):
    monkeypatch.setattr("nanothink.data.delimited.MAX_LINE_BYTES", 2**20)
    content = 'id,text\n1,"two\nlines"\n2,"open\n' + "3,more of it\n" * 100_000
    said = r"line 4: the quoted field that begins in line 4 takes more than 1 MiB"
    refused(tmp_path, put(tmp_path, "a.csv", content), DataError, said)
    said = r"line 3: text follows the end of the quoted field that begins in line 2"
    refused(tmp_path, put(tmp_path, "b.csv", 'id,text\n1,"open\n2,"more"\n'), DataError, said)


def test_fields_that_span_lines_are_counted_and_odd_ones_named(tmp_path, capsys):
    rows = ['1,"two\nlines"', "2,plain", '3,"a\n\nb"', '"4\n",x', '5,"' + "line\n" * 150 + '"']
    done = Import(tmp_path, put(tmp_path, "a.csv", "\n".join(["id,text", *rows]) + "\n"))
    assert len(done.texts) == 5
    assert (done.report.n_spanning, done.report.first_spanning) == (4, 2)
    (warning,) = done.report.warnings
    assert (warning.line, warning.reason.startswith("one quoted field takes 151 lines")) == (10, True)
    merged = 'id,text\n1,"Well, he said\n2,Third.\n3,Fourth.\n4,so"\n5,Fifth.\n'
    done = Import(tmp_path, put(tmp_path, "b.csv", merged))
    assert (len(done.texts), done.report.n_spanning, done.report.first_spanning) == (2, 1, 2)
    (warning,) = done.report.warnings
    assert (warning.line, "looks like a row" in warning.reason) == (2, True)
    command = ["data", "import", str(tmp_path / "b.csv"), "--data-dir", str(tmp_path), "--domain"]
    assert run([*command, "e"]) == 0
    assert "1 field spans several lines; it begins in line 2." in capsys.readouterr().out
    assert run([*command, "f", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["n_multiline_fields"], result["first_multiline_field"]) == (1, 2)
    many = "id,text\n" + '1,"a\n2,b"\n' * 50
    done = Import(tmp_path, put(tmp_path, "c.csv", many))
    assert len(done.report.warnings) == 4
    assert "47 more fields" in done.report.warnings[-1].reason


# JSON


def test_a_json_array_of_objects_or_strings(tmp_path):
    items = [
        {"body": "one", "source": "here"},
        "two",
        {"body": ""},
        {"bdoy": "x"},
        5,
        {"body": 7},
        {"body": None},
    ]
    done = Import(tmp_path, put(tmp_path, "a.json", json.dumps(items, indent=1)), text_field="body")
    assert list(zip(done.texts, done.sources, strict=True)) == [("one", "here"), ("two", "a.json:2")]
    assert done.report.empty == 2
    assert [bad.line for bad in done.report.bad_rows] == [4, 5, 6]
    assert "Did you mean 'bdoy'?" in done.report.bad_rows[0].reason
    assert "must be a string, not int" in done.report.bad_rows[2].reason


def test_json_that_is_none_is_refused_with_the_place(tmp_path):
    refused(
        tmp_path,
        put(tmp_path, "a.json", '["a",\n "é" NaN]'),
        DataError,
        r"a\.json:2:6: not valid JSON, a comma",
    )
    refused(tmp_path, put(tmp_path, "b.json", '{"text": "a"}'), DataError, "JSON array.*not an object")
    refused(
        tmp_path,
        put(tmp_path, "c.json", '{"x": [1], "y": 2}'),
        DataError,
        "jq '.\\[\"x\"\\]' .* > array.json",
    )
    refused(tmp_path, put(tmp_path, "c.json", " \n"), DataError, "There is no text")
    refused(tmp_path, put(tmp_path, "d.json", b'["\xff"]'), DataError, "byte 0xff at offset 2")
    huge = Import(tmp_path, put(tmp_path, "e.json", '[{"text": "a", "x": 1e999}]'))
    assert huge.texts == ["a"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_json_lines_with_another_text_field(tmp_path, name):
    content = (
        b'\xef\xbb\xbf{"body": "one", "id": 9}\n\n{"body": }\n{"text": "x"}\n{"body": "two", "source": "s"}\n'
    )
    done = Import(
        tmp_path,
        put(tmp_path, name, gzip.compress(content) if name.endswith("gz") else content),
        text_field="body",
    )
    assert done.report.path.name == "a.jsonl"
    assert list(zip(done.texts, done.sources, strict=True)) == [("one", f"{name}:1"), ("two", "s")]
    assert [(bad.line, bad.column) for bad in done.report.bad_rows] == [(3, 10), (4, 1)]
    assert len(done.report.warnings) == 1
    assert done.progress[-1][0] == done.progress[-1][1]


def test_a_cut_archive_is_named(tmp_path):
    lines = "".join(json.dumps({"text": f"{i} {i * i}"}) + "\n" for i in range(5000)).encode()
    done = Import(tmp_path, put(tmp_path, "a.jsonl.gz", gzip.compress(lines)[:-2000]))
    assert 0 < len(done.texts) < 5000
    assert "ends too early" in done.report.bad_rows[-1].reason


def test_a_row_too_long_for_a_record_is_named(tmp_path):
    rows = ["fine", "\x01" * (MAX_LINE_BYTES // 6)]
    done = Import(tmp_path, put(tmp_path, "a.json", json.dumps(rows)))
    assert done.texts == ["fine"]
    assert "longer than a record can be" in done.report.bad_rows[0].reason


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", '[{"text":"a","group":"g"},{"text":"b","group":7.0},{"text":"c","group":true},"d"]'),
        (
            "a.jsonl",
            '{"text":"a","group":"g"}\n{"text":"b","group":7}\n{"text":"c","group":[]}\n{"text":"d"}\n',
        ),
        ("a.csv", "text,group\na,g\nb,7\nc,\nd,\n"),
    ],
)
def test_a_group_of_rows_is_kept(tmp_path, name, content):
    done = Import(tmp_path, put(tmp_path, name, content))
    assert done.texts == ["a", "b", "c", "d"]
    assert [record.get("group") for record in done.records] == ["g", "7", None, None]
    other = Import(tmp_path, tmp_path / name, text_field="group", domain="other")
    assert all("group" not in record for record in other.records)


def test_numbers_that_are_no_integers_are_groups_all_the_same(tmp_path):
    """As a table has them where one is missing: dropped, the pieces would fall on both sides of the split."""
    done = Import(
        tmp_path,
        put(
            tmp_path, "a.jsonl", "".join(f'{{"text":"a","group":{g}}}\n' for g in ("3", "3.0", "1.5", "1e3"))
        ),
    )
    assert [record["group"] for record in done.records] == ["3", "3", "1.5", "1000"]


@pytest.mark.parametrize("chunk_bytes", [1, 7, 10**6])
def test_a_large_array_is_read_item_by_item(tmp_path, monkeypatch, chunk_bytes):
    monkeypatch.setattr("nanothink.data.json_array.WHOLE_BYTES", 0)
    monkeypatch.setattr("nanothink.data.source_file.CHUNK_BYTES", chunk_bytes)
    items = ["one", {"text": 'two "}],[{" \\'}, {"text": "三", "x": [1, {"y": []}]}, {"x": "é"}, 5]
    path = put(tmp_path, "a.json", " " + json.dumps(items, indent=1, ensure_ascii=chunk_bytes == 7) + "\n")
    done = Import(tmp_path, path)
    assert done.texts == ["one", 'two "}],[{" \\', "三"]
    assert [bad.line for bad in done.report.bad_rows] == [4, 5]
    refused(
        tmp_path / "q",
        put(tmp_path, "b.json", '["a",\n{"text" 1}]'),
        DataError,
        r"b.json:2:9: not valid JSON",
    )
    refused(tmp_path / "q", put(tmp_path, "c.json", '["a", "b'), DataError, "the array has no end")
    refused(tmp_path / "q", put(tmp_path, "d.json", '["a"] x'), DataError, "text follows the end")


# Parquet and the Hub


def test_parquet_is_read_by_batches(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")

    texts = [f"text {i}" if i % 10 else None for i in range(3000)]
    table = pyarrow.table({"body": texts, "source": ["s"] + [""] * 2999, "other": list(range(3000))})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=700)
    done = Import(tmp_path, tmp_path / "a.parquet", text_field="body")
    assert done.texts == [text for text in texts if text]
    assert done.sources[:2] == ["a.parquet:2", "a.parquet:3"]
    assert done.report.empty == 300
    assert done.progress[-1][0] == done.progress[-1][1]
    assert len(done.progress) >= 3
    (tmp_path / "other").mkdir()
    refused(tmp_path / "other", tmp_path / "a.parquet", DataError, "has no 'text'.*body, source, other")
    refused(tmp_path / "other", tmp_path / "a.parquet", DataError, "no text in.*not int", text_field="other")
    rows = [{"id": 1, "meta": {"title": "T", "n": 2}, "parts": ["One.", "Two."]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "inner.parquet")
    suggested = r"--text-field parts`.*--template '\{meta.title\}\\n\\n\{parts\}'`"
    refused(tmp_path / "other", tmp_path / "inner.parquet", DataError, suggested)
    broken = put(tmp_path, "b.parquet", b"PAR1 nothing of the kind PAR1")
    refused(tmp_path / "other", broken, DataError, "not sound Parquet")


def test_a_missing_extra_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    parquet = put(tmp_path, "a.parquet", b"PAR1")
    refused(tmp_path, parquet, DataError, r"pip install 'nanothink\[parquet\]'")
    refused(
        tmp_path, "hf:someone/something", DataError, r"^Hub data sets.*pip install 'nanothink\[datasets\]'"
    )
    refused(
        tmp_path,
        "someone/something",
        DataError,
        r"no file or folder 'someone/something'.*nanothink\[datasets\]",
    )


def test_a_hub_data_set_is_streamed(tmp_path, monkeypatch):
    asked: list[object] = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return iter([{"body": "one", "source": "s"}, {"body": None}, {"body": "two"}])

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    done = Import(tmp_path, "hf:someone/things", text_field="body", config_name="en", split="test")
    assert asked == [
        (("someone/things", "en"), {"split": "test", "streaming": True, "trust_remote_code": False})
    ]
    assert done.report.path.name == "someone--things.jsonl"
    assert list(zip(done.texts, done.sources, strict=True)) == [("one", "s"), ("two", "someone/things:3")]
    assert done.report.empty == 1
    (tmp_path / "other").mkdir()
    refused(tmp_path / "other", "hf:someone/things", DataError, "has no 'text'.*body, source")

    def fails(*args, **kwargs):
        raise ConnectionError("offline")

    module.load_dataset = fails  # type: ignore[attr-defined]
    refused(tmp_path / "other", "hf:someone/things", DataError, "Cannot load.*ConnectionError: offline")


# Names, files that exist, nothing to import


@pytest.mark.parametrize("domain", ["", " ", ".x", "a/b", "..", "a\\b", "a,b", "a\n", "x" * 300])
def test_names_that_cannot_be_domains(tmp_path, domain):
    refused(
        tmp_path, put(tmp_path, "a.txt", "a"), UsageError, "cannot be the name of a domain", domain=domain
    )


def test_a_source_that_is_not_there_or_of_no_known_kind(tmp_path):
    refused(tmp_path, tmp_path / "gone.txt", DataError, "no file or folder.*gone.txt")
    refused(tmp_path, tmp_path / "gone", DataError, "no file or folder")
    refused(tmp_path, put(tmp_path, "a.odt", "x"), UsageError, "soffice --headless --convert-to docx ")
    refused(tmp_path, put(tmp_path, "a.zip", "x"), UsageError, "unzip -d a .*a.zip")
    refused(tmp_path, put(tmp_path, "a.xyz", "x"), UsageError, r"format of .*\.txt.*\.parquet")
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


def as_typed(error: pytest.ExceptionInfo[Exception], label: str = "") -> str:
    """The commands that a message says to type."""
    lines = [line.strip() for line in str(error.value).splitlines()[1:] if line.strip().startswith(label)]
    return " && ".join(line.removeprefix(label).strip() for line in lines)


def run_typed(command: str, folder: Path) -> None:
    """Run it in a shell, with the import itself in this process: starting another takes seconds."""
    first, _, words = command.rpartition("nanothink ")
    subprocess.run(f"{first}true", shell=True, check=True, cwd=folder)
    assert run(shlex.split(words)) in (0, 1)


@pytest.mark.parametrize(
    "way", ["itself", "symlink", "hardlink", "folder link", "named", "dots", "its domain", "hardlink in it"]
)
def test_the_file_that_would_be_written_is_no_source(tmp_path, monkeypatch, way):
    monkeypatch.chdir(tmp_path)
    lines = '{"body": "one", "title": "T"}\n{"bodies": 3}\n'
    target = put(tmp_path, "data/in p/a.jsonl", lines)
    options: dict[str, Any] = {"text_field": "body", "domain": "in p", "data_dir": "data"}
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
    options |= {"name": "a"} if way == "named" else {"name": "c"} if way.endswith(("domain", "it")) else {}
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="Move it out of the data folder") as error:
            import_source(source, overwrite=overwrite, **options)
        assert target.read_text() == lines
    run_typed(as_typed(error), tmp_path)
    written = target.with_name(f"{options.get('name', 'a')}.jsonl")
    assert [json.loads(line)["text"] for line in written.read_text().splitlines()] == ["one"]
    assert (tmp_path / "data-originals" / "a.jsonl").read_text() == lines


def test_a_link_in_the_place_of_the_file_is_moved_and_its_file_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = put(tmp_path, "mine/a.jsonl", '{"body": "one"}\n')
    put(tmp_path, "data-originals/a.jsonl", "taken")
    (tmp_path / "data" / "d").mkdir(parents=True)
    (tmp_path / "data" / "d" / "a.jsonl").symlink_to(source)
    with pytest.raises(UsageError) as error:
        import_source(source, domain="d", data_dir="data", text_field="body", overwrite=True)
    run_typed(as_typed(error), tmp_path)
    assert source.read_text() == '{"body": "one"}\n'
    assert (tmp_path / "data-originals" / "a.jsonl").read_text() == "taken"
    assert '"one"' in (tmp_path / "data" / "d" / "a.jsonl").read_text()


@pytest.mark.parametrize("source", ["data/d", "data", "data/../data/d/", "link"])
def test_the_folder_that_would_be_written_into_is_no_source(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    put(tmp_path, "data/d/a.txt", "A text.")
    (tmp_path / "link").symlink_to(tmp_path / "data" / "d")
    with pytest.raises(UsageError, match="is the folder that the import writes into") as error:
        import_source(source, domain="d", data_dir="data")
    assert [path.name for path in (tmp_path / "data" / "d").iterdir()] == ["a.txt"]
    run_typed(as_typed(error), tmp_path)
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
    assert any("it is the data folder" in warning.reason for warning in report.warnings)


def test_two_sources_of_one_name_are_both_kept_by_the_command_that_is_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("x", "y y", "z"):
        put(tmp_path, f"{folder}/notes.csv", f"id,body\n1,{folder}\n")
    options: dict[str, Any] = {"domain": "d", "data_dir": "my data", "text_field": "body", "quotes": False}
    import_source("x/notes.csv", **options)
    for source in ("y y/notes.csv", "z/notes.csv"):
        with pytest.raises(StorageError, match="exists already") as error:
            import_source(source, **options)
        run_typed(as_typed(error, "keep both:"), tmp_path)
    written = {path.name: json.loads(path.read_text())["text"] for path in Path("my data/d").iterdir()}
    assert written == {"notes.jsonl": "x", "notes-2.jsonl": "y y", "notes-3.jsonl": "z"}
    run_typed(as_typed(error, "replace it:"), tmp_path)
    assert json.loads(Path("my data/d/notes.jsonl").read_text())["text"] == "z"


@pytest.mark.parametrize("name", ["Smith, J.txt", "a\nb.txt", "a\\b.txt", "é" * 122 + ".txt"])
def test_whatever_the_name_of_a_source_the_command_that_keeps_both_works(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    for text in ("one", "two"):
        Path(name).write_text(text)
        with contextlib.suppress(StorageError):
            import_source(name, domain="d", data_dir="data")
    with pytest.raises(StorageError, match="exists already") as error:
        import_source(name, domain="d", data_dir="data")
    typed = str(error.value).partition("keep both:")[2].partition("\n  replace it:")[0]
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
