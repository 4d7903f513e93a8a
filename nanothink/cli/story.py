"""The stages of a training plan as commands: shown, run one after another, and resumed where they stopped."""

from __future__ import annotations

import contextlib
import io
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanothink.cli.suggestions import called_as
from nanothink.errors import CheckpointMismatchError, UsageError
from nanothink.suggestions import again, domain_named_after
from nanothink.suggestions import command as as_typed
from nanothink.wording import counted, rounded_duration

if TYPE_CHECKING:
    from nanothink.reporter import Reporter
    from nanothink.runs.plan_sizes import SpeedOf
    from nanothink.runs.planning import PlanFile
    from nanothink.runs.training_plan import Stage, TrainingPlan

Call = Callable[[list[str]], int]
"""Runs a command of NanoThink, as app.py gives it to every command."""

_TITLES = {
    "import": "The texts as records",
    "tokenizer": "A byte-level BPE of its own",
    "transformer": "An expert: a transformer",
    "state_space": "An expert: a state-space model",
    "diffuser": "An expert: a diffuser, against the frozen transformer",
    "combine": "NanoThink over the experts, frozen, with a vector store of the text",
    "evaluate": "All of them on held-out text",
    "sample": "What it writes, and which expert is trusted",
}
_SAMPLE_TOKENS = 80
_REPEATED = ("evaluate", "sample")
"""Stages that run again when a finished plan is asked for."""


@dataclass
class Story:
    """A call of ``nanothink train``, or of ``nanothink demo``, which brings a text of its own."""

    call: Call
    checkpoint_dir: Path
    data_dir: str | None = None
    seconds: float | None = None
    kinds: tuple[str, ...] | None = None
    device: str | None = None
    overwrite: bool = False
    as_json: bool = False
    extend: bool = False
    """Take more time than ``seconds`` where they are too few on this machine, instead of an error."""
    prompt: str | None = None
    """For the sample; the first words of the text when None."""
    speed_of: SpeedOf | None = None
    """Speed of this machine; measured when None."""
    began: float = field(default_factory=lambda: time.monotonic())

    def print_plan(self) -> int:
        """Print the plan, and write nothing."""
        from nanothink.cli import render

        plan = self._plan()
        if self.as_json:
            render.print_json(plan.model_dump(mode="json"))
        else:
            render.plan(plan)
        return 0

    def tell(self) -> int:
        """Carry out the plan from where it stands, then print what to type next."""
        from nanothink.cli import render
        from nanothink.runs.planning import PlanFile, settings_of, write_settings

        plan, file, scores = self._plan(), PlanFile(self.checkpoint_dir), dict[str, Any]()
        with contextlib.redirect_stdout(sys.stderr) if self.as_json else contextlib.nullcontext():
            render.plan(plan)
            file.write(plan)
            write_settings(self.checkpoint_dir, settings_of(plan, self.checkpoint_dir))
            index = 0
            while index < len(plan.stages):  # a stage can bring further ones
                if not plan.stages[index].done:
                    plan, code = self._carry_out(plan, index, file, scores)
                    if code:
                        render.note(f"To continue all of it: `{self._continues(plan)}`")
                        return code
                index += 1
        if self.as_json:
            render.print_json({"plan": plan.model_dump(mode="json"), **scores})
            return 0
        took, given = rounded_duration(plan.spent_seconds), rounded_duration(plan.time_seconds)
        render.chapter(f"Done in {took}; {given} were given. What to type next", "")
        for line in self._next_commands(plan):
            render.say(f"  {line}")
        return 0

    # ---------------------------------------------------------------------------------------------
    # The plan

    def _plan(self) -> TrainingPlan:
        """The plan of the folder, or a new one.

        Raises:
            UsageError: the folder has another plan, or models that no plan has made.
        """
        from nanothink.runs.planning import PlanFile, measure_text

        plan = None if self.overwrite else PlanFile(self.checkpoint_dir).read()
        if plan is None:
            return self._new_plan()
        here = self._continues(plan)
        done = sum(stage.done for stage in plan.stages)
        what = f"{self.checkpoint_dir} has a plan of {rounded_duration(plan.time_seconds)} for "
        what += f"{plan.data_dir}, of which {counted(done, 'stage')} of {len(plan.stages)} are done"
        time_asked, experts = self._asked(plan)
        words = [*([] if self.seconds else time_asked), *([] if self.kinds else experts)]
        overwrite = again("--overwrite", *words)
        anew = f"To start anew: {overwrite}; to keep both: another --checkpoint-dir."
        if self.data_dir not in (None, plan.data_dir) or self.kinds not in (None, plan.kinds):
            raise UsageError(
                f"{what}, with the experts {', '.join(plan.kinds)}. To continue it: `{here}`. {anew}"
            )
        if self.seconds not in (None, plan.time_seconds) and not self.extend:
            raise UsageError(f"{what}. To continue it: `{here}`. {anew}")
        source = self._source(plan.data_dir)
        with _reporting() as reporter, called_as(self._import_command(source)):
            found = measure_text(source, self.checkpoint_dir, reporter)
        if found.digest != plan.text.digest:
            raise CheckpointMismatchError(
                f"The text in {plan.data_dir} is not what this plan began with ({plan.text.n_bytes:,} bytes "
                f"then, {found.n_bytes:,} now), and models of different texts do not combine. To train on "
                f"the text as it is now: {overwrite}, or another --checkpoint-dir."
            )
        return plan

    def _continues(self, plan: TrainingPlan) -> str:
        device = ["--device", self.device] if self.device else []
        time_asked, experts = self._asked(plan)
        # both are said, or a message would be completed by what was asked for
        asked = [*time_asked, *experts]
        place = ["--checkpoint-dir", str(self.checkpoint_dir)]
        return shlex.join(["nanothink", "train", plan.data_dir, *asked, *place, *device])

    def _asked(self, plan: TrainingPlan) -> tuple[list[str], list[str]]:
        """The options that asked for the time and the experts of a plan."""
        whole, rest = divmod(plan.time_seconds, 60)
        duration = f"{plan.time_seconds:g}s" if rest else f"{whole:g}m"
        further = plan.further and self.kinds is None
        return ["--time", duration], [] if further else ["--experts", ",".join(plan.kinds)]

    def _new_plan(self) -> TrainingPlan:
        from nanothink.checkpoints import CheckpointStore
        from nanothink.runs.planning import is_imported, measure_text, opening
        from nanothink.runs.training_plan import KINDS, make_plan

        data_dir, kinds = self.data_dir or "data", self.kinds or KINDS
        further = self.kinds is None
        if self.seconds is None:
            words = ["nanothink", "train", data_dir, "--time", "2h"]
            raise UsageError(f"--time says how long all of it may take, as in: `{shlex.join(words)}`")
        stems = _stems(kinds, further)
        taken = [path for stem in stems for path in CheckpointStore(self.checkpoint_dir, stem).existing()]
        if taken and not self.overwrite:
            raise UsageError(
                f"{taken[0]} is there already, and no plan has made it. Choose another --checkpoint-dir, or "
                f"replace it: {again('--overwrite')}"
            )
        source = self._source(data_dir)
        with _reporting() as reporter:
            with called_as(self._import_command(source)):
                text = measure_text(source, self.checkpoint_dir, reporter)
            plan = make_plan(
                text,
                self.seconds,
                self._speed(reporter),
                data_dir=data_dir,
                kinds=kinds,
                further=further,
                imports=is_imported(source, self.checkpoint_dir),
                made_at=time.time(),
                prompt=self.prompt or opening(source, self.checkpoint_dir),
                extend=self.extend,
            )
        if plan.time_seconds > self.seconds:
            reporter.note(
                f"{rounded_duration(self.seconds)} are too few on this machine as busy as it is now: planned "
                f"for {rounded_duration(plan.time_seconds)}."
            )
        return plan

    def _speed(self, reporter: Reporter) -> SpeedOf:
        from nanothink.runs.machine_speed import MachineSpeed

        return self.speed_of or MachineSpeed(self.device, reporter)

    def _import_command(self, source: Path) -> str:
        """The import that a person types where it needs options; empty for a corpus."""
        from nanothink.runs.planning import is_imported

        if not is_imported(source, self.checkpoint_dir):
            return ""
        name = domain_named_after(source) or "texts"
        return as_typed("data import", source, "--domain", name, "--data-dir", f"{source}-imported")

    @staticmethod
    def _source(data_dir: str) -> Path:
        return Path(data_dir).expanduser()

    # ---------------------------------------------------------------------------------------------
    # Its stages

    def _carry_out(
        self, plan: TrainingPlan, index: int, file: PlanFile, scores: dict[str, Any]
    ) -> tuple[TrainingPlan, int]:
        """Settle a stage, show its command and run it. The plan is kept before and after."""
        from nanothink.cli import render
        from nanothink.runs.planning import with_tokens_counted

        if not plan.stages[index].started:
            plan = self._settled(plan, index).with_stage(index, started=True)
            file.write(plan)
        stage = plan.stages[index]
        command, title = self._command(plan, stage), _TITLES[stage.kind or stage.name]
        render.chapter(f"{index + 1}/{len(plan.stages)}  {title}", f"$ nanothink {shlex.join(command)}")
        code, before = 1, 0.0 if stage.name in _REPEATED else stage.spent_seconds
        try:
            code = self._run(stage, command, scores)
        finally:
            spent = before + time.monotonic() - self.began
            self.began = time.monotonic()
            done = not code and stage.name not in _REPEATED
            plan = plan.with_stage(index, spent_seconds=spent, done=done)
            if done and stage.name == "tokenizer":
                plan = with_tokens_counted(plan, self.checkpoint_dir)
            file.write(plan)
        return plan, code

    def _settled(self, plan: TrainingPlan, index: int) -> TrainingPlan:
        """The stages that are left, sized for the time that is left; the expert's speed is measured anew."""
        from nanothink.runs.training_plan import settled, with_further_experts

        with _reporting() as reporter:
            if plan.further and plan.stages[index].name == "combine":  # earlier stages may have left time
                plan = with_further_experts(settled(plan), self._speed(reporter))
            stage = plan.stages[index]
            counted_in = plan.with_stage(index, spent_seconds=time.monotonic() - self.began)
            if stage.kind is None:
                return settled(counted_in)
            speed = self._speed(reporter)(stage.kind, plan.shape_of(stage), plan.vocab_size)
        return settled(counted_in, {stage.timed_as: speed})

    def _run(self, stage: Stage, command: list[str], scores: dict[str, Any]) -> int:
        if not self.as_json or stage.name != "evaluate":
            return self.call(command)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            code = self.call([*command, "--json"])
        if not code:
            scores.update(json.loads(printed.getvalue()))
        return code

    def _command(self, plan: TrainingPlan, stage: Stage) -> list[str]:
        from nanothink.models import COMBINED, training_section
        from nanothink.runs.planning import IMPORTED_FOLDER, SETTINGS_FILE, TOKENIZER_FOLDER

        folder = self.checkpoint_dir
        settings = ["--config", str(folder / SETTINGS_FILE)]
        device = ["--device", self.device] if self.device else []
        experts = [str(folder / f"{expert.title}_expert.pt") for expert in plan.experts]
        combined = str(folder / f"{COMBINED}.pt")
        if stage.name == "import":
            source = self._source(plan.data_dir)
            put = ["--domain", "texts", "--data-dir", str(folder / IMPORTED_FOLDER), "--overwrite"]
            return ["data", "import", str(source), *put]
        if stage.name == "tokenizer":
            size, out = ["--vocab-size", str(plan.vocab_size)], folder / TOKENIZER_FOLDER
            again = ["--overwrite"] if out.exists() else []
            return ["tokenizer", "train", *settings, *size, "--out", str(out), *again]
        if stage.name == "evaluate":
            models, size = [*experts, combined], ["--max-tokens", str(stage.n_tokens)]
            return ["eval", *models, *size, *self._cache(models), *device]
        if stage.name == "sample":
            length = ["-n", str(_SAMPLE_TOKENS), "--seed", "1"]
            return ["generate", plan.prompt, "-c", combined, *length, "--show-routing", *device]
        kind = stage.kind or COMBINED
        section = training_section(kind)
        values: dict[str, object] = {f"{section}.eval_max_tokens": stage.n_tokens}
        if stage.kind is None:
            words = ["train-mla", *(word for path in experts for word in ("--expert", path))]
            values["vector_store.max_keys"] = stage.n_keys
            widest = max(plan.experts, key=lambda expert: (expert.widening, expert.kind == "state_space"))
            if widest.widening > 1:  # wider states are better keys (docs/log.md)
                values["vector_store.expert"] = widest.title
        else:
            words = ["pretrain", kind, "--max-steps", str(stage.steps)]
            if stage.nth > 1:
                words += ["--name", stage.title, "--seed", str(stage.nth)]
            values[f"{section}.eval_every_steps"] = stage.evaluate_every
            rule = plan.regularisation_of(stage)
            values |= {
                f"{section}.dropout": rule.dropout,
                f"{section}.weight_decay_tables": rule.weight_decay_tables,
            }
            if stage.widening > 1:
                shape = plan.shape_of(stage)
                values |= {"model.d_model": shape.d_model, "transformer.n_heads": shape.n_heads}
        words += [
            *settings,
            *(word for name, value in values.items() for word in ("--set", f"{name}={value}")),
        ]
        stem = kind if stage.kind is None else f"{stage.title}_expert"
        place = ["--checkpoint-dir", str(folder), self._resume_or_overwrite(plan, stem)]
        return [*words, *place, *device]

    @staticmethod
    def _cache(models: list[str]) -> list[str]:
        from nanothink.runs.planning import have_gates

        return ["--document-cache"] if have_gates(map(Path, models)) else []

    def _resume_or_overwrite(self, plan: TrainingPlan, stem: str) -> str:
        """``--overwrite`` for models that are older than the plan."""
        from nanothink.checkpoints import CheckpointStore

        existing = CheckpointStore(self.checkpoint_dir, stem).existing()
        older = bool(existing) and max(path.stat().st_mtime for path in existing) < plan.made_at
        return "--overwrite" if older else "--resume"

    def _next_commands(self, plan: TrainingPlan) -> Iterator[str]:
        from nanothink.models import COMBINED

        combined, folder = str(self.checkpoint_dir / f"{COMBINED}.pt"), self.checkpoint_dir
        for call, why in (
            (as_typed("generate", plan.prompt, "-c", combined, *self._cache([combined])), "let it write"),
            (as_typed("serve", combined), "in the browser, and by OpenAI's API"),
            (as_typed("report --checkpoint-dir", folder), "curves, domains, routing as one HTML page"),
            (as_typed("store search", plan.prompt, "-c", combined), "what it recalls"),
            (as_typed("checkpoints ls --checkpoint-dir", folder), "what there is"),
        ):
            yield f"{call}   # {why}"


def _stems(kinds: tuple[str, ...], further: bool) -> list[str]:
    """Names of the checkpoints that a plan of these experts may make."""
    from nanothink.models import COMBINED
    from nanothink.runs.training_plan import MOST_OF_A_KIND

    numbers = range(2, 1 + (MOST_OF_A_KIND if further else 1))
    names = [name for kind in kinds for name in (kind, *(f"{kind}_{n}" for n in numbers))]
    return [*(f"{name}_expert" for name in names), COMBINED]


def _reporting() -> Any:
    from nanothink.cli import render

    return render.reporting()
