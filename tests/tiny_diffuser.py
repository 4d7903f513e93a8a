"""A tiny diffuser with a random transformer as its teacher, and what it leaves to chance."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nanothink.config import DiffuserConfig, ModelConfig, TransformerConfig
from nanothink.data.tokens import IGNORE
from nanothink.models.contract import Batch
from nanothink.models.diffuser import Diffuser
from nanothink.models.noise import Draws
from nanothink.models.transformer import Transformer

VOCAB, WIDTH, CONTEXT, LEVELS = 61, 24, 40, 12
SIZES = ModelConfig(d_model=WIDTH, max_seq_len=CONTEXT)
BLOCKS = TransformerConfig(n_layers=2, n_heads=2)
TARGETS = ("input_embedding", "head_row", "hidden_state")


def shake(model: nn.Module, seed: int) -> None:
    """Give every weight a random value, so that nothing is hidden by a zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.3 + (1.0 if parameter.ndim == 1 else 0.0))


def teacher() -> Transformer:
    model = Transformer(VOCAB, SIZES, BLOCKS)
    shake(model, 7)
    return model.eval().requires_grad_(False)


def build(*, trained: bool = True, **shape: Any) -> Diffuser:
    torch.manual_seed(0)
    shape = {"n_layers": 2, "training_steps": LEVELS, "inference_steps": 4, "self_conditioning": 0.5} | shape
    model = Diffuser(VOCAB, SIZES, BLOCKS, DiffuserConfig(**shape))
    model.adopt(teacher(), tokens(8, CONTEXT, seed=11))
    if trained:
        shake(model, 1)
    return model


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def draws(model: Diffuser, batch: int, length: int, first: int = 0) -> Draws:
    return Draws.make(
        5,
        range(first, first + batch),
        length,
        WIDTH,
        n_levels=model.shape.training_steps,
        null_fraction=model.shape.null_fraction,
        guided_fraction=model.shape.self_conditioning,
        device=torch.device("cpu"),
    )


def batch_of(n_blocks: int, length: int = 16, first: int = 0) -> Batch:
    text = torch.cat([tokens(1, length + 1, seed=100 + first + i) for i in range(n_blocks)])
    targets = text[:, 1:].clone()
    targets[first % 2 :: 2, length // 2 :] = IGNORE
    return Batch(text[:, :-1].contiguous(), targets, range(first, first + n_blocks))
