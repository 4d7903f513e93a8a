"""A training plan as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nanothink.cli.render.console import count, duration, note, say, size
from nanothink.cli.render.tables import table
from nanothink.wording import rounded_duration

if TYPE_CHECKING:
    from nanothink.runs.training_plan import Stage, TrainingPlan

_UNUSED = 0.6
"""Share of the time below which a plan is said to need less than was given."""


def plan(plan: TrainingPlan) -> None:
    """Print the stages of a plan with what each does and how long it takes or took."""
    shape = plan.shape
    layers = ", ".join(f"{kind.replace('_', '-')} {shape.layers[kind]}" for kind in plan.kinds)
    rows = [[stage.title, _does(plan, stage), duration(_seconds(stage))] for stage in plan.stages]
    rows.append(["all", "", duration(sum(map(_seconds, plan.stages)))])
    table(
        ["stage", "what", ">time"],
        rows,
        title=f"Plan for {size(plan.text.n_bytes)} of text in {rounded_duration(plan.time_seconds)}: width "
        f"{shape.d_model}, layers {layers}, blocks of {shape.length} tokens",
        total=True,
    )
    if plan.seconds < _UNUSED * plan.time_seconds:
        note(
            f"This takes {rounded_duration(plan.seconds)} of the {rounded_duration(plan.time_seconds)}: with "
            "this much text, more training or a larger model would overfit. More text would help."
        )
    if not plan.spent_seconds:
        say("Times are those of this machine as busy as it is now; a late stage shortens the ones after it.")


def _seconds(stage: Stage) -> float:
    return stage.spent_seconds if stage.done else stage.seconds


def _does(plan: TrainingPlan, stage: Stage) -> str:
    if stage.done:
        return "done"
    if stage.name == "expert":
        tokens = plan.shape.tokens_per_step
        passes = stage.steps * tokens / plan.text.n_tokens(plan.vocab_size)
        done = f"{count(stage.steps)} steps of {count(tokens)} tokens, {passes:.2g} times over the text"
        return f"width {plan.shape_of(stage).d_model}, {done}" if stage.widening > 1 else done
    return {
        "import": "text files into records",
        "tokenizer": f"{count(plan.vocab_size)} entries",
        "combine": f"a vector store of at most {count(stage.n_keys)} keys, weights and gate",
        "evaluate": f"at most {count(stage.n_tokens)} held-out tokens of each domain",
        "sample": "a text",
    }[stage.name]
