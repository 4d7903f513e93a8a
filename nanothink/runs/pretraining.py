"""Train an expert or NanoThink: from prepared data to a finished, or safely interrupted, run."""

from __future__ import annotations

import json
import platform
import random
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from datetime import datetime
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from nanothink import __version__
from nanothink.checkpoints import (
    FORMAT_VERSION,
    CheckpointPayload,
    CheckpointStore,
    model_state,
    pack_rng,
    read_summary,
    restore_model,
    unpack_rng,
)
from nanothink.config import TrainMLAConfig
from nanothink.data.corpus import find_corpus
from nanothink.data.tokens import TokenStream
from nanothink.errors import CheckpointError, DataError, StorageError, counted
from nanothink.inference.calibration import fit_logit_scale
from nanothink.inference.denoising import denoising_errors
from nanothink.inference.evaluate import Evaluation, EvaluationStopped, evaluate_model
from nanothink.inference.generate import generate
from nanothink.inference.sampling import SamplingConfig
from nanothink.models.contract import LanguageModel
from nanothink.models.diffuser import Diffuser
from nanothink.models.nanothink import NanoThink
from nanothink.models.precision import choose_device
from nanothink.models.store_gate import Neighbours
from nanothink.reporter import SILENT, Reporter
from nanothink.runs.expert_state_cache import keep_states
from nanothink.runs.experts import as_entries
from nanothink.runs.preparing import (
    Configure,
    RunSetup,
    earlier_ending,
    ending_settings,
    experts_to_combine,
    frozen_transformer,
    largest_share,
    prepare,
)
from nanothink.runs.resuming import RunSpec
from nanothink.training.distributed import ALONE, Processes, join
from nanothink.training.events import RunFinished, RunStarted
from nanothink.training.interruption import StopRequest
from nanothink.training.loop import Callbacks, Run, train
from nanothink.training.objectives import Denoising, Objective, Routed, next_token
from nanothink.training.optimizer import GroupedOptimizer, effective_warmup, learning_rate_fraction
from nanothink.training.recording import RunRecorder
from nanothink.training.state import TrainState
from nanothink.training.trackers import require_tracker

T = TypeVar("T")

TARGET_SAMPLE_BLOCKS = 64
"""Training blocks over whose targets a diffuser takes their mean and spread."""

EVALUATION_TOKENS = 8192
"""Tokens per evaluation batch: enough to fill two cores, little enough to answer a signal at once."""

_SAMPLED_DOMAINS = 3
_OPENING_TOKENS = 6  # of a held-out text, as a prompt: a few words


def pretrain(spec: RunSpec, configure: Configure, reporter: Reporter = SILENT) -> RunFinished:
    """Train what ``where`` names, or go on with it.

    Raises:
        NanoThinkError: anything a person can mend, said so; see nanothink.errors.
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
            ending = earlier_ending(setup)
            resume_point = setup.resume_point.path if setup.resume_point is not None else None
            word = {
                "origin": str(resume_point) if resume_point else None,
                "ending": ending and asdict(ending),
                "types": setup.precision.settled,  # measured: another process might find otherwise
            }
            return (setup, ending), json.dumps(word)

        def others(word: str) -> tuple[RunSetup, RunFinished | None]:
            """From the same checkpoint, or from none; what the first has made is found, not made again."""
            said = json.loads(word)
            ending = RunFinished(**said["ending"]) if said["ending"] else None
            where_it_began = replace(spec, resume=said["origin"])
            return prepare(where_it_began, configure, reporter, said["types"]), ending

        setup, ending = processes.rank0_first(first, others)
        processes.assert_same_on_all_ranks("settings, data or versions", _identity(setup))
        if ending is not None:
            reporter.note("This run is complete. To train on, raise --max-epochs or --max-steps.")
            return ending
        run = build_run(setup, reporter, processes, stack)
        processes.assert_same_on_all_ranks("their first weights", weights_checksum(run.model))
        # Only from here on is there a state to save; a signal during the preparation just ends it.
        stop = stack.enter_context(StopRequest(reporter, forwarded=processes.size > 1))
        if setup.resume_point is None and processes.is_rank0:
            # Before the first step, so that a disk without room says so now, and so that what --overwrite
            # replaces is set aside all at once: the files here, the records just below.
            store.write(store.interrupted, checkpoint_payload(setup, run))
        leaves_best = setup.finds_best_anew or _knows_no_better(setup, store)
        if leaves_best and processes.is_rank0 and (kept := store.keep_best()):
            reporter.note(f"The best checkpoint so far is kept as {kept}.")
        if processes.is_rank0:
            folder = spec.checkpoint_dir / "runs" / spec.stem
            described, tracker = _description(setup, run), setup.training.tracker
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
        finished = train(run, _callbacks(setup, run, store, reporter, stop))
        if processes.is_rank0:
            ending_is_kept = recorder.keep_ending(
                {
                    "reason": finished.reason,
                    "step": finished.step,
                    "epoch": finished.epoch,
                    "best_loss": finished.best_loss,
                    "settings": ending_settings(setup.training),
                }
            )
            if ending_is_kept:  # else a resume would take the run for one to be trained further
                store.remove_interrupted()
        return finished


def _check_new_run(spec: RunSpec, configure: Configure, store: CheckpointStore, reporter: Reporter) -> None:
    """A mistake in settings or data is said first: mending it must not need --overwrite."""
    resolved = configure(None)
    config = resolved.config
    choose_device(spec.device)
    require_tracker(config.training_of(spec.kind).tracker)
    frozen_transformer(spec, config, None, reporter)
    experts_to_combine(spec, resolved, None, reporter)
    find_corpus(config.data.data_dir, config.data.domains)
    store.guard_new_run(overwrite=spec.overwrite)


def _knows_no_better(setup: RunSetup, store: CheckpointStore) -> bool:
    """Whether the best checkpoint is better than all that this run knows of, and so would be written over.

    It is where a run goes on from a file that is older than its best. The rolling file may be older too, by a
    kill between the two: then the evaluation that follows writes the same best again.
    """
    if setup.resume_point is None or setup.resume_point.path.resolve() == store.interrupted.resolve():
        return False
    with suppress(CheckpointError, StorageError):
        best, known = read_summary(store.best).best_loss, setup.state.best_loss
        return best is not None and (known is None or best < known)
    return False


def _identity(setup: RunSetup) -> str:
    """What processes must agree on to train the same model; paths may differ between machines."""
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


def weights_checksum(model: LanguageModel) -> str:
    """Equal for equal weights; made to tell copies of one model apart, bit by bit, in one pass."""
    sums = [
        tensor.detach().contiguous().view(torch.int32).sum(dtype=torch.int64).cpu()
        for _, tensor in sorted(model.state_dict().items())
        if tensor.dtype is torch.float32 and tensor.numel()
    ]
    return str(torch.stack(sums).tolist())


def build_run(
    setup: RunSetup, reporter: Reporter = SILENT, processes: Processes = ALONE, stack: ExitStack | None = None
) -> Run:
    """Model, optimizer and where they stand: fresh, or as the checkpoint has them.

    Args:
        stack: closes at its end the files that the run reads from; None leaves them open.
    """
    stack = stack or ExitStack()
    train_config = setup.training
    device = setup.precision.device
    # Nothing here draws from Python or numpy, but an objective may, and then it must repeat.
    random.seed(train_config.seed)
    np.random.seed(train_config.seed % 2**32)
    torch.manual_seed(train_config.seed)
    model = _build_model(setup, reporter)
    scaler = torch.amp.GradScaler(device.type) if setup.precision.needs_scaler else None
    state = replace(setup.state)
    if setup.resume_point is not None:
        payload = setup.resume_point.payload
        report = restore_model(model, payload, expect_kind=setup.spec.kind, path=setup.resume_point.path)
        for line in report.lines():
            reporter.note(line)
    elif isinstance(model, Diffuser):
        assert setup.frozen is not None
        _, targets = setup.batches.read(0, TARGET_SAMPLE_BLOCKS)
        model.adopt(setup.frozen.build(reporter), targets)
    model.to(device)
    neighbours = _update_store(setup, model, reporter, processes, stack)
    model.dropout.rate = train_config.dropout
    optimizer = GroupedOptimizer(model.parameter_groups(), train_config)
    if setup.resume_point is not None:
        fresh = optimizer.load_state_dict(payload["optimizer_state"])
        # A run saved before its first step has no moments yet; afterwards their absence is worth a line.
        if fresh and payload["step"] > 0:
            reporter.note(
                f"Optimizer moments start at zero for {counted(len(fresh), 'parameter')}: "
                + ", ".join(fresh[:5])
                + (" ..." if len(fresh) > 5 else "")
            )
        if scaler is not None and payload["amp_scaler"]:
            scaler.load_state_dict(dict(payload["amp_scaler"]))
        for line in unpack_rng(payload["rng"]):
            reporter.note(line)
        setup.resume_point.release()
    # The rates of the last step taken, as a run that was never interrupted would hold them: a checkpoint
    # written before the next step must not differ in them.
    last_step = max(0, state.step - 1)
    optimizer.set_fraction(learning_rate_fraction(last_step, setup.plan.total_steps, train_config))
    processes.watch([parameter for parameter in model.parameters() if parameter.requires_grad])
    return Run(
        model=model,
        optimizer=optimizer,
        scaler=scaler,
        objective=_objective(setup, model, reporter, neighbours, stack),
        batches=setup.batches,
        precision=setup.precision,
        config=train_config,
        plan=setup.plan,
        state=state,
        processes=processes,
    )


def _build_model(setup: RunSetup, reporter: Reporter) -> LanguageModel:
    """A new one, or one whose weights are still to be restored."""
    if not setup.experts:
        return setup.build_model()
    config, vocab_size = setup.config, setup.tokenizer.vocab_size
    experts = {e.name: e.build(setup.precision.device, reporter) for e in setup.experts}
    return NanoThink(vocab_size, config.model, config.mla, experts, config.vector_store)


def _update_store(
    setup: RunSetup, model: LanguageModel, reporter: Reporter, processes: Processes, stack: ExitStack
) -> Callable[[Sequence[int]], Neighbours] | None:
    """Attach the run's vector store, if it has one, and return the function that gives blocks' neighbours."""
    if not isinstance(model, NanoThink) or model.store_gate is None:
        return None
    from nanothink.runs.vector_store import key_expert, update_store
    from nanothink.vector_store.neighbours import TrainingNeighbours
    from nanothink.vector_store.store import store_folder

    config, batches, plan = setup.config, setup.batches, setup.plan
    expert = key_expert(model, _built_on(setup)["experts"], config, setup.tokenizer, setup.precision)

    def blocks_ahead() -> Iterator[tuple[str, int]]:
        """What the run will read, each block once."""
        seen: set[tuple[str, int]] = set()
        remaining = max(0, plan.total_steps - setup.state.step) * plan.blocks_per_step
        for position in range(setup.state.position, setup.state.position + remaining):
            if (place := batches.place(position)) not in seen:
                seen.add(place)
                yield place
            if len(seen) == batches.n_blocks:
                return

    def stored() -> TrainingNeighbours:
        return update_store(
            store_folder(setup.spec.checkpoint_dir, setup.spec.stem),
            model,
            expert,
            config.vector_store,
            setup.tokens,
            blocks_ahead,
            vocab_size=setup.tokenizer.vocab_size,
            replace_other=setup.spec.overwrite,
            reporter=reporter,
        )

    # The others find the store that the first has built, and the neighbours that it has looked up.
    known = processes.rank0_first(lambda: (stored(), ""), lambda _: stored())
    stack.callback(known.close)
    return lambda positions: known.read([batches.place(position) for position in positions])


def _objective(
    setup: RunSetup,
    model: LanguageModel,
    reporter: Reporter,
    neighbours: Callable[[Sequence[int]], Neighbours] | None,
    stack: ExitStack,
) -> Objective:
    if isinstance(setup.training, TrainMLAConfig):
        assert isinstance(model, NanoThink)
        states = keep_states(setup, model, reporter)
        if states is not None:
            stack.callback(states.close)
        return Routed(setup.training.entropy_reg, states, neighbours)
    if setup.spec.kind != "diffuser":
        return next_token
    transformer = None
    if setup.config.diffuser.target == "hidden_state":
        assert setup.frozen is not None
        transformer = setup.frozen.build(reporter).to(setup.precision.device)
    return Denoising(setup.training.seed, transformer)


def _callbacks(
    setup: RunSetup, run: Run, store: CheckpointStore, reporter: Reporter, stop: StopRequest
) -> Callbacks:
    config, train_config = setup.config, setup.training
    length = config.model.max_seq_len
    if not any(stream.n_tokens for stream in setup.tokens.val.values()):
        raise DataError("There is no validation text: every domain needs at least two characters of text.")
    validation: Mapping[str, TokenStream] = setup.tokens.val
    sampling = SamplingConfig(max_new_tokens=max(1, train_config.sample_tokens), seed=train_config.seed)

    processes = run.processes

    def calibrate() -> float:
        if isinstance(run.model, NanoThink) and run.model.store_gate is not None:
            return 1.0  # its predictions are no softmax of scaled logits
        return fit_logit_scale(
            run.model,
            {name: stream.sample(train_config.eval_max_tokens) for name, stream in validation.items()},
            length=length,
            precision=run.precision,
            should_stop=stop,
        )

    def evaluate_share() -> Evaluation:
        evaluation = evaluate_model(
            run.model,
            validation,
            length=length,
            batch_size=max(1, EVALUATION_TOKENS // length),
            precision=run.precision,
            max_tokens=train_config.eval_max_tokens,
            reporter=reporter,
            stage="validating",
            should_stop=stop,
            share=(processes.rank, processes.size),
        )
        if isinstance(run.objective, Denoising) and isinstance(run.model, Diffuser):
            errors = denoising_errors(  # so few tokens that every process measures them all
                run.model,
                validation,
                length=length,
                precision=run.precision,
                transformer=run.objective.transformer,
                should_stop=stop,
            )
            evaluation = replace(evaluation, denoising=errors)
        return evaluation

    def evaluate() -> Evaluation:
        if processes.size > 1:
            processes.assert_same_on_all_ranks(
                f"weights after step {run.state.step}", weights_checksum(run.model)
            )
        own_scale = _unless_stopped(processes, calibrate)
        run.model.logit_scale = processes.all_reduce_sum([own_scale if processes.is_rank0 else 0.0])[0]
        return _unless_stopped(processes, evaluate_share).added(processes.all_reduce_sum)

    def sample_here() -> Mapping[str, str]:
        if not processes.is_rank0:
            return {}
        prompts = _sample_prompts(setup)
        tokenizer = setup.tokenizer

        def leave_if_asked(row: int, token: int) -> None:
            if stop():
                raise EvaluationStopped

        continued = generate(
            run.model,
            [tokenizer.encode(p) for p in prompts],
            sampling,
            eos_id=tokenizer.eos_id,
            on_token=leave_if_asked,
        )
        return {prompt: tokenizer.decode(new) for prompt, new in zip(prompts, continued, strict=True)}

    def sample() -> Mapping[str, str]:
        return _unless_stopped(processes, sample_here)

    def save(role: str) -> Path:
        path = {"best": store.best, "interrupted": store.interrupted}.get(role) or store.epoch(
            run.state.epoch
        )
        if processes.is_rank0:
            store.write(path, checkpoint_payload(setup, run))
        return path

    def resume_command(path: Path) -> str:
        asked = setup.spec.device if processes.size == 1 else None  # else each process has its own
        device = ["--device", asked] if asked else []
        return shlex.join([*processes.launcher, "nanothink", "resume", str(path), *device])

    return Callbacks(evaluate, sample, save, reporter=reporter, stop=stop, resume_command=resume_command)


def _sample_prompts(setup: RunSetup) -> list[str]:
    """The prompts that were asked for; else how held-out texts begin, in the language of the data."""
    if setup.training.sample_prompts is not None:
        return list(setup.training.sample_prompts)
    tokenizer = setup.tokenizer
    openings = []
    for stream in list(setup.tokens.val.values())[:_SAMPLED_DOMAINS]:
        tokens = stream.block(0, 1 + _OPENING_TOKENS)[0][1:].tolist()  # what stands first is an EOS
        first_text = takewhile(lambda token: token != tokenizer.eos_id, tokens)
        openings.append(tokenizer.decode(list(first_text)).rstrip("\N{REPLACEMENT CHARACTER}"))
    return list(dict.fromkeys(openings))


def _unless_stopped(processes: Processes, work: Callable[[], T]) -> T:
    """What ``work`` gives; EvaluationStopped if it was stopped in any of the processes."""
    done = None
    with suppress(EvaluationStopped):
        done = work()
    if processes.any(done is None) or done is None:
        raise EvaluationStopped
    return done


def checkpoint_payload(setup: RunSetup, run: Run) -> CheckpointPayload:
    """All that changes the next step, as plain containers and tensors."""
    state: TrainState = run.state
    return {
        "format_version": FORMAT_VERSION,
        "kind": run.model.kind,
        "model_state": model_state(run.model),
        "optimizer_state": run.optimizer.state_dict(),
        "step": state.step,
        "epoch": state.epoch,
        "position": state.position,
        "amp_scaler": run.scaler.state_dict() if run.scaler is not None else None,
        "rng": pack_rng(),
        "early_stopping": {
            "best_loss": state.best_loss,
            "evals_without_improvement": state.evals_without_improvement,
        },
        "best_loss": state.best_loss,
        "config": setup.config.model_dump(mode="json"),
        "tokenizer": setup.tokenizer.to_state(),
        "data_fingerprint": setup.tokens.fingerprint,
        "split": setup.split.to_state(),
        "run": {
            "name": setup.spec.stem,
            "state": state.to_dict(),
            "logit_scale": run.model.logit_scale,
            "nanothink_version": __version__,
            **_built_on(setup),
        },
    }


def _built_on(setup: RunSetup) -> dict[str, Any]:
    """The digest of the transformer that a diffuser's run began with; the experts that are combined."""
    if setup.frozen is not None:
        return {"transformer": setup.frozen.digest}
    if setup.experts:
        return {"experts": as_entries(setup.experts)}
    if setup.resume_point is None:
        return {}
    earlier = setup.resume_point.payload["run"]
    return {name: earlier[name] for name in ("transformer", "experts") if name in earlier}


def _description(setup: RunSetup, run: Run) -> dict[str, Any]:
    return {
        "kind": setup.spec.kind,
        "name": setup.spec.stem,
        "config": setup.config.model_dump(mode="json"),
        "sources": dict(setup.sources),
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "tokenizer": {
            "name": setup.tokenizer.name,
            "vocab_size": setup.tokenizer.vocab_size,
            "fingerprint": setup.tokenizer.fingerprint,
        },
        "data": {
            "fingerprint": setup.tokens.fingerprint,
            "train_tokens": {d: s.n_tokens for d, s in setup.tokens.train.items()},
            "validation_tokens": {d: s.n_tokens for d, s in setup.tokens.val.items()},
            "n_bad_lines": setup.tokens.skipped_records,
        },
        "precision": {
            "device": str(setup.precision.device),
            "dtype": setup.precision.name,
            "reason": setup.precision.reason,
        },
        "machine": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "nanothink": __version__,
            "platform": platform.platform(),
            "threads": torch.get_num_threads(),
            "processes": run.processes.size,
        },
        "started": datetime.now().astimezone().isoformat(timespec="milliseconds"),
    }


def _remarks(setup: RunSetup) -> list[str]:
    """What would surprise a person later, said before the first step."""
    remarks = []
    train_config, plan = setup.training, setup.plan
    done = setup.state.step
    if done > plan.total_steps:
        remarks.append(
            f"{counted(done, 'step')} are done already, more than the {plan.total_steps:,} asked for: "
            "nothing is left to do."
        )
    warmup = effective_warmup(train_config, plan.total_steps)
    if warmup == 0 < train_config.warmup_steps:
        remarks.append(f"No warm-up: this run has {counted(plan.total_steps, 'step')}.")
    elif warmup != train_config.warmup_steps:
        remarks.append(
            f"Warming up over a tenth of this run ({counted(warmup, 'step')}), not "
            f"{counted(train_config.warmup_steps, 'step')}."
        )
    length = setup.config.model.max_seq_len
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
