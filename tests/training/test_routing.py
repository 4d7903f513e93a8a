"""Experts that hold almost all or almost nothing over an epoch are named."""

from __future__ import annotations

import pytest

from nanothink.training.routing import unbalanced_experts
from nanothink.training.state import TrainState


def heard(epoch: int, **weights: float) -> list[str]:
    """Warnings when an epoch ends with these mean weights."""
    parts = {f"weight_{name}": weight for name, weight in weights.items()} | {"cross_entropy": 1.0}
    return list(unbalanced_experts(parts, epoch))


def test_the_mean_over_the_epoch_decides() -> None:
    alone, idle = heard(1, a=0.96, b=0.03, c=0.01)
    assert "expert 'a' held 96.0 % of the weight over epoch 1" in alone
    assert "expert 'c' held 1.0 % of the weight over epoch 1" in idle
    assert heard(2, a=0.95, b=0.02, c=0.03) == []


def test_nothing_is_said_where_there_is_nothing_to_choose_or_no_epoch_ended() -> None:
    assert heard(1, only=1.0) == []
    assert list(unbalanced_experts({}, 1)) == []


def test_the_epoch_counts_targets_and_not_steps() -> None:
    state = TrainState()
    state.count({"weight_a": 0.9, "weight_b": 0.1}, 100)
    state.count({"weight_a": 0.98, "weight_b": 0.02}, 300)
    resumed = TrainState.from_dict(state.to_dict())
    assert resumed == state
    resumed.count({"weight_a": 0.5, "weight_b": 0.5}, 400)
    assert resumed.end_epoch() == pytest.approx({"weight_a": 0.73, "weight_b": 0.27})
    assert resumed.end_epoch() == {}  # each epoch is judged by itself


def test_a_memory_takes_nothing_from_how_experts_are_judged() -> None:
    alone, idle = heard(1, a=0.198, b=0.002, vector_store=0.8)
    assert "expert 'a' held 99.0 % of the weight" in alone
    assert "expert 'b' held 1.0 % of the weight" in idle
    assert heard(1, a=0.5, b=0.49, vector_store=0.01) == []
