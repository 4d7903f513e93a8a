from __future__ import annotations

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


def test_state_survives_the_trip_through_a_dict() -> None:
    state = TrainState(step=3, epoch=1, position=12, best_loss=2.5, bad_evaluations=2, skipped_steps=1)
    assert TrainState.from_dict(state.to_dict()) == state
    assert TrainState.from_dict({"step": 4, "unknown": 1}) == TrainState(step=4)
