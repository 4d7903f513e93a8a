"""The losses that training minimises. The loop knows only their shape, so one loop serves every phase."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from nanothink.data.tokens import IGNORE
from nanothink.models.contract import Batch, Expert, LanguageModel, Loss
from nanothink.models.nanothink import NanoThink
from nanothink.models.router import routing_entropy
from nanothink.models.store_gate import Neighbours
from nanothink.training.expert_states import ExpertStates

Objective: TypeAlias = Callable[[LanguageModel, Batch, float], Loss]
"""(model, batch, scale) -> the loss: ``scale`` times sums over valid targets."""


def next_token(model: LanguageModel, batch: Batch, scale: float) -> Loss:
    """Cross-entropy of the next token, in nats."""
    return Loss(model.loss(batch.inputs, batch.targets, scale=scale))


@dataclass(frozen=True)
class ExpertObjective:
    """The loss of an expert's own kind: see ``Expert.training_loss``."""

    seed: int
    """The run's, for random choices."""
    base: LanguageModel | None = None
    """Frozen; the model that the expert builds on, if that is needed at every step."""

    def __call__(self, model: LanguageModel, batch: Batch, scale: float) -> Loss:
        assert isinstance(model, Expert)
        return model.training_loss(batch, scale, seed=self.seed, base=self.base)


WEIGHT_PART = "weight_"
"""Prefix of the parts that are an expert's mean weight."""


@dataclass(frozen=True)
class Routed:
    """NanoThink's objective: cross-entropy of the next token, and a pull towards weights that are equal.

    Total = cross_entropy + entropy_reg (log E - H(w)), with H the entropy of each token's weights. Beside
    them the parts have ``routing_entropy``, H, and the mean weight of each expert, and of a vector store.
    """

    entropy_reg: float
    states: ExpertStates | None = None
    """Cache of the experts' states; None computes them each time. The loss is the same."""
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
