from __future__ import annotations

import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from reports import Told

from nanothink.errors import UsageError
from nanothink.inference.evaluate import Evaluation, Score
from nanothink.training.events import Evaluated, Sampled, StepDone
from nanothink.training.recording import RunRecorder
from nanothink.training.state import TrainState


def record(
    folder: Path, tracker: str, *, step: int = 0, notes: list[str] | None = None, close: bool = True
) -> RunRecorder:
    """The records of a run of two steps, a validation and a sample, which goes on at ``step``."""
    state = TrainState(step=step, evaluated_step=step)
    reporter = Told((notes if notes is not None else []).append)
    recorder = RunRecorder(folder, {"config": {"train_expert": {"lr": 0.1}}}, state, reporter, tracker)
    for number in (step + 1, step + 2):
        recorder.event(StepDone(number, 10, 0, 1.25, 1e-3, 0.5, 64, 0.1, False, True))
    recorder.event(Evaluated(step + 2, 1, Evaluation({"tales": Score(2.0, 1, 4)}), True, 0))
    recorder.event(Sampled(step + 2, 1, {"Once": " upon"}))
    if close:
        recorder.close()
    return recorder


def test_tensorboard_has_numbers_and_samples_and_hides_repeated_steps(tmp_path: Path) -> None:
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    record(tmp_path, "tensorboard")
    record(tmp_path, "tensorboard", step=1)
    first, resumed = sorted(tmp_path.glob("events.out.tfevents.*"), key=lambda path: path.stat().st_mtime_ns)

    def events(path: Path) -> list[Any]:
        data, found = path.read_bytes(), []
        while data:
            length = int.from_bytes(data[:8], "little")
            found.append(Event.FromString(data[12 : 12 + length]))
            data = data[12 + length + 4 :]
        return found

    values = {(e.step, v.tag): v.simple_value for e in events(first) for v in e.summary.value}
    assert values[1, "train/loss"] == values[2, "train/loss"] == 1.25
    assert values[2, "bits_per_byte/tales"] == pytest.approx(2 / math.log(2) / 4)
    assert (2, "sample/Once/text_summary") in values
    starts = [e.step for e in events(resumed) if e.session_log.status == SessionLog.START]
    assert starts == [2]


class Library(SimpleNamespace):
    """What wandb and trackio have in common; keeps the calls."""

    def __init__(self, fail: str = "") -> None:
        super().__init__(calls=[], fail=fail)

    def _call(self, function: str, *given: Any) -> None:
        self.calls.append((function, *given))
        if function == self.fail:
            raise RuntimeError("no space")

    def init(self, **settings: Any) -> None:
        print("a line of the library's own")
        self._call("init", settings)

    def log(self, values: dict[str, Any], step: int) -> None:
        self._call("log", values, step)

    def finish(self) -> None:
        print("a line of the library's own")
        self._call("finish")


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    fake = Library()
    for name in ("wandb", "trackio"):
        monkeypatch.setitem(sys.modules, name, fake)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    return fake


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_library_gets_the_settings_and_every_value(
    name: str, library: Library, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record(tmp_path / "mine", name)
    record(tmp_path / "mine", name, step=2)
    begun = [call[1] for call in library.calls if call[0] == "init"]
    assert [(b["project"], b["name"], b["group"]) for b in begun] == [
        ("nanothink", "mine", "mine"),
        ("nanothink", "mine from step 2", "mine"),
    ]
    assert begun[0]["config"] == {"train_expert": {"lr": 0.1}}
    logged = [(step, values) for _, values, step in (c for c in library.calls if c[0] == "log")]
    assert [step for step, _ in logged] == [1, 2, 2, 2, 3, 4, 4, 4]
    assert logged[0][1]["train/loss"] == 1.25
    assert logged[2][1]["validation/loss"] == 2.0
    assert logged[3][1] == {"sample/Once": "Once upon"}
    assert library.calls[-1] == ("finish",)
    assert capsys.readouterr().out == ""  # standard output is for results


def test_a_tracker_that_fails_is_reported_once_and_the_run_continues(
    library: Library, tmp_path: Path
) -> None:
    library.fail, notes = "log", list[str]()
    record(tmp_path / "mine", "trackio", notes=notes)
    assert notes == ["warning: the tracker has failed (no space). Training continues without it."]
    assert len((tmp_path / "mine" / "metrics.jsonl").read_text().splitlines()) == 3


def test_a_tracker_that_cannot_start_or_is_missing_ends_the_run_before_it_begins(
    library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library.fail = "init"
    with pytest.raises(UsageError, match=r"tracker=wandb cannot start: no space.*tracker=none"):
        record(tmp_path / "mine", "wandb")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name, package in (("tensorboard", "tensorboardX"), ("trackio", "trackio")):
        with pytest.raises(UsageError, match=rf"needs {package}: .*pip install 'nanothink\[{name}\]'"):
            record(tmp_path / "mine", name)


def test_no_tracker_is_opened_unless_it_is_asked_for(library: Library, tmp_path: Path) -> None:
    record(tmp_path / "mine", "none")
    assert not library.calls
    assert not list((tmp_path / "mine").glob("events.*"))


def test_trackio_itself_takes_a_run_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "store"))  # it looks when it is imported
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pytest.importorskip("trackio")
    notes: list[str] = []
    record(tmp_path / "mine", "trackio", notes=notes)
    assert not notes
    assert list((tmp_path / "store").glob("nanothink*"))
