"""The joint gate mixes to a distribution, both ways of mixing agree, an empty memory has no share."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from nanothink.models.joint_gate import (
    DOCUMENT_CACHE,
    MEMORIES,
    Evidence,
    JointGate,
    evidence_of,
    memory_names,
    n_expert_features,
    no_neighbours,
)
from nanothink.models.store_gate import NO_TOKEN, Neighbours

VOCAB, N, K = 19, 12, 10


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def neighbours(seed: int) -> Neighbours:
    """Row 1 has none, row 2 has three."""
    similarities = drawn(N, K, seed=seed).tanh().sort(-1, descending=True).values
    tokens = torch.randint(5, (N, K), generator=torch.Generator().manual_seed(seed))
    for row, there in ((1, 0), (2, 3)):
        similarities[row, there:], tokens[row, there:] = -torch.inf, NO_TOKEN
    return Neighbours(similarities, tokens)


UNIGRAM = drawn(VOCAB, seed=9).log_softmax(-1)
PRODUCT = (2 * drawn(N, VOCAB, seed=8)).log_softmax(-1)


def evidence(n_experts: int = 3, *memories: Neighbours) -> Evidence:
    experts = [2 * drawn(N, VOCAB, seed=10 + e) for e in range(n_experts)]
    read = torch.arange(N)
    return evidence_of(experts, PRODUCT, read, UNIGRAM, memories or (neighbours(1), neighbours(2)))


def gate(seen: Evidence, *, n_hidden: int = 4) -> JointGate:
    names = MEMORIES[-len(seen.memories) :]
    generator = torch.Generator().manual_seed(0)
    made = JointGate.start(names, seen.features, UNIGRAM, n_hidden=n_hidden, generator=generator)
    moved = {
        n: w + 0.3 * drawn(*w.shape, seed=3) if n in made.trained else w for n, w in made.weights.items()
    }
    return JointGate(names, moved)


@pytest.mark.parametrize("n_hidden", [0, 4])
@pytest.mark.parametrize("n_experts", [1, 3])
def test_both_ways_of_mixing_agree_and_give_a_distribution(n_experts: int, n_hidden: int) -> None:
    seen = evidence(n_experts)
    assert seen.features.shape == (N, n_expert_features(n_experts) + 2 * 6)
    made = gate(seen, n_hidden=n_hidden)
    mixed, shares = made.mix_logits(PRODUCT, seen)
    torch.testing.assert_close(mixed.exp().sum(-1), torch.ones(N))
    torch.testing.assert_close(shares.exp().sum(-1), torch.ones(N))
    targets = torch.arange(N) % 7  # some that no neighbour has
    own = PRODUCT.gather(-1, targets[:, None])[:, 0]
    found, again = made.mix(own, targets, seen)
    torch.testing.assert_close(found, mixed.gather(-1, targets[:, None])[:, 0])
    torch.testing.assert_close(again, shares)


def test_the_mixture_is_the_formula() -> None:
    seen = evidence()
    made = gate(seen)
    w = made.weights
    for row in (0, 2, 5):
        x = ((seen.features[row] - w["mean"]) / w["deviation"]).clamp(-4, 4)
        scores = w["out"] @ torch.tanh(w["hidden"] @ x + w["hidden_bias"]) + w["out_bias"]
        g = scores.softmax(-1)
        p = g[0] * PRODUCT[row].exp()
        for i, memory in enumerate(seen.memories):
            there = memory.tokens[row] != NO_TOKEN
            weights = (memory.similarities[row][there] / w["log_temperature"][i].exp()).softmax(-1)
            for token, weight in zip(memory.tokens[row][there], weights, strict=True):
                p[token] += g[1 + i] * weight
        torch.testing.assert_close(made.mix_logits(PRODUCT, seen)[0][row].exp(), p)


def test_an_empty_memory_has_no_share_and_looks_like_none() -> None:
    seen = evidence()
    shares = gate(seen).log_shares(seen).exp()
    assert float(shares[1, 1:].max()) < 1e-9  # row 1 has no neighbours in either
    bare = seen.without_last(1)
    torch.testing.assert_close(
        bare.features, evidence(3, neighbours(1), no_neighbours(N, torch.device("cpu"))).features
    )
    assert float(gate(seen).log_shares(bare).exp()[:, 2].max()) < 1e-9
    torch.testing.assert_close(seen.features, evidence().features)  # the original stays


def test_it_starts_the_same_for_every_token() -> None:
    seen = evidence()
    start = JointGate.start(MEMORIES, seen.features, UNIGRAM, n_hidden=4, generator=torch.Generator())
    shares = start.log_shares(seen).exp()
    expected = torch.tensor([0.0, -1.5, -1.5]).softmax(-1)
    torch.testing.assert_close(shares[3:], expected.expand(N - 3, -1))
    assert float(start.weights["log_temperature"][0]) == pytest.approx(math.log(0.04))


def test_the_usual_gate_reads_the_prediction_and_the_memories_alone() -> None:
    for memories in ((neighbours(1),), (neighbours(1), neighbours(2))):
        two, three = evidence(2, *memories), evidence(3, *memories)  # the same prediction, another expert
        gates = [JointGate.usual(MEMORIES[-len(memories) :], n, UNIGRAM) for n in (2, 3)]
        shares = [made.log_shares(seen) for made, seen in zip(gates, (two, three), strict=True)]
        torch.testing.assert_close(*shares, rtol=1e-3, atol=1e-3)
        assert float(shares[0].exp()[:, 0].std()) > 0.01
        again = JointGate.of_weights(gates[0].weights, 2, VOCAB)
        torch.testing.assert_close(again.log_shares(two), shares[0])


@pytest.mark.parametrize("n_hidden", [0, 4])
def test_its_weights_say_what_it_is(n_hidden: int) -> None:
    for seen in (evidence(), evidence(3, neighbours(1))):
        made = gate(seen, n_hidden=n_hidden)
        again = JointGate.of_weights(made.for_cache_alone().weights, 3, VOCAB)
        assert again.cache_alone
        assert not made.cache_alone
        assert again.names == made.names
        assert again.names[-1] == DOCUMENT_CACHE
        torch.testing.assert_close(again.log_shares(seen), made.log_shares(seen))
        with pytest.raises(ValueError, match="shapes"):
            JointGate.of_weights(made.weights, 2, VOCAB)
        with pytest.raises(ValueError, match="shapes"):
            JointGate.of_weights(made.weights, 3, VOCAB + 1)
    names, seen = memory_names(True, 3), evidence(3, *(neighbours(seed) for seed in range(4)))
    several = JointGate.start(names, seen.features, UNIGRAM, n_hidden=n_hidden, generator=torch.Generator())
    assert JointGate.of_weights(several.weights, 3, VOCAB).names == names
    wrong: dict[str, Tensor] = {**several.weights, "n_caches": torch.tensor(2.0)}
    for broken in ({}, wrong):
        with pytest.raises(ValueError, match="shapes"):
            JointGate.of_weights(broken, 3, VOCAB)


def test_features_are_finite_for_certain_and_indifferent_experts() -> None:
    certain = torch.full((N, VOCAB), -100.0)
    certain[:, 0] = 100.0
    seen = evidence_of(
        [certain, torch.zeros(N, VOCAB)],
        certain.log_softmax(-1),
        torch.arange(N),
        UNIGRAM,
        [no_neighbours(N, torch.device("cpu"))],
    )
    assert bool(torch.isfinite(seen.features).all())
