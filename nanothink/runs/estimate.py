"""Estimate of a run: parameters, tokens, steps, time, memory, disk. For ``--dry-run``."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace

import torch

from nanothink.models import COMBINED
from nanothink.models.low_rank import FACTORS, in_blocks
from nanothink.reporter import SILENT, Reporter
from nanothink.runs.expert_state_cache import kept_bytes
from nanothink.runs.memory import Choice, ModelSizes, choices, device_bytes, with_recomputation
from nanothink.runs.preparing import RunSetup, largest_share
from nanothink.runs.teacher import TEACHER
from nanothink.runs.teaching import estimate_targets
from nanothink.runs.timing import RunTime, time_run
from nanothink.training.optimizer import effective_warmup
from nanothink.training.sharding import without_memory
from nanothink.vector_store.index import bytes_per_key, choose_kind
from nanothink.vector_store.neighbours import bytes_per_neighbour

_FLOAT32 = 4


@dataclass(frozen=True)
class RunEstimate:
    """Sizes in bytes, counts in units of their name."""

    parameters: dict[str, int]
    """Trained parameters, by their role for the optimizer."""
    frozen_parameters: int
    """Numbers in the checkpoint that are not trained."""
    train_tokens: dict[str, int]
    validation_tokens: dict[str, int]
    tokens_per_step: int
    steps: int
    steps_per_epoch: float
    warmup_steps: int
    epochs: float
    n_processes: int
    memory: dict[str, int]
    """Bytes in each process, by use."""
    available_bytes: int
    """Memory that each process may take; 0 if it is unknown."""
    choices: list[Choice]
    """Ways to run with so many processes, and whether they fit."""
    checkpoint_bytes: int
    disk_bytes: int
    disk_free_bytes: int
    states_bytes: int
    """The experts' states on the disk; 0 if they are not kept."""
    targets_bytes: int
    """The teacher's targets on the disk; 0 without a teacher."""
    precision: str
    precision_reason: str
    n_bad_lines: int
    """Lines of the text that are skipped."""
    time: RunTime

    @property
    def peak_memory_bytes(self) -> int:
        return sum(self.memory.values())


def estimate_run(setup: RunSetup, n_processes: int = 1, reporter: Reporter = SILENT) -> RunEstimate:
    """Count what can be counted, time a few steps, and estimate the rest.

    Args:
        setup: of NanoThink, with ``train_mla.fit`` settled.

    Raises:
        UsageError: there are more processes than blocks in a batch.
    """
    config, train_config, plan = setup.config, setup.training, setup.plan
    with without_memory():  # shapes are enough
        model = setup.build_model()
    groups = model.parameter_groups()
    parameters = {role: sum(p.numel() for _, p in named) for role, named in groups.items() if named}
    # Frozen: a base under adapters, a diffuser's table of targets, NanoThink's experts.
    sizes = ModelSizes.of(model, train_config, _in_bfloat16(setup))
    value_bytes = 2 if setup.precision.dtype.itemsize == 2 else 4
    length = config.model.max_seq_len

    def activation_bytes(n_blocks: int) -> int:
        kept = model.activation_bytes(n_blocks, length, value_bytes)
        recomputed = train_config.recompute_activations
        return with_recomputation(model, kept, n_blocks * length) if recomputed else kept

    activations = activation_bytes(largest_share(setup, n_processes))
    shard, windows = config.distributed.shard, train_config.grad_accum_steps
    memory = sizes.memory(n_processes, shard, windows, activations)
    available = device_bytes(setup.precision.device, n_processes)
    store_disk = 0
    if setup.spec.kind == COMBINED and config.vector_store.enabled:
        memory["vector store"], store_disk = _vector_store(setup)
    targets_bytes, targets_seconds = estimate_targets(setup, reporter) if TEACHER in setup.parts else (0, 0.0)
    checkpoint = sizes.weight_bytes + _FLOAT32 * sizes.moments
    epochs = plan.total_steps * plan.blocks_per_step / plan.n_blocks
    snapshots = int(epochs) // train_config.snapshot_every_epochs
    return RunEstimate(
        parameters=parameters,
        frozen_parameters=sizes.frozen,
        train_tokens={name: stream.n_tokens for name, stream in setup.tokens.train.items()},
        validation_tokens={name: stream.n_tokens for name, stream in setup.tokens.val.items()},
        tokens_per_step=plan.blocks_per_step * length,
        steps=plan.total_steps,
        steps_per_epoch=plan.n_blocks / plan.blocks_per_step,
        warmup_steps=effective_warmup(train_config, plan.total_steps),
        epochs=epochs,
        n_processes=n_processes,
        memory=memory,
        available_bytes=available,
        choices=choices(sizes, train_config, n_processes, available, activation_bytes),
        checkpoint_bytes=checkpoint,
        # best, rolling, snapshots, and the temporary file of the one being written
        disk_bytes=checkpoint * (3 + snapshots) + store_disk,
        disk_free_bytes=_free_bytes(setup),
        states_bytes=kept_bytes(setup),
        targets_bytes=targets_bytes,
        precision=setup.precision.name,
        precision_reason=setup.precision.reason,
        n_bad_lines=setup.tokens.skipped_records,
        time=replace(time_run(setup, n_processes, reporter), targets_seconds=targets_seconds),
    )


def _in_bfloat16(setup: RunSetup) -> int:
    """Frozen numbers that stay bfloat16 as they were published."""
    if setup.spec.kind != COMBINED and getattr(setup.training, "lora_rank", None) is None:
        return 0  # trained, or not kept
    if setup.resume_point is not None:
        states = [setup.resume_point.payload["model_state"]]
    else:
        states = [part.payload["model_state"] for name, part in setup.parts.items() if name != TEACHER]
        states = [state for state in states if not any(name.endswith(FACTORS) for name in state)]
    return sum(
        tensor.numel()
        for state in states
        for name, tensor in state.items()
        if in_blocks(name) and tensor.dtype is torch.bfloat16
    )


def _vector_store(setup: RunSetup) -> tuple[int, int]:
    """Bytes of memory and disk of the store once built, with the neighbours of the training blocks."""
    settings, model = setup.config.vector_store, setup.config.model
    n_tokens = sum(stream.n_tokens for stream in setup.tokens.train.values())
    n_keys = min(n_tokens, settings.max_keys or n_tokens)
    index = n_keys * bytes_per_key(choose_kind(settings, n_keys), model.d_model)
    looked_up = min(setup.plan.n_blocks, setup.plan.total_steps * setup.plan.blocks_per_step)
    kept = looked_up * model.max_seq_len * settings.n_neighbours * bytes_per_neighbour(n_keys)
    return index, index + 4 * n_keys + kept


def _free_bytes(setup: RunSetup) -> int:
    folder = setup.spec.checkpoint_dir.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
