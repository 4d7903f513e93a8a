"""Chunks, long lines and compressed files: the same records, and memory that is bounded."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest
import zstandard
from record_reading import only_problem, read

from nanothink.data.lines import MAX_LINE_BYTES

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
