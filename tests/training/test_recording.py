from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from reports import Told

from nanothink.errors import StorageError
from nanothink.inference.evaluate import Evaluation, Score
from nanothink.training.events import Evaluated, Sampled, StepDone
from nanothink.training.recording import RunRecorder
from nanothink.training.state import TrainState


def step(number: int, loss: float = 2.0, logged: bool = True) -> StepDone:
    return StepDone(number, 10, 0, loss, 1e-3, 0.5, 64, 0.1, not math.isfinite(loss), logged)


def evaluated(number: int) -> Evaluated:
    return Evaluated(number, 1, Evaluation({"d": Score(2.0, 1, 4)}), True, 0)


def lines(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_it_writes_what_happens(tmp_path: Path) -> None:
    recorder = RunRecorder(tmp_path / "run", {"kind": "transformer"}, TrainState())
    recorder.event(step(1))
    recorder.event(step(2, logged=False))
    recorder.event(evaluated(2))
    recorder.event(Sampled(2, 1, {"Once": " upon"}))
    recorder.close()
    train, validation = lines(tmp_path / "run")
    assert (train["event"], train["step"], train["loss"]) == ("train", 1, 2.0)
    assert train["tokens_per_second"] == pytest.approx(640)
    assert validation["event"] == "validation"
    assert validation["bits_per_byte"] == pytest.approx(2 / math.log(2) / 4)
    assert validation["domains"]["d"]["tokens"] == 1
    assert lines(tmp_path / "run", "samples.jsonl")[0]["samples"] == {"Once": " upon"}
    assert json.loads((tmp_path / "run" / "config.json").read_text()) == {"kind": "transformer"}


def test_what_lies_beyond_the_checkpoint_is_dropped(tmp_path: Path) -> None:
    recorder = RunRecorder(tmp_path, {}, TrainState())
    for number in (1, 2, 3, 4):
        recorder.event(step(number))
        recorder.event(evaluated(number))
    recorder.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"event": "train", "st')  # a killed process, in the middle of a line
    RunRecorder(tmp_path, {}, TrainState(step=3, evaluated_step=2)).close()
    kept = [(line["event"], line["step"]) for line in lines(tmp_path)]
    assert kept == [("train", 1), ("validation", 1), ("train", 2), ("validation", 2), ("train", 3)]


def test_a_new_run_begins_with_an_empty_folder_and_sets_the_old_one_aside(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "mine"
    first = RunRecorder(folder, {}, TrainState())
    first.event(step(1))
    first.close()
    for _ in range(2):
        RunRecorder(folder, {}, TrainState()).close()
        assert lines(folder) == []
    earliest, latest = sorted(
        (tmp_path / "replaced").iterdir(), key=lambda path: len(lines(path)), reverse=True
    )
    assert earliest.name.startswith("mine-")
    assert [len(lines(earliest)), len(lines(latest))] == [1, 0]


def test_a_loss_that_is_not_a_number_is_null(tmp_path: Path) -> None:
    recorder = RunRecorder(tmp_path, {}, TrainState())
    recorder.event(step(1, loss=math.nan))
    diverged = Evaluation({"a": Score(math.nan, 100, 300)}, denoising={1: math.inf})
    recorder.event(Evaluated(1, 1, diverged, False, 1))
    recorder.close()
    written = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in written
    assert "Infinity" not in written
    trained, validated = lines(tmp_path)
    assert trained["loss"] is None
    assert validated["loss"] is None
    assert validated["domains"]["a"]["loss"] is None
    assert validated["domains"]["a"]["tokens"] == 100
    assert validated["denoising_mse"] == {"1": None}


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file where a folder should be")
    with pytest.raises(StorageError, match=r"runs.*--checkpoint-dir"):
        RunRecorder(tmp_path / "runs" / "x", {}, TrainState())


def test_samples_survive_a_resume_whatever_characters_they_hold(tmp_path: Path) -> None:
    """U+2028 and its like end a line for str.splitlines, but not in a file of JSON lines."""
    texts = {"Once": "a\u2028b\u0085c\x0bd"}
    recorder = RunRecorder(tmp_path / "runs" / "x", {}, TrainState())
    recorder.event(Sampled(2, 1, texts))
    recorder.close()
    RunRecorder(tmp_path / "runs" / "x", {}, TrainState(step=2, evaluated_step=2)).close()
    (kept,) = (tmp_path / "runs" / "x" / "samples.jsonl").read_bytes().splitlines()
    assert json.loads(kept)["samples"] == texts


def test_half_a_character_of_a_killed_process_is_dropped(tmp_path: Path) -> None:
    recorder = RunRecorder(tmp_path / "runs" / "x", {}, TrainState())
    recorder.event(Sampled(2, 1, {"Once": "one"}))
    recorder.close()
    path = tmp_path / "runs" / "x" / "samples.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + '{"step": 3, "samples": {"Once": "ö'.encode()[:-1])
    RunRecorder(tmp_path / "runs" / "x", {}, TrainState(step=3, evaluated_step=3)).close()
    assert path.read_bytes() == whole


def test_records_are_not_written_through_links(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "runs" / "x", tmp_path / "elsewhere"
    folder.mkdir(parents=True)
    elsewhere.write_text("precious")
    (folder / "config.json").symlink_to(elsewhere)
    (folder / "samples.jsonl").symlink_to(tmp_path / "made")
    with pytest.raises(StorageError, match=r"records cannot be written.*a symbolic link is in the way"):
        RunRecorder(folder, {}, TrainState(step=1))
    (folder / "samples.jsonl").unlink()
    recorder = RunRecorder(folder, {}, TrainState(step=1))
    recorder.event(step(2))
    recorder.close()
    assert elsewhere.read_text() == "precious"
    assert not (folder / "config.json").is_symlink()
    assert not (tmp_path / "made").exists()


def test_a_full_disk_is_said_once_and_what_waited_is_written_when_it_has_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room: float = math.inf
    really_write = os.write

    def write(descriptor: int, data: memoryview) -> int:
        nonlocal room
        if room <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = really_write(descriptor, data[: int(min(room, len(data)))])
        room -= written
        return written

    monkeypatch.setattr("nanothink.disk.growing_file.os.write", write)
    notes: list[str] = []
    recorder = RunRecorder(tmp_path, {}, TrainState(), Told(notes.append))
    for number in range(1, 9):
        if number == 3:
            room = 100  # of a line, a part
        if number == 7:
            room = math.inf
        recorder.event(step(number))
        recorder.event(evaluated(number))
        recorder.event(Sampled(number, 1, {"Once": " upon"}))
        expected = number if number < 3 or number > 6 else 2
        assert [entry["step"] for entry in lines(tmp_path, "samples.jsonl")] == list(range(1, expected + 1))
        assert len(lines(tmp_path)) == 2 * expected
    recorder.close()
    assert [entry["step"] for entry in lines(tmp_path)] == [n for n in range(1, 9) for _ in range(2)]
    first, second = notes
    assert "No space left on device. Training continues" in first
    assert "complete again" in second


def test_what_never_found_room_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    recorder = RunRecorder(tmp_path, {}, TrainState(), Told(notes.append))
    recorder.event(step(1))

    def refuse(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("nanothink.disk.growing_file.os.write", refuse)
    monkeypatch.setattr("nanothink.disk.growing_file.MOST_WAITING_BYTES", 500)  # two lines
    for number in range(2, 10):
        recorder.event(step(number))
    monkeypatch.setattr("nanothink.disk.write.RawFile", refuse)
    assert not recorder.keep_ending({})
    recorder.close()
    assert [line.partition(":")[0] for line in notes] == ["warning"] * 3
    assert "8 lines of the run's records could not be written" in notes[2]
    assert [entry["step"] for entry in lines(tmp_path)] == [1]
