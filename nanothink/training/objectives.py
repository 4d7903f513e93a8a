"""What a step minimises. The loop knows only this shape, so one loop serves every phase."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch

from nanothink.models.contract import IGNORE, LanguageModel
from nanothink.models.diffuser import Diffuser
from nanothink.models.nanothink import NanoThink, routing_entropy
from nanothink.models.noise import Draws
from nanothink.models.store_gate import Neighbours
from nanothink.models.transformer import Transformer
from nanothink.training.expert_states import ExpertStates


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


WEIGHT_PART = "weight_"
"""Before an expert's name: the part of the loss's record that is its mean weight."""


@dataclass(frozen=True)
class Routed:
    """NanoThink's objective: cross-entropy of the next token, and a pull towards weights that are equal.

    Total = cross_entropy + entropy_reg (log E - H(w)), with H the entropy of each token's weights. Beside
    them the parts have ``routing_entropy``, H, and the mean weight of each expert, and of a vector store.
    """

    entropy_reg: float
    states: ExpertStates | None = None
    """Where the experts' states are kept; None: they are computed each time. The loss is the same."""
    neighbours: Callable[[Sequence[int]], Neighbours] | None = None
    """Neighbours in the vector store at each token of some blocks, (B, T, K); None without a store."""

    def __call__(self, model: LanguageModel, batch: Batch, scale: float) -> Loss:
        assert isinstance(model, NanoThink)
        known = self.states.of(model, batch.inputs, batch.positions) if self.states is not None else None
        hits = None
        if self.neighbours is not None:
            hits = self.neighbours(batch.positions).to(batch.inputs.device)
        cross_entropy, trust = model.loss_and_routing(
            batch.inputs, batch.targets, scale=scale, states=known, neighbours=hits
        )
        weights = model.router_weights(trust)
        valid = (batch.targets != IGNORE).float() * scale  # (B, T)
        entropy = (routing_entropy(weights) * valid).sum()
        lacking = math.log(len(model.names)) * valid.sum() - entropy
        means = (trust.detach() * valid.unsqueeze(-1)).sum((0, 1))  # no product: autocast would narrow it
        parts = {"cross_entropy": cross_entropy.detach(), "routing_entropy": entropy.detach()}
        parts |= {f"{WEIGHT_PART}{name}": mean for name, mean in zip(model.components, means, strict=True)}
        return Loss(cross_entropy + self.entropy_reg * lacking, parts)
