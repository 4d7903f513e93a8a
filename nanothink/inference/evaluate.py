"""Loss, perplexity and bits per byte of a model on held-out text, by domain.

Bits per byte are per byte of text, not per token: total nats / ln 2 / UTF-8 bytes of the scored documents.
The end-of-text token of each document is predicted too, and its nats count although it adds no byte. So the
figure can be compared across tokenizers. Of a conversation the answers alone count: their nats, with the ends
of turns, by their bytes.

Its standard error is the spread over samples of as many groups of documents. That of a difference tells a
better model from one that was lucky with these documents.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nanothink.data.batches import validation_batches
from nanothink.data.tokens import IGNORE, TokenStream
from nanothink.models.contract import LanguageModel
from nanothink.models.nanothink import NanoThink
from nanothink.models.precision import Precision
from nanothink.models.router import routing_entropy
from nanothink.reporter import SILENT, Reporter


@dataclass(frozen=True)
class Score:
    """Code length of some text under a model, with its tokens and bytes."""

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

    def to_dict(self) -> dict[str, float]:
        return {
            "loss": self.loss,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "tokens": self.tokens,
            "bytes": self.n_bytes,
        }


@dataclass(frozen=True)
class DocumentScores:
    """Nats, bytes and group of each document, in the order of the text."""

    nats: NDArray[np.float64]
    n_bytes: NDArray[np.int64]
    groups: NDArray[np.uint64]
    """Documents of one group are alike, so the standard error counts them as one draw."""


@dataclass(frozen=True)
class Difference:
    """Difference of two models on the same documents."""

    bits_per_byte: float
    standard_error: float | None
    """None where some domain has less than two groups of documents."""


@dataclass(frozen=True)
class Routing:
    """Weights of the experts of a combined model, summed over some text."""

    totals: Mapping[str, float]
    """Sum of the weights over the tokens, by expert, and "vector_store" where a vector store is attached."""
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

    def to_dict(self) -> dict[str, Any]:
        return {"weights": self.weights, "entropy": self.entropy}

    def __add__(self, other: Routing) -> Routing:
        totals = {name: total + other.totals[name] for name, total in self.totals.items()}
        return Routing(totals, self.entropy_total + other.entropy_total, self.tokens + other.tokens)


@dataclass(frozen=True)
class Evaluation:
    domains: Mapping[str, Score]
    denoising: Mapping[int, float] = field(default_factory=dict)
    """Mean squared error by noise level, of a model that denoises; see inference/denoising.py."""
    routing: Mapping[str, Routing] = field(default_factory=dict)
    """Routing by domain, of a model that combines experts."""
    logit_scale: float = 1.0
    """Factor that the model's logits had: below 1 where it is too sure."""
    documents: Mapping[str, DocumentScores] = field(default_factory=dict, compare=False)
    """Documents by domain; empty where several processes each scored a share."""

    def added(self, total: Callable[[Sequence[float]], Sequence[float]]) -> Evaluation:
        """The evaluation of the whole text, from this process's share.

        Args:
            total: adds equally long lists of numbers over all processes.
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
        return replace(self, domains=domains, routing=routing, documents={})

    @property
    def overall(self) -> Score:
        """All domains together, weighted by size."""
        scores = self.domains.values()
        return Score(
            sum(s.nats for s in scores), sum(s.tokens for s in scores), sum(s.n_bytes for s in scores)
        )

    def to_dict(self) -> dict[str, Any]:
        """Scores overall and by domain; ``denoising_mse`` and ``routing`` of a model that has them."""
        found: dict[str, Any] = {
            "overall": self.overall.to_dict(),
            "domains": {name: score.to_dict() for name, score in self.domains.items()},
        }
        if self.denoising:
            found["denoising_mse"] = {str(level): mse for level, mse in self.denoising.items()}
        if self.routing:
            found["routing"] = {name: routing.to_dict() for name, routing in self.routing.items()}
        return found

    def standard_error(self, domain: str | None = None) -> float | None:
        """Standard error of the bits per byte of a domain, or overall.

        None where a domain has less than two groups of documents, or where the scores of documents are
        unknown.
        """
        return _standard_error([of for name, of in self.documents.items() if domain in (None, name)])

    def less(self, other: Evaluation) -> Difference | None:
        """Bits per byte overall minus another model's; None if the two did not score the same documents.

        The standard error is that of paired differences: the difficulty of a document for both cancels.
        """
        if not self.documents or self.documents.keys() != other.documents.keys():
            return None
        pairs = [(own, other.documents[domain]) for domain, own in self.documents.items()]
        if not all(np.array_equal(own.n_bytes, others.n_bytes) for own, others in pairs):
            return None
        error = _standard_error([replace(own, nats=own.nats - others.nats) for own, others in pairs])
        return Difference(self.overall.bits_per_byte - other.overall.bits_per_byte, error)


def _standard_error(strata: Sequence[DocumentScores]) -> float | None:
    """Standard error of total nats / ln 2 / total bytes, for groups of documents drawn within each stratum.

    The combined ratio estimate of a stratified sample (Cochran 1977, Sampling Techniques, section 6.11) of
    clusters, for a population of which the sample is a small part. Groups that need more nats than others for
    their bytes make it large; their length alone does not. Counting each document of a book as a draw of its
    own would make it too small, as such documents are hard or easy together.
    """
    clusters = [np.unique(of.groups, return_inverse=True)[1] for of in strata]
    if not strata or any(len(own) == 0 or own.max() == 0 for own in clusters):
        return None
    total_bytes = sum(float(of.n_bytes.sum()) for of in strata)
    ratio = sum(float(of.nats.sum()) for of in strata) / total_bytes
    variance = 0.0
    for of, own in zip(strata, clusters, strict=True):
        residuals = np.bincount(own, of.nats - ratio * of.n_bytes)
        variance += len(residuals) * float(np.var(residuals, ddof=1))
    return math.sqrt(variance) / math.log(2) / total_bytes


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
    reporter: Reporter = SILENT,
    stage: str = "evaluating",
    should_stop: Callable[[], bool] | None = None,
    share: tuple[int, int] = (0, 1),
) -> Evaluation:
    """Score the streams in order, in blocks of ``length`` tokens.

    Args:
        max_tokens: a random sample of whole documents of at most this many tokens in each domain.
        stage: name of the work in reports of progress.
        should_stop: called before each batch.
        share: (index, number of shares): the rows of each batch scored here; ``Evaluation.added`` adds all
            shares. Each takes as many forward passes, in which processes may gather parameters together.

    Deterministic: a fixed sample, a fixed order, sums in float64. Leaves the model's training flag as it was.
    """
    number, n_shares = share
    scored = {name: stream.sample(max_tokens) for name, stream in streams.items() if stream.n_tokens}
    total = sum(stream.n_targets for stream in scored.values())
    done = 0
    scores: dict[str, Score] = {}
    documents: dict[str, DocumentScores] = {}
    routing: dict[str, Routing] = {}
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for name, stream in scored.items():
                sizes = stream.documents()
                ends = np.cumsum(sizes.n_tokens)
                nats = np.zeros(len(ends))
                first = 0  # of a batch's targets, in the stream
                if isinstance(model, NanoThink):
                    routing[name] = Routing(dict.fromkeys(model.components, 0.0), 0.0, 0)
                for inputs, targets in validation_batches(stream, length, batch_size):
                    if should_stop is not None and should_stop():
                        raise EvaluationStopped
                    n_real = int((targets != IGNORE).sum())
                    if n_real:
                        start, stop = (len(inputs) * at // n_shares for at in (number, number + 1))
                        rows = slice(start, max(stop, start + 1))
                        own = targets[rows] if start < stop else torch.full_like(targets[rows], IGNORE)
                        # A text that is shorter than a block takes no more than its own length.
                        n = int((targets != IGNORE).any(0).nonzero().max()) + 1
                        tokens, following = (x[:, :n].to(precision.device) for x in (inputs[rows], own))
                        with precision.autocast():
                            if isinstance(model, NanoThink):
                                likelihood, weights = model.likelihood_and_routing(tokens, following)
                                routing[name] += _routing_over(weights[following != IGNORE], model)
                            else:
                                likelihood = model.log_likelihood(tokens, following)
                        real = own != IGNORE
                        places = first + start * targets.shape[1] + np.flatnonzero(real.numpy())
                        if len(its := np.searchsorted(ends, places, side="right")):
                            sums = np.bincount(its - its[0], weights=likelihood.cpu()[real[:, :n]].numpy())
                            nats[its[0] : its[0] + len(sums)] -= sums
                    first += targets.numel()
                    done += n_real
                    reporter.progress(stage, done, total)
                scores[name] = Score(float(nats.sum()), stream.n_targets, stream.n_bytes)
                documents[name] = DocumentScores(nats, sizes.n_bytes, sizes.groups)
    finally:
        model.train(was_training)
    return Evaluation(
        scores,
        routing=routing,
        logit_scale=model.logit_scale,
        documents=documents if n_shares == 1 else {},
    )


def _routing_over(weights: torch.Tensor, model: NanoThink) -> Routing:
    """Routing of (N, E) weights, or (N, E + 1) with a vector store."""
    totals = weights.sum(0).tolist()
    entropy = float(routing_entropy(model.router_weights(weights)).sum())
    return Routing(dict(zip(model.components, totals, strict=True)), entropy, len(weights))
