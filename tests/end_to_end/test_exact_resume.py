"""Interrupted and resumed is the same run as never interrupted: every kind, every moment, every bit.

Each run is interrupted at one moment after the other: where the last bit is right, every resume was.
Compared are all checkpoints of both runs (weights, moments, learning rates, random states, early-stopping
counter, settings) and their records; see ``assert_same_run``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from struck_runs import KINDS, LAST_EPOCH, Ground, assert_same, assert_same_run, metrics, stem

from nanothink.checkpoints import read_checkpoint

AN_EPOCH = 12  # steps; validation comes every 4


def after_step(step: int, *signals: str) -> dict[str, Any]:
    return {"event": "StepDone", "having": {"step": step}, "signals": signals}


def in_backward(n: int, sent: str) -> dict[str, Any]:
    """In the middle of an accumulation window if ``n`` is odd: each has two backward passes."""
    return {"call": "torch:Tensor.backward", "nth": n, "after": True, "signals": [sent]}


MOMENTS: list[tuple[str, dict[str, Any], int]] = [
    # (moment, strike, step of the state that is left). What is done since the rolling file is done again.
    ("killed with half of the second window done", in_backward(3, "SIGKILL"), 0),
    ("stopped in a window, which is finished first", in_backward(5, "SIGTERM"), 3),
    (
        "killed with the best file written, and not the rolling one that comes with it",
        {"event": "CheckpointSaved", "having": {"role": "best"}, "signals": ["SIGKILL"]},
        3,
    ),
    ("stopped in the middle of an epoch", after_step(6, "SIGINT"), 6),
    (
        "stopped with the last step of an epoch done, and not its validation",
        after_step(AN_EPOCH, "SIGINT"),
        12,
    ),
    ("killed a step later", after_step(14, "SIGKILL"), 12),
    ("stopped again", after_step(18, "SIGTERM"), 18),
]


@pytest.mark.parametrize("kind", KINDS)
def test_the_run_that_is_compared_with_has_something_to_get_wrong(
    kind: str, uninterrupted: Callable[[str], Path]
) -> None:
    folder = uninterrupted(kind)
    recorded = metrics(folder, stem(kind))
    assert [m["step"] for m in recorded if m["event"] == "train"] == list(range(1, 2 * AN_EPOCH + 1))
    validated = [(m["step"], m["epoch"]) for m in recorded if m["event"] == "validation"]
    first = [(0, 0)] if kind == "nanothink_mla" else []  # the ensemble that it starts from
    assert validated == [*first, (4, 0), (8, 0), (12, 1), (16, 1), (20, 1), (24, 2)]
    assert len({m["learning_rate"] for m in recorded if m["event"] == "train"}) > AN_EPOCH
    assert any(m["best"] for m in recorded if m["event"] == "validation")
    assert (folder / f"{stem(kind)}_epoch{LAST_EPOCH}.pt").exists()


def test_some_run_that_is_compared_with_counts_towards_early_stopping(
    uninterrupted: Callable[[str], Path],
) -> None:
    """Which kind it is depends on the processor's last bits."""
    recorded = [m for kind in KINDS for m in metrics(uninterrupted(kind), stem(kind))]
    assert any(m["event"] == "validation" and not m["best"] for m in recorded)


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_at_every_moment_it_is_the_same_run(
    kind: str, ground: Ground, uninterrupted: Callable[[str], Path], tmp_path: Path
) -> None:
    arguments, rolling = ground.typed(kind, tmp_path), tmp_path / f"{stem(kind)}_interrupted.pt"
    for n, (moment, strike, step) in enumerate(MOMENTS):
        ended = ground.server.run([*arguments, *(["--resume"] if n else [])], strike=strike)
        assert ended.code == (-9 if "SIGKILL" in strike["signals"] else 130), f"{moment}: {ended.stderr}"
        assert "Traceback" not in ended.stderr, moment
        assert not n or f"Resuming from {rolling}" in ended.stderr, moment
        # An evaluation may have written it since.
        assert read_checkpoint(rolling)["step"] == step, moment
    ended = ground.server.run(["resume", "--checkpoint-dir", str(tmp_path)])
    assert ended.code == 0, ended.stderr
    assert f"Resuming from {rolling}" in ended.stderr
    assert_same_run(uninterrupted(kind), tmp_path, stem(kind))


def test_two_runs_are_the_same_run(
    ground: Ground, uninterrupted: Callable[[str], Path], tmp_path: Path
) -> None:
    assert ground.server.run(ground.typed("transformer", tmp_path)).code == 0
    assert_same_run(uninterrupted("transformer"), tmp_path, "transformer_expert")


def test_a_difference_of_one_bit_would_be_seen(uninterrupted: Callable[[str], Path]) -> None:
    payload = read_checkpoint(uninterrupted("transformer") / "transformer_expert.pt")
    other = read_checkpoint(uninterrupted("transformer") / "transformer_expert.pt")
    assert_same(payload, other)
    moments = next(iter(other["optimizer_state"]["muon"]["state"].values()))
    moments["momentum_buffer"].view(-1)[0] = (
        moments["momentum_buffer"].view(-1)[0].nextafter(moments["momentum_buffer"].new_tensor(1e9))
    )
    with pytest.raises(AssertionError, match="momentum_buffer"):
        assert_same(payload, other)
