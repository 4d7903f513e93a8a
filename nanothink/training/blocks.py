"""Blocks of a model in training: compiled, or recomputed in the backward pass. Weights keep their names.

A block's ``forward`` is replaced for training alone: evaluation and decoding, whose shapes and caches change
from call to call, run the block as it is written.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from nanothink.config import TrainConfig
from nanothink.models.contract import LanguageModel
from nanothink.models.dropout import Dropout
from nanothink.models.mamba_mixer import Mixer

Forward = Callable[..., Any]


def compiles(config: TrainConfig, device: torch.device) -> bool:
    """True if the blocks are compiled: asked for, or "auto" on CUDA."""
    return config.compile == "on" or (config.compile == "auto" and device.type == "cuda")


def set_up_blocks(model: LanguageModel, config: TrainConfig, device: torch.device) -> None:
    """Compile the blocks and recompute their activations, by the settings. Once, before they are sharded."""
    compiled = compiles(config, device)
    if compiled and config.compile == "auto":
        # chosen for the user: what does not compile on this machine runs as it is written
        torch._dynamo.config.suppress_errors = True
    if compiled:
        outside: Any = torch.compiler.disable
        if model.dropout.rate:  # generators are no part of a graph
            model.dropout.__dict__["mask"] = outside(model.dropout.mask)
        for module in model.modules():  # a loop over the tokens would be a graph as long as the text
            if isinstance(module, Mixer):
                module.__dict__["scanned"] = outside(module.scanned)
    for block in model.blocks:
        forward: Forward = block.forward
        if compiled:
            forward = torch.compile(forward)
        if config.recompute_activations:
            forward = _recomputed(forward, model.dropout)
        if forward is not block.forward:
            block.forward = _in_training(block, forward)


def _in_training(block: nn.Module, forward: Forward) -> Forward:
    plain: Forward = block.forward

    def chosen(*inputs: Any) -> Any:
        return forward(*inputs) if block.training and torch.is_grad_enabled() else plain(*inputs)

    return chosen


def _recomputed(forward: Forward, dropout: Dropout) -> Forward:
    """``forward`` that keeps its inputs alone and runs again in the backward pass, with the same masks.

    Activation checkpointing: Chen et al. 2016, "Training deep nets with sublinear memory cost".
    """
    from torch.utils.checkpoint import checkpoint

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), dropout.masks_again(dropout.states())

    def recomputed(*inputs: Any) -> Any:
        return checkpoint(
            forward, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts
        )

    return recomputed
