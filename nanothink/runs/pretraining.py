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
from nanothink.inference.denoising import denoising_errors
from nanothink.inference.evaluate import Evaluation, EvaluationStopped, evaluate_model
from nanothink.inference.generate import generate
from nanothink.inference.sampling import SamplingConfig
from nanothink.models.contract import LanguageModel
from nanothink.models.diffuser import Diffuser
from nanothink.models.nanothink import NanoThink
from nanothink.models.precision import choose_device
from nanothink.models.recall import Neighbours
from nanothink.runs.experts import as_entries
from nanothink.runs.keeping import keep_states
from nanothink.runs.preparing import (
    Configure,
    Prepared,
    earlier_ending,
    ending_settings,
    experts_to_combine,
    frozen_transformer,
    largest_share,
    prepare,
)
from nanothink.runs.resuming import Watch, Where
from nanothink.training.distributed import ALONE, Processes, join
from nanothink.training.events import EvaluationProgress, Event, Note, Observer, RunFinished, RunStarted
from nanothink.training.interruption import StopRequest
from nanothink.training.loop import Run, Services, train
from nanothink.training.objectives import Denoising, Objective, Routed, next_token
from nanothink.training.optimizer import GroupedOptimizer, effective_warmup, learning_rate_fraction
from nanothink.training.recording import RunRecorder
from nanothink.training.routing import RoutingWatch
from nanothink.training.state import TrainState

T = TypeVar("T")

TARGET_SAMPLE_BLOCKS = 64
"""Training blocks over whose targets a diffuser takes their mean and spread."""

EVALUATION_TOKENS = 8192
"""Tokens per evaluation batch: enough to fill two cores, little enough to answer a signal at once."""

_SAMPLED_DOMAINS = 3
_OPENING_TOKENS = 6  # of a held-out text, as a prompt: a few words


def pretrain(where: Where, configure: Configure, *, observe: Observer, watch: Watch) -> RunFinished:
    """Train what ``where`` names, or go on with it.

    Raises:
        NanoThinkError: anything a person can mend, said so; see nanothink.errors.
    """
    with ExitStack() as stack:
        processes = stack.enter_context(join(where.device, watch.note))
        where = replace(where, device=processes.device)
        store = where.store
        if not processes.is_first:
            observe, watch = _unheard, Watch(note=_unheard, progress=lambda *_: None)

        def first() -> tuple[tuple[Prepared, RunFinished | None], str]:
            stack.enter_context(store.lock(watch.note))
            if where.resume is None:
                _check_new_run(where, configure, store, watch)
            prepared = prepare(where, configure, watch)
            largest_share(prepared, processes.size)
            ending = earlier_ending(prepared)
            origin = prepared.origin.path if prepared.origin is not None else None
            word = {
                "origin": str(origin) if origin else None,
                "ending": ending and asdict(ending),
                "types": prepared.precision.settled,  # measured: another process might find otherwise
            }
            return (prepared, ending), json.dumps(word)

        def others(word: str) -> tuple[Prepared, RunFinished | None]:
            """From the same checkpoint, or from none; what the first has made is found, not made again."""
            said = json.loads(word)
            ending = RunFinished(**said["ending"]) if said["ending"] else None
            where_it_began = replace(where, resume=said["origin"])
            return prepare(where_it_began, configure, watch, said["types"]), ending

        prepared, ending = processes.one_after_first(first, others)
        processes.require_same("settings, data or versions", _identity(prepared))
        if ending is not None:
            watch.note("This run is complete. To train on, raise --max-epochs or --max-steps.")
            return ending
        run = build_run(prepared, watch, processes, stack)
        processes.require_same("their first weights", weights_checksum(run.model))
        # Only from here on is there a state to save; a signal during the preparation just ends it.
        say = watch.note if processes.is_first else None
        stop = stack.enter_context(StopRequest(say, forwarded=processes.size > 1))
        if prepared.origin is None and processes.is_first:
            # Before the first step, so that a disk without room says so now, and so that what --overwrite
            # replaces is set aside all at once: the files here, the records just below.
            store.write(store.interrupted, checkpoint_payload(prepared, run))
        leaves_best = prepared.finds_best_anew or _knows_no_better(prepared, store)
        if leaves_best and processes.is_first and (kept := store.keep_best()):
            watch.note(f"The best checkpoint so far is kept as {kept}.")
        tell = observe
        if processes.is_first:
            folder = where.checkpoint_dir / "runs" / where.stem
            recorder = RunRecorder(folder, _description(prepared, run), run.state, watch.note)
            stack.callback(recorder.close)
            recorder.forget_ending()

            def tell(event: Event) -> None:
                recorder(event)
                observe(event)
                watch_routing(event)

            watch_routing = RoutingWatch(tell)

        for line in _remarks(prepared):
            tell(Note(line))
        tell(
            RunStarted(
                name=where.stem,
                step=run.state.step,
                total_steps=run.plan.total_steps,
                epoch=run.state.epoch,
                epochs=run.plan.epochs,
                n_blocks=run.plan.n_blocks,
                blocks_per_step=run.plan.blocks_per_step,
            )
        )
        finished = train(run, _services(prepared, run, store, tell, stop))
        if processes.is_first:
            ending_is_kept = recorder.keep_ending(
                {
                    "reason": finished.reason,
                    "step": finished.step,
                    "epoch": finished.epoch,
                    "best_loss": finished.best_loss,
                    "settings": ending_settings(prepared.training),
                }
            )
            if ending_is_kept:  # else a resume would take the run for one to be trained further
                store.remove_interrupted()
        return finished


def _check_new_run(where: Where, configure: Configure, store: CheckpointStore, watch: Watch) -> None:
    """A mistake in settings or data is said first: mending it must not need --overwrite."""
    resolved = configure(None)
    config = resolved.config
    choose_device(where.device)
    frozen_transformer(where, config, None, watch)
    experts_to_combine(where, resolved, None, watch)
    find_corpus(config.data.data_dir, config.data.domains)
    store.guard_new_run(overwrite=where.overwrite)


def _knows_no_better(prepared: Prepared, store: CheckpointStore) -> bool:
    """Whether the best checkpoint is better than all that this run knows of, and so would be written over.

    It is where a run goes on from a file that is older than its best. The rolling file may be older too, by a
    kill between the two: then the evaluation that follows writes the same best again.
    """
    if prepared.origin is None or prepared.origin.path.resolve() == store.interrupted.resolve():
        return False
    with suppress(CheckpointError, StorageError):
        best, known = read_summary(store.best).best_loss, prepared.state.best_loss
        return best is not None and (known is None or best < known)
    return False


def _unheard(_: object) -> None:
    """What all but the first of several processes say."""


def _identity(prepared: Prepared) -> str:
    """What processes must agree on to train the same model; paths may differ between machines."""
    settings = prepared.config.model_dump(mode="json")
    del settings["data"]["data_dir"]
    return json.dumps(
        [
            settings,
            prepared.tokens.fingerprint,
            prepared.split.described(),
            prepared.tokenizer.fingerprint,
            prepared.state.to_dict(),
            asdict(prepared.plan),
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
    prepared: Prepared, watch: Watch, processes: Processes = ALONE, stack: ExitStack | None = None
) -> Run:
    """Model, optimizer and where they stand: fresh, or as the checkpoint has them.

    Args:
        stack: closes at its end the files that the run reads from; None leaves them open.
    """
    stack = stack or ExitStack()
    train_config = prepared.training
    device = prepared.precision.device
    # Nothing here draws from Python or numpy, but an objective may, and then it must repeat.
    random.seed(train_config.seed)
    np.random.seed(train_config.seed % 2**32)
    torch.manual_seed(train_config.seed)
    model = _build_model(prepared, watch)
    scaler = torch.amp.GradScaler(device.type) if prepared.precision.needs_scaler else None
    state = replace(prepared.state)
    if prepared.origin is not None:
        payload = prepared.origin.payload
        report = restore_model(model, payload, expect_kind=prepared.where.kind, path=prepared.origin.path)
        for line in report.lines():
            watch.note(line)
    elif isinstance(model, Diffuser):
        assert prepared.frozen is not None
        _, targets = prepared.batches.read(0, TARGET_SAMPLE_BLOCKS)
        model.adopt(prepared.frozen.build(watch.note), targets)
    model.to(device)
    neighbours = _remember(prepared, model, watch, processes, stack)
    optimizer = GroupedOptimizer(model.parameter_groups(), train_config)
    if prepared.origin is not None:
        fresh = optimizer.load_state_dict(payload["optimizer_state"])
        # A run saved before its first step has no moments yet; afterwards their absence is worth a line.
        if fresh and payload["step"] > 0:
            watch.note(
                f"Optimizer moments start at zero for {counted(len(fresh), 'parameter')}: "
                + ", ".join(fresh[:5])
                + (" ..." if len(fresh) > 5 else "")
            )
        if scaler is not None and payload["amp_scaler"]:
            scaler.load_state_dict(dict(payload["amp_scaler"]))
        for line in unpack_rng(payload["rng"]):
            watch.note(line)
        prepared.origin.release()
    # The rates of the last step taken, as a run that was never interrupted would hold them: a checkpoint
    # written before the next step must not differ in them.
    last_step = max(0, state.step - 1)
    optimizer.set_fraction(learning_rate_fraction(last_step, prepared.plan.total_steps, train_config))
    processes.watch([parameter for parameter in model.parameters() if parameter.requires_grad])
    return Run(
        model=model,
        optimizer=optimizer,
        scaler=scaler,
        objective=_objective(prepared, model, watch, neighbours, stack),
        batches=prepared.batches,
        precision=prepared.precision,
        config=train_config,
        plan=prepared.plan,
        state=state,
        processes=processes,
    )


def _build_model(prepared: Prepared, watch: Watch) -> LanguageModel:
    """A new one, or one whose weights are still to be restored."""
    if not prepared.experts:
        return prepared.build_model()
    config, vocab_size = prepared.config, prepared.tokenizer.vocab_size
    experts = {e.name: e.build(prepared.precision.device, watch.note) for e in prepared.experts}
    return NanoThink(vocab_size, config.model, config.mla, experts, config.vector_store)


def _remember(
    prepared: Prepared, model: LanguageModel, watch: Watch, processes: Processes, stack: ExitStack
) -> Callable[[Sequence[int]], Neighbours] | None:
    """Attach the memory of a run that has one, and give the neighbours of the blocks at some positions."""
    if not isinstance(model, NanoThink) or model.recall is None:
        return None
    from nanothink.memory.neighbours import TrainingNeighbours
    from nanothink.memory.store import memory_folder
    from nanothink.runs.remembering import key_expert, remember

    config, batches, plan = prepared.config, prepared.batches, prepared.plan
    expert = key_expert(model, _built_on(prepared)["experts"], config, prepared.tokenizer, prepared.precision)

    def blocks_ahead() -> Iterator[tuple[str, int]]:
        """What the run will read, each block once."""
        seen: set[tuple[str, int]] = set()
        remaining = max(0, plan.total_steps - prepared.state.step) * plan.blocks_per_step
        for position in range(prepared.state.position, prepared.state.position + remaining):
            if (place := batches.place(position)) not in seen:
                seen.add(place)
                yield place
            if len(seen) == batches.n_blocks:
                return

    def remembered() -> TrainingNeighbours:
        return remember(
            memory_folder(prepared.where.checkpoint_dir, prepared.where.stem),
            model,
            expert,
            config.vector_store,
            prepared.tokens,
            blocks_ahead,
            vocab_size=prepared.tokenizer.vocab_size,
            replace_other=prepared.where.overwrite,
            note=watch.note,
            progress=watch.progress,
        )

    # The others find the store that the first has built, and the neighbours that it has looked up.
    known = processes.one_after_first(lambda: (remembered(), ""), lambda _: remembered())
    stack.callback(known.close)
    return lambda positions: known.read([batches.place(position) for position in positions])


def _objective(
    prepared: Prepared,
    model: LanguageModel,
    watch: Watch,
    neighbours: Callable[[Sequence[int]], Neighbours] | None,
    stack: ExitStack,
) -> Objective:
    if isinstance(prepared.training, TrainMLAConfig):
        assert isinstance(model, NanoThink)
        states = keep_states(prepared, model, watch)
        if states is not None:
            stack.callback(states.close)
        return Routed(prepared.training.entropy_reg, states, neighbours)
    if prepared.where.kind != "diffuser":
        return next_token
    transformer = None
    if prepared.config.diffuser.target == "hidden_state":
        assert prepared.frozen is not None
        transformer = prepared.frozen.build(watch.note).to(prepared.precision.device)
    return Denoising(prepared.training.seed, transformer)


def _services(
    prepared: Prepared, run: Run, store: CheckpointStore, tell: Observer, stop: StopRequest
) -> Services:
    config, train_config = prepared.config, prepared.training
    length = config.model.max_seq_len
    if not any(stream.n_tokens for stream in prepared.tokens.val.values()):
        raise DataError("There is no validation text: every domain needs at least two characters of text.")
    validation: Mapping[str, TokenStream] = prepared.tokens.val
    sampling = SamplingConfig(max_new_tokens=max(1, train_config.sample_tokens), seed=train_config.seed)

    processes = run.processes

    def evaluate_share() -> Evaluation:
        evaluation = evaluate_model(
            run.model,
            validation,
            length=length,
            batch_size=max(1, EVALUATION_TOKENS // length),
            precision=run.precision,
            max_tokens=train_config.eval_max_tokens,
            on_progress=lambda done, total: tell(EvaluationProgress(done, total)),
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
            processes.require_same(f"weights after step {run.state.step}", weights_checksum(run.model))
        return _unless_stopped(processes, evaluate_share).added(processes.total)

    def sample_here() -> Mapping[str, str]:
        if not processes.is_first:
            return {}
        prompts = _sample_prompts(prepared)
        tokenizer = prepared.tokenizer

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
        if processes.is_first:
            store.write(path, checkpoint_payload(prepared, run))
        return path

    def resume_command(path: Path) -> str:
        asked = prepared.where.device if processes.size == 1 else None  # else each process has its own
        device = ["--device", asked] if asked else []
        return shlex.join([*processes.launcher, "nanothink", "resume", str(path), *device])

    return Services(evaluate, sample, save, observe=tell, stop=stop, resume_command=resume_command)


def _sample_prompts(prepared: Prepared) -> list[str]:
    """The prompts that were asked for; else how held-out texts begin, in the language of the data."""
    if prepared.training.sample_prompts is not None:
        return list(prepared.training.sample_prompts)
    tokenizer = prepared.tokenizer
    openings = []
    for stream in list(prepared.tokens.val.values())[:_SAMPLED_DOMAINS]:
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


def checkpoint_payload(prepared: Prepared, run: Run) -> CheckpointPayload:
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
        "early_stopping": {"best_loss": state.best_loss, "bad_evaluations": state.bad_evaluations},
        "best_loss": state.best_loss,
        "config": prepared.config.model_dump(mode="json"),
        "tokenizer": prepared.tokenizer.to_state(),
        "data_fingerprint": prepared.tokens.fingerprint,
        "split": prepared.split.to_state(),
        "run": {
            "name": prepared.where.stem,
            "state": state.to_dict(),
            "nanothink_version": __version__,
            **_built_on(prepared),
        },
    }


def _built_on(prepared: Prepared) -> dict[str, Any]:
    """The digest of the transformer that a diffuser's run began with; the experts that are combined."""
    if prepared.frozen is not None:
        return {"transformer": prepared.frozen.digest}
    if prepared.experts:
        return {"experts": as_entries(prepared.experts)}
    if prepared.origin is None:
        return {}
    earlier = prepared.origin.payload["run"]
    return {name: earlier[name] for name in ("transformer", "experts") if name in earlier}


def _description(prepared: Prepared, run: Run) -> dict[str, Any]:
    return {
        "kind": prepared.where.kind,
        "name": prepared.where.stem,
        "config": prepared.config.model_dump(mode="json"),
        "sources": dict(prepared.sources),
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "tokenizer": {
            "name": prepared.tokenizer.name,
            "vocab_size": prepared.tokenizer.vocab_size,
            "fingerprint": prepared.tokenizer.fingerprint,
        },
        "data": {
            "fingerprint": prepared.tokens.fingerprint,
            "train_tokens": {d: s.n_tokens for d, s in prepared.tokens.train.items()},
            "validation_tokens": {d: s.n_tokens for d, s in prepared.tokens.val.items()},
            "n_bad_lines": prepared.tokens.skipped_records,
        },
        "precision": {
            "device": str(prepared.precision.device),
            "dtype": prepared.precision.name,
            "reason": prepared.precision.reason,
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


def _remarks(prepared: Prepared) -> list[str]:
    """What would surprise a person later, said before the first step."""
    remarks = []
    train_config, plan = prepared.training, prepared.plan
    done = prepared.state.step
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
    length = prepared.config.model.max_seq_len
    draws = plan.total_steps * plan.blocks_per_step / len(prepared.tokens.train)
    for domain, stream in prepared.tokens.train.items():
        passes = draws / max(1, stream.n_blocks(length))
        if passes > 1 and passes > 4 * plan.total_steps * plan.blocks_per_step / plan.n_blocks:
            remarks.append(
                f"Domain '{domain}' is small: with equal weight for every domain this run reads it "
                f"{passes:.0f} times."
            )
    if prepared.tokens.skipped_records:
        left_out = counted(prepared.tokens.skipped_records, "bad record")
        remarks.append(f"{left_out} left out (--skip-bad-records).")
    return remarks
