"""The records of a run, read back at any moment of its life."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nanothink.errors import DataError
from nanothink.training.records import _object, _rows, read_run


def write_run(folder: Path, *lines: str) -> Path:
    folder.mkdir()
    description = {"name": "mine", "kind": "transformer", "config": {}}
    (folder / "config.json").write_text(json.dumps(description))
    (folder / "metrics.jsonl").write_text("".join(lines), "utf-8")
    return folder


def train_line(step: int, loss: str = "2.5", **more: object) -> str:
    rest = "".join(f', "{name}": {json.dumps(value)}' for name, value in more.items())
    return f'{{"event": "train", "step": {step}, "epoch": 0, "loss": {loss}{rest}}}\n'


def validation_line(step: int, loss: str) -> str:
    return f'{{"event": "validation", "step": {step}, "epoch": 1, "loss": {loss}, "domains": {{}}}}\n'


def test_numbers_become_curves_by_name(tmp_path: Path) -> None:
    lines = [train_line(1, "3.5", learning_rate=0.1), train_line(2, "3.25", learning_rate=0.2, skipped=False)]
    records = read_run(write_run(tmp_path / "run", *lines))
    assert records.training.keys() == {"loss", "learning_rate"}
    assert list(records.training["loss"].steps) == [1, 2]
    assert list(records.training["loss"].values) == [3.5, 3.25]
    assert list(records.training["learning_rate"].values) == [0.1, 0.2]
    assert (records.name, records.kind, records.last_step, records.ending) == ("mine", "transformer", 2, None)


@pytest.mark.parametrize("n_bytes", range(1, 40, 7))
def test_a_line_that_is_being_written_is_not_there_yet(tmp_path: Path, n_bytes: int) -> None:
    records = read_run(write_run(tmp_path / "run", train_line(1), train_line(2)[:n_bytes]))
    assert list(records.training["loss"].steps) == [1]
    assert records.n_unreadable == 0


def test_a_last_line_without_its_end_is_left_out_even_if_it_is_whole(tmp_path: Path) -> None:
    # 12 of a step 123 would be read otherwise, were a number the last thing in a line.
    assert read_run(write_run(tmp_path / "run", train_line(1), train_line(2).rstrip("\n"))).last_step == 1


def test_damaged_lines_are_counted(tmp_path: Path) -> None:
    lines = [train_line(1), "{broken\n", "[1, 2]\n", '{"event": "train"}\n', "\n", train_line(2)]
    records = read_run(write_run(tmp_path / "run", *lines))
    assert list(records.training["loss"].steps) == [1, 2]
    assert records.n_unreadable == 3


def test_what_is_not_finite_is_no_point(tmp_path: Path) -> None:
    lines = [
        train_line(1),
        train_line(2, "null", skipped=True),
        train_line(3, "NaN"),
        train_line(4, "Infinity"),
    ]
    records = read_run(write_run(tmp_path / "run", *lines))
    assert list(records.training["loss"].steps) == [1]
    assert (records.n_skipped, records.last_step) == (1, 4)


def test_the_best_validation_has_the_lowest_loss(tmp_path: Path) -> None:
    lines = [validation_line(step, loss) for step, loss in ((1, "3"), (2, "2"), (3, "NaN"), (4, "2.5"))]
    best = read_run(write_run(tmp_path / "run", *lines)).best
    assert best is not None
    assert best["step"] == 2


def test_a_run_that_has_just_begun(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "metrics.jsonl").unlink()
    records = read_run(folder)
    assert (records.last_step, records.best, dict(records.training)) == (0, None, {})


@pytest.mark.parametrize("text", [None, "", "{", "[]", '{"name": "x"}'])
def test_what_is_no_run_is_refused(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(DataError, match=r"holds no records of a run.*checkpoints/runs"):
        read_run(tmp_path)


def test_json_that_is_nested_too_deeply_says_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("[" * 4000 + '\n{"step": 1}\n')
    assert _object(path) is None
    assert list(_rows(path)) == [None, {"step": 1}]
