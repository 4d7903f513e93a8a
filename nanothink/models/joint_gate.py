"""One gate over a model and its memories: the product of experts, the vector store, the document cache.

    p(v) = Σ_i g_i(f) p_i(v)        g = softmax(A tanh(B f + b) + a)

p_0 is the model's own distribution (a product of experts, or a single model), the others are those of a
memory's neighbours, as in the kNN language model (Khandelwal et al. 2020, section 2) and the continuous cache
(Grave, Joulin and Usunier 2017, section 3.1). They mix with one constant, He, Neubig and Berg-Kirkpatrick
(2021, section 4.1) with a learned gate for one memory. Here a perceptron of a few tanh units gates all. It
reads features of distributions alone, no states, so that a few thousand tokens fit it:

- of each expert its entropy, greatest log-probability and margin over the second; of each pair the logarithm
  of their symmetric divergence and whether they predict the same token;
- of the product the greatest log-probability and the entropy; unigram log-frequency of the token read and of
  the one predicted;
- of each memory the greatest similarity, how far the eighth is behind, the share of its likeliest token, the
  probability it gives to the product's prediction, whether both predict the same, and whether it is empty.

An empty memory has no share. Each is a function of the tokens read, so a causal model stays causal.

Shapes: N tokens, V vocabulary, E experts, M memories, K neighbours, F features, H hidden units.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from nanothink.models.loss import CHUNK_ROWS
from nanothink.models.store_gate import (
    NO_TOKEN,
    TINY,
    VECTOR_STORE,
    Neighbours,
    neighbour_weights,
)

if TYPE_CHECKING:
    from nanothink.models.contract import LanguageModel

DOCUMENT_CACHE = "document_cache"
"""Name of the document cache beside those of the experts and the vector store."""

GATE_PREFIX = "joint_gate."
"""Before the names of a gate's weights among those of a checkpoint."""

MEMORIES = (VECTOR_STORE, DOCUMENT_CACHE)
"""In the order of a gate that has both; one that has no vector store has the last alone."""


def memory_names(stored: bool, n_caches: int) -> tuple[str, ...]:
    """Names of the memories of a gate, in their order: the document cache's for each one that there is."""
    return (*MEMORIES[: int(stored)], *MEMORIES[1:] * n_caches)


_NEAR_ZERO = 1e-3  # probabilities nearer to 0 or 1 than this count the same
_FAR = -30.0  # score of an empty memory
_LARGEST = 4.0  # standard deviations that a feature counts at most
_FEATURE_TEMPERATURE = 0.05  # of the memories' features, whatever temperatures the mixture learns
_OF_PRODUCT = 4  # features of the model's own prediction, after those of single experts
_IGNORED = 1e6  # deviation of a feature that a linear gate does not look at
_RANK = 8  # the neighbour whose distance says how many are near


@dataclass(frozen=True)
class Evidence:
    """What the gate sees of N tokens, and what it mixes."""

    features: Tensor
    """(N, F) float32."""
    memories: Sequence[Neighbours]
    """M memories' neighbours, (N, K) each."""

    def without_last(self, n: int) -> Evidence:
        """The same with the last ``n`` memories empty."""
        kept = len(self.memories) - n
        empty = no_neighbours(len(self.features), self.features.device)
        features = self.features.clone()
        features[:, features.shape[1] - n * len(_EMPTY) :] = features.new_tensor(_EMPTY * n)
        return Evidence(features, [*self.memories[:kept], *[empty] * n])

    def rows(self, chosen: Tensor | slice) -> Evidence:
        return Evidence(self.features[chosen], [memory.rows(chosen) for memory in self.memories])


def gated_rows(
    model: LanguageModel,
    unigram: Tensor,
    states: Tensor,
    weights: Tensor | None,
    tokens: Tensor,
    memories: Sequence[Neighbours],
) -> Iterator[tuple[slice, Tensor, Evidence]]:
    """Evidence of N positions, some hundred at a time: rows, the model's log-probabilities (R, V), evidence.

    Args:
        model: whose head and experts predict.
        unigram: (V,) log-frequencies.
        states: (N, D) final states.
        weights: (N, E) of the experts of a combined model.
        tokens: (N,) the tokens read last.
        memories: neighbours, (N, K) each.
    """
    for start in range(0, len(states), CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        experts = model.expert_logits(states[rows], None if weights is None else weights[rows])
        product = model.predicted(states[rows]).log_softmax(-1)
        found = [neighbours.rows(rows) for neighbours in memories]
        yield rows, product, evidence_of(experts, product, tokens[rows], unigram, found)


def no_neighbours(n: int, device: torch.device) -> Neighbours:
    """N empty rows, (N, 1)."""
    tokens = torch.full((n, 1), NO_TOKEN, device=device)
    return Neighbours(torch.full((n, 1), -torch.inf, device=device), tokens)


def evidence_of(
    experts: Sequence[Tensor],
    product: Tensor,
    tokens: Tensor,
    unigram: Tensor,
    memories: Sequence[Neighbours],
) -> Evidence:
    """Evidence of N positions.

    Args:
        experts: (N, V) logits each.
        product: (N, V) log-probabilities of the model.
        tokens: (N,) the tokens read last.
        unigram: (V,) log-frequencies.
        memories: neighbours, (N, K) each.
    """
    log_p = [logits.float().log_softmax(-1) for logits in experts]
    p = [each.exp() for each in log_p]
    features: list[Tensor] = []
    predicted = []
    for own, probabilities in zip(log_p, p, strict=True):
        first, second = own.topk(2, -1).values.unbind(-1)
        features += [-(probabilities * own).sum(-1), first, first - second]
        predicted.append(own.argmax(-1))
    for i in range(len(experts)):
        for j in range(i):
            divergence = ((p[i] - p[j]) * (log_p[i] - log_p[j])).sum(-1)
            features += [divergence.clamp_min(1e-6).log(), (predicted[i] == predicted[j]).float()]
    peak, likeliest = product.max(-1)
    features += [peak, -(product.exp() * product).sum(-1), unigram[tokens], unigram[likeliest]]
    for neighbours in memories:
        features += _memory_features(neighbours, likeliest)
    return Evidence(torch.stack(features, -1), memories)


def n_expert_features(n_experts: int) -> int:
    """Features that do not come from memories."""
    return 3 * n_experts + n_experts * (n_experts - 1) + _OF_PRODUCT


_EMPTY = (0.0, 0.0, 0.0, 0.0, 0.0, 1.0)  # the features of a memory that holds nothing


def _memory_features(neighbours: Neighbours, likeliest: Tensor) -> list[Tensor]:
    there = neighbours.tokens != NO_TOKEN  # (N, K)
    similarities = neighbours.similarities.float().masked_fill(~there, 0.0)
    weights = neighbour_weights(neighbours, similarities.new_tensor(math.log(_FEATURE_TEMPERATURE)))
    nearest = neighbours.tokens[:, 0]
    behind = similarities[:, min(_RANK, similarities.shape[1]) - 1]
    agreement = (weights * (neighbours.tokens == nearest[:, None])).sum(-1)
    supported = (weights * (neighbours.tokens == likeliest[:, None])).sum(-1)
    none = ~there[:, 0]
    found = [
        (similarities[:, 0] - 0.8) / 0.1,
        (similarities[:, 0] - behind) / 0.1,
        torch.logit(agreement, eps=_NEAR_ZERO),
        torch.logit(supported, eps=_NEAR_ZERO),
        (nearest == likeliest).float(),
    ]
    return [feature.masked_fill(none, 0.0) for feature in found] + [none.float()]


# The usual gate, as benchmarks/usual_gate.py fits it (docs/log.md). A row for each feature: mean, deviation,
# and its weight in the share of the vector store, of the document cache, of the cache alone.
_USUAL = (
    (-1.75, 0.92, 0.01, 0.07, 0.23),
    (3.95, 1.41, -0.36, -0.17, 0.17),
    (-6.55, 1.57, 0.26, 0.00, -0.23),
    (-5.77, 1.67, -0.39, -0.42, -0.29),
    (1.34, 0.56, 0.50, -0.37, 0.0),
    (0.51, 0.53, 0.22, 0.20, 0.0),
    (-1.16, 1.76, 0.63, 0.34, 0.0),
    (-1.60, 2.36, 0.10, -0.01, 0.0),
    (0.29, 0.45, -0.09, -0.13, 0.0),
    (0.0, _IGNORED, 0.0, 0.0, 0.0),
    (-0.41, 2.14, -0.25, 1.34, 1.33),
    (2.27, 1.77, 0.03, -0.20, -0.21),
    (0.86, 2.66, 0.09, 0.49, 0.59),
    (-4.06, 3.67, -0.03, 0.12, 0.11),
    (0.16, 0.37, 0.06, -0.05, -0.04),
    (0.0, _IGNORED, 0.0, 0.0, 0.0),
)
_USUAL_BIAS = (-1.53, -1.27, -1.55)
_USUAL_TEMPERATURE = (0.024, 0.078)


@dataclass(frozen=True)
class JointGate:
    """A fitted gate: plain tensors, which no optimizer of the model knows."""

    names: tuple[str, ...]
    """Of the memories, in order."""
    weights: Mapping[str, Tensor]
    """``mean``, ``deviation`` (F,): of the features. ``hidden`` (H, F), ``hidden_bias`` (H,), ``out``
    (1 + M, H), ``out_bias`` (1 + M,); a linear gate has no hidden ones, and ``out`` is (1 + M, F).
    ``log_temperature`` (M,). ``unigram`` (V,): log-frequencies. If there, ``cache_alone`` (): see below, and
    ``n_caches`` (): document caches, where there are several."""

    @classmethod
    def start(
        cls,
        names: Sequence[str],
        features: Tensor,
        unigram: Tensor,
        *,
        n_hidden: int,
        generator: torch.Generator,
    ) -> JointGate:
        """Equal whatever the features: memories at e^-1.5 times the model's share, temperature 0.04.

        Args:
            features: (N, F) of the text to fit on, for their means and spreads.
            n_hidden: H; 0 for a linear gate.
        """
        n_features, n_sources = features.shape[1], 1 + len(names)
        weights = {
            "mean": features.mean(0),
            "deviation": features.std(0) + 1e-6,
            "out": torch.zeros(n_sources, n_hidden or n_features),
            "out_bias": torch.tensor([0.0] + [-1.5] * len(names)),
            "log_temperature": torch.full((len(names),), math.log(0.04)),
            "unigram": unigram,
        }
        if (n_caches := list(names).count(DOCUMENT_CACHE)) > 1:
            weights["n_caches"] = torch.tensor(float(n_caches))
        if n_hidden:
            bound = n_features**-0.5
            drawn = torch.rand(n_hidden, n_features + 1, generator=generator) * 2 - 1
            weights |= {"hidden": drawn[:, 1:] * bound, "hidden_bias": drawn[:, 0] * bound}
        return cls(tuple(names), weights)

    @classmethod
    def usual(cls, names: Sequence[str], n_experts: int, unigram: Tensor) -> JointGate:
        """A linear gate for a model that there is no text to fit one for: weights fitted once, for another
        model on other text (``_USUAL``)."""
        own = n_expert_features(n_experts) - _OF_PRODUCT
        both = len(names) > 1
        rows = _USUAL if both else _USUAL[:_OF_PRODUCT] + _USUAL[_OF_PRODUCT + len(_EMPTY) :]
        mean, deviation, *of_memories = torch.tensor(rows).unbind(1)
        columns = slice(2) if both else slice(2, 3)
        out = torch.stack([torch.zeros_like(mean), *of_memories[columns]])
        weights = {
            "mean": F.pad(mean, (own, 0)),
            "deviation": F.pad(deviation, (own, 0), value=_IGNORED),
            "out": F.pad(out, (own, 0)),
            "out_bias": torch.tensor([0.0, *list(_USUAL_BIAS)[columns]]),
            "log_temperature": torch.tensor(_USUAL_TEMPERATURE[-len(names) :]).log(),
            "unigram": unigram,
        }
        return cls(tuple(names), weights)

    @classmethod
    def of_weights(cls, weights: Mapping[str, Tensor], n_experts: int, vocab_size: int) -> JointGate:
        """The gate with these weights.

        Raises:
            ValueError: they are no gate of a model of so many experts and tokens.
        """
        n_memories = weights["log_temperature"].numel() if "log_temperature" in weights else 0
        n_features = n_expert_features(n_experts) + n_memories * len(_EMPTY)
        n_hidden = len(weights["hidden_bias"]) if "hidden_bias" in weights else 0
        shapes = {
            "mean": (n_features,),
            "deviation": (n_features,),
            "out": (1 + n_memories, n_hidden or n_features),
            "out_bias": (1 + n_memories,),
            "log_temperature": (n_memories,),
            "unigram": (vocab_size,),
        }
        if n_hidden:
            shapes |= {"hidden": (n_hidden, n_features), "hidden_bias": (n_hidden,)}
        shapes |= {name: () for name in ("cache_alone", "n_caches") if name in weights}
        found = {name: tuple(weight.shape) for name, weight in weights.items()}
        n_caches = int(weights["n_caches"]) if "n_caches" in weights else 1
        if found != shapes or n_caches not in (1, n_experts) or n_memories - n_caches not in (0, 1):
            raise ValueError(f"its joint gate has the shapes {found}")
        return cls(memory_names(n_memories > n_caches, n_caches), dict(weights))

    @property
    def trained(self) -> list[str]:
        """Names of the weights that are fitted, not measured."""
        measured = ("mean", "deviation", "unigram", "cache_alone", "n_caches")
        return [name for name in self.weights if name not in measured]

    @property
    def n_caches(self) -> int:
        """Document caches, of one expert each."""
        return self.names.count(DOCUMENT_CACHE)

    @property
    def cache_alone(self) -> bool:
        """True for a gate that predicts only where a document cache is in use; the vector store alone has a
        better one (store_gate.py)."""
        return "cache_alone" in self.weights

    def for_cache_alone(self) -> JointGate:
        return JointGate(self.names, {**self.weights, "cache_alone": torch.tensor(1.0)})

    def to(self, device: torch.device) -> JointGate:
        return JointGate(self.names, {name: weight.to(device) for name, weight in self.weights.items()})

    def log_shares(self, evidence: Evidence) -> Tensor:
        """(N, 1 + M): logarithms of g."""
        w = self.weights
        x = ((evidence.features - w["mean"]) / w["deviation"]).clamp(-_LARGEST, _LARGEST)
        if "hidden" in w:
            x = torch.tanh(F.linear(x, w["hidden"], w["hidden_bias"]))
        scores = F.linear(x, w["out"], w["out_bias"])
        empty = torch.stack([m.tokens[:, 0] == NO_TOKEN for m in evidence.memories], -1)  # (N, M)
        of_memories = scores[:, 1:].masked_fill(empty, _FAR)
        return torch.cat([scores[:, :1], of_memories], -1).log_softmax(-1)

    def mix(self, log_likelihood: Tensor, targets: Tensor, evidence: Evidence) -> tuple[Tensor, Tensor]:
        """Log-likelihood (N,) of the targets under the mixture, and ``log_shares``.

        Args:
            log_likelihood: (N,) of the targets under the model alone.
        """
        shares = self.log_shares(evidence)
        terms = [log_likelihood]
        for i, neighbours in enumerate(evidence.memories):
            weights = neighbour_weights(neighbours, self.weights["log_temperature"][i])
            said = (weights * (neighbours.tokens == targets[:, None])).sum(-1)
            terms.append(said.clamp_min(TINY).log())
        return (shares + torch.stack(terms, -1)).logsumexp(-1), shares

    def mix_logits(self, product: Tensor, evidence: Evidence) -> tuple[Tensor, Tensor]:
        """Log-probabilities (N, V) of the mixture, given the model's, and ``log_shares``."""
        shares = self.log_shares(evidence)
        p = shares[:, :1].exp() * product.exp()
        for i, neighbours in enumerate(evidence.memories):
            weights = neighbour_weights(neighbours, self.weights["log_temperature"][i])
            p = p.scatter_add(-1, neighbours.tokens.clamp_min(0), weights * shares[:, 1 + i : 2 + i].exp())
        # as above, so that both ways agree where no source has a token
        return p.clamp_min(TINY).log(), shares
