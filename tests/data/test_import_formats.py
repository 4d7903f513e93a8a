"""Tables with and without quotes, JSON, Parquet and Hub data sets as records."""

from __future__ import annotations

import gzip
import json
import sys
import types

import pytest
from imports import Import, put, refused

from nanothink.cli.app import run
from nanothink.errors import DataError, UsageError


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
    assert not done.findings.bad_rows
    assert done.findings.n_spanning == 0


def test_a_tsv_that_seems_to_be_quoted_says_how_to_read_it(tmp_path):
    path = put(tmp_path, "a.tsv", 'id\ttext\n1\tplain\n2\t"in quotes"\n3\t"and so"\n4\t"\n')
    done = Import(tmp_path, path)
    assert done.texts == ["plain", '"in quotes"', '"and so"', '"']
    assert [warning.line for warning in done.findings.warnings.named()] == [3, 4]
    (group,) = done.findings.warnings.groups
    assert "begins and ends with a double quote" in group.reason
    assert "--quotes" in group.reason
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
    said = rf"a\.csv, line \d+: the row that begins in line {line} cannot be read \(unexpected end of data\)"
    refused(tmp_path, put(tmp_path, "a.csv", content), DataError, said, text_field=field)


def test_a_quote_that_swallows_a_whole_file_is_named_where_it_began(tmp_path, monkeypatch):
    monkeypatch.setattr("nanothink.data.delimited.MAX_LINE_BYTES", 2**20)
    content = 'id,text\n1,"two\nlines"\n2,"open\n' + "3,more of it\n" * 100_000
    said = r"the row that begins in line 4 cannot be read \(a field takes more than 1 MiB"
    refused(tmp_path, put(tmp_path, "a.csv", content), DataError, said)
    said = r"line 3: the row that begins in line 2 cannot be read \(.* expected after"
    refused(tmp_path, put(tmp_path, "b.csv", 'id,text\n1,"open\n2,"more"\n'), DataError, said)


def test_fields_that_span_lines_are_counted_and_odd_ones_named(tmp_path, capsys):
    rows = ['1,"two\nlines"', "2,plain", '3,"a\n\nb"', '"4\n",x', '5,"' + "line\n" * 150 + '"']
    done = Import(tmp_path, put(tmp_path, "a.csv", "\n".join(["id,text", *rows]) + "\n"))
    assert len(done.texts) == 5
    assert (done.findings.n_spanning, done.findings.first_spanning) == (4, 2)
    (warning,) = done.findings.warnings.named()
    assert (warning.line, warning.reason.startswith("one quoted field takes 151 lines")) == (10, True)
    merged = 'id,text\n1,"Well, he said\n2,Third.\n3,Fourth.\n4,so"\n5,Fifth.\n'
    done = Import(tmp_path, put(tmp_path, "b.csv", merged))
    assert (len(done.texts), done.findings.n_spanning, done.findings.first_spanning) == (2, 1, 2)
    (warning,) = done.findings.warnings.named()
    assert (warning.line, "looks like a row" in warning.reason) == (2, True)
    command = ["data", "import", str(tmp_path / "b.csv"), "--data-dir", str(tmp_path), "--domain"]
    assert run([*command, "e"]) == 0
    assert "1 field spans several lines; it begins in line 2." in capsys.readouterr().out
    assert run([*command, "f", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["n_multiline_fields"], result["first_multiline_field"]) == (1, 2)
    many = "id,text\n" + '1,"a\n2,b"\n' * 50
    done = Import(tmp_path, put(tmp_path, "c.csv", many))
    assert len(done.findings.warnings) == 50
    assert len(done.findings.warnings.groups) == 1


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
    assert done.findings.empty == 2
    assert [bad.line for bad in done.findings.bad_rows.named()] == [4, 5, 6]
    assert "Did you mean 'bdoy'?" in done.findings.bad_rows.named()[0].reason
    assert "must be a string, not int" in done.findings.bad_rows.named()[2].reason


def test_json_that_is_none_is_refused_with_the_place(tmp_path):
    refused(
        tmp_path,
        put(tmp_path, "a.json", '["a",\n "é" NaN]'),
        DataError,
        r"a\.json:2:6: not JSON: expecting ',' delimiter, found `NaN`",
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
    assert [(bad.line, bad.column) for bad in done.findings.bad_rows.named()] == [(3, 10), (4, 1)]
    assert len(done.findings.warnings.named()) == 1
    assert done.progress[-1][0] == done.progress[-1][1]


def test_a_cut_archive_is_named(tmp_path):
    lines = "".join(json.dumps({"text": f"{i} {i * i}"}) + "\n" for i in range(5000)).encode()
    done = Import(tmp_path, put(tmp_path, "a.jsonl.gz", gzip.compress(lines)[:-2000]))
    assert 0 < len(done.texts) < 5000
    assert "ends too early" in done.findings.bad_rows.named()[-1].reason


def test_a_row_too_long_for_a_record_is_named(tmp_path, monkeypatch):
    longest = 1 << 20  # 64 times that, as it is, takes seconds
    monkeypatch.setattr("nanothink.data.importing.MAX_LINE_BYTES", longest)
    rows = ["fine", "\x01" * (longest // 6)]
    done = Import(tmp_path, put(tmp_path, "a.json", json.dumps(rows)))
    assert done.texts == ["fine"]
    assert "longer than a record can be" in done.findings.bad_rows.named()[0].reason


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
    assert [bad.line for bad in done.findings.bad_rows.named()] == [4, 5]
    refused(
        tmp_path / "q",
        put(tmp_path, "b.json", '["a",\n{"text" 1}]'),
        DataError,
        r"b.json:2:9: not JSON",
    )
    refused(tmp_path / "q", put(tmp_path, "c.json", '["a", "b'), DataError, "the array has no end")
    refused(tmp_path / "q", put(tmp_path, "d.json", '["a"] x'), DataError, "text follows the end")


def test_parquet_is_read_by_batches(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")

    texts = [f"text {i}" if i % 10 else None for i in range(3000)]
    table = pyarrow.table({"body": texts, "source": ["s"] + [""] * 2999, "other": list(range(3000))})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=700)
    done = Import(tmp_path, tmp_path / "a.parquet", text_field="body")
    assert done.texts == [text for text in texts if text]
    assert done.sources[:2] == ["a.parquet:2", "a.parquet:3"]
    assert done.findings.empty == 300
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
        r"no file or folder someone/something.*hf:someone/something",
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
    assert done.findings.empty == 1
    (tmp_path / "other").mkdir()
    refused(tmp_path / "other", "hf:someone/things", DataError, "has no 'text'.*body, source")

    def fails(*args, **kwargs):
        raise ConnectionError("offline")

    module.load_dataset = fails  # type: ignore[attr-defined]
    refused(tmp_path / "other", "hf:someone/things", DataError, "Cannot load.*ConnectionError: offline")
