from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from reports import Told
from training_harness import LENGTH, VOCABULARY, Blocks, Harness

from nanothink.data.tokens import IGNORE
from nanothink.errors import InterruptedRun, TrainingDivergedError
from nanothink.inference.evaluate import Evaluation, EvaluationStopped, Score
from nanothink.models.contract import Batch, Loss
from nanothink.training.events import Evaluated, RunFinished, StepDone
from nanothink.training.interruption import StopRequest
from nanothink.training.loop import Callbacks, train
from nanothink.training.objectives import next_token
from nanothink.training.state import TrainState


def test_it_runs_to_the_end_of_its_plan() -> None:
    harness = Harness(validation=[3.0, 2.0, 1.0])
    finished = harness.go()
    assert (finished.step, finished.epoch, finished.best_loss) == (12, 3, 1.0)
    assert [e.step for e in harness.events if isinstance(e, Evaluated)] == [4, 8, 12]
    assert harness.run.state.position == 24


def test_it_learns() -> None:
    harness = Harness(max_epochs=30, n_blocks=4, lr=3e-3, period=4)
    harness.go()
    first, last = harness.steps[0].loss, harness.steps[-1].loss
    assert first == pytest.approx(math.log(VOCABULARY), rel=1e-3)
    assert last < first - 0.3


def test_the_loss_reported_is_the_mean_over_all_targets_of_the_window() -> None:
    """Not the mean of means: micro-batches with ignored targets hold fewer."""
    harness = Harness(grad_accum_steps=3, batch_size=2, max_epochs=1, n_blocks=6)
    model = harness.run.model
    inputs, targets = Blocks().read(0, 6)
    with torch.no_grad():
        expected = float(model.loss(inputs, targets)) / int((targets != IGNORE).sum())
    harness.go()
    assert harness.steps[0].loss == pytest.approx(expected, rel=1e-6)
    assert harness.steps[0].tokens == int((targets != IGNORE).sum())


@pytest.mark.parametrize(("batch", "windows"), [(6, 1), (3, 2), (2, 3), (1, 6)])
def test_accumulation_gives_the_gradient_of_the_whole_window(batch: int, windows: int) -> None:
    whole = Harness(batch_size=6, max_steps=3, optimizer="adamw", lr=1e-5)
    parts = Harness(batch_size=batch, grad_accum_steps=windows, max_steps=3, optimizer="adamw", lr=1e-5)
    whole.go()
    parts.go()
    for a, b in zip(whole.steps, parts.steps, strict=True):
        assert a.loss == pytest.approx(b.loss, rel=1e-5)
        assert a.gradient_norm == pytest.approx(b.gradient_norm, rel=1e-4)


def test_an_objective_hears_the_positions_of_its_blocks_and_its_parts_are_summed() -> None:
    """However the window is cut, each block is known by its place in the run."""
    heard: dict[int, list[int]] = {}
    for batch_size, windows in ((4, 1), (2, 2), (1, 4)):
        harness = Harness(batch_size=batch_size, grad_accum_steps=windows, max_steps=2, n_blocks=100)
        seen: list[int] = []

        def objective(model: Any, batch: Batch, scale: float, seen: list[int] = seen) -> Loss:
            expected, _ = Blocks().read(batch.positions[0], len(batch.positions))
            assert torch.equal(batch.inputs, expected)
            seen += batch.positions
            return Loss(next_token(model, batch, scale).total, {"places": torch.tensor(sum(batch.positions))})

        object.__setattr__(harness.run, "objective", objective)
        harness.go()
        heard[batch_size] = seen
        assert [step.parts for step in harness.steps] == [{"places": 6.0}, {"places": 22.0}]
    assert heard == {4: list(range(8)), 2: list(range(8)), 1: list(range(8))}


def test_gradients_are_clipped() -> None:
    free = Harness(max_steps=1, grad_clip=1e9, optimizer="adamw")
    free.go()
    norm = free.steps[0].gradient_norm
    clipped = Harness(max_steps=1, grad_clip=norm / 100, optimizer="adamw")
    kept: list[float] = []
    step = clipped.run.optimizer.step

    def spy(scaler: Any = None) -> None:
        kept.append(
            float(
                torch.stack(
                    [p.grad.norm() for p in clipped.run.optimizer.parameters if p.grad is not None]
                ).norm()
            )
        )
        step(scaler)

    clipped.run.optimizer.step = spy  # type: ignore[method-assign]
    clipped.go()
    assert clipped.steps[0].gradient_norm == pytest.approx(norm)
    assert kept[0] == pytest.approx(norm / 100, rel=1e-3)


def test_best_is_the_lowest_validation_loss() -> None:
    harness = Harness(validation=[3.0, 4.0, 2.0], max_epochs=3)
    harness.go()
    assert [(role, epoch) for role, epoch, _ in harness.saved if role == "best"] == [("best", 1), ("best", 3)]


def test_snapshots_come_every_few_epochs() -> None:
    harness = Harness(max_epochs=5, snapshot_every_epochs=2, early_stopping_patience=99)
    harness.go()
    assert [epoch for role, epoch, _ in harness.saved if role == "epoch"] == [2, 4]


def test_the_rolling_checkpoint_follows_every_evaluation_and_comes_last() -> None:
    harness = Harness(max_epochs=2, snapshot_every_epochs=1)
    harness.go()
    assert [role for role, _, _ in harness.saved] == ["best", "epoch", "interrupted", "epoch", "interrupted"]


def test_the_rolling_checkpoint_comes_by_the_clock_too() -> None:
    harness = Harness(max_epochs=1, save_every_seconds=1e-9)
    harness.go()
    assert [step for role, _, step in harness.saved if role == "interrupted"][:3] == [1, 2, 3]


def test_it_stops_when_validation_stops_improving() -> None:
    harness = Harness(validation=[1.0, *[2.0] * 99], max_epochs=50, early_stopping_patience=3)
    finished = harness.go()
    assert finished.epoch == 4
    assert "no improvement in 3 evaluations" in finished.reason
    assert finished.best_loss == 1.0


def test_stopping_before_the_rate_has_come_down_is_said_with_what_to_do() -> None:
    """The best is after the third of twenty epochs, whose last step reads a block of the fourth."""
    losses = [3.0, 2.0, 1.0, *[2.0] * 9]
    harness = Harness(validation=losses, n_blocks=13, max_epochs=20, early_stopping_patience=3)
    harness.go()
    (advice,) = harness.notes
    assert "lowest at step 20 of 130, while the learning rate was still high" in advice
    assert "--max-epochs 3 --overwrite" in advice
    harness = Harness(validation=losses, n_blocks=13, max_steps=130, early_stopping_patience=3)
    harness.go()
    assert "--max-steps 20 --overwrite" in harness.notes[0]


@pytest.mark.parametrize(
    ("losses", "epochs"),
    [
        ([4.0, 3.0, 2.0, 1.0, 2.0, 2.0], 7),  # the best was past the middle
        ([1.0, 2.0, 2.0], 3),  # the run went to its end
    ],
)
def test_nothing_is_advised_where_the_rate_came_down(losses: list[float], epochs: int) -> None:
    harness = Harness(validation=losses, max_epochs=epochs, early_stopping_patience=2)
    harness.go()
    assert not harness.notes


def test_a_run_that_stopped_early_stays_stopped() -> None:
    harness = Harness(validation=[1.0, *[2.0] * 99], max_epochs=50, early_stopping_patience=3)
    harness.go()
    before = harness.run.state.step
    assert "no improvement" in harness.go().reason
    assert harness.run.state.step == before


def test_validation_that_is_not_a_number_is_never_best() -> None:
    harness = Harness(validation=[math.nan, 2.0, math.inf], max_epochs=3)
    assert harness.go().best_loss == 2.0


def test_a_run_without_any_finite_validation_has_not_ended_well() -> None:
    """Its rolling checkpoint would be removed, and nothing be left of it."""
    harness = Harness(validation=[math.nan, math.inf, math.nan], max_epochs=3)
    with pytest.raises(TrainingDivergedError, match=r"No validation loss was finite \(3 evaluations\)"):
        harness.go()
    assert not [event for event in harness.events if isinstance(event, RunFinished)]


def test_it_evaluates_at_the_end_of_a_run_that_ends_within_an_epoch() -> None:
    harness = Harness(max_steps=3, n_blocks=100)
    finished = harness.go()
    assert finished.best_loss == 1.0
    assert finished.epoch == 0


def test_steps_of_several_epochs_do_not_each_have_a_snapshot() -> None:
    """Three epochs a step, a snapshot every two: a step counts for one, so every second step has one."""
    harness = Harness(n_blocks=2, batch_size=6, max_epochs=12, snapshot_every_epochs=2)
    harness.go()
    assert [epoch for role, epoch, _ in harness.saved if role == "epoch"] == [6, 12]


def test_it_evaluates_between_epochs_when_asked() -> None:
    harness = Harness(n_blocks=8, max_epochs=2, eval_every_steps=3, early_stopping_patience=99)
    harness.go()
    assert [(e.step, e.epoch) for e in harness.events if isinstance(e, Evaluated)] == [
        (3, 0),
        (4, 1),
        (6, 1),
        (8, 2),
    ]


def test_a_stop_saves_and_leaves() -> None:
    harness = Harness(max_epochs=3)
    observe = harness.events.append

    class Stopper(list[Any]):
        def append(self, event: Any) -> None:
            observe(event)
            if isinstance(event, StepDone) and event.step == 2:
                harness.stop._on_signal(2, None)

    harness.events = Stopper()
    with pytest.raises(InterruptedRun, match=r"after step 2 of 12"):
        harness.go()
    assert harness.saved == [("interrupted", 0, 2)]


def test_a_stop_within_an_evaluation_leads_back_to_that_evaluation() -> None:
    harness = Harness(max_epochs=2)

    def stopped() -> Evaluation:
        harness.stop._on_signal(15, None)
        raise EvaluationStopped

    harness.evaluate = stopped  # type: ignore[method-assign]
    with pytest.raises(InterruptedRun, match="SIGTERM"):
        harness.go()
    state = harness.run.state
    assert (state.epoch, state.step, state.evaluated_step) == (0, 4, -1)
    assert harness.saved == [("interrupted", 0, 4)]
    harness.stop = StopRequest()
    harness.evaluate = lambda: Evaluation({"d": Score(1.0, 1, 1)})  # type: ignore[method-assign]
    harness.go()
    assert [e.step for e in harness.events if isinstance(e, Evaluated)] == [4, 8]


def test_an_epochs_means_count_its_steps_before_a_resume_too() -> None:
    """Three steps an epoch; the run is stopped within the second epoch and goes on elsewhere."""

    def objective(model: Any, batch: Batch, scale: float) -> Loss:
        valid = (batch.targets != IGNORE).float().sum(1)
        places = torch.tensor([float(p) for p in batch.positions])
        return Loss(next_token(model, batch, scale).total, {"place": (places * valid).sum() * scale})

    def means(events: list[Any]) -> list[dict[str, float]]:
        return [dict(e.epoch_parts) for e in events if isinstance(e, Evaluated)]

    def harness() -> Harness:
        made = Harness(batch_size=4, n_blocks=12, max_epochs=2, eval_every_steps=2)
        object.__setattr__(made.run, "objective", objective)
        return made

    whole = harness()
    whole.go()
    per_block = [LENGTH // 2 if p % 3 == 0 else LENGTH for p in range(24)]
    expected = [
        sum(p * per_block[p] for p in own) / sum(per_block[p] for p in own)
        for own in (range(12), range(12, 24))
    ]
    found = means(whole.events)
    assert [len(parts) for parts in found] == [0, 1, 0, 1]  # steps 2, 3, 4 and 6: the epochs end at 3 and 6
    assert [parts["place"] for parts in found if parts] == pytest.approx(expected)

    first, second = harness(), harness()

    def observe(event: Any) -> None:
        first.events.append(event)
        if isinstance(event, StepDone) and event.step == 5:
            first.stop._on_signal(2, None)

    with pytest.raises(InterruptedRun):
        train(first.run, Callbacks(first.evaluate, dict, first.save, Told(event=observe), first.stop))
    object.__setattr__(second.run, "state", TrainState.from_dict(first.run.state.to_dict()))
    second.go()
    assert means(first.events) + means(second.events) == found
