"""What a step minimises. The loop knows only this shape, so one loop serves every phase."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch

from nanothink.models.contract import LanguageModel
from nanothink.models.diffuser import Diffuser
from nanothink.models.noise import Draws
from nanothink.models.transformer import Transformer


@dataclass(frozen=True)
class Batch:
    """Blocks of text, and which of the run's blocks they are."""

    inputs: torch.Tensor
    """(B, T) int64."""
    targets: torch.Tensor
    """(B, T) int64, IGNORE where there is nothing to predict."""
    positions: Sequence[int]
    """Of each block in the run's order; with the seed they decide whatever an objective leaves to chance."""


@dataclass(frozen=True)
class Loss:
    """Sums over the valid targets of a batch, times the scale that was asked for."""

    total: torch.Tensor
    """Scalar; what is minimised."""
    parts: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Scalars by name, for the records; empty where the total says it all."""


Objective: TypeAlias = Callable[[LanguageModel, Batch, float], Loss]
"""(model, batch, scale) -> the loss: ``scale`` times sums over valid targets."""


def next_token(model: LanguageModel, batch: Batch, scale: float) -> Loss:
    """Cross-entropy of the next token, in nats."""
    return Loss(model.loss(batch.inputs, batch.targets, scale=scale))


@dataclass(frozen=True)
class Denoising:
    """The diffuser's objective: squared errors of the clean target, and cross-entropy of the head.

    Total = mse_weight (mse_pure + mse_noised) + cross_entropy_weight (cross_entropy + rounding / every), with
    the parts of ``Diffuser.denoising_losses``. At cross_entropy_weight 0 the head's part stays in with weight
    1, but reaches the head alone.
    """

    seed: int
    """Of the noise; the run's."""
    transformer: Transformer | None = None
    """Frozen; needed where the target is its hidden state."""

    def __call__(self, model: LanguageModel, batch: Batch, scale: float) -> Loss:
        assert isinstance(model, Diffuser)
        shape = model.shape
        draws = Draws.make(
            self.seed,
            batch.positions,
            batch.inputs.shape[1],
            model.d_model,
            n_levels=shape.training_steps,
            null_fraction=shape.null_fraction,
            guided_fraction=shape.self_conditioning,
            device=batch.inputs.device,
        )
        clean = model.clean_targets(batch.targets, self.transformer)
        parts = model.denoising_losses(batch.inputs, batch.targets, clean, draws, scale)
        total = shape.mse_weight * (parts["mse_pure"] + parts["mse_noised"])
        of_head = parts["cross_entropy"]
        if "rounding" in parts:
            of_head = of_head + parts["rounding"] / shape.rounding_every
        total = total + (shape.cross_entropy_weight or 1.0) * of_head
        return Loss(total, {name: part.detach() for name, part in parts.items()})
