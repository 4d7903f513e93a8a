"""The time that a dry run says, beside the time that the run takes."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from nanothink.cli.app import run
from nanothink.config import TrainExpertConfig
from nanothink.runs import long_runs
from nanothink.training.state import Plan, TrainState


@pytest.mark.parametrize(
    ("settings", "state", "expected"),
    [
        ({"max_epochs": 3}, TrainState(), 3),  # steps 4, 8 and 12
        ({"max_epochs": 3}, TrainState(step=8, epoch=2, position=16), 1),
        ({"max_steps": 5}, TrainState(), 2),  # steps 4 and 5
        ({"max_steps": 8}, TrainState(), 2),
        (
            {"max_epochs": 3, "eval_every_steps": 3},
            TrainState(),
            7,
        ),  # 3, 4, 6, 8, 9 and 12, which is counted twice
        ({"max_steps": 3, "batch_size": 64}, TrainState(), 3),  # several epochs in a step
    ],
)
def test_evaluations_are_counted_before_the_run(
    settings: dict[str, int], state: TrainState, expected: int
) -> None:
    config = TrainExpertConfig(**({"batch_size": 2} | settings))
    plan = Plan.make(config, 8, state)
    assert plan.n_evaluations(config.eval_every_steps, state) == expected


def test_a_dry_run_says_how_long(
    tiny_corpus: Path,
    tiny_tokenizer: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["pretrain", "state_space", "--data-dir", tiny_corpus, "--tokenizer", tiny_tokenizer]
    words += ["--checkpoint-dir", tmp_path / "none", "--preset", "tiny", "--max-steps", "40", "--dry-run"]
    assert run([*map(str, words), "--json"]) == 0
    estimate: dict[str, Any] = json.loads(capsys.readouterr().out)
    taken = estimate["time"]
    assert taken["n_steps"] == 40
    assert taken["step_seconds"] > 0 < taken["evaluation_seconds"]
    parts = 40 * taken["step_seconds"] + taken["n_evaluations"] * taken["evaluation_seconds"]
    assert estimate["seconds"] == pytest.approx(parts)
    assert not (tmp_path / "none").exists()


def test_a_dry_run_of_a_model_too_large_for_this_machine_allocates_none_of_it(
    tiny_corpus: Path,
    tiny_tokenizer: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """65 B parameters, as one of eight processes would estimate them; the time is that of products."""
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 8, "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    words = ["pretrain", "transformer", "--data-dir", tiny_corpus, "--tokenizer", tiny_tokenizer]
    words += ["--checkpoint-dir", tmp_path / "none", "--max-steps", "40", "--dry-run"]
    shape = ("model.d_model=16384", "transformer.n_layers=20", "transformer.n_heads=128")
    for setting in (*shape, "model.max_seq_len=2048", "train_expert.batch_size=16"):
        words += ["--set", setting]
    assert run([*map(str, words), "--json"]) == 0
    estimate: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert sum(estimate["parameters"].values()) > 6e10
    assert [choice["name"] for choice in estimate["choices"]] == ["data-parallel", "sharded"]
    assert not any(choice["fits"] for choice in estimate["choices"])
    whole, shared = (choice["n_bytes"] for choice in estimate["choices"])
    assert shared < whole / 4
    assert not estimate["time"]["measured"]
    assert estimate["time"]["step_seconds"] > 10


@pytest.mark.parametrize(
    ("preset", "advice"),
    [
        ("default", "`nanothink pretrain transformer --preset tiny --overwrite"),
        ("tiny", "Fewer epochs take less"),
    ],
)
def test_a_plan_above_an_hour_comes_with_advice(
    tiny_corpus: Path, tiny_tokenizer: Path, capsys: pytest.CaptureFixture[str], preset: str, advice: str
) -> None:
    words = ["pretrain", "transformer", "--data-dir", tiny_corpus, "--tokenizer", tiny_tokenizer, "--dry-run"]
    words += [
        "--preset",
        preset,
        "--max-steps",
        10_000_000,
        "--device",
        "cpu",
        "--set",
        "model.max_seq_len=16",
    ]
    words += ["--set", "train_expert.batch_size=1", "--set", "train_expert.sample_tokens=0"]
    words += ["--set", "transformer.n_layers=1"]
    assert run([*map(str, words)]) == 0
    said = capsys.readouterr().err
    assert "This run takes about" in said
    assert advice in said


def test_a_smaller_model_that_was_timed_as_slower_is_no_advice(
    tiny_corpus: Path,
    tiny_tokenizer: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on a machine that became busy while models were timed."""
    monkeypatch.setattr(long_runs, "_smaller", lambda *_: ("tiny", 1e12))
    words = ["pretrain", "transformer", "--data-dir", tiny_corpus, "--tokenizer", tiny_tokenizer, "--dry-run"]
    words += ["--max-steps", 10_000_000, "--device", "cpu", "--set", "model.max_seq_len=16"]
    words += ["--set", "train_expert.batch_size=1", "--set", "transformer.n_layers=1"]
    assert run([*map(str, words)]) == 0
    said = capsys.readouterr().err
    assert "Fewer epochs take less" in said
    assert "smaller model" not in said


def test_a_run_without_a_preset_says_that_the_text_is_too_little_for_it(
    tiny_corpus: Path, tiny_tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["pretrain", "transformer", "--data-dir", tiny_corpus, "--tokenizer", tiny_tokenizer, "--dry-run"]
    words += ["--set", "train_expert.batch_size=1", "--set", "train_expert.max_epochs=4"]
    words += ["--set", "transformer.n_layers=1", "--set", "model.max_seq_len=16"]
    assert run([*map(str, words)]) == 0
    assert "`nanothink pretrain transformer --preset auto --overwrite" in capsys.readouterr().err


def test_the_preset_auto_chooses_by_the_text_and_goes_to_the_end_of_its_schedule(
    tiny_corpus: Path, tiny_tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["pretrain", "transformer", "--data-dir", tiny_corpus, "--tokenizer", tiny_tokenizer, "--dry-run"]
    words += ["--preset", "auto", "--set", "train_expert.dropout=0.1", "--set", "model.max_seq_len=16"]
    assert run([*map(str, words)]) == 0
    chosen = "model.d_model=64, weight_decay_tables=0.1, max_epochs=32, early_stopping_patience=32"
    assert f"Chosen for it: {chosen}" in capsys.readouterr().err


@pytest.mark.bench
@pytest.mark.parametrize("kind", ["transformer", "state_space"])
def test_the_estimate_is_near_what_a_run_takes(
    tiny_corpus: Path,
    tiny_tokenizer: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In seconds of the processor, which the load of the machine changes least; set OMP_NUM_THREADS=1."""
    monkeypatch.setattr(time, "perf_counter", time.process_time)
    words = ["pretrain", kind, "--data-dir", tiny_corpus, "--tokenizer", tiny_tokenizer]
    words += ["--checkpoint-dir", tmp_path, "--preset", "tiny", "--max-steps", "60", "--json"]
    assert run([*map(str, words), "--dry-run"]) == 0
    estimated = json.loads(capsys.readouterr().out)["seconds"]
    started = time.process_time()
    assert run([*map(str, words)]) == 0
    taken = time.process_time() - started
    assert estimated == pytest.approx(taken, rel=0.4)  # 0.25 on a quiet machine
