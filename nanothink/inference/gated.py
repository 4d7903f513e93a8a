"""A text under a model with its memories, by position: what the joint gate is fitted on and scored by.

The text is read in the order of its documents, in the blocks of ``evaluate_model``. The document cache of a
position holds earlier positions of its own document alone, also across blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nanothink.data.batches import validation_batches
from nanothink.data.tokens import IGNORE, TokenStream
from nanothink.inference.evaluate import DocumentScores, Evaluation, Score
from nanothink.inference.generate import evaluating
from nanothink.models.contract import LanguageModel
from nanothink.models.document_cache import DocumentCache
from nanothink.models.joint_gate import Evidence, gated_rows
from nanothink.models.nanothink import NanoThink
from nanothink.models.precision import Precision
from nanothink.models.store_gate import VECTOR_STORE
from nanothink.reporter import SILENT, Reporter


@dataclass(frozen=True)
class Reading:
    """How a text is read."""

    length: int
    """Tokens of a block."""
    precision: Precision
    window: int
    """Of the document cache, in tokens."""
    n_neighbours: int
    """Of the document cache."""
    batch_tokens: int = 8192


@dataclass(frozen=True)
class Positions:
    """Some consecutive positions of a text."""

    documents: NDArray[np.int64]
    """Number of the document in its stream."""
    targets: Tensor
    """(N,) tokens that follow."""
    log_likelihood: Tensor
    """(N,) of the targets under the model alone."""
    evidence: Evidence


def positions(
    model: LanguageModel,
    stream: TokenStream,
    names: Sequence[str],
    unigram: Tensor,
    reading: Reading,
) -> Iterator[Positions]:
    """The positions of a stream that are trained on, some hundred at a time, and all of them in the memories.

    The caller sets evaluation mode.

    Args:
        names: of the memories that are searched, see ``memory_names``.
        unigram: (V,) log-frequencies.
    """
    ends = np.cumsum(stream.documents().n_tokens)
    stored = VECTOR_STORE in names
    caches = [DocumentCache(reading.window, reading.n_neighbours) for _ in names[int(stored) :]]
    device, first = reading.precision.device, 0
    batch_size = max(1, reading.batch_tokens // reading.length)
    # The document cache holds what was asked, too.
    whole = validation_batches(stream.with_all_targets(), reading.length, batch_size)
    for (inputs, targets), wanted in zip(whole, _wanted(stream, reading.length, batch_size), strict=True):
        n_real = int((targets != IGNORE).sum())
        inputs, targets = inputs[:, :n_real], targets[:, :n_real]  # short text takes no more than its length
        documents = np.searchsorted(ends, np.arange(first, first + n_real), side="right")
        first += n_real
        with torch.inference_mode(), reading.precision.autocast():
            weights = None
            if isinstance(model, NanoThink):
                states, weights = model.routed(inputs.to(device))
                weights = weights.flatten(0, 1)[:n_real]
            else:
                states = model.hidden(inputs.to(device))
            states = states.flatten(0, 1)[:n_real]  # what is not real comes last
            tokens, following = inputs.flatten()[:n_real].to(device), targets.flatten()[:n_real].to(device)
            read = torch.from_numpy(documents).to(device)
            keys = model.cache_keys(states)  # more of them than caches, if there is one for all experts
            memories = [model.stored_neighbours(keys[0])] if stored else []
            memories += [cache.read(own, following, read) for cache, own in zip(caches, keys, strict=False)]
            for rows, product, evidence in gated_rows(model, unigram, states, weights, tokens, memories):
                own = product.gather(-1, following[rows, None])[:, 0]
                kept = wanted[rows]
                if kept.all():
                    yield Positions(documents[rows], following[rows], own, evidence)
                elif kept.any():
                    chosen = kept.nonzero()[:, 0].to(device)
                    yield Positions(
                        documents[rows][kept.numpy()],
                        following[rows][chosen],
                        own[chosen],
                        evidence.rows(chosen),
                    )


def _wanted(stream: TokenStream, length: int, batch_size: int) -> Iterator[Tensor]:
    """For each batch which of its positions are trained on, flat."""
    for first in range(0, stream.n_tokens, batch_size * length):
        stop = min(first + batch_size * length, stream.n_tokens)
        yield torch.from_numpy(stream.trained(first, stop))


def evaluate_gated(
    model: LanguageModel,
    streams: Mapping[str, TokenStream],
    reading: Reading,
    *,
    max_tokens: int | None = None,
    with_cache: bool = True,
    reporter: Reporter = SILENT,
    stage: str = "evaluating with memories",
) -> Evaluation:
    """``evaluate_model`` of a model with its memories, mixed by its joint gate.

    Args:
        with_cache: False empties the document caches.
    """
    gate = model.joint_gate
    assert gate is not None
    gate = gate.to(reading.precision.device)
    scored = {name: stream.sample(max_tokens) for name, stream in streams.items() if stream.n_tokens}
    total, done = sum(stream.n_targets for stream in scored.values()), 0
    scores: dict[str, Score] = {}
    of_documents: dict[str, DocumentScores] = {}
    with evaluating(model):
        for name, stream in scored.items():
            sizes = stream.documents()
            nats = np.zeros(len(sizes.n_tokens))
            for each in positions(model, stream, gate.names, gate.weights["unigram"], reading):
                evidence = each.evidence
                if not with_cache:
                    evidence = evidence.without_last(gate.n_caches)
                mixed, _ = gate.mix(each.log_likelihood, each.targets, evidence)
                np.subtract.at(nats, each.documents, mixed.double().cpu().numpy())
                done += len(each.targets)
                reporter.progress(stage, done, total)
            scores[name] = Score(float(nats.sum()), stream.n_targets, stream.n_bytes)
            of_documents[name] = DocumentScores(nats, sizes.n_bytes, sizes.groups)
    return Evaluation(scores, logit_scale=model.logit_scale, documents=of_documents)
