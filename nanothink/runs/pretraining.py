"""Training of an expert or of NanoThink, from the command's settings to a finished or interrupted run."""

from __future__ import annotations

import json
import shlex
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from typing import Any

import torch

from nanothink import __version__
from nanothink.checkpoints import CheckpointStore, read_summary
from nanothink.config import TrainConfig
from nanothink.data.corpus import find_corpus
from nanothink.errors import CheckpointError, InterruptedRun, StorageError
from nanothink.inference.evaluate import EvaluationStopped
from nanothink.models import training_of
from nanothink.models.precision import choose_device
from nanothink.reporter import SILENT, Reporter
from nanothink.runs.building import build_run
from nanothink.runs.callbacks import make_callbacks
from nanothink.runs.initial import INITIAL, config_of_initial
from nanothink.runs.joint_gate import finish_best, settle_fit
from nanothink.runs.long_runs import warn_of_long_run
from nanothink.runs.parts import find_parts
from nanothink.runs.preparing import Configure, RunSetup, largest_share, prepare
from nanothink.runs.resuming import RunSpec
from nanothink.runs.saving import description, save_state
from nanothink.training.distributed import join
from nanothink.training.events import Evaluated, RunFinished, RunStarted
from nanothink.training.interruption import StopRequest
from nanothink.training.kept_memory import kept_memory
from nanothink.training.loop import train
from nanothink.training.optimizer import effective_warmup
from nanothink.training.recording import ENDING, RunRecorder
from nanothink.training.trackers import require_tracker
from nanothink.wording import counted


def pretrain(spec: RunSpec, configure: Configure, reporter: Reporter = SILENT) -> RunFinished:
    """Train the run that ``spec`` names, or resume it.

    Raises:
        InterruptedRun: a signal came; the state is saved.
        NanoThinkError: anything that the user can fix; see nanothink.errors.
    """
    with ExitStack() as stack:
        processes = stack.enter_context(join(spec.device, reporter))
        spec = replace(spec, device=processes.device)
        store = spec.store
        if not processes.is_rank0:
            reporter = SILENT

        def first() -> tuple[tuple[RunSetup, RunFinished | None], str]:
            stack.enter_context(store.lock(reporter))
            if spec.resume is None:
                _check_new_run(spec, configure, store, reporter)
            setup = prepare(spec, configure, reporter)
            largest_share(setup, processes.size)
            ending = _earlier_ending(setup)
            resume_point = setup.resume_point.path if setup.resume_point is not None else None
            message = {
                "resume": str(resume_point) if resume_point else None,
                "ending": ending and asdict(ending),
                "types": setup.precision.settled,  # measured: another process might choose differently
            }
            return (setup, ending), json.dumps(message)

        def others(message: str) -> tuple[RunSetup, RunFinished | None]:
            """Prepare from the same checkpoint. Tokens and tokenizer are on the disk by now."""
            first_did = json.loads(message)
            ending = RunFinished(**first_did["ending"]) if first_did["ending"] else None
            same = replace(spec, resume=first_did["resume"], verified=True)
            return prepare(same, configure, reporter, first_did["types"]), ending

        setup, ending = processes.rank0_first(first, others)
        processes.assert_same_on_all_ranks("settings, data or versions", _identity(setup))
        if ending is not None:
            reporter.note("This run is complete. To train on, raise --max-epochs or --max-steps.")
            return ending
        setup = settle_fit(setup, reporter, processes)
        if processes.size == 1:
            warn_of_long_run(setup, configure, reporter)
        run = build_run(setup, reporter, processes, stack)
        # Before this point there is no state to save, and a signal ends the process.
        stop = stack.enter_context(StopRequest(reporter, forwarded=processes.size > 1))
        if setup.resume_point is None:
            # Before the first step, so that a full disk is found now, and so that everything --overwrite
            # replaces is set aside at once: the files here, the records below.
            save_state(setup, run, store, "interrupted")
        leaves_best = setup.best_is_reset or _knows_no_better(setup, store)
        if leaves_best and processes.is_rank0 and (kept := store.keep_best()):
            reporter.note(f"The best checkpoint so far is kept as {kept}.")
        if processes.is_rank0:
            folder = spec.checkpoint_dir / "runs" / spec.stem
            described, tracker = description(setup, run), setup.training.tracker
            recorder = RunRecorder(folder, described, run.state, reporter, tracker)
            stack.callback(recorder.close)
            recorder.forget_ending()
            reporter = recorder
        for line in _remarks(setup):
            reporter.note(line)
        reporter.event(
            RunStarted(
                name=spec.stem,
                step=run.state.step,
                total_steps=run.plan.total_steps,
                epoch=run.state.epoch,
                epochs=run.plan.epochs,
                n_blocks=run.plan.n_blocks,
                blocks_per_step=run.plan.blocks_per_step,
            )
        )
        callbacks = make_callbacks(setup, run, store, reporter, stop)
        with kept_memory():
            finished = train(run, callbacks)
        run.optimizer.release()  # the best checkpoint is read in its place
        fitting = reporter if processes.size > 1 else _UntilStopped(reporter, stop)
        try:
            fitted = processes.rank0_first(
                lambda: (finish_best(setup, run, store, fitting), ""), lambda _: None
            )
        except EvaluationStopped:
            raise InterruptedRun(
                f"Stopped by {stop.name} after step {finished.step} of {run.plan.total_steps}. Paused and "
                f"saved. Resume with: {callbacks.resume_command()}"
            ) from None
        if fitted is not None:
            finished = replace(finished, best_loss=fitted.overall.loss)
            reporter.event(Evaluated(finished.step, finished.epoch, fitted, True, 0, fitted=True))
        if processes.is_rank0:
            ending_is_kept = recorder.keep_ending(
                {
                    "reason": finished.reason,
                    "step": finished.step,
                    "epoch": finished.epoch,
                    "best_loss": finished.best_loss,
                    "settings": _ending_settings(setup.training),
                }
            )
            if ending_is_kept:  # else a resume would train the finished run further
                store.remove_interrupted()
        return finished


class _UntilStopped(Reporter):
    """Passes reports on, and raises EvaluationStopped at the first progress after a stop was asked for."""

    def __init__(self, reporter: Reporter, stop: StopRequest) -> None:
        self._reporter, self._stop = reporter, stop

    def note(self, message: str) -> None:
        self._reporter.note(message)

    def progress(self, stage: str, done: int, total: int) -> None:
        if self._stop():
            raise EvaluationStopped
        self._reporter.progress(stage, done, total)


def _earlier_ending(setup: RunSetup) -> RunFinished | None:
    """The end of this run, if it has ended; None if there is something left to train.

    A run that stopped early could train on from its best epoch. It does so if a setting that ends a run was
    changed since.
    """
    spec = setup.spec
    marker = spec.checkpoint_dir / "runs" / spec.stem / ENDING
    if setup.resume_point is None or spec.store.rolling() or not marker.exists():
        return None
    try:
        ending: dict[str, Any] = json.loads(marker.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    whole = isinstance(ending, dict) and {"step", "epoch", "reason", "best_loss"} <= ending.keys()
    if not whole or ending.get("settings") != _ending_settings(setup.training):
        return None
    return RunFinished(ending["step"], ending["epoch"], ending["reason"], ending["best_loss"], 0.0)


def _ending_settings(train: TrainConfig) -> dict[str, Any]:
    """The settings that decide when a run ends."""
    return {
        "max_epochs": train.max_epochs,
        "max_steps": train.max_steps,
        "early_stopping_patience": train.early_stopping_patience,
    }


def _check_new_run(spec: RunSpec, configure: Configure, store: CheckpointStore, reporter: Reporter) -> None:
    """Report mistakes in settings and data before old checkpoints: fixing them must not need --overwrite."""
    resolved = configure(None)
    config = resolved.config
    choose_device(spec.device)
    require_tracker(training_of(spec.kind, config).tracker)
    parts = find_parts(spec, resolved, None, reporter)
    if INITIAL in parts:
        config_of_initial(parts[INITIAL], resolved)
    find_corpus(config.data.data_dir, config.data.domains)
    store.guard_new_run(overwrite=spec.overwrite)


def _knows_no_better(setup: RunSetup, store: CheckpointStore) -> bool:
    """True if the best checkpoint is better than the best that this run knows, and so would be overwritten.

    That is so when a run resumes from a file that is older than its best. The rolling file can be older too,
    by a kill between the two: then the next evaluation writes the same best again.
    """
    if setup.resume_point is None or setup.resume_point.path.resolve() in [
        path.resolve() for path in store.rolling()
    ]:
        return False
    with suppress(CheckpointError, StorageError):
        best, known = read_summary(store.best).best_loss, setup.state.best_loss
        return best is not None and (known is None or best < known)
    return False


def _identity(setup: RunSetup) -> str:
    """Settings, data and versions, which all ranks must share. Paths may differ between machines."""
    settings = setup.config.model_dump(mode="json")
    del settings["data"]["data_dir"]
    return json.dumps(
        [
            settings,
            setup.tokens.fingerprint,
            setup.split.described(),
            setup.tokenizer.fingerprint,
            setup.state.to_dict(),
            asdict(setup.plan),
            __version__,
            torch.__version__,
        ]
    )


_FEW_TRAINING_BLOCKS, _FEW_VALIDATION_TOKENS = 50, 2000


def _too_little(setup: RunSetup) -> list[str]:
    """What there is too little text for."""
    blocks, length = setup.plan.n_blocks, setup.config.model.max_seq_len
    n_val = sum(stream.n_tokens for stream in setup.tokens.val.values())
    found = []
    if blocks < _FEW_TRAINING_BLOCKS:
        found.append(
            f"The training text is {counted(blocks, 'block')} of {length} tokens: enough to try the "
            "commands, too little to learn a language from. Add documents."
        )
    if n_val < _FEW_VALIDATION_TOKENS:
        found.append(
            f"Validation has {counted(n_val, 'token')}: too few to compare models by, and to choose the best "
            "step by. Add documents."
        )
    return found


def _remarks(setup: RunSetup) -> list[str]:
    """Notes before the first step on what could surprise later."""
    remarks = []
    train_config, plan = setup.training, setup.plan
    done = setup.state.step
    if done > plan.total_steps:
        remarks.append(
            f"{counted(done, 'step')} are done already, more than the {plan.total_steps:,} asked for: "
            "nothing is left to train."
        )
    warmup = effective_warmup(train_config, plan.total_steps)
    if done >= plan.total_steps:
        pass  # nothing is trained: no warm-up to explain
    elif warmup == 0 < train_config.warmup_steps:
        remarks.append(f"No warm-up: this run has {counted(plan.total_steps, 'step')}.")
    elif warmup != train_config.warmup_steps:
        remarks.append(
            f"Warming up over a tenth of this run ({counted(warmup, 'step')}), not "
            f"{counted(train_config.warmup_steps, 'step')}."
        )
    if train_config.tracker == "tensorboard":
        runs = shlex.quote(str(setup.spec.checkpoint_dir / "runs"))
        remarks.append(f"To watch the run: tensorboard --logdir {runs}")
    length = setup.config.model.max_seq_len
    remarks += _too_little(setup)
    draws = plan.total_steps * plan.blocks_per_step / len(setup.tokens.train)
    for domain, stream in setup.tokens.train.items():
        passes = draws / max(1, stream.n_blocks(length))
        if passes > 1 and passes > 4 * plan.total_steps * plan.blocks_per_step / plan.n_blocks:
            remarks.append(
                f"Domain '{domain}' is small: with equal weight for every domain this run reads it "
                f"{passes:.0f} times."
            )
    if setup.tokens.skipped_records:
        left_out = counted(setup.tokens.skipped_records, "bad record")
        remarks.append(f"{left_out} left out (--skip-bad-records).")
    return remarks
