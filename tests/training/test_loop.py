from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from reports import Told

from nanothink.config import Config, TrainExpertConfig
from nanothink.config.run import resolve_config
from nanothink.data.tokens import IGNORE
from nanothink.errors import InterruptedRun, TrainingDivergedError
from nanothink.inference.evaluate import Evaluation, EvaluationStopped, Score
from nanothink.models import build_model
from nanothink.models.contract import Batch, Loss
from nanothink.models.precision import Precision
from nanothink.training.events import Evaluated, RunFinished, StepDone
from nanothink.training.interruption import StopRequest
from nanothink.training.loop import Callbacks, Run, train
from nanothink.training.objectives import next_token
from nanothink.training.optimizer import GroupedOptimizer
from nanothink.training.state import Plan, TrainState

VOCABULARY, LENGTH = 17, 8


class Blocks:
    """Blocks whose content depends on their position alone; some targets are ignored."""

    def __init__(self, period: int = 1 << 30) -> None:
        self.period = period

    def read(self, start: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows = []
        for position in range(start, start + count):
            generator = torch.Generator().manual_seed(position % self.period)
            rows.append(torch.randint(0, VOCABULARY, (LENGTH + 1,), generator=generator))
        blocks = torch.stack(rows)
        targets = blocks[:, 1:].clone()
        targets[torch.arange(start, start + count) % 3 == 0, LENGTH // 2 :] = IGNORE
        return blocks[:, :-1].contiguous(), targets


class Harness:
    """A run on a tiny real model, everything that it reports and saves kept in lists."""

    def __init__(
        self,
        *,
        validation: list[float] | None = None,
        n_blocks: int = 8,
        period: int = 1 << 30,
        **settings: Any,
    ) -> None:
        settings = {
            "batch_size": 2,
            "max_epochs": 3,
            "warmup_steps": 0,
            "sample_tokens": 0,
            "log_every_steps": 1,
        } | settings
        self.config = TrainExpertConfig(**settings)
        config: Config = resolve_config(
            assignments=[
                "model.d_model=16",
                "model.max_seq_len=8",
                "transformer.n_layers=1",
                "transformer.n_heads=2",
            ]
        ).config
        torch.manual_seed(0)
        model = build_model("transformer", config, VOCABULARY)
        state = TrainState()
        self.run = Run(
            model=model,
            optimizer=GroupedOptimizer(model.parameter_groups(), self.config),
            scaler=None,
            objective=next_token,
            batches=Blocks(period),
            precision=Precision(torch.device("cpu"), torch.float32, "test"),
            config=self.config,
            plan=Plan.make(self.config, n_blocks, state),
            state=state,
        )
        self.stop = StopRequest()
        self.events: list[Any] = []
        self.notes: list[str] = []
        self.saved: list[tuple[str, int, int]] = []
        self.validation = iter(validation or [])

    def evaluate(self) -> Evaluation:
        return Evaluation({"d": Score(next(self.validation, 1.0), 1, 1)})

    def save(self, role: str) -> Path:
        self.saved.append((role, self.run.state.epoch, self.run.state.step))
        return Path(role)

    def go(self) -> RunFinished:
        callbacks = Callbacks(
            evaluate=lambda: self.evaluate(),
            sample=dict,
            save=self.save,
            reporter=Told(self.notes.append, event=self.events.append),
            stop=self.stop,
        )
        return train(self.run, callbacks)

    @property
    def steps(self) -> list[StepDone]:
        return [e for e in self.events if isinstance(e, StepDone)]

    @property
    def weights(self) -> torch.Tensor:
        return torch.cat([p.detach().flatten() for p in self.run.model.parameters()])


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


class TestNotFinite:
    def _poisoned(self, steps: set[int], **settings: Any) -> Harness:
        harness = Harness(**settings)

        def objective(model: Any, batch: Batch, scale: float) -> Loss:
            loss = next_token(model, batch, scale)
            return Loss(loss.total * math.nan) if harness.run.state.step in steps else loss

        object.__setattr__(harness.run, "objective", objective)
        return harness

    def test_the_step_is_skipped_and_counted(self) -> None:
        harness = self._poisoned({1}, max_steps=2)
        harness.run.optimizer.set_fraction(1.0)
        harness.go()
        assert [s.skipped for s in harness.steps] == [False, True]
        assert harness.run.state.skipped_steps == 1
        assert torch.isfinite(harness.weights).all()

    def test_a_skipped_step_changes_no_weight(self) -> None:
        before = self._poisoned({0}, max_steps=1)
        weights = before.weights
        before.go()
        assert torch.equal(weights, before.weights)

    def test_many_in_a_row_end_the_run_and_overwrite_nothing(self) -> None:
        harness = self._poisoned(set(range(4, 99)), max_steps=50, max_skipped_steps=5, n_blocks=1000)
        with pytest.raises(
            TrainingDivergedError, match=r"5 steps in a row, up to step 9.*--set train_expert\.lr="
        ):
            harness.go()
        assert harness.saved == []
        assert torch.isfinite(harness.weights).all()

    def test_good_steps_in_between_reset_the_count(self) -> None:
        harness = self._poisoned({1, 2, 4, 5}, max_steps=8, max_skipped_steps=3)
        harness.go()
        assert harness.run.state.skipped_steps == 4

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("where", ["loss", "one gradient"])
    @pytest.mark.parametrize("scaled", [False, True])
    def test_whatever_is_not_finite_changes_nothing(self, value: float, where: str, scaled: bool) -> None:
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

    def _overflowing(self, scaler: torch.amp.GradScaler, **settings: Any) -> Harness:
        """Gradients that the scale takes out of range; float32's, since float16 is slow on a CPU."""
        harness = Harness(n_blocks=1000, max_epochs=99, **settings)
        object.__setattr__(harness.run, "scaler", scaler)

        def objective(model: Any, batch: Batch, scale: float) -> Loss:
            return Loss(next_token(model, batch, scale).total * 1e3)

        object.__setattr__(harness.run, "objective", objective)
        return harness

    def test_float16_that_overflows_is_skipped_until_the_scale_fits(self) -> None:
        """The scale begins far too high, is halved at every overflow, and the run goes on."""
        harness = self._overflowing(torch.amp.GradScaler("cpu", init_scale=2.0**127), max_steps=20)
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

    def test_a_scale_that_never_fits_ends_the_run(self) -> None:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=0.999)
        harness = self._overflowing(scaler, max_steps=50, max_skipped_steps=4)
        with pytest.raises(TrainingDivergedError, match="4 steps in a row, up to step 4"):
            harness.go()
        assert harness.saved == []

    def test_no_rolling_checkpoint_while_steps_are_skipped(self) -> None:
        """What is on disk stays from when numbers were good: going on from there can help."""
        harness = self._poisoned({2, 3, 5}, max_steps=6, save_every_seconds=1e-9, n_blocks=1000)
        harness.go()
        assert [step for role, _, step in harness.saved if role == "interrupted"] == [1, 2, 5, 6]

    def test_after_a_validation_that_is_not_finite_nothing_is_written(self) -> None:
        harness = Harness(validation=[2.0, math.nan], max_epochs=2, snapshot_every_epochs=1)
        harness.go()
        assert {epoch for _, epoch, _ in harness.saved} == {1}

    @pytest.mark.parametrize("poisoned", ["weight", "moment"])
    def test_what_is_not_finite_is_never_written(self, poisoned: str) -> None:
        """A step of finite numbers whose result is too large: found before it replaces a good checkpoint."""
        harness = Harness(max_epochs=3, n_blocks=8)
        take = harness.run.optimizer.step

        def overflow(scaler: Any = None) -> None:
            take(scaler)
            if harness.run.state.step == 5:
                weight = harness.run.optimizer.parameters[0]
                if poisoned == "weight":
                    weight.data.view(-1)[0] = math.inf
                else:
                    harness.run.optimizer.optimizers["adamw"].state[weight]["exp_avg_sq"].view(-1)[0] = (
                        math.inf
                    )

        harness.run.optimizer.step = overflow  # type: ignore[method-assign]
        with pytest.raises(
            TrainingDivergedError, match=r"After step 8 the weights are not finite.*--set train_expert\.lr="
        ):
            harness.go()
        assert {step for _, _, step in harness.saved} == {4}


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
