from __future__ import annotations

import pytest

from nanothink.config import TrainExpertConfig
from nanothink.training.state import Plan, TrainState


def test_the_length_of_a_run_counts_accumulation() -> None:
    config = TrainExpertConfig(batch_size=4, grad_accum_steps=3, max_epochs=2)
    plan = Plan.make(config, 30, TrainState())
    assert (plan.blocks_per_step, plan.total_steps) == (12, 5)


def test_it_does_not_change_on_the_way() -> None:
    config = TrainExpertConfig(batch_size=7, max_epochs=3)
    totals = {Plan.make(config, 31, TrainState(step=s, position=7 * s)).total_steps for s in range(14)}
    assert totals == {14}


def test_the_last_steps_overshoot_is_no_epoch_of_its_own() -> None:
    config = TrainExpertConfig(batch_size=4, max_epochs=3)
    assert Plan.make(config, 573, TrainState()).epochs == 3
    assert Plan.make(config, 4, TrainState()).epochs == 3
    assert Plan.make(config.model_copy(update={"max_steps": 1}), 573, TrainState()).epochs == 1


def test_max_steps_decides() -> None:
    config = TrainExpertConfig(batch_size=1, max_epochs=2, max_steps=1000)
    assert Plan.make(config, 10, TrainState()).total_steps == 1000


def test_another_batch_size_after_a_resume_covers_the_blocks_that_remain() -> None:
    config = TrainExpertConfig(batch_size=10, max_epochs=2)
    plan = Plan.make(config, 100, TrainState(step=50, position=100, epoch=1))
    assert plan.total_steps == 60


def test_an_epoch_is_over_when_its_blocks_are_used_up() -> None:
    plan = Plan.make(TrainExpertConfig(batch_size=4), 10, TrainState())
    assert not plan.epoch_is_over(TrainState(step=2, position=8))
    assert plan.epoch_is_over(TrainState(step=3, position=12))
    assert not plan.epoch_is_over(TrainState(step=3, position=12, epoch=1))
    assert plan.epoch_is_over(TrainState(step=5, position=20, epoch=1))


@pytest.mark.parametrize("n_blocks", [200, 100, 50, 7])
def test_text_that_grows_or_shrinks_makes_epochs_longer_or_shorter_from_there_on(n_blocks: int) -> None:
    """Else five epochs of 100 blocks would make the sixth, of 200, end after 3.5 of them, unvalidated."""
    config = TrainExpertConfig(batch_size=1, max_epochs=20)
    state = TrainState()
    state.fit(100)
    state.step = state.position = 500
    state.epoch = 5
    state.fit(n_blocks)
    plan = Plan.make(config, n_blocks, state)
    assert plan.total_steps == 500 + 15 * n_blocks
    assert plan.epochs == 20
    ends = []
    while state.position < plan.total_steps:
        state.step, state.position = state.step + 1, state.position + 1
        if plan.epoch_is_over(state):
            state.epoch += 1
            ends.append(state.position)
    assert ends == [500 + n * n_blocks for n in range(1, 16)]
    assert TrainState.from_dict(state.to_dict()) == state


def test_state_survives_the_trip_through_a_dict() -> None:
    state = TrainState(
        step=3, epoch=1, position=12, best_loss=2.5, evals_without_improvement=2, skipped_steps=1
    )
    assert TrainState.from_dict(state.to_dict()) == state
    assert TrainState.from_dict({"step": 4, "unknown": 1}) == TrainState(step=4)


@pytest.mark.parametrize(
    ("n_blocks", "total_steps", "every"),
    [(3200, 800, 80), (3200, 100, 20), (80, 400, 0), (3200, 12, 20)],
    ids=["two epochs", "a short run", "twenty epochs", "a trial"],
)
def test_a_run_of_few_epochs_is_evaluated_ten_times_unless_it_is_short(
    n_blocks: int, total_steps: int, every: int
) -> None:
    plan = Plan(n_blocks=n_blocks, blocks_per_step=8 if n_blocks > 80 else 4, total_steps=total_steps)
    assert plan.evaluates_every(None) == every
    assert plan.evaluates_every(7) == 7
