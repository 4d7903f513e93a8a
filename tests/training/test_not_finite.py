"""Numbers that are not finite: skipped, counted, at last the end of a run, and never written."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from training_harness import Harness

from nanothink.errors import TrainingDivergedError
from nanothink.models.contract import Batch, Loss
from nanothink.training.events import StepDone
from nanothink.training.objectives import next_token


class Snapshots(list[Any]):
    """The events of a run, and its weights and moments after every step."""

    def __init__(self, harness: Harness) -> None:
        super().__init__()
        self.harness = harness
        self.taken: dict[int, list[torch.Tensor]] = {}

    def append(self, event: Any) -> None:
        super().append(event)
        if isinstance(event, StepDone):
            moments = [
                value.clone().flatten()
                for optimizer in self.harness.run.optimizer.optimizers.values()
                for state in optimizer.state.values()
                for value in state.values()
            ]
            self.taken[event.step] = [self.harness.weights.clone(), *moments]


def poisoned(steps: set[int], **settings: Any) -> Harness:
    harness = Harness(**settings)

    def objective(model: Any, batch: Batch, scale: float) -> Loss:
        loss = next_token(model, batch, scale)
        return Loss(loss.total * math.nan) if harness.run.state.step in steps else loss

    object.__setattr__(harness.run, "objective", objective)
    return harness


def test_a_step_that_is_not_finite_is_skipped_and_counted() -> None:
    harness = poisoned({1}, max_steps=2)
    harness.run.optimizer.set_fraction(1.0)
    harness.go()
    assert [s.skipped for s in harness.steps] == [False, True]
    assert harness.run.state.skipped_steps == 1
    assert torch.isfinite(harness.weights).all()


def test_a_skipped_step_changes_no_weight() -> None:
    before = poisoned({0}, max_steps=1)
    weights = before.weights
    before.go()
    assert torch.equal(weights, before.weights)


def test_many_skipped_in_a_row_end_the_run_and_overwrite_nothing() -> None:
    harness = poisoned(set(range(4, 99)), max_steps=50, max_skipped_steps=5, n_blocks=1000)
    with pytest.raises(
        TrainingDivergedError, match=r"5 steps in a row, up to step 9.*--set train_expert\.lr="
    ):
        harness.go()
    assert harness.saved == []
    assert torch.isfinite(harness.weights).all()


def test_good_steps_between_skipped_ones_reset_the_count() -> None:
    harness = poisoned({1, 2, 4, 5}, max_steps=8, max_skipped_steps=3)
    harness.go()
    assert harness.run.state.skipped_steps == 4


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["loss", "one gradient"])
@pytest.mark.parametrize("scaled", [False, True])
def test_whatever_is_not_finite_changes_nothing(value: float, where: str, scaled: bool) -> None:
    """Neither a weight nor a moment; the next step is taken as ever."""
    harness = Harness(max_steps=4, n_blocks=1000)
    if scaled:
        object.__setattr__(harness.run, "scaler", torch.amp.GradScaler("cpu", init_scale=1.0))
    first = harness.run.optimizer.parameters[0]

    def objective(model: Any, batch: Batch, scale: float) -> Loss:
        loss = next_token(model, batch, scale).total
        if harness.run.state.step != 2:
            return Loss(loss)
        if where == "loss":
            return Loss((loss - loss.detach()) + value)  # its gradients are sound
        return Loss(loss + (first.flatten()[0] - first.detach().flatten()[0]) * value)

    object.__setattr__(harness.run, "objective", objective)
    harness.events = Snapshots(harness)
    harness.go()
    assert [step.skipped for step in harness.steps] == [False, False, True, False]
    assert harness.run.state.skipped_steps == 1
    before, after, later = (harness.events.taken[step] for step in (2, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not torch.equal(after[0], later[0])


def overflowing(scaler: torch.amp.GradScaler, **settings: Any) -> Harness:
    """Gradients that the scale takes out of range; float32's, since float16 is slow on a CPU."""
    harness = Harness(n_blocks=1000, max_epochs=99, **settings)
    object.__setattr__(harness.run, "scaler", scaler)

    def objective(model: Any, batch: Batch, scale: float) -> Loss:
        return Loss(next_token(model, batch, scale).total * 1e3)

    object.__setattr__(harness.run, "objective", objective)
    return harness


def test_float16_that_overflows_is_skipped_until_the_scale_fits() -> None:
    """The scale begins far too high, is halved at every overflow, and the run goes on."""
    harness = overflowing(torch.amp.GradScaler("cpu", init_scale=2.0**127), max_steps=20)
    harness.events = Snapshots(harness)
    harness.go()
    skipped = [step.skipped for step in harness.steps]
    n_skipped = sum(skipped)
    assert 1 <= n_skipped < 20
    assert skipped == [True] * n_skipped + [False] * (20 - n_skipped)
    assert harness.run.scaler is not None
    assert harness.run.scaler.get_scale() == 2.0 ** (127 - n_skipped)
    assert torch.equal(harness.events.taken[n_skipped][0], Harness().weights)
    assert all(math.isfinite(step.loss) for step in harness.steps), "the loss is told unscaled"


def test_a_scale_that_never_fits_ends_the_run() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=0.999)
    harness = overflowing(scaler, max_steps=50, max_skipped_steps=4)
    with pytest.raises(TrainingDivergedError, match="4 steps in a row, up to step 4"):
        harness.go()
    assert harness.saved == []


def test_no_rolling_checkpoint_while_steps_are_skipped() -> None:
    """What is on disk stays from when numbers were good: going on from there can help."""
    harness = poisoned({2, 3, 5}, max_steps=6, save_every_seconds=1e-9, n_blocks=1000)
    harness.go()
    assert [step for role, _, step in harness.saved if role == "interrupted"] == [1, 2, 5, 6]


def test_after_a_validation_that_is_not_finite_nothing_is_written() -> None:
    harness = Harness(validation=[2.0, math.nan], max_epochs=2, snapshot_every_epochs=1)
    harness.go()
    assert {epoch for _, epoch, _ in harness.saved} == {1}


@pytest.mark.parametrize("spoilt", ["weight", "moment"])
def test_what_is_not_finite_is_never_written(spoilt: str) -> None:
    """A step of finite numbers whose result is too large: found before it replaces a good checkpoint."""
    harness = Harness(max_epochs=3, n_blocks=8)
    take = harness.run.optimizer.step

    def overflow(scaler: Any = None) -> None:
        take(scaler)
        if harness.run.state.step == 5:
            weight = harness.run.optimizer.parameters[0]
            if spoilt == "weight":
                weight.data.view(-1)[0] = math.inf
            else:
                harness.run.optimizer.optimizers["adamw"].state[weight]["exp_avg_sq"].view(-1)[0] = math.inf

    harness.run.optimizer.step = overflow  # type: ignore[method-assign]
    with pytest.raises(
        TrainingDivergedError, match=r"After step 8 the weights are not finite.*--set train_expert\.lr="
    ):
        harness.go()
    assert {step for _, _, step in harness.saved} == {4}
