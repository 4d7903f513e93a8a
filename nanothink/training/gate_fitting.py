"""The joint gate, fitted on held-out text in seconds: some hundred numbers, the model frozen.

On the text that a model was trained on its memories look less useful than they are, since it knows that text.
So the gate learns on documents that neither the model nor its vector store has seen, and these are no longer
scored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from nanothink.data.tokens import TokenStream
from nanothink.inference.gated import Positions, Reading, positions
from nanothink.inference.generate import evaluating
from nanothink.models.contract import LanguageModel
from nanothink.models.joint_gate import Evidence, JointGate
from nanothink.models.store_gate import Neighbours
from nanothink.reporter import SILENT, Reporter
from nanothink.training.muon import EagerAdamW

FIT_TOKENS = 20_000
"""Most tokens that a gate is fitted on; more brought nothing."""

FEW_TOKENS = 3_000
"""With fewer, hidden units learn the sample: the gate is linear, and stays near its usual weights."""

_PULL = 30.0  # nats in all, for each weight of a linear gate that is 1 away from its usual value
_HIDDEN, _BATCH, _LR, _DECAY = 12, 4096, 1e-2, 1e-3
_WITHOUT_CACHE = 0.25  # weight of the loss with the document cache empty, as it is where it is disabled
_COUNTED = 2_000_000  # training tokens that the unigram frequencies are counted on, at most


def fit_joint_gate(
    model: LanguageModel,
    streams: Mapping[str, TokenStream],
    names: Sequence[str],
    unigram: Tensor,
    reading: Reading,
    *,
    steps: int,
    seed: int,
    reporter: Reporter = SILENT,
) -> JointGate:
    """The gate that gives the text the greatest likelihood; the usual one where there is none.

    Args:
        streams: text that nothing was fitted on, by domain.
        names: of the memories, in the order of ``joint_gate.MEMORIES``.
        unigram: (V,) log-frequencies.
        steps: of the optimizer.
        seed: of the start and the batches.
    """
    advance = reporter.counter("joint gate: reading", sum(stream.n_targets for stream in streams.values()))
    found = []
    with evaluating(model):
        for stream in streams.values():
            if stream.n_tokens:
                for each in positions(model, stream, names, unigram, reading):
                    found.append(each)
                    advance(len(each.targets))
    usual = JointGate.usual(names, len(model.expert_names), unigram)
    if not found:
        return usual
    text = join(found)
    if len(text.targets) < FEW_TOKENS:
        return fit_linear(text, usual, _PULL, steps, seed, reporter)
    generator = torch.Generator().manual_seed(seed)
    features = text.evidence.features
    start = JointGate.start(names, features, unigram, n_hidden=_HIDDEN, generator=generator)
    return _fit(text, start, steps, generator, reporter, decay=_DECAY)


def fit_linear(
    text: Positions, start: JointGate, pull: float, steps: int, seed: int, reporter: Reporter = SILENT
) -> JointGate:
    """The gate that gives the text the greatest likelihood, less ``pull`` nats times the squared distance of
    its weights from those of ``start``."""
    return _fit(text, start, steps, torch.Generator().manual_seed(seed), reporter, pull=pull)


def _fit(
    text: Positions,
    start: JointGate,
    steps: int,
    generator: torch.Generator,
    reporter: Reporter,
    *,
    decay: float = 0.0,
    pull: float = 0.0,
) -> JointGate:
    n = len(text.targets)
    trained = {name: start.weights[name].clone().requires_grad_() for name in start.trained}
    gate = JointGate(start.names, {**start.weights, **trained})
    shaped = [weight for name, weight in trained.items() if name != "log_temperature"]
    optimizer = EagerAdamW(
        [
            {"params": shaped, "weight_decay": decay},
            {"params": [trained["log_temperature"]], "weight_decay": 0.0},
        ],
        lr=_LR,
    )
    advance = reporter.counter("joint gate: fitting", steps)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = _LR * 0.5 * (1 + math.cos(math.pi * step / steps)) + 1e-5
        chosen = torch.randint(n, (min(n, _BATCH),), generator=generator)
        evidence = text.evidence.rows(chosen)
        own, targets = text.log_likelihood[chosen], text.targets[chosen]
        loss = -gate.mix(own, targets, evidence)[0].mean()
        bare = evidence.without_last(start.n_caches)
        loss = loss - _WITHOUT_CACHE * gate.mix(own, targets, bare)[0].mean()
        if pull:
            moved = [(weight - start.weights[name]).square().sum() for name, weight in trained.items()]
            loss = loss + pull / n * torch.stack(moved).sum()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        advance(1)
    return JointGate(gate.names, {name: weight.detach() for name, weight in gate.weights.items()})


def join(parts: Sequence[Positions]) -> Positions:
    """One after another, on the CPU; plain tensors, which gradients can go through."""

    def joined(tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([tensor.cpu() for tensor in tensors]).clone()

    memories = []
    for columns in zip(*(part.evidence.memories for part in parts), strict=True):
        counts = None
        if columns[0].counts is not None:
            counts = joined([column.counts for column in columns if column.counts is not None])
        similarities = joined([column.similarities for column in columns])
        memories.append(Neighbours(similarities, joined([column.tokens for column in columns]), counts))
    return Positions(
        np.concatenate([part.documents for part in parts]),
        joined([part.targets for part in parts]),
        joined([part.log_likelihood for part in parts]),
        Evidence(joined([part.evidence.features for part in parts]), memories),
    )


def unigram_log_frequencies(streams: Mapping[str, TokenStream], vocab_size: int) -> Tensor:
    """(V,) log-frequencies of the tokens in a text, each counted once more than it is there."""
    counts = np.ones(vocab_size)
    share = _COUNTED // max(1, len(streams))
    for stream in streams.values():
        sample = stream.sample(share)
        length = 8192
        for index in range(min(sample.n_blocks(length), -(-share // length))):
            _, targets = sample.block(index, length)
            counts += np.bincount(targets[targets >= 0], minlength=vocab_size)
    return torch.from_numpy(np.log(counts / counts.sum())).float()
