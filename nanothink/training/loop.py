"""The training loop, one for every phase.

One turn: epoch over? evaluate, keep the best, snapshot, stop early; stop asked? save and leave; run
over? leave; next batches; forward and backward over the accumulation window; finite check; clip;
optimizer step; log; rolling save. Evaluation stands first so that a run stopped between the last step
of an epoch and its evaluation resumes with just that evaluation.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch

from nanothink.config import TrainConfig
from nanothink.data.tokens import IGNORE
from nanothink.errors import InterruptedRun, TrainingDivergedError
from nanothink.inference.evaluate import Evaluation, EvaluationStopped
from nanothink.models.contract import Batch, LanguageModel
from nanothink.models.precision import Precision
from nanothink.reporter import Reporter
from nanothink.suggestions import again, command
from nanothink.training.distributed import ALONE, Processes
from nanothink.training.events import (
    CheckpointSaved,
    Evaluated,
    RunFinished,
    Sampled,
    StepDone,
)
from nanothink.training.interruption import StopRequest
from nanothink.training.objectives import Objective
from nanothink.training.optimizer import GroupedOptimizer, learning_rate_fraction
from nanothink.training.routing import unbalanced_experts
from nanothink.training.sharding import Placement
from nanothink.training.state import Plan, TrainState
from nanothink.wording import counted

Role = Literal["best", "epoch", "interrupted"]
"""Purpose of a checkpoint."""


class BlockSource(Protocol):
    """Source of training blocks; ``TrainingBatches`` is one."""

    def read(self, start: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets, (count, T) int64 each, of the blocks at positions start .. start+count-1."""
        ...


@dataclass(frozen=True)
class Run:
    """Everything a run is made of. ``state`` and what it points to change; the rest does not."""

    model: LanguageModel
    optimizer: GroupedOptimizer
    scaler: torch.amp.GradScaler | None
    objective: Objective
    batches: BlockSource
    precision: Precision
    config: TrainConfig
    plan: Plan
    state: TrainState
    processes: Processes = ALONE
    placed: Placement | None = None
    """Where the parameters are; None: ``model`` is whole in this process."""
    evaluates_first: bool = False
    """Evaluate before the first step too, and so never end with a worse model than the one begun with."""

    @property
    def placement(self) -> Placement:
        return self.placed or Placement(self.model)


@dataclass(frozen=True)
class Callbacks:
    """Functions that the loop calls. Several processes each call all of them at the same point.

    evaluate: score the validation text; may raise EvaluationStopped, and then does so in all processes.
    sample: text by prompt, leaving every random state as it was; may raise EvaluationStopped likewise.
    save: write a checkpoint of ``state`` in a role ("best", "epoch", "interrupted"), return its path.
    stop: true once this process was asked to stop; then all processes stop.
    resume_command: the command that resumes from the latest saved state, with further words of it.
    """

    evaluate: Callable[[], Evaluation]
    sample: Callable[[], Mapping[str, str]]
    save: Callable[[Role], Path]
    reporter: Reporter
    stop: StopRequest
    resume_command: Callable[..., str] = lambda *words: command("resume", *words)


def train(run: Run, callbacks: Callbacks) -> RunFinished:
    """Train until the plan is fulfilled or validation stops improving.

    Raises:
        InterruptedRun: a signal came; the state is saved.
        TrainingDivergedError: too many steps in a row were not finite, or no validation was; the last good
            checkpoint stays.
        StorageError: a checkpoint could not be written; the one before it is intact.
    """
    config, plan, state = run.config, run.plan, run.state
    started = last_saved = time.monotonic()
    run.model.train()

    while True:
        if _evaluation_is_due(run):
            # A stop inside leaves the state as it was: the checkpoint below leads back to this evaluation.
            with suppress(EvaluationStopped):
                _evaluate(run, callbacks)
                last_saved = time.monotonic()
        if run.processes.any(callbacks.stop()):
            _save("interrupted", run, callbacks)
            raise InterruptedRun(
                f"Stopped by {callbacks.stop.name} after step {state.step} of {plan.total_steps}. Paused and "
                f"saved. Resume with: {callbacks.resume_command()}"
            )
        if reason := _reason_to_end(run):
            break

        step_started = time.monotonic()
        fraction = learning_rate_fraction(state.step, plan.total_steps, config)
        run.optimizer.set_fraction(fraction)
        taken = take_step(run)

        state.step += 1
        state.position += plan.blocks_per_step
        state.skipped_steps += not taken.finite
        state.skipped_in_a_row = 0 if taken.finite else state.skipped_in_a_row + 1
        if taken.finite:
            state.count(taken.parts, taken.n_targets)
        callbacks.reporter.event(
            StepDone(
                step=state.step,
                total_steps=plan.total_steps,
                epoch=state.epoch,
                loss=taken.loss,
                learning_rate=config.lr * fraction,
                gradient_norm=taken.gradient_norm,
                tokens=taken.n_targets,
                seconds=time.monotonic() - step_started,
                skipped=not taken.finite,
                logged=state.step % config.log_every_steps == 0 or state.step in {1, plan.total_steps},
                parts=taken.parts,
                learning_rates=run.optimizer.rates,
            )
        )
        if state.skipped_in_a_row >= config.max_skipped_steps:
            raise TrainingDivergedError(
                f"Loss or gradient was not finite for {state.skipped_in_a_row} steps in a row, up to step "
                f"{state.step}. The last good checkpoint is untouched. {_remedy(config, callbacks)}"
            )
        # Not while steps are being skipped: what is on disk is from when numbers were still good.
        if not state.skipped_in_a_row and run.processes.any(
            run.processes.is_rank0 and time.monotonic() - last_saved >= config.save_every_seconds
        ):
            _save("interrupted", run, callbacks)
            last_saved = time.monotonic()

    if state.best_loss is None and state.evals_without_improvement:
        raise TrainingDivergedError(
            f"No validation loss was finite ({counted(state.evals_without_improvement, 'evaluation')}), so "
            f"there is no best checkpoint. The last good one is untouched. " + _remedy(config, callbacks)
        )
    if advice := _advice(run):
        callbacks.reporter.note(advice)
    finished = RunFinished(state.step, state.epoch, reason, state.best_loss, time.monotonic() - started)
    callbacks.reporter.event(finished)
    return finished


@dataclass(frozen=True)
class StepTaken:
    """Outcome of an optimizer step: means over its targets, and their number over all processes."""

    loss: float
    parts: Mapping[str, float]
    n_targets: int
    gradient_norm: float
    finite: bool
    """False if loss or gradient were not finite, and the weights are as before."""


def take_step(run: Run) -> StepTaken:
    """Train on one accumulation window. The state does not change."""
    placement = run.placement
    loss, parts, n_targets = _accumulate(run, placement)
    if run.scaler is not None:
        placement.agree_on_overflow(run.optimizer.parameters)
        run.optimizer.unscale(run.scaler)
    norm = placement.clip(run.optimizer.parameters, run.config.grad_clip)
    finite = math.isfinite(loss) and math.isfinite(norm)
    if finite:
        run.optimizer.step(run.scaler)
    if run.scaler is not None:
        run.scaler.update()  # it learns from what unscale found, step or no step
    run.optimizer.zero_grad()
    return StepTaken(loss, parts, n_targets, norm, finite)


def _accumulate(run: Run, placement: Placement) -> tuple[float, dict[str, float], int]:
    """Gradients of one accumulation window, added over all processes.

    Returns the mean loss over all its targets, the same of its parts, and the number of targets.

    The targets are counted before the first forward pass, so that every one has the same weight
    however they are spread over micro-batches.
    """
    config, device, processes = run.config, run.precision.device, run.processes
    share = processes.share(config.batch_size)
    window = []
    for i in range(config.grad_accum_steps):
        first = run.state.position + i * config.batch_size + share.start
        inputs, targets = run.batches.read(first, len(share))
        window.append(Batch(inputs, targets, range(first, first + len(share))))
    n_targets = int(
        processes.all_reduce_sum([sum(int((batch.targets != IGNORE).sum()) for batch in window)])[0]
    )
    losses = []
    for i, batch in enumerate(window):
        here = Batch(batch.inputs.to(device), batch.targets.to(device), batch.positions)
        masks = run.model.dropout.masks(config.seed, here.positions, device)
        placement.add_next(i == len(window) - 1)
        with run.precision.autocast(), masks:
            scale = 1.0 / max(1, n_targets)  # 0 where there are questions alone
            loss = placement.compute(run.objective, here, scale)
        total = loss.total if run.scaler is None else run.scaler.scale(loss.total)
        total.backward()  # type: ignore[no-untyped-call]
        losses.append({"": loss.total.detach(), **loss.parts})
    placement.collect()
    own = [float(torch.stack([part[name] for part in losses]).sum()) for name in losses[0]]
    sums = dict(zip(losses[0], processes.all_reduce_sum(own), strict=True))
    return sums.pop(""), sums, n_targets


def _evaluation_is_due(run: Run) -> bool:
    state, every = run.state, run.plan.evaluates_every(run.config.eval_every_steps)
    if state.evaluated_step == state.step:
        return False
    between = every > 0 and state.step > 0 and state.step % every == 0
    if run.evaluates_first and state.evaluated_step < 0:
        return True
    return run.plan.epoch_is_over(state) or between or run.plan.is_over(state)


def _reason_to_end(run: Run) -> str:
    """Reason to end, or an empty string. A function of the state alone, so a resumed run agrees."""
    if run.state.evals_without_improvement >= run.config.early_stopping_patience:
        return f"no improvement in {counted(run.state.evals_without_improvement, 'evaluation')}"
    if run.plan.is_over(run.state):
        return f"all {counted(run.state.step, 'step')} done"
    return ""


def _advice(run: Run) -> str:
    """Advice for a run that stopped early in the first half of its schedule; else an empty string.

    Its best loss came while the learning rate was high. With a schedule of that many epochs the rate is low
    by then, which gave 1.7 and 2.4 % fewer bits per byte on 0.5 and 1 MB of text (docs/log.md).
    """
    state, plan = run.state, run.plan
    if plan.is_over(state) or not 0 < 2 * state.best_step <= plan.total_steps:
        return ""
    epochs = max(1, round(state.best_step * plan.blocks_per_step / plan.n_blocks))
    by_steps = run.config.max_steps is not None  # which decides where both are given
    shorter = ("--max-steps", state.best_step) if by_steps else ("--max-epochs", epochs)
    retry = again(*shorter, "--overwrite")
    return (
        f"Loss was lowest at step {state.best_step:,} of {plan.total_steps:,}, while the learning rate was "
        f"still high. Retry with a shorter schedule: {retry}"
    )


def _evaluate(run: Run, callbacks: Callbacks) -> None:
    """Evaluate, keep the best, sample, snapshot."""
    config, plan, state = run.config, run.plan, run.state
    evaluation = callbacks.evaluate()
    # Here already, since a stop must leave the state as it was: the resumed run would miss these samples.
    samples = callbacks.sample() if config.sample_tokens else {}
    before = state.epoch
    state.epoch = max(before, plan.epochs_over(state))  # one step can end several where there are few blocks
    state.evaluated_step = state.step
    loss = evaluation.overall.loss
    best = math.isfinite(loss) and (state.best_loss is None or loss < state.best_loss)
    state.evals_without_improvement = 0 if best else state.evals_without_improvement + 1
    if best:
        state.best_loss, state.best_step = loss, state.step
    epoch_parts = state.end_epoch() if state.epoch > before else {}
    callbacks.reporter.event(
        Evaluated(state.step, state.epoch, evaluation, best, state.evals_without_improvement, epoch_parts)
    )
    for line in unbalanced_experts(epoch_parts, state.epoch):
        callbacks.reporter.note(line)
    if config.sample_tokens:
        callbacks.reporter.event(Sampled(state.step, state.epoch, samples))
    if not math.isfinite(loss):
        return  # nothing to go on from: the checkpoints stay as they are
    if best:
        _save("best", run, callbacks)
    epochs_a_step = max(1, plan.blocks_per_step // plan.n_blocks)  # several where there is little text
    between = config.snapshot_every_epochs * epochs_a_step
    if state.epoch // between > before // between:
        _save("epoch", run, callbacks)
    _save("interrupted", run, callbacks)


def _save(role: Role, run: Run, callbacks: Callbacks) -> Path:
    started = time.monotonic()
    if run.processes.any(not run.optimizer.is_finite()):
        raise TrainingDivergedError(
            f"After step {run.state.step} the weights are not finite any more. The last good checkpoint is "
            f"untouched. {_remedy(run.config, callbacks)}"
        )
    path = callbacks.save(role)
    callbacks.reporter.event(CheckpointSaved(run.state.step, role, path, time.monotonic() - started))
    return path


def _remedy(config: TrainConfig, callbacks: Callbacks) -> str:
    resume = callbacks.resume_command("--set", f"{config.section}.lr={config.lr / 3:.1e}")
    return f"Lower the learning rate and resume from it: {resume}"
