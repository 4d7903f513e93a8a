"""Memory of each process of a training run, computed from sizes alone, and what would fit the device.

Weights, gradients and moments are 4 bytes a number, but for frozen weights in bfloat16. With parameters
shared out (training/sharding.py), N processes keep an N-th of each, and gather two blocks at a time, beside
what is in no block.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from nanothink.config import TrainConfig
from nanothink.models.contract import LanguageModel

_FLOAT32 = 4
_PROCESS_BYTES = 450 * 2**20  # the interpreter with torch loaded, before any tensor
_USABLE = 0.9  # of a device: the rest is fragments, and buffers of libraries

Shard = Literal["full", "none"]


@dataclass(frozen=True)
class ModelSizes:
    """Numbers of a model, by what becomes of them in training."""

    trained: int
    frozen: int
    moments: int
    """Muon keeps one a weight, AdamW two."""
    outside_blocks: int
    """Trained parameters in no block."""
    largest_block: int
    bfloat16: int = 0
    """Those of ``frozen`` that take two bytes."""
    frozen_gathered: int = 0
    """Those of ``frozen`` that are gathered at a time: beside adapters, or of the largest frozen expert."""

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights."""
        return _FLOAT32 * (self.trained + self.frozen) - (_FLOAT32 - 2) * self.bfloat16

    @classmethod
    def of(cls, model: LanguageModel, config: TrainConfig, bfloat16: int = 0) -> ModelSizes:
        """Count those of a model, which may have shapes alone (device "meta")."""
        groups = {role: sum(p.numel() for _, p in named) for role, named in model.parameter_groups().items()}
        trained = sum(groups.values())
        one_moment = groups.get("matrices", 0) if config.optimizer == "muon" else 0
        blocks = [[p for p in block.parameters() if p.requires_grad] for block in model.blocks]
        in_blocks = [sum(p.numel() for p in block) for block in blocks]
        return cls(
            trained=trained,
            frozen=sum(tensor.numel() for tensor in model.state_dict().values()) - trained,
            moments=2 * trained - one_moment,
            outside_blocks=trained - sum(in_blocks),
            largest_block=max(in_blocks, default=0),
            bfloat16=bfloat16,
            frozen_gathered=_gathered(model) - trained + sum(in_blocks) - 2 * max(in_blocks, default=0),
        )

    def memory(self, n_processes: int, shard: Shard, n_windows: int, activations: int) -> dict[str, int]:
        """Bytes in each process at the peak, by use.

        Args:
            n_windows: forward and backward passes per optimizer step.
            activations: bytes that one of them keeps.
        """
        n = n_processes if shard == "full" else 1
        memory = {
            "weights": -(-self.weight_bytes // n),
            "gradients": _FLOAT32 * -(-self.trained // n),
            "optimizer": _FLOAT32 * -(-self.moments // n),
            "activations": activations,
            "process": _PROCESS_BYTES,
        }
        if n_processes > 1:
            at_a_time = self.outside_blocks + 2 * self.largest_block
            # gradients not added over the processes yet: all, where a window has several passes
            memory["gradients"] += _FLOAT32 * (self.trained if n_windows > 1 else at_a_time)
        if n > 1:
            memory["gathered"] = _FLOAT32 * (at_a_time + self.frozen_gathered)
        return memory


def _gathered(model: LanguageModel) -> int:
    """Numbers of parameters gathered at a time: those in no block, two blocks, and as much of one expert."""
    inside = [m for m in model.modules() if isinstance(m, LanguageModel) and m is not model]
    of_experts = {parameter for expert in inside for parameter in expert.parameters()}
    blocks = [sum(p.numel() for p in block.parameters()) for block in model.blocks]
    own = sum(p.numel() for p in model.parameters() if p not in of_experts)
    outside = own - sum(blocks)
    return outside + 2 * max(blocks, default=0) + max(map(_gathered, inside), default=0)


def with_recomputation(model: LanguageModel, activations: int, n_tokens: int) -> int:
    """``LanguageModel.activation_bytes`` where blocks are recomputed: their inputs, and one block's own."""
    n_blocks = max(1, len(model.blocks))
    return activations // n_blocks + _FLOAT32 * model.d_model * n_tokens * n_blocks


@dataclass(frozen=True)
class Choice:
    """A way to run, and what it takes."""

    name: str
    settings: str
    """As ``--set`` takes them."""
    n_bytes: int
    fits: bool


def choices(
    sizes: ModelSizes,
    config: TrainConfig,
    n_processes: int,
    available: int,
    activation_bytes: Callable[[int], int],
) -> list[Choice]:
    """Data-parallel, shared out, and the largest smaller batch that fits where neither does.

    Args:
        available: bytes for each process.
        activation_bytes: what a forward pass over so many blocks of text keeps.
    """

    def choice(name: str, shard: Shard, batch: int) -> Choice:
        windows = config.grad_accum_steps * config.batch_size // batch
        memory = sizes.memory(n_processes, shard, windows, activation_bytes(-(-batch // n_processes)))
        settings = f"distributed.shard={shard}" if n_processes > 1 else ""
        if batch != config.batch_size:
            own = f"{config.section}.batch_size={batch} {config.section}.grad_accum_steps={windows}"
            settings = f"{settings} {own}".strip()
        n_bytes = sum(memory.values())
        return Choice(name, settings, n_bytes, n_bytes <= available)

    whole = "data-parallel" if n_processes > 1 else "as it is"
    found = [choice(whole, "none", config.batch_size)]
    if n_processes > 1:
        found.append(choice("sharded", "full", config.batch_size))
    if not any(each.fits for each in found):
        divisors = [
            b for b in range(config.batch_size - 1, n_processes - 1, -1) if config.batch_size % b == 0
        ]
        smaller = [choice("smaller batch", "full", batch) for batch in divisors]
        found += [each for each in smaller if each.fits][:1]
    return found


def device_bytes(device: torch.device, n_here: int) -> int:
    """Memory that each of ``n_here`` processes on this machine may take; 0 if it is unknown."""
    if device.type == "cuda":
        return int(_USABLE * torch.cuda.mem_get_info(device)[1])
    try:
        return int(_USABLE * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / n_here)
    except (AttributeError, ValueError, OSError):  # Windows
        return 0
