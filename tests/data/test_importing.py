"""Every kind of source becomes sound records, and nothing is dropped unsaid."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import shlex
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from imports import Import, put, refused

from nanothink.cli.app import run
from nanothink.data.corpus import find_corpus, validate_corpus
from nanothink.data.importing import SPLIT_CHARS, import_source
from nanothink.data.text_files import cut_text
from nanothink.errors import DataError, UsageError


def test_a_text_file_is_one_record(tmp_path):
    done = Import(
        tmp_path, put(tmp_path, "note.txt", "\n\n  Indented é.\r\n\r\nMore.\r\n\n"), domain="letters"
    )
    assert done.report.path == tmp_path / "out" / "letters" / "note.jsonl"
    assert done.records == [{"text": "  Indented é.\n\nMore.", "source": "note.txt", "id": 0}]
    assert done.progress[-1][0] == done.progress[-1][1] == (tmp_path / "note.txt").stat().st_size
    assert done.findings.empty == len(done.findings.bad_rows) == len(done.findings.warnings) == 0


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
    assert done.findings.empty == 1
    (warning,) = done.findings.warnings.named()
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
    assert (done.findings.n_spanning, done.findings.first_spanning) == (1, 2)
    assert done.findings.empty == 1
    assert csv.field_size_limit() == limit
    assert done.progress[-1][0] == done.progress[-1][1]


def test_a_source_column_is_kept_and_odd_rows_are_named(tmp_path):
    path = put(tmp_path, "a.csv", "\ufefftext,source\none,here\ntwo,\nthree\nfour,x,y\n\nfive,there\n")
    done = Import(tmp_path, path)
    assert done.texts == ["one", "two", "five"]
    assert done.sources == ["here", "a.csv:3", "there"]
    assert [(bad.line, bad.reason) for bad in done.findings.bad_rows.named()] == [
        (4, "the row has 1 field, the header has 2"),
        (5, "the row has 3 fields, the header has 2"),
    ]
    assert done.findings.empty == 1


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
    assert not done.findings.bad_rows.named()


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
    assert not done.findings.warnings.named()
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
    assert [Path(bad.file).name for bad in done.findings.bad_files.named()] == ["b.txt", "c.csv"]
    assert done.findings.bad_files.named()[0].reason.startswith("is not UTF-8 text")
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
