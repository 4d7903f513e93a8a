"""The document cache: strictly earlier positions of the same document, causal, the same step by step."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nanothink.config import Config, MLAConfig, ModelConfig, TransformerConfig
from nanothink.models import COMBINED, EXPERTS, ExpertDescription, build_model
from nanothink.models.contract import LanguageModel
from nanothink.models.document_cache import CachedModel, DocumentCache
from nanothink.models.joint_gate import DOCUMENT_CACHE, JointGate, n_expert_features
from nanothink.models.store_gate import NO_TOKEN

VOCAB, WIDTH, K, EOS = 23, 16, 4, 0
KINDS = (*EXPERTS, COMBINED)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def text(length: int, *, seed: int = 0, low: int = 1) -> Tensor:
    return torch.randint(low, VOCAB, (length,), generator=torch.Generator().manual_seed(seed))


def built(kind: str, *, context: int = 8, share: float = 1.0) -> CachedModel:
    """A model with random weights, and a gate that gives each cache about ``share`` times the model's part.

    A combined model has a cache for each expert, unless ``kind`` is "one cache".
    """
    one_cache, kind = kind == "one cache", COMBINED if kind == "one cache" else kind
    config = Config(
        model=ModelConfig(d_model=WIDTH, max_seq_len=context),
        transformer=TransformerConfig(n_layers=1, n_heads=2),
        mla=MLAConfig(n_layers=1, n_heads=2),
    )
    names = ("transformer", "state_space")
    experts = [ExpertDescription(name, name, config) for name in names] if kind == COMBINED else []
    torch.manual_seed(0)
    model: LanguageModel = build_model(kind, config, VOCAB, experts).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    n_caches = 1 if one_cache else max(1, len(experts))
    n_features = n_expert_features(max(1, len(experts))) + 6 * n_caches
    weights = {
        "mean": torch.zeros(n_features),
        "deviation": torch.ones(n_features),
        "hidden": 0.1 * drawn(3, n_features),
        "hidden_bias": torch.zeros(3),
        "out": 0.1 * drawn(1 + n_caches, 3, seed=1),
        "out_bias": torch.tensor([0.0] + [math.log(share)] * n_caches),
        "log_temperature": torch.tensor([math.log(0.1)] * n_caches),
        "unigram": torch.full((VOCAB,), -math.log(VOCAB)),
    }
    if n_caches > 1:
        weights["n_caches"] = torch.tensor(float(n_caches))
    model.joint_gate = JointGate.of_weights(weights, max(1, len(experts)), VOCAB)
    assert model.joint_gate.names == (DOCUMENT_CACHE,) * n_caches
    return CachedModel(model, eos_id=EOS, window=20, n_neighbours=K)


def by_hand(keys: Tensor, tokens: Tensor, documents: Tensor, window: int) -> list[dict[int, float]]:
    """Of each position: the nearest earlier ones of its document as {position: similarity}."""
    unit = F.normalize(keys, dim=-1)
    found = []
    for t in range(len(keys)):
        earlier = [s for s in range(max(0, t - window), t) if documents[s] == documents[t]]
        nearest = sorted(earlier, key=lambda s: -float(unit[s] @ unit[t]))[:K]
        found.append({s: float(unit[s] @ unit[t]) for s in nearest})
    return found


@pytest.mark.parametrize("pieces", [[40], [1] * 40, [7, 1, 20, 12]])
@pytest.mark.parametrize("window", [3, 100])
def test_neighbours_are_the_nearest_strictly_earlier_ones_of_the_document(
    pieces: list[int], window: int
) -> None:
    keys, tokens = drawn(40, WIDTH), text(40)
    documents = torch.tensor([0] * 15 + [3] + [4] * 24)
    cache = DocumentCache(window, K)
    parts = [
        cache.read(*own)
        for own in zip(*(torch.split(x, pieces) for x in (keys, tokens, documents)), strict=True)
    ]
    similarities = torch.cat([part.similarities for part in parts])
    said = torch.cat([part.tokens for part in parts])
    for t, expected in enumerate(by_hand(keys, tokens, documents, window)):
        n = len(expected)
        torch.testing.assert_close(similarities[t, :n], torch.tensor(list(expected.values())))
        assert said[t, :n].tolist() == [int(tokens[s]) for s in expected]
        assert (said[t, n:] == NO_TOKEN).all()
        assert (similarities[t, n:] == -torch.inf).all()


@pytest.mark.parametrize("kind", [*KINDS, "one cache"])
def test_step_by_step_and_in_batches_it_predicts_as_at_once(kind: str) -> None:
    """Also past the model's context of 8 tokens, and where the second text ends in the middle."""
    model = built(kind)
    texts = torch.stack([text(30), text(30, seed=1)])
    texts[1, 11] = EOS
    whole = model.logits(texts)
    torch.testing.assert_close(whole.exp().sum(-1), torch.ones(2, 30), rtol=1e-4, atol=1e-4)
    state = model.start(2)
    for t in range(30):
        torch.testing.assert_close(model.step(texts[:, t : t + 1], state), whole[:, t], rtol=1e-3, atol=1e-4)
    state, late = model.start(1), model.start(1)
    model.step(texts[:1, :20], state)
    model.step(texts[1:, :5], late)
    state.join(late)
    mixed = model.step(torch.stack([texts[0, 20:25], texts[1, 5:10]]), state)
    torch.testing.assert_close(mixed, torch.stack([whole[0, 24], whole[1, 9]]), rtol=1e-3, atol=1e-4)
    state.drop(0)
    torch.testing.assert_close(model.step(texts[1:, 10:11], state), whole[1:, 10], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", [*KINDS, "one cache"])
def test_tokens_change_nothing_at_or_before_the_one_before_them(kind: str) -> None:
    model, tokens = built(kind, context=32), text(24)
    tokens[12:] = tokens[:12]  # so that the cache has something to say
    changed = tokens.clone()
    changed[18:] = text(6, seed=5)
    before, after = model.logits(tokens[None])[0], model.logits(changed[None])[0]
    torch.testing.assert_close(before[:18], after[:18], rtol=0, atol=0)
    assert not torch.allclose(before[18:], after[18:])


def test_random_tokens_cannot_be_told() -> None:
    """Were the next token in the cache already, its probability would be far above 1 / V."""
    model = built("transformer", context=512, share=20.0)
    tokens = text(500, low=1)
    log_p = model.logits(tokens[None])[0, :-1]
    p = log_p.gather(-1, tokens[1:, None]).exp()
    assert float(p.mean()) == pytest.approx(1 / VOCAB, rel=0.4)


def test_the_cache_knows_a_passage_that_comes_again() -> None:
    model, tokens = built("state_space", share=20.0), text(10).repeat(2)
    p = model.logits(tokens[None])[0].exp()
    following = p[:-1].gather(-1, tokens[1:, None])[:, 0]
    assert float(following[12:].mean()) > 0.5
    assert float(following[:8].mean()) < 0.2
    ended = tokens.clone()
    ended[9] = EOS  # another document begins: it says nothing of the one before
    p = model.logits(ended[None])[0].exp()
    assert float(p[12:-1].gather(-1, ended[13:, None]).mean()) < 0.2


def test_routing_shows_the_share_of_the_cache() -> None:
    model = built(COMBINED, share=20.0)
    assert model.components == ("transformer", "state_space", DOCUMENT_CACHE)
    state = model.start(1)
    model.step(text(1)[None], state)
    assert state.weights is not None
    assert float(state.weights[0, 2]) < 1e-6  # nothing is in it yet
    model.step(text(6, seed=1)[None], state)
    torch.testing.assert_close(state.weights.sum(-1), torch.ones(1))
    assert float(state.weights[0, 2]) > 0.5


def test_each_expert_has_a_cache_of_its_own_states() -> None:
    model, tokens = built(COMBINED, context=32), text(20)
    state = model.start(1)
    model.step(tokens[None], state)
    (row,) = state.rows
    states = model.model.read(tokens[None], model.model.start(1))[0]
    assert len(row.caches) == 2
    expected = [F.normalize(own, dim=-1) for own in model.model.cache_keys(states)]
    for cache, own in zip(row.caches, expected, strict=True):
        torch.testing.assert_close(cache._keys, own)
    assert not torch.allclose(expected[0], expected[1])
