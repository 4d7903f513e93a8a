"""A run built from its set-up: model, optimizer, objective and vector store, fresh or from the checkpoint."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from typing import Any, cast

import numpy as np
import torch

from nanothink.checkpoints import CheckpointPayload
from nanothink.checkpoints.restore import restore_model, unpack_rng
from nanothink.config import TrainMLAConfig
from nanothink.models import COMBINED, EXPERTS
from nanothink.models.contract import Expert, LanguageModel
from nanothink.models.low_rank import FACTORS, keep_bfloat16
from nanothink.models.nanothink import NanoThink
from nanothink.models.store_gate import Neighbours
from nanothink.reporter import SILENT, Reporter
from nanothink.runs.expert_state_cache import keep_states
from nanothink.runs.initial import INITIAL
from nanothink.runs.preparing import RunSetup
from nanothink.runs.resuming import ResumePoint
from nanothink.runs.saved_model import SavedModel
from nanothink.runs.saving import built_on
from nanothink.runs.teacher import TEACHER
from nanothink.runs.teaching import make_targets
from nanothink.runs.vector_store import KeyExpert, ModelStore, key_entry, owner_of
from nanothink.training.blocks import set_up_blocks
from nanothink.training.distillation import Taught
from nanothink.training.distributed import ALONE, Processes
from nanothink.training.loop import Run
from nanothink.training.objectives import ExpertObjective, Objective, Routed
from nanothink.training.optimizer import GroupedOptimizer, learning_rate_fraction
from nanothink.training.sharding import without_memory
from nanothink.vector_store.manifest import store_folder
from nanothink.vector_store.neighbours import RepeatedSearch, TrainingNeighbours
from nanothink.wording import counted

TARGET_SAMPLE_BLOCKS = 64
"""Training blocks whose targets a model sees that adopts another: see ``Expert.adopt``."""


def build_run(
    setup: RunSetup, reporter: Reporter = SILENT, processes: Processes = ALONE, stack: ExitStack | None = None
) -> Run:
    """Build model, optimizer, objective and state of a run; restore them from the checkpoint if there is one.

    Args:
        stack: closes the files that the run reads from; None leaves them open.
    """
    stack = stack or ExitStack()
    train_config = setup.training
    device = setup.precision.device
    taught = None
    if TEACHER in setup.parts:  # before the seeds are set: what is on the disk already is not computed again
        taught = processes.rank0_first(
            lambda: (make_targets(setup, reporter), ""), lambda _: make_targets(setup)
        )
        stack.callback(taught.close)
    # Nothing here draws from Python or numpy, but an objective may, and then it must repeat.
    random.seed(train_config.seed)
    np.random.seed(train_config.seed % 2**32)
    torch.manual_seed(train_config.seed)
    # Of what several processes resume each reads its own rows. Else rank 0 has the model, and sends them.
    model, in_rows = None, False
    if processes.size > 1 and (setup.resume_point is not None or not processes.is_rank0):
        with without_memory():
            model = setup.build_model()
        if setup.resume_point is not None:
            saved = setup.resume_point.payload["model_state"]
            in_rows = has_all(model, saved)
            keep_bfloat16(model, saved)
    has_values = processes.is_rank0 and not in_rows
    if model is None or has_values:
        torch.manual_seed(train_config.seed)
        model = _build_model(setup, reporter)
    scaler = torch.amp.GradScaler(device.type) if setup.precision.needs_scaler else None
    state = replace(setup.state)
    if setup.resume_point is not None and has_values:
        _restore(model, setup.resume_point, reporter)
    elif has_values and isinstance(model, Expert):
        for name, base in setup.parts.items():
            if name == TEACHER:
                continue
            _, targets = setup.batches.read(0, TARGET_SAMPLE_BLOCKS)
            built = _built(base, torch.device("cpu"), reporter)
            if name == INITIAL and not model.head_weight.requires_grad:  # frozen under adapters
                keep_bfloat16(model, built.state_dict())
            model.adopt(built, targets)
    if processes.size == 1:  # else each process puts its own rows there
        model.to(device)
    elif not in_rows:
        model.logit_scale, drawn = processes.of_rank0((model.logit_scale, torch.get_rng_state()))
        torch.set_rng_state(drawn)
    neighbours = _update_store(setup, model, reporter, processes, stack)
    model.joint_gate = None  # that of an earlier end of this run
    model.dropout.rate = train_config.dropout
    set_up_blocks(model, train_config, device)
    if taught is not None:
        objective: Objective = Taught(taught, setup.config.distillation.weight)
    else:
        objective = _objective(setup, reporter, neighbours, stack)
    leave_whole, shard = _kept_whole(model, objective), setup.config.distributed.shard
    placement = processes.place(model, shard, leave_whole, from_rank0=not in_rows)
    optimizer = GroupedOptimizer(placement.groups(), train_config, placement)
    if setup.resume_point is not None:
        payload = setup.resume_point.payload
        if in_rows:
            _restore(model, setup.resume_point, reporter)
            model.joint_gate = None
        fresh = optimizer.load_state_dict(payload["optimizer_state"], setup.resume_point.read_moments)
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
    return Run(
        model=model,
        optimizer=optimizer,
        scaler=scaler,
        objective=objective,
        batches=taught if taught is not None else setup.batches,
        precision=setup.precision,
        config=train_config,
        plan=setup.plan,
        state=state,
        processes=processes,
        placed=placement,
        evaluates_first=isinstance(model, NanoThink),
    )


def _restore(model: LanguageModel, point: ResumePoint, reporter: Reporter) -> None:
    report = restore_model(
        model, point.payload, expect_kind=model.kind, path=point.path, read=point.read_weights
    )
    for line in report.lines():
        reporter.note(line)


def has_all(model: torch.nn.Module, saved: Mapping[str, torch.Tensor]) -> bool:
    """True if every weight of the model is among those saved, in its shape, and no adapter that it lacks."""
    own = model.state_dict()
    whole = all(name in saved and saved[name].shape == weight.shape for name, weight in own.items())
    return whole and all(name in own for name in saved if name.endswith(FACTORS))


def _kept_whole(model: LanguageModel, objective: Objective) -> list[torch.nn.Module]:
    """Frozen experts that processes do not read in step, since each computes what its cache lacks."""
    reads_alone = isinstance(objective, Routed) and objective.states is not None
    return list(cast(NanoThink, model).experts) if reads_alone else []


def weights_checksum(weights: Mapping[str, torch.Tensor]) -> str:
    """Checksum of weights, in one pass. Ranks compare it: a difference of one bit changes it."""
    sums = [
        tensor.detach().contiguous().view(torch.int32).sum(dtype=torch.int64).cpu()
        for _, tensor in sorted(weights.items())
        if tensor.dtype is torch.float32 and tensor.numel()
    ]
    return str([int(each) for each in sums])


def _build_model(setup: RunSetup, reporter: Reporter) -> LanguageModel:
    """A new model, or one whose weights are not restored yet."""
    if setup.spec.kind != COMBINED or not setup.parts:
        return setup.build_model()
    config, vocab_size = setup.config, setup.tokenizer.vocab_size
    experts = {name: _built(part, setup.precision.device, reporter) for name, part in setup.parts.items()}
    return NanoThink(vocab_size, config.model, config.mla, experts, config.vector_store)


def _built(saved: SavedModel, device: torch.device, reporter: Reporter) -> LanguageModel:
    """The frozen model, with a note on each kind of weight that did not fit."""
    model, differences = saved.build(device)
    for line in differences:
        reporter.note(f"{saved.path}: {line}")
    return model


def _update_store(
    setup: RunSetup, model: LanguageModel, reporter: Reporter, processes: Processes, stack: ExitStack
) -> Callable[[Sequence[int]], Neighbours] | None:
    """Attach the run's vector store, if it has one; return a function from positions to their neighbours."""
    if not isinstance(model, NanoThink) or model.store_gate is None:
        return None
    shared_out = processes.size > 1
    load = cache(lambda: _key_expert(setup, reporter)) if shared_out else None
    own, batches = store_of_run(setup, model, load), setup.batches

    def stored() -> TrainingNeighbours:
        store = own.open_or_build(setup.tokens, replace=setup.spec.overwrite, reporter=reporter)
        known = own.neighbours(store, setup.tokens, blocks_ahead(setup), reporter)
        model.vector_store = RepeatedSearch(store)
        if load is not None:
            load.cache_clear()  # needed again for a block alone that cannot be read back
        return known

    # Rank 0 builds the store and looks the neighbours up; the other ranks find both on the disk.
    known = processes.rank0_first(lambda: (stored(), ""), lambda _: stored())
    stack.callback(known.close)
    return lambda positions: known.read([batches.place(position) for position in positions])


def store_of_run(
    setup: RunSetup, model: NanoThink, load: Callable[[], LanguageModel] | None = None
) -> ModelStore:
    """The vector store that a run uses, whether it is built yet or not.

    Args:
        load: gives the key expert; None: it is the model's own, which is whole here.
    """
    config = setup.config
    entry = _key_entry(setup)
    inside = cast(LanguageModel, model.experts[model.names.index(entry["name"])])
    expert = KeyExpert(owner_of(entry, config, setup.tokenizer), load or (lambda: inside), setup.precision)
    folder = store_folder(setup.spec.checkpoint_dir, setup.spec.stem)
    return ModelStore(folder, config.vector_store, expert, setup.tokenizer)


def _key_entry(setup: RunSetup) -> Mapping[str, Any]:
    return key_entry(built_on(setup)["experts"], setup.config.vector_store.expert)


def _key_expert(setup: RunSetup, reporter: Reporter) -> LanguageModel:
    """A copy of the expert whose states are keys, read by itself: that of the model is shared out."""
    name, device, point = _key_entry(setup)["name"], setup.precision.device, setup.resume_point
    if point is None:
        saved = setup.parts[name]
    else:
        prefix = f"experts.{[inside.name for inside in setup.inside].index(name)}."
        weights = {n: t for n, t in point.payload["model_state"].items() if n.startswith(prefix)}
        if point.read_weights is not None:
            weights = {name: torch.empty_like(tensor, device="cpu") for name, tensor in weights.items()}
            point.read_weights(weights)
        payload: CheckpointPayload = {**point.payload, "model_state": weights}
        saved = SavedModel.of(point.path, payload).expert(name)
    return _built(saved, device, reporter).to(device)


def blocks_ahead(setup: RunSetup) -> Iterator[tuple[str, int]]:
    """The blocks that a run will read, each once."""
    batches, plan, seen = setup.batches, setup.plan, set[tuple[str, int]]()
    remaining = max(0, plan.total_steps - setup.state.step) * plan.blocks_per_step
    for position in range(setup.state.position, setup.state.position + remaining):
        if (place := batches.place(position)) not in seen:
            seen.add(place)
            yield place
        if len(seen) == batches.n_blocks:
            return


def _objective(
    setup: RunSetup,
    reporter: Reporter,
    neighbours: Callable[[Sequence[int]], Neighbours] | None,
    stack: ExitStack,
) -> Objective:
    if isinstance(setup.training, TrainMLAConfig):
        states = keep_states(setup, built_on(setup)["experts"], reporter)
        if states is not None:
            stack.callback(states.close)
        return Routed(setup.training.entropy_reg, states, neighbours)
    base, built = EXPERTS[setup.spec.kind].model().base(setup.config), None
    if base is not None and base.at_every_step:
        device = setup.precision.device
        built = _built(setup.parts[base.kind], device, reporter).to(device)
    return ExpertObjective(setup.training.seed, built)
