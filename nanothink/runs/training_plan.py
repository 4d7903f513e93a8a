"""Plan of ``nanothink train``: model, stages and their times, a pure function of text, time and speed.

    text size, seconds, speed of this machine ──► shape ──► stages, each with its seconds

The largest shape is taken that can be trained enough in the time: on as many tokens as its parameters or
its text ask for, whichever is less. The time is then divided: what is fixed (reading, the store, evaluation)
first, the rest in equal parts among the experts. Time that they cannot use, as more epochs would overfit,
goes to further experts, when the plan is made and once more before the experts are combined. A stage is
settled when it starts, from the time that is left then, so that later stages are shortened if earlier ones
took longer; from there on it stays as it is, so that a resumed stage is the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from nanothink.config.base import Settings
from nanothink.errors import UsageError
from nanothink.runs.plan_sizes import SHAPES, Shape, SpeedOf, StepTime, TextSize
from nanothink.suggestions import again
from nanothink.training.regularisation import Regularisation
from nanothink.wording import rounded_duration

KINDS = ("state_space", "transformer")
"""Experts of a plan by default: with the store, what gave most on little text (docs/log.md)."""

FURTHER = (("state_space", 2), ("transformer", 2), ("state_space", 1))
"""Kind of the experts that time is left for, in this order, and how many times as wide as the shape."""
MOST_OF_A_KIND = 1 + max(sum(kind == other for other, _ in FURTHER) for kind in KINDS)

Name = Literal["import", "tokenizer", "expert", "combine", "evaluate", "sample"]


class Stage(Settings):
    """One command of a plan."""

    name: Name
    kind: str | None = None
    """The expert that is trained."""
    nth: int = 1
    """Its number among the experts of its kind in this plan."""
    widening: int = 1
    """Its width, as a multiple of the shape's."""
    steps: int = 0
    evaluate_every: int = 1
    n_keys: int = 0
    """Of the vector store, at most."""
    n_tokens: int = 0
    """Held-out tokens to score, of each domain at most."""
    seconds: float
    """Planned."""
    spent_seconds: float = 0.0
    started: bool = False
    """Settled: a resume repeats it as it is."""
    done: bool = False

    @property
    def title(self) -> str:
        """Name of the expert, its kind with its number from the second on; else of the stage."""
        if self.kind is None:
            return self.name
        return f"{self.kind}_{self.nth}" if self.nth > 1 else self.kind

    @property
    def timed_as(self) -> str:
        """Key of its step's time in ``TrainingPlan.times``."""
        return f"{self.kind} x{self.widening}" if self.widening > 1 else f"{self.kind}"


class TrainingPlan(Settings):
    """A plan as it lies in the checkpoint folder, and how far it has come."""

    version: Literal[1] = 1
    data_dir: str
    """As given: a corpus, or a folder of texts that is imported first."""
    time_seconds: float
    made_at: float
    """Seconds since the epoch. Checkpoints that are older belong to no stage of this plan."""
    text: TextSize
    kinds: tuple[str, ...]
    """Kinds of the first experts, in their order."""
    further: bool = False
    """Further experts were wanted, if there was time for them."""
    shape: Shape
    vocab_size: int
    epochs: float
    """Passes of each expert over the text, about."""
    times: dict[str, StepTime]
    """Of each kind and widening, as last measured: ``Stage.timed_as``."""
    unit: float
    """Speed of this machine: seconds here for one second of the machine that the fixed times are from."""
    prompt: str
    """For the sample at the end."""
    stages: tuple[Stage, ...]

    @property
    def spent_seconds(self) -> float:
        return sum(stage.spent_seconds for stage in self.stages)

    @property
    def seconds(self) -> float:
        """Planned in all."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def experts(self) -> list[Stage]:
        """The stages that train one each."""
        return [stage for stage in self.stages if stage.kind is not None]

    def shape_of(self, stage: Stage) -> Shape:
        """The shape of a stage's expert."""
        return self.shape.widened(stage.widening)

    def regularisation_of(self, stage: Stage) -> Regularisation:
        """Dropout and decay of a stage's expert, by its size, the text and the number of its steps."""
        shape, n_tokens = self.shape_of(stage), self.text.n_tokens(self.vocab_size)
        rule = Regularisation.of(n_tokens, shape.n_parameters(self.vocab_size))
        return rule.within(stage.steps * shape.tokens_per_step / n_tokens)

    def with_stage(self, index: int, **changes: Any) -> TrainingPlan:
        stages = list(self.stages)
        stages[index] = stages[index].model_copy(update=changes)
        return self.model_copy(update={"stages": tuple(stages)})


# ---------------------------------------------------------------------------------------------------
# Times of what is no training, in seconds of one core of a server of 2026; Machine.unit scales them

_REFERENCE_STEP_SECONDS = 0.05  # a step of the smallest shape's transformer there
_START = 5.0  # Python, torch, the checks
_READ_A_MB = 1.2  # reading, the tokenizer's merges, tokenising
_EXPERT = 9.0  # preparing a run, and its gate at the end
_EVALUATION = 0.8  # calibration, samples, saving
_COMBINE = 9.0  # FAISS, weights and gate on held-out text
_KEY = 3e-5  # adding a key to the store
_GATED_TOKEN = 2e-4  # scoring a token with store and document cache
_PASSES = 3  # over the held-out text while combining
_EVALUATE = 3.0
_SAMPLE = 1.5

_RESERVE = 0.06  # of the time, for what no estimate knows
_FEWEST_STEPS = 30  # of an expert: with fewer there is nothing to see
_ENOUGH_TOKENS = 2.0  # for each parameter, before a larger shape is worth its time
_MOST_PARAMETERS = 12.0  # for each training token
_MOST_EVALUATIONS, _FEWEST_EVALUATIONS = 10, 2
_EVALUATING = 0.1  # of an expert's time
_FINISHING = 0.06  # of the time, for each: keys of the store, scoring while combining, evaluation
_FEWEST_TOKENS, _MOST_TOKENS = 4_000, 100_000  # held-out tokens to score, of all domains
_FEWEST_KEYS = 20_000


def make_plan(
    text: TextSize,
    seconds: float,
    speed_of: SpeedOf,
    *,
    data_dir: str = "data",
    kinds: tuple[str, ...] = KINDS,
    further: bool = False,
    imports: bool = False,
    made_at: float = 0.0,
    prompt: str = "The",
    extend: bool = False,
) -> TrainingPlan:
    """Choose shape, vocabulary and stages for ``seconds``.

    With ``further``, time that ``kinds`` cannot use goes to further experts. With ``extend``, a time that
    is too little is replaced by the least that makes sense.

    Shapes are timed from the smallest on, and no further than one that could be trained enough.

    Raises:
        UsageError: the time is too little; the message has the least that makes sense.
    """
    unit = _unit(speed_of(KINDS[-1], SHAPES[0], SHAPES[0].vocab_size(text.n_bytes)))
    chosen: tuple[Shape, dict[str, StepTime]] | None = None
    for shape in SHAPES:
        vocab_size = shape.vocab_size(text.n_bytes)
        n_parameters, n_tokens = shape.n_parameters(vocab_size), text.n_tokens(vocab_size)
        wanted = _wanted_tokens(text, shape)
        if chosen is not None:
            before, measured = chosen
            work = n_parameters / before.n_parameters(before.vocab_size(text.n_bytes))
            cheapest = sum(t.step_seconds for t in measured.values()) * work / 3
            steps = wanted / shape.tokens_per_step * before.tokens_per_step / shape.tokens_per_step
            if n_parameters > _MOST_PARAMETERS * n_tokens or cheapest * steps > seconds:
                break
        times = {kind: speed_of(kind, shape, vocab_size) for kind in kinds}
        needed = sum(times[kind].step_seconds for kind in kinds) * wanted / shape.tokens_per_step
        if chosen is not None and needed > _training_seconds(text, seconds, times, unit):
            break
        chosen = shape, times
    assert chosen is not None
    shape, times = chosen
    least = _least_seconds(text, seconds, shape, times, unit)
    if seconds < least and not extend:
        raise UsageError(
            f"--time {rounded_duration(seconds)} is too little for {len(times)} experts of this text on this "
            f"machine. The least that makes sense is {least / 60:.0f} min: "
            f"{again('--time', f'{least / 60:.0f}m')}"
        )
    seconds = max(seconds, least)
    vocab_size = shape.vocab_size(text.n_bytes)
    stages = [
        *([Stage(name="import", seconds=_READ_A_MB / 4 * unit * text.n_bytes / 1e6)] if imports else []),
        Stage(name="tokenizer", seconds=_reading_seconds(text, unit)),
        *(Stage(name="expert", kind=kind, seconds=0.0) for kind in kinds),
        *(Stage(name=name, seconds=0.0) for name in ("combine", "evaluate", "sample")),
    ]
    plan = TrainingPlan(
        data_dir=data_dir,
        time_seconds=seconds,
        made_at=made_at,
        text=text,
        kinds=kinds,
        further=further,
        shape=shape,
        vocab_size=vocab_size,
        epochs=1.0,
        times=times,
        unit=unit,
        prompt=prompt,
        stages=tuple(stages),
    )
    plan = settled(plan)
    if further:
        plan = with_further_experts(plan, speed_of)
    steps = min(stage.steps for stage in plan.experts)
    return plan.model_copy(update={"epochs": steps * shape.tokens_per_step / text.n_tokens(vocab_size)})


def with_further_experts(plan: TrainingPlan, speed_of: SpeedOf) -> TrainingPlan:
    """The plan with as many further experts as it has time for without shortening any."""
    for kind, widening in FURTHER[len(plan.experts) - len(plan.kinds) :]:
        nth = 1 + sum(stage.kind == kind for stage in plan.experts)
        expert = Stage(name="expert", kind=kind, nth=nth, widening=widening, seconds=0.0)
        if not _is_full(plan):
            break
        times = plan.times
        if expert.timed_as not in times:
            shape = plan.shape_of(expert)
            times = {**times, expert.timed_as: speed_of(kind, shape, plan.vocab_size)}
        at = plan.stages.index(plan.experts[-1]) + 1
        stages = (*plan.stages[:at], expert, *plan.stages[at:])
        longer = settled(plan.model_copy(update={"stages": stages, "times": times}))
        if not _is_full(longer):
            break
        plan = longer
    return plan


def _is_full(plan: TrainingPlan) -> bool:
    """True if each expert that has not started is trained as long as the text bears, or as one that has."""
    started = [stage.steps for stage in plan.experts if stage.started]
    ahead = (stage for stage in plan.experts if not stage.started)
    enough = ((stage, _most_steps(plan.text, plan.shape, stage.widening)) for stage in ahead)
    return all(stage.steps >= min([most, *started]) for stage, most in enough)


def settled(plan: TrainingPlan, measured: Mapping[str, StepTime] | None = None) -> TrainingPlan:
    """The plan with every stage that has not started sized for the time that is left.

    Args:
        measured: new values of some ``times``; what is no training is taken to have changed as much.
    """
    if measured:
        changes = [time.step_seconds / plan.times[name].step_seconds for name, time in measured.items()]
        unit = max(0.3, plan.unit * sum(changes) / len(changes))
        plan = plan.model_copy(update={"times": {**plan.times, **measured}, "unit": unit})
    text, unit, times = plan.text, plan.unit, plan.times
    token_seconds = max(time.token_seconds for time in times.values())
    left = plan.time_seconds * (1 - _RESERVE) - sum(s.spent_seconds for s in plan.stages)
    left -= sum(max(0.0, s.seconds - s.spent_seconds) for s in plan.stages if s.started and not s.done)
    ahead = [stage for stage in plan.stages if not stage.started]
    left -= sum(stage.seconds for stage in ahead if stage.name in ("import", "tokenizer"))
    last = {stage.name: stage for stage in _finishing(plan, left, token_seconds)}
    n_experts = sum(stage.kind is not None for stage in ahead)
    for_training = left - sum(last[stage.name].seconds for stage in ahead if stage.name in last)
    stages = []
    for stage in plan.stages:
        if stage.started:
            stages.append(stage)
        elif stage.name == "expert":
            step = times[stage.timed_as]
            sizes = _expert(text, plan.shape, stage.widening, unit, for_training / n_experts, step)
            stages.append(stage.model_copy(update=sizes))
        else:
            stages.append(last.get(stage.name, stage))
    return plan.model_copy(update={"stages": tuple(stages)})


def _most_steps(text: TextSize, shape: Shape, widening: int) -> int:
    """Steps for as many epochs as the text bears.

    A wider model than the text asks for overfits sooner: twice as wide it bears half as many (docs/log.md).
    """
    vocab_size = shape.vocab_size(text.n_bytes)
    n_tokens = text.n_tokens(vocab_size)
    epochs = Regularisation.of(n_tokens, shape.widened(widening).n_parameters(vocab_size)).max_epochs
    return math.ceil(epochs / widening * n_tokens / shape.tokens_per_step)


def _expert(
    text: TextSize, shape: Shape, widening: int, unit: float, seconds: float, time: StepTime
) -> dict[str, Any]:
    """As many steps as the time allows and the text bears, with evaluations in between."""
    vocab_size = shape.vocab_size(text.n_bytes)
    available = max(0.0, seconds - _EXPERT * unit)
    n_tokens = text.n_tokens(vocab_size)
    most = _most_steps(text, shape, widening)
    affordable = shape.tokens_per_step * min(most, (1 - _EVALUATING) * available / time.step_seconds)
    # every epoch ends with an evaluation; where there are few epochs, more come in between
    n_epochs = int(affordable / n_tokens)
    between = int(_EVALUATING * available / (_EVALUATION * unit + _FEWEST_TOKENS * time.token_seconds))
    between = max(min(between, _MOST_EVALUATIONS), _FEWEST_EVALUATIONS) if n_epochs < _MOST_EVALUATIONS else 1
    n_evaluations = n_epochs + between
    scored = (_EVALUATING * available / n_evaluations - _EVALUATION * unit) / time.token_seconds
    n_scored = int(min(max(scored, _FEWEST_TOKENS), _MOST_TOKENS, n_tokens // 9))
    evaluating = n_evaluations * (_EVALUATION * unit + n_scored * time.token_seconds)
    # a quarter at least: on a busy machine what is no training is estimated by too much
    steps = int(max(available - evaluating, seconds / 4) / time.step_seconds)
    steps = max(_FEWEST_STEPS // 3, min(steps, most))
    return {
        "steps": steps,
        "evaluate_every": -(-steps // between),
        "n_tokens": max(1, n_scored // text.n_domains),
        "seconds": _EXPERT * unit + evaluating + steps * time.step_seconds,
    }


def _finishing(plan: TrainingPlan, left: float, token_seconds: float) -> list[Stage]:
    """Store, scoring and sample, sized for a share of the time each, or of what is left if that is less."""
    unit, n_experts = plan.unit, len(plan.experts)
    share = _FINISHING * max(0.0, min(plan.time_seconds, 4 * left))
    n_train = plan.text.n_tokens(plan.vocab_size)
    held_out = n_train // 9
    key = _KEY * unit + token_seconds
    n_keys = min(n_train, max(_FEWEST_KEYS, int(share / key)))
    token = n_experts * token_seconds + _GATED_TOKEN * unit

    def scored(passes: int) -> int:
        return max(1, min(held_out, _MOST_TOKENS, max(_FEWEST_TOKENS, int(share / (passes * token)))))

    combining, evaluating = scored(_PASSES), scored(2)
    return [
        Stage(
            name="combine",
            n_keys=n_keys,
            n_tokens=max(1, combining // plan.text.n_domains),
            seconds=_COMBINE * unit + n_keys * key + _PASSES * combining * token,
        ),
        Stage(
            name="evaluate",
            n_tokens=max(1, evaluating // plan.text.n_domains),
            seconds=_EVALUATE * unit + 2 * evaluating * token,
        ),
        Stage(name="sample", seconds=_SAMPLE * unit),
    ]


def _unit(time: StepTime) -> float:
    """Speed beside the reference. What is not arithmetic does not become much faster by a fast machine."""
    return max(0.3, time.step_seconds / _REFERENCE_STEP_SECONDS)


def _reading_seconds(text: TextSize, unit: float) -> float:
    return unit * (_START + _READ_A_MB * text.n_bytes / 1e6)


def _wanted_tokens(text: TextSize, shape: Shape) -> float:
    """Tokens on which a shape is worth training: as its parameters ask for, or as the text bears."""
    vocab_size = shape.vocab_size(text.n_bytes)
    n_tokens, n_parameters = text.n_tokens(vocab_size), shape.n_parameters(vocab_size)
    bearable = Regularisation.of(n_tokens, n_parameters).max_epochs * n_tokens
    return min(_ENOUGH_TOKENS * n_parameters, bearable)


def _training_seconds(text: TextSize, seconds: float, times: Mapping[str, StepTime], unit: float) -> float:
    """Seconds left for the steps of all experts, about."""
    fixed = _reading_seconds(text, unit) + unit * (_EXPERT * len(times) + _COMBINE + _EVALUATE + _SAMPLE)
    shares = 1 - _RESERVE - 3 * _FINISHING
    return (seconds * shares - fixed) * (1 - _EVALUATING)


def _least_seconds(
    text: TextSize, seconds: float, shape: Shape, times: Mapping[str, StepTime], unit: float
) -> float:
    """``seconds`` if they suffice; else whole minutes that do."""
    least_training = _FEWEST_STEPS * sum(time.step_seconds for time in times.values())
    if _training_seconds(text, seconds, times, unit) >= least_training:
        return seconds
    shares = 1 - _RESERVE - 3 * _FINISHING
    fixed = shares * seconds - _training_seconds(text, seconds, times, unit) / (1 - _EVALUATING)
    least = (fixed + least_training / (1 - _EVALUATING)) / shares
    return 60.0 * math.ceil(1.3 * least / 60)  # the machine may be busier when it is asked again
