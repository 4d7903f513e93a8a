"""What is a record, what is only odd, and what is wrong: one decision a test."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from record_reading import Reading, only_problem, read

from nanothink.data.records import Record
from nanothink.errors import UnreadableError

# What is fine


def test_reads_fields_and_line_numbers(tmp_path):
    reading = read(
        tmp_path, b'{"text": "a", "source": "s", "id": 7}\n{"id": null, "text": "\xc3\xa9", "x": [1.5]}\n'
    )
    assert reading.numbered == [(1, Record(text="a", source="s", id=7)), (2, Record(text="é"))]
    assert reading.problems == []
    assert reading.warnings == []


@pytest.mark.parametrize("slow", [b"", b', "deep": 1e999'], ids=["fast path", "slow look"])
@pytest.mark.parametrize(
    ("value", "group"),
    [
        (b'"a \\u00e9"', "a é"),
        (b"7", "7"),
        (b"-3", "-3"),
        (b"1" + b"0" * 30, "1" + "0" * 30),
        (b'""', None),
        (b"null", None),
        (b"true", None),
        (b"1.5", None),
        (b'["a"]', None),
        (b'{"a": 1}', None),
    ],
)
def test_a_group_is_a_string_or_an_integer_and_anything_else_is_ignored(tmp_path, value, group, slow):
    reading = read(tmp_path, b'{"text": "a", "group": %b%b}\n' % (value, slow))
    assert reading.numbered == [(1, Record(text="a", group=group))]
    assert not reading.problems
    assert not reading.warnings


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"", b" \t\r\n"])
def test_line_ends_and_a_last_line_without_one(tmp_path, end):
    reading = read(tmp_path, b'{"text": "a"}\r\n{"text": "b"}' + end)
    assert reading.texts == ["a", "b"]
    assert reading.problems == []
    assert reading.warnings == []


@pytest.mark.parametrize("number", [10**30, -(10**30), 2**64, -1, 0])
def test_any_integer_is_an_id(tmp_path, number):
    reading = read(tmp_path, json.dumps({"text": "a", "id": number}).encode())
    assert reading.records == [Record(text="a", id=number)]
    assert reading.warnings == []


@pytest.mark.parametrize(
    ("fields", "source", "number"),
    [
        ('"source": {"name": "arxiv", "text": 1}, "id": "a/7"', None, "a/7"),
        ('"source": ["a"], "id": 1.5', None, None),
        ('"source": 5, "id": true', None, None),
        ('"source": "s", "id": {"n": 1}, "x": 1e999', "s", None),
        ('"source": {}, "id": "7", "x": 1e999', None, "7"),
        ('"source": null, "id": 1e3', None, None),
        ('"id": ' + "7" * 5000, None, None),
    ],
)
def test_source_and_id_are_informational_whatever_they_hold(tmp_path, fields, source, number):
    reading = read(tmp_path, f'{{"text": "a", {fields}}}\n'.encode())
    assert reading.records == [Record(text="a", source=source, id=number)]
    assert reading.problems == []
    assert reading.warnings == []


@pytest.mark.parametrize("other", ["1e999", "[" * 900 + "]" * 900, "9" * 5000, "{}", '"\\u0000"'])
def test_other_fields_may_hold_any_json(tmp_path, other):
    reading = read(tmp_path, f'{{"text": "a", "x": {other}}}'.encode())
    assert reading.texts == ["a"]
    assert reading.problems == []
    assert reading.warnings == []


# What is odd: taken, with a warning


def test_byte_order_mark_at_the_start_is_a_warning_and_shifts_no_column(tmp_path):
    reading = read(tmp_path, b'\xef\xbb\xbf{"text": "a"}\n{"text": "b"}\n')
    assert reading.texts == ["a", "b"]
    assert [(w.line, "byte-order mark" in w.reason) for w in reading.warnings] == [(1, True)]
    bad = read(tmp_path, b'\xef\xbb\xbf{"text": NaN}\n')
    assert only_problem(bad).column == 10


def test_blank_lines_give_one_warning_with_their_number(tmp_path):
    reading = read(tmp_path, b'{"text": "a"}\n\n \t\r\n{"text": "b"}\n\n')
    assert reading.numbered == [(1, Record(text="a")), (4, Record(text="b"))]
    assert reading.problems == []
    (warning,) = reading.warnings
    assert (warning.line, warning.reason) == (2, "3 blank lines were passed over")


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf", b"{}\n"])
def test_a_file_without_any_record_is_a_warning(tmp_path, content):
    assert "the file holds no record" in [w.reason for w in read(tmp_path, content).warnings]


def test_escaped_nul_is_kept_with_a_warning(tmp_path):
    reading = read(tmp_path, b'{"text": "a\\u0000b"}\n')
    assert reading.texts == ["a\0b"]
    (warning,) = reading.warnings
    assert (warning.line, warning.column) == (1, 12)
    assert "NUL" in warning.reason


@pytest.mark.parametrize(
    ("line", "key", "column"),
    [
        ('{"text": "a", "text": "b"}', "text", 15),
        ('{"é": 1, "text":"a","x":1e5,"text":"b"}', "text", 29),
        ('{"messages": [], "messages": 1, "text": "b"}', "messages", 18),
    ],
)
def test_a_repeated_text_is_a_warning_and_the_last_one_counts(tmp_path, line, key, column):
    reading = read(tmp_path, line.encode())
    assert reading.texts == ["b"]
    (warning,) = reading.warnings
    assert (warning.line, warning.column) == (1, column)
    assert f"`{key}` stands more than once" in warning.reason


@pytest.mark.parametrize(
    "line",
    ['{"text": "say \\"text\\": now", "id": 1}', '{"type": "text", "text": "id", "x": {"text": 1, "id": 2}}'],
)
def test_what_only_looks_like_a_repeated_key_is_no_warning(tmp_path, line):
    reading = read(tmp_path, line.encode())
    assert len(reading.records) == 1
    assert reading.warnings == []


# What is wrong


@pytest.mark.parametrize(
    ("line", "column", "words"),
    [
        (b'{"text": NaN}', 10, "finite"),
        (b'{"text": "a", "x": Infinity}', 20, "finite"),
        (b'{"text": "a", "x": -Infinity}', 20, "finite"),
        (b'{"text": "a",}', 13, "a comma before '}'"),
        (b'{"text": "a"} // note', 15, "extra data, found `//`"),
        (b"{'text': 'a'}", 2, "double quotes"),
        (b'{"text": "a", "id": 01}', 22, "found `1`"),
        (b'{"text": "a"} {"text": "b"}', 15, "extra data"),
        (b'{"text": "a"} b', 15, "extra data"),
        (b'{"text": "a', 10, "unterminated string"),
        (b'{"text": "a"', 13, "found the end"),
        (b'{"text": "a\tb"}', 12, "control character, found U+0009"),
        (b'{"text": "a\x00b"}', 12, "control character, found U+0000"),
        (b'{"text": "\\ud800"}', 11, "surrogate"),
        (b'{"text": "a", "x": "\\udfff"}', 21, "surrogate"),
        (b'{"text": "\xc3\xa9\xff"}', 12, "byte 0xff is not valid UTF-8"),
        (b'{"text": "\xed\xa0\x80"}', 11, "byte 0xed is not valid UTF-8"),
        (b'{"text": "\xc3', 11, "byte 0xc3 is not valid UTF-8"),
        (b'{"text": "a", "x": ' + b"[" * 2000, 1, "nested too deeply"),
        (b'["a"]', 1, "must be a JSON object, not an array; `nanothink data import`"),
        (b'"a"', 1, "must be a JSON object, not a string"),
        (b"3", 1, "must be a JSON object, not an integer"),
        (b"null", 1, "must be a JSON object, not null"),
        (b"{}", 1, "`text` is missing"),
        (b'{"txet": "a"}', 1, "there is `txet`. Did you mean 'text'?"),
        (b'{"Text": "a"}', 1, "there is `Text`. Did you mean 'text'?"),
        (b'{"body": "a", "n": 1}', 1, "there is `body`, `n` (to use another key: `nanothink data import`)"),
        (b'{"id": 1, "text": 5}', 19, "`text` must be a string, not an integer"),
        (b'{"text": null}', 10, "`text` is null"),
        (b'{"text": ["a"]}', 10, "`text` must be a string, not an array"),
        (b'{"text": ""}', 10, "`text` is empty"),
        (b'{"x": "\\u00e9\xc3\xa9", "text" : ""}', 27, "`text` is empty"),
        (b'{"x": "\xc3\xa9", "text" : "  "}', 21, "`text` is whitespace alone"),
        (b'{"x": {"text": "a"}, "text": {}}', 30, "`text` must be a string, not an object"),
        (b'{"text": " \\n\\u00a0"}', 10, "`text` is whitespace alone"),
    ],
)
def test_a_bad_line_is_named_and_passed_over(tmp_path, line, column, words):
    reading = read(tmp_path, b'{"text": "before"}\n' + line + b'\n{"text": "after"}\n')
    assert reading.numbered == [(1, Record(text="before")), (3, Record(text="after"))]
    (problem,) = reading.problems
    assert words in problem.reason
    assert (problem.file, problem.line, problem.column) == (str(tmp_path / "a.jsonl"), 2, column)
    assert str(problem) == f"{tmp_path / 'a.jsonl'}:2:{column}: {problem.reason}"


@pytest.mark.parametrize(
    ("line", "field"),
    [
        (b'{"title": "of some length", "content": "a"}', "content"),
        (b'{"title": "a", "lyrics": "of some length", "n": 5}', "lyrics"),
        (b'{"title": "a", "lyrics": "of some length", "n": 1e999}', "lyrics"),
        (b'{"messages": [{"role": "user", "content": "a"}]}', ""),
    ],
)
def test_a_record_without_text_tells_where_its_text_may_be(tmp_path, line, field):
    assert only_problem(read(tmp_path, line)).text_field == field


@pytest.mark.parametrize("content", [b'[\n{"text": "a"},\n{"text": "b"}\n]\n', b'{\n"text": "a"\n}\n'])
def test_json_over_several_lines_is_one_error(tmp_path, content):
    problem = only_problem(read(tmp_path, content))
    assert (problem.line, problem.column) == (1, 1)
    assert "spread over several lines" in problem.reason


def test_byte_order_mark_elsewhere_is_an_error(tmp_path):
    reading = read(tmp_path, b'{"text": "a"}\n\xef\xbb\xbf{"text": "b"}\n')
    assert reading.texts == ["a"]
    assert (reading.problems[0].line, reading.problems[0].column) == (2, 1)
    assert "byte-order mark" in reading.problems[0].reason


@pytest.mark.parametrize(
    ("content", "column"),
    [
        (b'{"text": "a"}\r{"text": "b"}\r', 14),
        (b'{"text": "a"}\r{"text": "b"}\n', 14),
        (b'{"text": "a"}\r', 14),
    ],
)
def test_bare_carriage_return_as_line_end_is_an_error_that_says_so(tmp_path, content, column):
    problem = only_problem(read(tmp_path, content))
    assert (problem.line, problem.column) == (1, column)
    assert "carriage return" in problem.reason


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_utf16_is_one_error_for_the_whole_file(tmp_path, encoding):
    problem = only_problem(read(tmp_path, ('{"text": "a"}\n' * 5).encode(encoding)))
    assert "save it as UTF-8" in problem.reason


@pytest.mark.parametrize(
    ("content", "name"),
    [(gzip.compress(b'{"text": "a"}'), ".jsonl.gz"), (zstandard.compress(b'{"text": "a"}'), ".jsonl.zst")],
    ids=["gzip", "zstandard"],
)
def test_compressed_data_under_a_plain_name_is_one_error(tmp_path, content, name):
    assert name in only_problem(read(tmp_path, content)).reason


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60) | st.text('{}"text: a\n\r\\u0', max_size=60).map(str.encode))
def test_no_bytes_whatever_raise(tmp_path_factory, content):
    reading = read(tmp_path_factory.getbasetemp(), content)
    # Each line is a record, a problem, or blank; none goes missing.
    assert reading.records or reading.problems or reading.warnings


# Files that cannot be read


def test_what_is_no_file_raises(tmp_path):
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    (tmp_path / "broken.jsonl").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.jsonl")
    words = {
        "gone.jsonl": "the file is gone",
        "broken.jsonl": "link points to a file that does not exist",
        "folder.jsonl": "it is a folder",
        "pipe.jsonl": "not a regular file",
        "loop.jsonl": "Too many levels of symbolic links",
    }
    for name, reason in words.items():
        with pytest.raises(UnreadableError, match=reason) as caught:
            Reading(tmp_path / name)
        assert caught.value.file == str(tmp_path / name)
        assert caught.value.line <= 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_raises(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}')
    (tmp_path / "a.jsonl").chmod(0)
    with pytest.raises(UnreadableError, match="Permission denied"):
        Reading(tmp_path / "a.jsonl")


def test_a_name_that_is_not_utf8_can_be_shown(tmp_path):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.jsonl"))
    path.write_bytes(b"{}")
    problem = only_problem(Reading(path))
    assert "\\xff.jsonl" in problem.file
    assert json.dumps(str(problem)).encode()


# The record itself


@pytest.mark.parametrize("text", ["", " ", "\u3000\n", "\x1c"])
def test_no_record_can_be_blank(text):
    with pytest.raises(ValidationError):
        Record(text=text)


def test_records_are_strict_and_frozen():
    with pytest.raises(ValidationError):
        Record(text=b"a")  # type: ignore[arg-type]
    with pytest.raises(ValidationError):
        Record(text="a").text = "b"  # type: ignore[misc]
