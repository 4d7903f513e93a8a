"""What is a record, what is only odd, and what is wrong: one decision a test."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from nanothink.data.lines import MAX_LINE_BYTES
from nanothink.data.record_file import write_records
from nanothink.data.records import Problem, Record, iter_records
from nanothink.errors import StorageError, UnreadableError


class Reading:
    """Everything one pass over a file gives."""

    def __init__(self, path: Path) -> None:
        self.problems: list[Problem] = []
        self.warnings: list[Problem] = []
        self.bytes: list[int] = []
        self.numbered = list(
            iter_records(
                path,
                on_problem=self.problems.append,
                on_warning=self.warnings.append,
                on_bytes=self.bytes.append,
            )
        )
        self.records = [record for _, record in self.numbered]
        self.texts = [record.text for record in self.records]


def read(folder: Path, content: bytes, name: str = "a.jsonl") -> Reading:
    path = folder / name
    path.write_bytes(content)
    return Reading(path)


def only_problem(reading: Reading) -> Problem:
    assert len(reading.problems) == 1, reading.problems
    assert reading.records == []
    return reading.problems[0]


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


def test_of_a_repeated_key_the_last_one_counts(tmp_path):
    reading = read(tmp_path, b'{"text": "a", "id": 1, "text": "b"}')
    assert (reading.texts, reading.warnings) == (["b"], [])


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


# Chunks and memory


def read_in_a_fresh_process(path: Path) -> tuple[list[str], list[list[object]], int]:
    """Texts, problems as [line, column, reason], and by how many KiB the peak memory grew."""
    code = """if True:
        import json, resource, sys
        from pathlib import Path
        from nanothink.data.records import iter_records
        import zstandard
        start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found = []
        texts = [r.text for _, r in iter_records(Path(sys.argv[1]), on_problem=found.append)]
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start
        print(json.dumps([texts, [[p.line, p.column, p.reason] for p in found], grown]))
    """
    command = [sys.executable, "-c", code, str(path)]
    texts, problems, grown = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    return texts, problems, grown


def test_records_do_not_depend_on_where_chunks_end(tmp_path):
    texts = [f"{i} " + "né" * (i * 997 % 3000) for i in range(400)] + ["x" * 1_500_000, "y"]
    content = "".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts).encode()
    assert len(content) > 2 * 2**20
    reading = read(tmp_path, content)
    assert reading.texts == texts
    assert [number for number, _ in reading.numbered] == list(range(1, len(texts) + 1))
    assert sum(reading.bytes) == len(content)
    assert len(reading.bytes) < 20


def test_a_line_over_the_limit_is_an_error_and_memory_stays_bounded(tmp_path):
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        file.write(b'{"text": "before"}\n{"text": "')
        for _ in range(300):
            file.write(b"x" * 2**20)
        file.write(b'"}\n{"text": "after"}\n')
    texts, problems, grown_kib = read_in_a_fresh_process(path)
    assert texts == ["before", "after"]
    assert problems == [[2, 1, f"the line is longer than 64 MiB ({MAX_LINE_BYTES:,} bytes)"]]
    assert grown_kib < 150 * 1024  # the line alone has 300 MiB


def test_a_line_just_within_the_limit_is_read(tmp_path):
    empty = len(b'{"text":""}')
    for extra, n_records in ((0, 1), (1, 0)):
        line = b'{"text":"' + b"x" * (MAX_LINE_BYTES - empty + extra) + b'"}'
        reading = read(tmp_path, line)
        assert len(reading.records) == n_records
        assert len(reading.problems) == 1 - n_records
        del reading


# Compression

TEXTS = [f"text {i} " + "abc" * (i % 50) for i in range(20_000)]
LINES = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in TEXTS)


def compress(data: bytes, kind: str) -> bytes:
    return (
        gzip.compress(data, 1)
        if kind == "gz"
        else zstandard.ZstdCompressor(write_checksum=True).compress(data)
    )


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_compressed_files_read_the_same_and_count_file_bytes(tmp_path, kind):
    content = compress(LINES, kind)
    reading = read(tmp_path, content, f"a.jsonl.{kind}")
    assert reading.numbered == read(tmp_path, LINES).numbered
    assert reading.problems == []
    assert sum(reading.bytes) == len(content)


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_several_members_or_frames_are_read_whole(tmp_path, kind):
    cut = len(LINES) // 2 + 7
    content = compress(LINES[:cut], kind) + compress(b"", kind) + compress(LINES[cut:], kind)
    if kind == "gz":
        content += b"\0" * 512
    reading = read(tmp_path, content, f"a.jsonl.{kind}")
    assert len(reading.records) == 20_000
    assert reading.problems == []


@pytest.mark.parametrize("kind", ["gz", "zst"])
@pytest.mark.parametrize("keep", [0.001, 0.3, 0.999])
def test_a_cut_file_is_an_error_at_the_line_reached(tmp_path, kind, keep):
    content = compress(LINES, kind)
    reading = read(tmp_path, content[: int(len(content) * keep)], f"a.jsonl.{kind}")
    (problem,) = reading.problems
    assert "ends too early" in problem.reason
    assert problem.line == len(reading.records) + 1
    assert reading.texts == TEXTS[: len(reading.records)]
    if keep > 0.9:
        assert len(reading.records) > 10_000


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_damaged_data_is_an_error_not_an_exception(tmp_path, kind):
    content = bytearray(compress(LINES, kind))
    content[len(content) // 2 : len(content) // 2 + 40] = bytes(range(40))
    reading = read(tmp_path, bytes(content), f"a.jsonl.{kind}")
    assert reading.problems
    assert "damaged" in reading.problems[-1].reason
    junk = read(tmp_path, b"not compressed at all\n", f"b.jsonl.{kind}")
    assert "damaged" in only_problem(junk).reason


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_a_bomb_stays_bounded(tmp_path, kind):
    path = tmp_path / f"a.jsonl.{kind}"
    packer = zstandard.ZstdCompressor().compressobj() if kind == "zst" else None
    with gzip.open(path, "wb", 1) if packer is None else path.open("wb") as file:
        for _ in range(500):
            zeros = bytes(2**20)
            file.write(zeros if packer is None else packer.compress(zeros))
        if packer is not None:
            file.write(packer.flush())
    texts, ((line, _, reason),), grown_kib = read_in_a_fresh_process(path)
    assert texts == []
    assert line == 1
    assert "longer than 64 MiB" in str(reason)
    assert grown_kib < 180 * 1024  # of 500 MiB


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


# Writing


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.builds(
            Record,
            text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(
                lambda t: not t.isspace()
            ),
            source=st.none() | st.text(st.characters(exclude_categories=["Cs"])),
            id=st.none() | st.integers(),
        )
    )
)
def test_what_is_written_is_read_back(tmp_path_factory, records):
    path = tmp_path_factory.getbasetemp() / "written" / "a.jsonl"
    assert write_records(path, records, overwrite=True) == len(records)
    reading = Reading(path)
    assert reading.records == records
    assert reading.problems == []


def test_writing_refuses_to_replace_a_file_unless_told(tmp_path):
    path = tmp_path / "d" / "a.jsonl"
    write_records(path, [Record(text="old")])
    with pytest.raises(StorageError, match="exists already"):
        write_records(path, [Record(text="new")])
    assert Reading(path).texts == ["old"]
    write_records(path, [Record(text="new")], overwrite=True)
    assert Reading(path).texts == ["new"]
    assert [p.name for p in path.parent.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_half_way_leaves_nothing_behind(tmp_path, error):
    def records():
        yield Record(text="x" * 100_000)
        raise error

    with pytest.raises(error):
        write_records(tmp_path / "new" / "domain" / "a.jsonl", records())
    assert list(tmp_path.iterdir()) == []
    write_records(tmp_path / "a.jsonl", [Record(text="old")])
    with pytest.raises(error):
        write_records(tmp_path / "a.jsonl", records(), overwrite=True)
    assert Reading(tmp_path / "a.jsonl").texts == ["old"]
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_full_disk_says_what_to_do_and_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.jsonl"
    write_records(path, [Record(text="old")])
    code = (
        "import resource, signal, sys\n"
        "from pathlib import Path\n"
        "from nanothink.data.record_file import write_records\n"
        "from nanothink.data.records import Record\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
        "records = (Record(text='x' * 10_000) for _ in range(1000))\n"
        "write_records(Path(sys.argv[1]), records, overwrite=True)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False
    )
    assert "StorageError: Cannot write" in done.stderr
    assert "Nothing was changed" in done.stderr
    assert Reading(path).texts == ["old"]
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_file_in_the_way_of_the_folder_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="is a file, not a folder"):
        write_records(tmp_path / "file" / "a.jsonl", [Record(text="a")])


def test_written_files_have_ordinary_permissions(tmp_path):
    write_records(tmp_path / "a.jsonl", [Record(text="a")])
    mask = os.umask(0)
    os.umask(mask)
    assert (tmp_path / "a.jsonl").stat().st_mode & 0o777 == 0o666 & ~mask
