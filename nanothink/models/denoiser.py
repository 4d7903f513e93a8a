"""The diffuser's denoiser: feed-forward blocks with adaptive normalisation.

Peebles and Xie 2023, section 3.2 (adaLN-Zero); per position and conditioned on a context vector z as in MAR
(Li et al. 2024, section 3.3). It differs in that the modulation is a sum of a term of z and a term of the
noise level t, so that the first is computed once for all evaluations.

Shapes: ... any, D model width, N noise levels, M = 3 D numbers a block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanothink.models.dropout import Dropout
from nanothink.models.feed_forward import SwiGLU
from nanothink.models.layers import RMSNorm, linear
from nanothink.models.precision import matmul_dtype

_LEVEL_FEATURES = 32
"""Cosines of the noise level: smooth over 100 levels, fine enough to tell neighbours apart."""


@dataclass(frozen=True)
class Condition:
    """The context as the denoiser reads it, computed once for all evaluations at its positions."""

    stream: Tensor
    """(..., D): the initial value of the denoiser's stream."""
    modulation: Tensor
    """(..., layers * M): shift, scale and gate of each block, without the term of the noise level."""


class Denoiser(nn.Module):
    """Feed-forward blocks whose norms are shifted, scaled and gated by context and noise level.

    All blocks begin as the identity and the output at zero.

    Args:
        width: D.
        n_layers: blocks.
        inner: inner width of a block.
        n_levels: N.
        guided: True if it reads an earlier guess (self-conditioning).
        dropout: that of the model.
    """

    level_features: Tensor

    def __init__(
        self, width: int, n_layers: int, inner: int, n_levels: int, *, guided: bool, dropout: Dropout
    ) -> None:
        super().__init__()
        self.width, self.inner, self.dropout = width, inner, dropout
        self.context_proj = linear(width, width)
        self.noisy_proj = linear(width, width)
        self.guess_proj = linear(width, width, zero=True) if guided else None
        self.context_modulation = linear(width, n_layers * 3 * width, zero=True)
        self.level_proj = linear(_LEVEL_FEATURES, width)
        self.level_modulation = linear(width, n_layers * 3 * width, zero=True)
        self.norms = nn.ModuleList(RMSNorm(width) for _ in range(n_layers))
        self.mlps = nn.ModuleList(SwiGLU(width, inner) for _ in range(n_layers))
        self.norm = RMSNorm(width)
        self.out_proj = linear(width, width, zero=True)
        angles = torch.outer(
            torch.arange(n_levels + 1, dtype=torch.float64) / n_levels,
            math.pi * torch.arange(_LEVEL_FEATURES, dtype=torch.float64),
        )  # (N + 1, features)
        self.register_buffer("level_features", 2**0.5 * angles.cos().float(), persistent=False)

    def condition(self, states: Tensor) -> Condition:
        """(..., D) states of the encoder."""
        return Condition(self.context_proj(states), self.context_modulation(states))

    def level_terms(self, levels: Tensor | int) -> Tensor:
        """Terms of the modulation, (layers * M), or (..., layers * M) for (...) int64 levels."""
        if isinstance(levels, int):
            features = self.level_features[levels]
            one: Tensor = self.level_modulation(F.silu(self.level_proj(features)))
            return one
        by_level = self.level_modulation(F.silu(self.level_proj(self.level_features)))  # (N + 1, layers * M)
        return F.embedding(levels, by_level)

    def forward(
        self, condition: Condition, noisy: Tensor | None, levels: Tensor | int, guess: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """One evaluation.

        Args:
            condition: of (..., D) positions.
            noisy: x_t, (..., D); None stands for zeros.
            levels: t, (...) int64, or one for all.
            guess: an earlier guess at the clean target, (..., D); None stands for zeros.

        Returns:
            The prediction, and the last normalised state, (..., D) float32 each.
        """
        x = condition.stream.float()
        dtype = matmul_dtype(x)
        if noisy is not None:
            x = x + self.noisy_proj(noisy.to(dtype))
        if guess is not None and self.guess_proj is not None:
            x = x + self.guess_proj(guess.to(dtype))
        of_level = self.level_terms(levels)
        terms = (condition.modulation + of_level).chunk(3 * len(self.norms), dim=-1)
        for i, (norm, mlp) in enumerate(zip(self.norms, self.mlps, strict=True)):
            shift, scale, gate = terms[3 * i : 3 * i + 3]
            inside = torch.addcmul(shift, norm(x, dtype), 1 + scale)
            x = torch.addcmul(x, self.dropout(mlp(inside).float()), (1 + gate).float())
        hidden = self.dropout(self.norm(x))
        return self.out_proj(hidden.to(dtype)).float(), hidden

    def activation_bytes(self, value_bytes: int) -> int:
        """Bytes a position that an evaluation keeps for the backward pass."""
        return len(self.mlps) * value_bytes * (6 * self.width + 2 * self.inner) + 20 * self.width

    def reading_bytes(self, value_bytes: int) -> tuple[int, int]:
        """Bytes of an evaluation without gradients: for each position, and for all of them together."""
        terms = 3 * len(self.mlps) * self.width
        per_position = 4 * self.width + value_bytes * (2 * terms + 3 * self.width + 3 * self.inner)
        return per_position, value_bytes * len(self.level_features) * terms
