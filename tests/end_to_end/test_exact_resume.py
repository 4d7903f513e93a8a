"""Interrupted and resumed is the same run as never interrupted: every kind, every moment, every bit.

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


MOMENTS: dict[str, list[dict[str, Any]]] = {
    "in the middle of an epoch": [after_step(6, "SIGTERM")],
    # Backward passes 1 and 2 of a process are its first step. SIGTERM waits for the second of them, SIGKILL
    # leaves with half a window done, and what it has done since the rolling file is done again.
    "in the middle of an accumulation window": [
        {"call": "torch:Tensor.backward", "nth": 9, "after": True, "signals": ["SIGTERM"]},
        {"call": "torch:Tensor.backward", "nth": 3, "after": True, "signals": ["SIGKILL"]},
    ],
    # The best file is written, the rolling one that comes with it is not.
    "just after a best": [
        {"event": "CheckpointSaved", "having": {"role": "best"}, "nth": 2, "signals": ["SIGKILL"]}
    ],
    # Stopped with the last step of the epoch done and its validation not.
    "at an epoch's end": [after_step(AN_EPOCH, "SIGINT")],
    "twice in a row": [after_step(5, "SIGINT"), after_step(6, "SIGKILL"), after_step(18, "SIGTERM")],
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_run_that_is_compared_with_has_something_to_get_wrong(
    kind: str, uninterrupted: Callable[[str], Path]
) -> None:
    folder = uninterrupted(kind)
    recorded = metrics(folder, stem(kind))
    assert [m["step"] for m in recorded if m["event"] == "train"] == list(range(1, 2 * AN_EPOCH + 1))
    validated = [(m["step"], m["epoch"]) for m in recorded if m["event"] == "validation"]
    assert validated == [(4, 0), (8, 0), (12, 1), (16, 1), (20, 1), (24, 2)]
    assert len({m["learning_rate"] for m in recorded if m["event"] == "train"}) > AN_EPOCH
    assert any(m["best"] for m in recorded if m["event"] == "validation")
    assert (folder / f"{stem(kind)}_epoch{LAST_EPOCH}.pt").exists()


def test_some_run_that_is_compared_with_counts_towards_early_stopping(
    uninterrupted: Callable[[str], Path],
) -> None:
    """Which kind it is depends on the processor's last bits."""
    recorded = [m for kind in KINDS for m in metrics(uninterrupted(kind), stem(kind))]
    assert any(m["event"] == "validation" and not m["best"] for m in recorded)


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("kind", KINDS)
def test_resumed_is_the_same_run(
    kind: str, moment: str, ground: Ground, uninterrupted: Callable[[str], Path], tmp_path: Path
) -> None:
    arguments = ground.typed(kind, tmp_path)
    for n, strike in enumerate(MOMENTS[moment]):
        ended = ground.server.run([*arguments, *(["--resume"] if n else [])], strike=strike)
        killed = "SIGKILL" in strike["signals"]
        assert ended.code == (-9 if killed else 130), ended.stderr
        assert "Traceback" not in ended.stderr
    if moment == "twice in a row":
        ended = ground.server.run(["resume", "--checkpoint-dir", str(tmp_path)])
    else:
        ended = ground.server.run([*arguments, "--resume"])
    assert ended.code == 0, ended.stderr
    assert f"Resuming from {tmp_path / stem(kind)}_interrupted.pt" in ended.stderr
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
