"""The memory's part of the model: adds up, causal, the same step by step, and without trace when off."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import pytest
import torch
import torch.nn.functional as F
from promises import assert_causal, assert_steps_are_parallel
from torch import Tensor

from nanothink.config import MLAConfig, ModelConfig, TrainMLAConfig, TransformerConfig, VectorStoreConfig
from nanothink.config.run import Config
from nanothink.data.tokens import IGNORE
from nanothink.errors import UsageError
from nanothink.models import build_model
from nanothink.models.contract import Batch
from nanothink.models.decoding_states import JointState
from nanothink.models.loss import likelihood_and_peak, linear_log_likelihood
from nanothink.models.nanothink import NanoThink
from nanothink.models.store_gate import NO_TOKEN, TINY, Neighbours, StoreGate, choose_key_expert
from nanothink.training.objectives import Routed
from nanothink.training.optimizer import GroupedOptimizer

VOCAB, WIDTH, K = 37, 16, 5


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def gate(seed: int = 3) -> StoreGate:
    """With evidence and stream at work."""
    made = StoreGate(WIDTH)
    with torch.no_grad():
        made.evidence_weight.copy_(drawn(3, seed=seed) * 0.3)
        made.stream_weight.copy_(drawn(WIDTH, seed=seed + 1) * 2)
        made.log_temperature.fill_(math.log(0.2))
    return made


def some_neighbours(rows: int, *, counts: bool = False) -> Neighbours:
    """Tokens from a small range, so that some agree; row 1 has no neighbour at all, row 2 lacks some."""
    similarities = drawn(rows, K, seed=5).tanh().sort(-1, descending=True).values
    said = torch.randint(4, (rows, K), generator=torch.Generator().manual_seed(6))
    for row, there in ((1, 0), (2, 3)):
        similarities[row, there:], said[row, there:] = -torch.inf, NO_TOKEN
    n = torch.randint(1, 4, (rows, K), generator=torch.Generator().manual_seed(7)).float() if counts else None
    return Neighbours(similarities, said, n)


@torch.no_grad()
def plain_mixture(made: StoreGate, logits: Tensor, stream: Tensor, n: Neighbours) -> tuple[Tensor, Tensor]:
    """The formulas at the head of recall.py, one number at a time."""
    mixed, shares = torch.empty(len(logits), VOCAB), torch.zeros(len(logits))
    tau = made.log_temperature.exp()
    for row in range(len(logits)):
        own = logits[row].softmax(-1)
        there = [j for j in range(K) if n.tokens[row, j] != NO_TOKEN]
        if not there:
            mixed[row] = own
            continue
        raw = [
            math.exp(float(n.similarities[row, j] / tau))
            * (1.0 if n.counts is None else float(n.counts[row, j]))
            for j in there
        ]
        hits = torch.zeros(VOCAB)
        for j, weight in zip(there, raw, strict=True):
            hits[n.tokens[row, j]] += weight / sum(raw)
        agreement = float(hits[n.tokens[row, 0]])
        peak = float(own.max())

        def odds(p: float) -> float:
            p = min(max(p, 1e-4), 1 - 1e-4)
            return math.log(p / (1 - p))

        evidence = torch.tensor([(float(n.similarities[row, 0]) - 0.8) / 0.1, odds(agreement), odds(peak)])
        of_stream = stream[row] @ made.stream_weight / math.sqrt(WIDTH)
        total = evidence @ made.evidence_weight + of_stream + made.bias
        share = float(total.sigmoid())
        mixed[row] = (1 - share) * own + share * hits
        shares[row] = share
    return mixed, shares


@pytest.mark.parametrize("counts", [False, True])
def test_the_mixture_is_what_the_formulas_say(counts: bool) -> None:
    made, logits, stream, n = (
        gate(),
        drawn(12, VOCAB) * 2,
        drawn(12, WIDTH, seed=2),
        some_neighbours(12, counts=counts),
    )
    expected, shares = plain_mixture(made, logits, stream, n)
    found, share = made.mix_logits(logits, stream, n)
    torch.testing.assert_close(found.exp(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(share, shares, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(12), rtol=1e-5, atol=1e-5)
    assert share[1] == 0
    assert 0.05 < share[0] < 0.95
    assert share[3] != share[4]
    targets = tokens(12, 1)[:, 0] % 4
    own = logits.log_softmax(-1)
    mixed, again = made.mix(own.gather(1, targets[:, None])[:, 0], own.amax(-1), stream, n, targets)
    torch.testing.assert_close(mixed, expected.gather(1, targets[:, None])[:, 0].log(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(again, shares, rtol=1e-5, atol=1e-6)


def test_a_key_that_stands_for_several_counts_as_several() -> None:
    made, stream = gate(), drawn(1, WIDTH)
    several = Neighbours(torch.tensor([[0.9, 0.9, 0.9, 0.5]]), torch.tensor([[3, 3, 3, 1]]))
    one = Neighbours(torch.tensor([[0.9, 0.5]]), torch.tensor([[3, 1]]), torch.tensor([[3.0, 1.0]]))
    logits = drawn(1, VOCAB)
    torch.testing.assert_close(made.mix_logits(logits, stream, several), made.mix_logits(logits, stream, one))
    unlike = Neighbours(one.similarities, one.tokens)
    assert not torch.allclose(
        made.mix_logits(logits, stream, several)[0], made.mix_logits(logits, stream, unlike)[0]
    )


def test_what_no_neighbour_says_keeps_finite_gradients() -> None:
    made, stream, n = gate(), drawn(12, WIDTH).requires_grad_(), some_neighbours(12)
    own = drawn(12, VOCAB).log_softmax(-1).requires_grad_()
    targets = torch.full((12,), VOCAB - 1)
    mixed, _ = made.mix(own[:, -1], own.amax(-1).detach(), stream, n, targets)
    (-mixed.sum()).backward()
    assert mixed.isfinite().all()
    for parameter in (own, stream, *made.parameters()):
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
    assert (own.grad[:, -1] != 0).all()  # type: ignore[index]
    assert TINY < 1e-12


def test_the_gradients_are_those_of_the_whole_distribution() -> None:
    n, targets = some_neighbours(12), tokens(12, 1)[:, 0] % 4
    found = []
    for way in ("mix", "logits"):
        made, hidden, head = (
            gate(),
            drawn(12, WIDTH).requires_grad_(),
            drawn(VOCAB, WIDTH, seed=1).requires_grad_(),
        )
        if way == "mix":
            own, peak = likelihood_and_peak(hidden, head, targets, chunk_rows=5)
            mixed, _ = made.mix(own, peak, hidden.detach(), n, targets)
        else:
            logits = hidden @ head.T
            # the model's own confidence is evidence, not something the gate may teach
            confidence = logits.detach().log_softmax(-1).amax(-1)
            weights = made.distribution(n)
            odds = made.log_odds(hidden.detach(), n, weights, confidence)
            share = odds.sigmoid().masked_fill(n.tokens[:, 0] == NO_TOKEN, 0.0)[:, None]
            said = torch.zeros(12, VOCAB).scatter_add(1, n.tokens.clamp_min(0), weights)
            mixed = ((1 - share) * logits.softmax(-1) + share * said).gather(1, targets[:, None])[:, 0].log()
        mixed.sum().backward()
        found.append([mixed.detach(), hidden.grad, head.grad, *(p.grad for p in made.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_the_peak_is_the_greatest_probability() -> None:
    hidden, head = drawn(30, WIDTH), drawn(VOCAB, WIDTH, seed=1)
    targets = tokens(30, 1)[:, 0]
    targets[3] = IGNORE
    own, peak = likelihood_and_peak(hidden, head, targets, chunk_rows=7)
    assert torch.equal(own, linear_log_likelihood(hidden, head, targets, chunk_rows=7))
    expected = (hidden @ head.T).log_softmax(-1).amax(-1)
    expected[3] = 0
    torch.testing.assert_close(peak, expected, rtol=1e-5, atol=1e-5)
    assert not likelihood_and_peak(hidden.requires_grad_(), head, targets)[1].requires_grad


# ---------------------------------------------------------------------------------------------------
# In a model


class FewKeys:
    """A memory of random keys, searched by looking at all of them."""

    def __init__(self, n_keys: int = 200) -> None:
        self.keys = F.normalize(drawn(n_keys, WIDTH, seed=8), dim=-1)
        self.said = torch.randint(VOCAB, (n_keys,), generator=torch.Generator().manual_seed(9))
        self.asked = 0

    def search(self, queries: Tensor) -> Neighbours:
        assert torch.allclose(queries.norm(dim=-1), torch.ones(len(queries)), atol=1e-5)
        self.asked += len(queries)
        best = (queries.float() @ self.keys.T).topk(K, dim=-1)
        return Neighbours(best.values, self.said[best.indices])


def build(*, enabled: bool = True, vector_store: bool = True) -> NanoThink:
    torch.manual_seed(0)
    whole = Config(
        model=ModelConfig(d_model=WIDTH, max_seq_len=32), transformer=TransformerConfig(n_layers=1, n_heads=2)
    )
    experts = {name: build_model("transformer", whole, VOCAB) for name in ("one", "two")}
    for expert in experts.values():
        for parameter in expert.parameters():
            torch.nn.init.normal_(parameter, std=0.4)
    store = VectorStoreConfig(enabled=enabled, expert="two", n_neighbours=K)
    model = NanoThink(VOCAB, whole.model, MLAConfig(n_heads=2, n_layers=1), experts, store)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not name.startswith("store_gate."):
            torch.nn.init.normal_(parameter, std=0.3)
    if model.store_gate is not None:
        model.store_gate = gate()
    if vector_store:
        model.vector_store = FewKeys()
    return model


def test_without_a_store_nothing_of_it_is_there() -> None:
    plain, with_gate = build(enabled=False, vector_store=False), build(vector_store=False)
    assert not [name for name in plain.state_dict() if "store_gate" in name]
    assert {n for n in with_gate.state_dict() if n not in plain.state_dict()} == {
        f"store_gate.{name}" for name in ("log_temperature", "evidence_weight", "stream_weight", "bias")
    }
    x, y = tokens(2, 20), tokens(2, 20, seed=1)
    for found, other in (
        (plain.logits(x), with_gate.logits(x)),
        (plain.loss(x, y), with_gate.loss(x, y)),
        (plain.routing(x), with_gate.routing(x)),
        (plain.step(x, plain.start(2)), with_gate.step(x, with_gate.start(2))),
    ):
        assert torch.equal(found, other)
    plain.vector_store = FewKeys()  # a memory that the model has no gate for is not asked
    plain.logits(x)
    assert plain.vector_store.asked == 0
    assert plain.components == ("one", "two")


def test_all_ways_to_ask_agree() -> None:
    model, x, y = build(), tokens(3, 20), tokens(3, 20, seed=1)
    y[0, 4] = IGNORE
    logits = model.logits(x)
    torch.testing.assert_close(logits.exp().sum(-1), torch.ones(3, 20), rtol=1e-4, atol=1e-4)
    expected = logits.gather(-1, y.clamp_min(0)[..., None])[..., 0].masked_fill(y == IGNORE, 0)
    torch.testing.assert_close(model.log_likelihood(x, y), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.loss(x, y, scale=0.1), -expected.sum() * 0.1, rtol=1e-4, atol=1e-4)
    loss, trust = model.loss_and_routing(x, y)
    torch.testing.assert_close(loss, -expected.sum(), rtol=1e-4, atol=1e-4)
    assert trust.shape == (3, 20, 3)
    assert model.components == ("one", "two", "vector_store")
    torch.testing.assert_close(trust.sum(-1), torch.ones(3, 20))
    valid = y != IGNORE
    torch.testing.assert_close(trust[valid], model.routing(x)[valid], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.router_weights(trust), model.routed(x)[1], rtol=1e-4, atol=1e-5)
    model.vector_store = None
    assert (model.logits(x).log_softmax(-1) - logits).abs().max() > 0.05


def test_neighbours_that_are_known_are_not_searched() -> None:
    model, x, y = build(), tokens(3, 20), tokens(3, 20, seed=1)
    expected = model.loss_and_routing(x, y)
    vector_store = model.vector_store
    assert isinstance(vector_store, FewKeys)
    queries = F.normalize(model.experts[1].hidden(x), dim=-1)  # type: ignore[operator]
    found = vector_store.search(queries.flatten(0, 1))
    known = Neighbours(found.similarities.view(3, 20, K), found.tokens.view(3, 20, K))
    asked = vector_store.asked
    torch.testing.assert_close(model.loss_and_routing(x, y, neighbours=known), expected)

    def known_at(positions: Sequence[int]) -> Neighbours:
        assert list(positions) == [7, 8, 9]
        return known

    objective = Routed(0.5, neighbours=known_at)
    loss = objective(model, Batch(x, y, (7, 8, 9)), 1 / 60)
    assert vector_store.asked == asked
    assert set(loss.parts) == {
        "cross_entropy",
        "routing_entropy",
        "weight_one",
        "weight_two",
        "weight_vector_store",
    }
    torch.testing.assert_close(sum(loss.parts[f"weight_{n}"] for n in model.components), torch.tensor(1.0))
    weights = model.routed(x)[1]
    entropy = torch.special.entr(weights).sum(-1).mean()
    torch.testing.assert_close(loss.parts["routing_entropy"], entropy, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        loss.total, expected[0] / 60 + 0.5 * (math.log(2) - entropy), rtol=1e-4, atol=1e-5
    )


def outputs(model: NanoThink, x: Tensor, targets: Tensor) -> Iterator[tuple[str, Tensor]]:
    yield "logits", model.logits(x)
    yield "routing", model.routing(x)
    yield "log-likelihood", model.log_likelihood(x, targets)
    _, _, queries = model._passed(x)
    assert queries is not None
    yield "queries", queries


def test_tokens_after_t_change_nothing_at_or_before_t() -> None:
    model, targets = build(), tokens(2, 24, seed=9)
    assert_causal(lambda x: dict(outputs(model, x, targets)), tokens(2, 24), VOCAB, atol=1e-5)


@pytest.mark.parametrize("chunks", [(1,) * 24, (24,), (10, 1, 1, 7, 5)])
def test_stepwise_equals_parallel(chunks: tuple[int, ...]) -> None:
    model, x = build().eval(), tokens(3, 24)
    routing = model.routing(x).detach()

    def look(state: object, position: int) -> None:
        assert isinstance(state, JointState)
        assert state.weights is not None
        torch.testing.assert_close(state.weights, routing[:, position - 1], rtol=1e-4, atol=1e-5)

    assert_steps_are_parallel(model, x, chunks, look=look)


def test_training_moves_the_gate_and_not_the_experts() -> None:
    model = build().train()
    groups = model.parameter_groups()
    names = {f"store_gate.{name}" for name in ("log_temperature", "evidence_weight", "stream_weight", "bias")}
    assert {name for name, _ in groups["other"]} >= names
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = GroupedOptimizer(groups, TrainMLAConfig(lr=1e-2))
    model.loss(tokens(4, 20), tokens(4, 20, seed=3), scale=1 / 80).backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(before[name], parameter) == name.startswith("experts."), name


def test_which_expert_gives_the_keys() -> None:
    kinds = {"a": "diffuser", "b": "transformer", "c": "state_space"}
    assert choose_key_expert(kinds, None) == "c"
    assert choose_key_expert({"a": "diffuser", "b": "transformer"}, None) == "b"
    assert choose_key_expert({"a": "diffuser"}, None) == "a"
    assert choose_key_expert(kinds, "a") == "a"
    with pytest.raises(UsageError, match=r"no such expert.*a, b, c"):
        choose_key_expert(kinds, "zebra")
