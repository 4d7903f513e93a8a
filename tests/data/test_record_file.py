"""Files of records are written whole, and read back the same."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from record_reading import Reading

from nanothink.data.record_file import write_records
from nanothink.data.records import Record
from nanothink.errors import StorageError


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
