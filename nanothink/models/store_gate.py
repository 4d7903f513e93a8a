"""The distribution of a vector store's neighbours, and the gate that mixes it with the model's.

The kNN language model (Khandelwal et al. 2020, section 2): neighbours j of the state at position t, at
similarity s_j, each with the token v_j that followed it in its text, give

    p_mem(v) = Σ_j softmax(s / τ)_j [v_j = v]
    p(v)     = (1 - g) p_model(v) + g p_mem(v)

where they took one λ for g, a learned gate sets it at each position (as in He, Neubig and Berg-Kirkpatrick
2021, "Efficient nearest neighbor language models", section 4.1):

    g = σ(a · evidence + c · u / √D + b)

with u the stream that the router reads. The evidence is the similarity of the nearest neighbour, the share of
p_mem that its token has, and the log-odds of the model's likeliest token, all functions of the tokens up to
t. A position without neighbours has g = 0.

A compacted store keeps one key in place of n_j similar ones with the same token, which then counts n_j times:
softmax(s / τ + log n).

Shapes: ... any, K neighbours, D width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanothink.errors import UsageError
from nanothink.suggestions import did_you_mean

VECTOR_STORE = "vector_store"
"""Name of the vector store beside the experts' names."""

NO_TOKEN = -1
"""Fills up where there are fewer neighbours than were asked for."""

TINY = 1e-20
"""Probability in p_mem of a token that no neighbour has, so that its logarithm is finite."""

_CERTAIN = 1e-4  # probabilities nearer to 0 or 1 than this count the same
_SURE = 12.0  # log-odds beyond which 1 - g would round to 0 in float32
_NEAR = 0.1  # a difference in similarity that matters


@dataclass(frozen=True)
class Neighbours:
    """Nearest neighbours, nearest first. Missing ones come last."""

    similarities: Tensor
    """(..., K) float32, -inf where missing."""
    tokens: Tensor
    """(..., K) int64: the token that followed each; NO_TOKEN where missing."""
    counts: Tensor | None = None
    """(..., K) float32: number of keys that each stands for; None if all are 1."""

    def view(self, *shape: int) -> Neighbours:
        """The same in rows of this shape, (*shape, K)."""
        counts = None if self.counts is None else self.counts.view(*shape, -1)
        return Neighbours(self.similarities.view(*shape, -1), self.tokens.view(*shape, -1), counts)

    def rows(self, chosen: Tensor | slice) -> Neighbours:
        counts = None if self.counts is None else self.counts[chosen]
        return Neighbours(self.similarities[chosen], self.tokens[chosen], counts)

    def to(self, device: torch.device) -> Neighbours:
        counts = None if self.counts is None else self.counts.to(device)
        return Neighbours(self.similarities.to(device), self.tokens.to(device), counts)


class NeighbourSearch(Protocol):
    """Something that finds neighbours."""

    def search(self, queries: Tensor) -> Neighbours:
        """(N, D) states -> N rows of neighbours, on the device of the queries."""
        ...


def neighbour_weights(neighbours: Neighbours, log_temperature: Tensor) -> Tensor:
    """(..., K) softmax of similarities over a temperature: sum 1, or all 0 where there is no neighbour."""
    with torch.autocast(neighbours.tokens.device.type, enabled=False):
        there = neighbours.tokens != NO_TOKEN
        # Zero first: an infinite similarity would make the temperature's gradient NaN, masked or not.
        similarities = neighbours.similarities.float().masked_fill(~there, 0.0)
        scores = similarities * torch.exp(-log_temperature)
        if neighbours.counts is not None:
            scores = scores + neighbours.counts.log()
        none = ~there.any(-1, keepdim=True)
        weights = scores.masked_fill(~there, -torch.inf).masked_fill(none, 0.0).softmax(-1)
        return weights.masked_fill(none, 0.0)


class StoreGate(nn.Module):
    """Temperature and gate. Few parameters, none of a linear layer: the optimizer treats them like biases.

    The start is τ = 0.05 and g = σ(-1.5) = 0.18, whatever the evidence.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.log_temperature = nn.Parameter(torch.tensor(math.log(0.05)))
        self.evidence_weight = nn.Parameter(torch.zeros(3))  # a
        self.stream_weight = nn.Parameter(torch.zeros(width))  # c
        self.bias = nn.Parameter(torch.tensor(-1.5))  # b

    def distribution(self, neighbours: Neighbours) -> Tensor:
        """(..., K) weights of the neighbours, with sum 1; all 0 where there is none."""
        return neighbour_weights(neighbours, self.log_temperature)

    def log_odds(self, stream: Tensor, neighbours: Neighbours, weights: Tensor, peak: Tensor) -> Tensor:
        """Log-odds of the gate, (...) log g / (1 - g); undefined where there are no neighbours.

        Args:
            stream: (..., D), u.
            weights: (..., K), ``distribution(neighbours)``.
            peak: (...) logarithm of the model's greatest probability.
        """
        with torch.autocast(stream.device.type, enabled=False):
            nearest = neighbours.similarities[..., 0].float().clamp(-1.0, 1.0)
            agreeing = neighbours.tokens == neighbours.tokens[..., :1]
            agreement = (weights.detach() * agreeing).sum(-1)
            evidence = torch.stack(
                [
                    (nearest - 0.8) / _NEAR,
                    torch.logit(agreement, eps=_CERTAIN),
                    torch.logit(peak.float().exp(), eps=_CERTAIN),
                ],
                dim=-1,
            )
            of_stream = stream.float() @ self.stream_weight / math.sqrt(len(self.stream_weight))
            odds = evidence @ self.evidence_weight + of_stream + self.bias
            return odds.clamp(-_SURE, _SURE)

    def mix(
        self, log_likelihood: Tensor, peak: Tensor, stream: Tensor, neighbours: Neighbours, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Log-likelihood of each target under the mixture, and g, both (...), given the model's own.

        Args:
            log_likelihood: (...) of the targets under p_model.
            peak, stream: see ``log_odds``.
            targets: (...) tokens.
        """
        weights = self.distribution(neighbours)
        odds = self.log_odds(stream, neighbours, weights, peak)
        with torch.autocast(stream.device.type, enabled=False):
            said = (weights * (neighbours.tokens == targets.unsqueeze(-1))).sum(-1)
            hits = F.logsigmoid(odds) + said.clamp_min(TINY).log()
            mixed = torch.logaddexp(F.logsigmoid(-odds) + log_likelihood, hits)
            there = neighbours.tokens[..., 0] != NO_TOKEN
            share = odds.sigmoid().masked_fill(~there, 0.0)
            return torch.where(there, mixed, log_likelihood), share

    def mix_logits(self, logits: Tensor, stream: Tensor, neighbours: Neighbours) -> tuple[Tensor, Tensor]:
        """Log p over the whole vocabulary, (..., V) float32, and g, (...), given p_model's logits."""
        own = logits.float().log_softmax(-1)
        weights = self.distribution(neighbours)
        odds = self.log_odds(stream, neighbours, weights, own.amax(-1))
        there = neighbours.tokens[..., 0] != NO_TOKEN
        said = torch.zeros_like(own).scatter_add(-1, neighbours.tokens.clamp_min(0), weights)
        hits = F.logsigmoid(odds).unsqueeze(-1) + said.clamp_min(TINY).log()
        mixed = torch.logaddexp(F.logsigmoid(-odds).unsqueeze(-1) + own, hits)
        share = odds.sigmoid().masked_fill(~there, 0.0)
        return torch.where(there.unsqueeze(-1), mixed, own), share


def choose_key_expert(kinds: Mapping[str, str], asked: str | None) -> str:
    """The expert whose states are keys and queries.

    Args:
        kinds: kind of each expert, by name.
        asked: ``vector_store.expert``.

    Raises:
        UsageError: no expert is called that.
    """
    if asked is not None:
        if asked not in kinds:
            raise UsageError(
                f"vector_store.expert={asked}: there is no such expert.{did_you_mean(asked, kinds)} "
                f"There are: {', '.join(kinds)}."
            )
        return asked
    for kind in ("state_space", "transformer"):
        for name, own in kinds.items():
            if own == kind:
                return name
    return next(iter(kinds))
