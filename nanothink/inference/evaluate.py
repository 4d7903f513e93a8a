"""Loss, perplexity and bits per byte of a model on held-out text, by domain.

Bits per byte divides by what was written, not by how it was cut up: total nats / ln 2 / UTF-8 bytes of
the scored documents. The end-of-text token of each document is predicted too and its nats count,
while it adds no byte. So the figure does not depend on the tokenizer and can be compared across them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from nanothink.data.batches import validation_batches
from nanothink.data.tokens import IGNORE, TokenStream
from nanothink.models.contract import LanguageModel
from nanothink.models.nanothink import NanoThink, routing_entropy
from nanothink.models.precision import Precision


@dataclass(frozen=True)
class Score:
    """What a model needs to write down some text."""

    nats: float
    tokens: int
    n_bytes: int

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.n_bytes


@dataclass(frozen=True)
class Routing:
    """How far each expert of a combined model was trusted over some text."""

    totals: Mapping[str, float]
    """By expert, and "memory" where there is one: its weights, summed over the tokens."""
    entropy_total: float
    tokens: int

    @property
    def weights(self) -> dict[str, float]:
        """Mean weight of each expert."""
        return {name: total / self.tokens for name, total in self.totals.items()}

    @property
    def entropy(self) -> float:
        """Mean entropy of the router's weights, in nats: log E where all are equal."""
        return self.entropy_total / self.tokens

    def __add__(self, other: Routing) -> Routing:
        totals = {name: total + other.totals[name] for name, total in self.totals.items()}
        return Routing(totals, self.entropy_total + other.entropy_total, self.tokens + other.tokens)


@dataclass(frozen=True)
class Evaluation:
    domains: Mapping[str, Score]
    denoising: Mapping[int, float] = field(default_factory=dict)
    """Mean squared error by noise level, of a model that denoises; see inference/denoising.py."""
    routing: Mapping[str, Routing] = field(default_factory=dict)
    """By domain, of a model that combines experts."""

    def added(self, total: Callable[[Sequence[float]], Sequence[float]]) -> Evaluation:
        """The whole, of one's own share.

        Args:
            total: adds numbers over all who have a share; each gives as many.
        """
        parts = [score.nats for score in self.domains.values()]
        for own in self.routing.values():
            parts += [*own.totals.values(), own.entropy_total, own.tokens]
        sums = iter(total(parts))
        domains = {name: replace(score, nats=next(sums)) for name, score in self.domains.items()}
        routing = {
            name: Routing({e: next(sums) for e in own.totals}, next(sums), int(next(sums)))
            for name, own in self.routing.items()
        }
        return Evaluation(domains, self.denoising, routing)

    @property
    def overall(self) -> Score:
        """All domains together, each with the weight of its size."""
        scores = self.domains.values()
        return Score(
            sum(s.nats for s in scores), sum(s.tokens for s in scores), sum(s.n_bytes for s in scores)
        )


class EvaluationStopped(Exception):
    """Raised out of an evaluation when ``should_stop`` says so; nothing was changed."""


def evaluate_model(
    model: LanguageModel,
    streams: Mapping[str, TokenStream],
    *,
    length: int,
    batch_size: int,
    precision: Precision,
    max_tokens: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    share: tuple[int, int] = (0, 1),
) -> Evaluation:
    """Score the streams in order, in blocks of ``length`` tokens.

    Args:
        max_tokens: at most this many tokens of each domain, in whole documents.
        on_progress: called with (tokens scored, tokens in all).
        should_stop: asked before each batch.
        share: (number, of how many): one's own part of the batches; ``Evaluation.added`` adds all parts.

    Deterministic: no sampling, a fixed order, sums in float64. Leaves the model's training flag as it was.
    """
    number, n_shares = share
    planned = {name: stream.prefix(max_tokens) for name, stream in streams.items() if stream.n_tokens}
    total = sum(tokens for tokens, _ in planned.values())
    done = n_batches = 0
    scores: dict[str, Score] = {}
    routing: dict[str, Routing] = {}
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for name, (n_tokens, n_bytes) in planned.items():
                nats = 0.0
                if isinstance(model, NanoThink):
                    routing[name] = Routing(dict.fromkeys(model.speakers, 0.0), 0.0, 0)
                for inputs, targets in validation_batches(streams[name], length, batch_size, max_tokens):
                    if should_stop is not None and should_stop():
                        raise EvaluationStopped
                    if n_batches % n_shares == number:
                        tokens, following = inputs.to(precision.device), targets.to(precision.device)
                        with precision.autocast():
                            if isinstance(model, NanoThink):
                                loss, weights = model.loss_and_routing(tokens, following)
                                routing[name] += _routing_over(weights[following != IGNORE], model)
                            else:
                                loss = model.loss(tokens, following)
                        nats += float(loss)
                    n_batches += 1
                    done += int((targets != IGNORE).sum())
                    if on_progress is not None:
                        on_progress(done, total)
                scores[name] = Score(nats, n_tokens, n_bytes)
    finally:
        model.train(was_training)
    return Evaluation(scores, routing=routing)


def _routing_over(weights: torch.Tensor, model: NanoThink) -> Routing:
    """Of (N, E) weights, or (N, E + 1) with a memory."""
    totals = weights.sum(0).tolist()
    entropy = float(routing_entropy(model.router_weights(weights)).sum())
    return Routing(dict(zip(model.speakers, totals, strict=True)), entropy, len(weights))
