"""JSON in shared folders that is nested too deeply for Python's parser says nothing, and stops nothing."""

from __future__ import annotations

from pathlib import Path

from nanothink.disk.lock import _Holder
from nanothink.training.records import _object, _rows


def test_json_that_is_nested_too_deeply_says_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("[" * 4000 + '\n{"step": 1}\n')
    assert _Holder.read(path) is None
    assert _object(path) is None
    assert list(_rows(path)) == [None, {"step": 1}]
