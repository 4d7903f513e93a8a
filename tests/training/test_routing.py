"""Experts that hold almost all or almost nothing over an epoch are named."""

from __future__ import annotations

from nanothink.inference.evaluate import Evaluation, Score
from nanothink.training.events import Evaluated, Event, Note, RunStarted, StepDone
from nanothink.training.routing import RoutingWatch


def step(number: int, tokens: int = 100, *, skipped: bool = False, **weights: float) -> StepDone:
    parts = {f"weight_{name}": weight for name, weight in weights.items()}
    return StepDone(
        step=number,
        total_steps=10,
        epoch=0,
        loss=1.0,
        learning_rate=0.1,
        gradient_norm=1.0,
        tokens=tokens,
        seconds=1.0,
        skipped=skipped,
        logged=False,
        parts=parts | {"cross_entropy": 1.0},
    )


def evaluated(epoch: int) -> Evaluated:
    return Evaluated(5, epoch, Evaluation({"a": Score(1.0, 1, 1)}), best=True, bad_evaluations=0)


def heard(*events: Event) -> list[str]:
    notes: list[str] = []

    def tell(event: Event) -> None:
        assert isinstance(event, Note)
        notes.append(event.message)

    watch = RoutingWatch(tell)
    for event in events:
        watch(event)
    return notes


START = RunStarted("nanothink_mla", 0, 10, 0, 2, 10, 1)


def test_the_mean_over_the_epoch_decides() -> None:
    steps = [step(1, 100, a=0.90, b=0.09, c=0.01), step(2, 300, a=0.98, b=0.01, c=0.01)]
    alone, idle = heard(START, *steps, evaluated(1))
    assert "expert 'a' held 96.0 % of the weight over epoch 1" in alone
    assert "expert 'c' held 1.0 % of the weight over epoch 1" in idle
    # Once is not an epoch, and an evaluation within one is none.
    assert heard(START, *steps, evaluated(0)) == []
    assert heard(START, steps[0], evaluated(1)) == [idle]


def test_each_epoch_is_judged_by_itself() -> None:
    uneven, even = step(1, a=0.99, b=0.01), step(2, a=0.5, b=0.5)
    assert len(heard(START, uneven, evaluated(1), even, evaluated(2))) == 2
    assert len(heard(START, uneven, evaluated(1), uneven, evaluated(2))) == 4


def test_nothing_is_said_where_there_is_nothing_to_choose_or_to_count() -> None:
    assert heard(START, step(1, only=1.0), evaluated(1)) == []
    nan = float("nan")
    assert heard(START, step(1, a=0.5, b=0.5), step(2, skipped=True, a=nan, b=nan), evaluated(1)) == []
    assert heard(START, evaluated(1)) == []


def test_a_memory_takes_nothing_from_how_experts_are_judged() -> None:
    alone, idle = heard(START, step(1, a=0.198, b=0.002, memory=0.8), evaluated(1))
    assert "expert 'a' held 99.0 % of the weight" in alone
    assert "expert 'b' held 1.0 % of the weight" in idle
    assert heard(START, step(1, a=0.5, b=0.49, memory=0.01), evaluated(1)) == []
