"""Plans for texts and machines of any size: what they choose, and what they promise."""

from __future__ import annotations

import re

import pytest

from nanothink.cli.train import seconds_of
from nanothink.errors import UsageError
from nanothink.runs.plan_sizes import SHAPES, Shape, StepTime, TextSize
from nanothink.runs.training_plan import FURTHER, TrainingPlan, make_plan, settled, with_further_experts

TEXTS = (7_000, 100_000, 1_000_000, 20_000_000)
TIMES = (180, 600, 7200, 36_000)
SLOWNESS = (10.0, 1.0, 0.01)


class Machine:
    """A made-up machine on which time goes by the parameters, and which can become slower."""

    def __init__(self, slowness: float = 1.0) -> None:
        self.slowness = slowness
        self.timed: list[Shape] = []

    def __call__(self, kind: str, shape: Shape, vocab_size: int) -> StepTime:
        self.timed.append(shape)
        work = shape.n_parameters(vocab_size) - vocab_size * shape.d_model
        step = 6 * work * shape.tokens_per_step / 6e10 + 0.01
        return StepTime(
            step_seconds=self.slowness * step, token_seconds=self.slowness * (2 * work / 6e10 + 1e-5)
        )


def plan_of(n_bytes: int, seconds: float, machine: Machine) -> TrainingPlan:
    return make_plan(TextSize(n_bytes=n_bytes, n_domains=2), seconds, machine)


def steps_of(plan: TrainingPlan) -> list[int]:
    return [stage.steps for stage in plan.stages if stage.name == "expert"]


def plan_or_least(n_bytes: int, seconds: float, machine: Machine) -> TrainingPlan | int:
    """A plan, or the minutes that the error suggests."""
    try:
        return plan_of(n_bytes, seconds, machine)
    except UsageError as error:
        (found,) = re.findall(r"--time (\d+)m\b", str(error))
        return int(found)


@pytest.mark.parametrize("slowness", SLOWNESS)
@pytest.mark.parametrize("n_bytes", TEXTS)
def test_a_plan_fits_into_its_time_on_every_machine(n_bytes: int, slowness: float) -> None:
    widths = []
    for seconds in TIMES:
        machine = Machine(slowness)
        plan = plan_or_least(n_bytes, seconds, machine)
        if isinstance(plan, int):
            assert slowness == 10, "only the slow machine has too little time"
            assert plan_of(n_bytes, 60 * plan, machine).seconds
            continue
        assert plan.seconds <= seconds
        assert min(steps_of(plan)) >= 30
        assert plan.epochs <= 32.5
        assert all(plan.regularisation_of(expert).dropout <= 0.3 for expert in plan.experts)
        # no larger shape is timed than one that could be trained: its first step could take minutes
        assert max(shape.n_parameters(512) for shape in machine.timed) <= 12 * plan.shape.n_parameters(512)
        widths.append(plan.shape.n_parameters(plan.vocab_size))
    assert widths == sorted(widths), "more time never gives a smaller model"


def test_more_text_and_a_faster_machine_give_larger_models() -> None:
    little, much = plan_of(7_000, 36_000, Machine()), plan_of(20_000_000, 36_000, Machine())
    assert little.shape == SHAPES[0]
    assert much.shape.d_model > little.shape.d_model
    assert plan_of(20_000_000, 36_000, Machine(0.01)).shape.d_model > much.shape.d_model


def test_time_beyond_what_the_text_bears_is_not_used() -> None:
    plan = plan_of(7_000, 36_000, Machine())
    assert plan.seconds < 600
    assert plan.epochs == pytest.approx(32, abs=0.5)
    rule = plan.regularisation_of(plan.experts[0])
    assert (rule.dropout, rule.weight_decay_tables) == (0.3, 0.1)


@pytest.mark.parametrize("n_bytes", TEXTS)
def test_further_experts_take_the_time_that_is_left_and_no_other(n_bytes: int) -> None:
    numbers = []
    for seconds in TIMES:
        text = TextSize(n_bytes=n_bytes, n_domains=2)
        plain, longer = (make_plan(text, seconds, Machine(), further=further) for further in (False, True))
        assert longer.seconds <= seconds
        assert longer.shape == plain.shape
        assert longer.experts[:2] == plain.experts or len(longer.experts) > 2
        for before, after in zip(plain.experts, longer.experts, strict=False):
            assert after.steps >= before.steps, "no expert is shortened for another"
        numbers.append(len(longer.experts))
    assert numbers == sorted(numbers)
    assert max(numbers) == 2 + len(FURTHER) or n_bytes > 1_000_000


def test_a_wider_expert_reads_the_text_half_as_often() -> None:
    plan = make_plan(TextSize(n_bytes=1_100_000, n_domains=5), 36_000, Machine(), further=True)
    epochs = {expert.widening: expert.steps * plan.shape.tokens_per_step for expert in plan.experts}
    assert set(epochs) == {1, 2}
    assert epochs[1] / epochs[2] == pytest.approx(2, abs=0.01)
    wide = next(expert for expert in plan.experts if expert.widening == 2)
    assert plan.regularisation_of(wide).dropout == 0.3


def test_a_machine_that_was_busy_all_the_time_of_its_experts_brings_further_ones() -> None:
    """They were shortened for a time that they did not take; another of as many steps is better than none."""
    text, busy = TextSize(n_bytes=400_000, n_domains=1), Machine(8.0)
    plan = make_plan(text, 900, busy, further=True)
    assert len(plan.experts) == 2
    for index, stage in enumerate(plan.stages[:3]):
        plan = plan.with_stage(index, started=True, done=True, spent_seconds=stage.seconds / 8)
    longer = with_further_experts(settled(plan), Machine(4.0))
    assert len(longer.experts) > 2
    assert longer.experts[:2] == plan.experts
    assert all(expert.steps >= min(steps_of(plan)) for expert in longer.experts)
    assert longer.spent_seconds + sum(s.seconds for s in longer.stages if not s.started) <= 900


def test_a_late_stage_shortens_the_ones_after_it_and_no_stage_that_has_started() -> None:
    plan = plan_of(3_000_000, 240, Machine())
    at = [stage.name for stage in plan.stages].index("expert")
    plan = plan.with_stage(0, started=True, done=True, spent_seconds=plan.stages[0].seconds)
    plan = plan.with_stage(at, started=True)
    late = plan.with_stage(at, done=True, spent_seconds=plan.stages[at].seconds + 60)
    shorter = settled(late)
    assert shorter.stages[at].steps == plan.stages[at].steps
    assert shorter.stages[at + 1].steps < plan.stages[at + 1].steps
    assert shorter.stages[at + 1].n_tokens <= plan.stages[at + 1].n_tokens
    ahead = sum(stage.seconds for stage in shorter.stages if not stage.started)
    assert late.spent_seconds + ahead <= 240
    assert settled(shorter) == shorter


def test_a_machine_that_became_slower_takes_fewer_steps() -> None:
    plan = plan_of(3_000_000, 240, Machine())
    kind = plan.kinds[0]
    slower = settled(plan, {kind: Machine(2)(kind, plan.shape, plan.vocab_size)})
    assert steps_of(slower)[0] < 0.7 * steps_of(plan)[0]
    assert slower.unit == pytest.approx(2 * plan.unit)
    assert slower.seconds <= 240


def test_an_expert_is_trained_though_the_machine_was_busy_when_it_was_timed() -> None:
    """Ten steps of it would spoil the whole; later stages give way if it is late."""
    plan = plan_of(1_000_000, 240, Machine(4))
    kind = plan.kinds[1]
    busy = Machine(12)(kind, plan.shape, plan.vocab_size)
    stage = next(stage for stage in settled(plan, {kind: busy}).stages if stage.kind == kind)
    assert stage.steps * busy.step_seconds > 240 / 40


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("10m", 600), ("2h", 7200), ("1h30m", 5400), ("1.5 h", 5400), ("90", 5400), ("1d", 86_400)],
)
def test_a_time_is_read_as_people_write_it(text: str, seconds: float) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "2x", "h", "10m5", "-3m", "0", "1h junk", "1,5h"])
def test_what_is_no_time_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UsageError, match="Write it as 45m, 2h or 1h30m"):
        seconds_of(text)


def test_a_demo_takes_the_least_time_that_makes_sense_where_its_own_is_too_little() -> None:
    slow = Machine(10.0)
    least = plan_or_least(1_000_000, 180, slow)
    assert isinstance(least, int)
    plan = make_plan(TextSize(n_bytes=1_000_000, n_domains=2), 180, slow, extend=True)
    assert plan.time_seconds == 60 * least
    assert min(steps_of(plan)) > 0
    assert make_plan(TextSize(n_bytes=7_000, n_domains=2), 7200, slow, extend=True).time_seconds == 7200
