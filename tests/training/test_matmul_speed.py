"""Measuring and keeping how fast 16-bit products are."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch

from nanothink.config import ModelConfig, TrainExpertConfig
from nanothink.training import matmul_speed
from nanothink.training.matmul_speed import MatmulSpeed, ratio

NARROW, WIDE = torch.bfloat16, torch.float32
TINY = MatmulSpeed(width=16, rows=64)


class Clock:
    """Time passes by what is done, as a script has it: seconds of each piece of work, by its type."""

    def __init__(self, wide: Iterable[float], narrow: Iterable[float]) -> None:
        self.now = 0.0
        self.scripts = {WIDE: iter(wide), NARROW: iter(narrow)}
        self.done: list[torch.dtype] = []

    def work(self, dtype: torch.dtype) -> None:
        self.now += next(self.scripts[dtype])
        self.done.append(dtype)

    def __call__(self) -> float:
        return self.now


def test_the_sides_take_turns_and_the_first_round_does_not_count() -> None:
    clock = Clock([100, 6, 6, 6], [100, 2, 2, 2])
    assert ratio(clock.work, NARROW, clock) == 3
    assert clock.done == [WIDE, NARROW] * 4


def test_a_disturbed_round_is_outvoted() -> None:
    clock = Clock([1, 2, 50, 2, 2, 2], [1, 1, 1, 30, 1, 1])
    matmul_seconds = pytest.MonkeyPatch()
    with matmul_seconds.context() as patch:
        patch.setattr(matmul_speed, "_FEWEST_ROUNDS", 5)
        assert ratio(clock.work, NARROW, clock) == 2


def test_measuring_is_short() -> None:
    """Few rounds where one is long, one where that is plainly slow, and never more than some."""
    hopeless = Clock([0.02] * 9, [0.8] * 9)
    assert ratio(hopeless.work, NARROW, hopeless) == pytest.approx(0.025)
    assert len(hopeless.done) == 4
    assert hopeless.now < 2
    instant = Clock([1e-6] * 99, [1e-6] * 99)
    assert ratio(instant.work, NARROW, instant) == pytest.approx(1)
    assert len(instant.done) <= 32


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[], int]:
    """A cache folder of the test's own, and how often something was measured since."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(matmul_speed, "_KNOWN", {})
    monkeypatch.setattr(matmul_speed, "_SECONDS", 0.0)
    calls = []

    def counted(work: matmul_speed.Work, dtype: torch.dtype) -> float:
        calls.append(dtype)
        return ratio(work, dtype)

    monkeypatch.setattr(matmul_speed, "ratio", counted)

    def since() -> int:
        """As a new process would ask: nothing is known but what is in the folder."""
        matmul_speed._KNOWN.clear()
        n_calls = len(calls)
        calls.clear()
        return n_calls

    return since


def kept_file(tmp_path: Path) -> Path:
    (path,) = tmp_path.glob("nanothink/matmul/*.json")
    return path


def test_it_is_measured_once_and_kept(measured: Callable[[], int], tmp_path: Path) -> None:
    before = torch.get_num_threads(), torch.random.get_rng_state()
    speed = TINY.of_step(NARROW)
    assert 0.001 < speed.times < 1000
    assert speed.kept == kept_file(tmp_path)
    assert torch.get_num_threads() == before[0]
    assert torch.equal(torch.random.get_rng_state(), before[1])
    assert measured() == 1
    with torch.inference_mode(), torch.autocast("cpu", NARROW):  # whatever surrounds it
        assert TINY.of_step(NARROW) == speed
        assert measured() == 0
        TINY.of_muon(NARROW)
    assert measured() == 1


def test_another_answer_for_other_products_types_and_surroundings(
    measured: Callable[[], int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(speed: MatmulSpeed = TINY, dtype: torch.dtype = NARROW) -> int:
        speed.of_step(dtype)
        return measured()

    assert ask() == 1
    assert ask(dtype=torch.float16) == 1
    assert ask(MatmulSpeed(width=32, rows=64)) == 1
    assert ask(MatmulSpeed(width=16, rows=32)) == 1
    for name, value in (("ONEDNN_MAX_CPU_ISA", "AVX2"), ("MKL_ENABLE_INSTRUCTIONS", "AVX2")):
        monkeypatch.setenv(name, value)
        assert ask() == 1
        monkeypatch.delenv(name)
    monkeypatch.setattr(torch, "__version__", "99.0")
    assert ask() == 1
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(matmul_speed, "processor", lambda: "vendor_id: another")
    n_kept = len(list(tmp_path.glob("nanothink/matmul/*.json")))
    TINY.of_step(NARROW)
    assert len(list(tmp_path.glob("nanothink/matmul/*.json"))) == n_kept + 1


@pytest.mark.parametrize(
    "damage", ["", "{", "[1]", "null", "NaN", "times", "other key", "[" * 100_000, b"\xff"]
)
def test_a_damaged_file_is_measured_anew(
    damage: str | bytes, measured: Callable[[], int], tmp_path: Path
) -> None:
    speed = TINY.of_step(NARROW)
    path = kept_file(tmp_path)
    content = json.loads(path.read_text())
    if damage == "times":
        damage = json.dumps(content | {"times": -1.0})
    elif damage == "other key":
        damage = json.dumps(content | {"key": content["key"] | {"torch": "1.0"}})
    elif damage == "NaN":
        damage = json.dumps(content | {"times": float("nan")})
    path.write_bytes(damage if isinstance(damage, bytes) else damage.encode())
    measured()
    again = TINY.of_step(NARROW)
    assert measured() == 1
    assert again.kept == speed.kept
    assert json.loads(path.read_text())["times"] == again.times


@pytest.mark.parametrize("blocked", ["folder", "file"])
def test_where_it_cannot_be_kept(
    blocked: str, measured: Callable[[], int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if blocked == "folder":
        monkeypatch.setattr(matmul_speed, "private_folder", lambda *_: None)
    else:
        TINY.of_step(NARROW)
        path = kept_file(tmp_path)
        path.unlink()
        path.mkdir()  # as a full disk would refuse
        assert measured() == 1
    speed = TINY.of_step(NARROW)
    assert speed.kept is None
    assert TINY.of_step(NARROW) is speed  # within a process it stays
    assert measured() == 1
    assert TINY.of_step(NARROW).times > 0
    assert measured() == 1


def test_shapes_are_those_of_the_model_up_to_what_is_quick(
    measured: Callable[[], int], tmp_path: Path
) -> None:
    speeds = MatmulSpeed.of(TrainExpertConfig(batch_size=3), ModelConfig(d_model=24, max_seq_len=16))
    assert (speeds.width, speeds.rows) == (24, 48)
    speeds.of_step(NARROW)
    key = json.loads(kept_file(tmp_path).read_text())["key"]
    assert (key["width"], key["rows"]) == (24, 32)
    assert key["variables"] == {k: v for k, v in os.environ.items() if k.startswith(("MKL", "ONEDNN"))}
