"""NanoThink: starts as the ensemble of its experts, which stay frozen; causal; the same step by step."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from promises import assert_causal, assert_steps_are_parallel
from torch import Tensor

from nanothink.config import (
    Config,
    DiffuserConfig,
    MLAConfig,
    ModelConfig,
    StateSpaceConfig,
    TrainMLAConfig,
    TransformerConfig,
)
from nanothink.data.tokens import IGNORE
from nanothink.errors import UsageError
from nanothink.models import COMBINED, ExpertDescription, build_model
from nanothink.models.contract import LanguageModel
from nanothink.models.decoding_states import JointState
from nanothink.models.nanothink import NanoThink
from nanothink.models.router import routing_entropy
from nanothink.training.optimizer import GroupedOptimizer

VOCAB = 61
KINDS = ("transformer", "state_space", "diffuser")


def config(*, context: int = 48, width: int = 24, layers: int = 2, router: str = "token") -> Config:
    return Config(
        model=ModelConfig(d_model=width, max_seq_len=context),
        transformer=TransformerConfig(n_layers=2, n_heads=2),
        state_space=StateSpaceConfig(n_layers=2, d_state=4, scan="plain"),
        diffuser=DiffuserConfig(n_layers=1, denoiser_layers=1, training_steps=8, inference_steps=4),
        mla=MLAConfig(n_heads=2, n_layers=layers, router=router),
    )


def randomise(model: torch.nn.Module, seed: int, size: float = 0.3) -> None:
    """Every weight a random value, so that nothing is hidden by a zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("A_log"):
                continue  # a growing state would hide everything else
            noise = torch.randn(parameter.shape, generator=generator) * size
            parameter.copy_(noise + (1.0 if parameter.ndim == 1 else 0.0))


def build(
    *kinds: str,
    context: int = 48,
    layers: int = 2,
    router: str = "token",
    trained: bool = True,
    contexts: dict[str, int] | None = None,
) -> NanoThink:
    """Over experts with random weights; ``trained`` gives the rest random weights too."""
    kinds = kinds or KINDS
    torch.manual_seed(0)
    whole = config(context=context, layers=layers, router=router)
    experts: dict[str, LanguageModel] = {}
    for i, kind in enumerate(kinds):
        own = config(context=(contexts or {}).get(kind, context))
        experts[f"{kind}{i}"] = build_model(kind, own, VOCAB)
        randomise(experts[f"{kind}{i}"], seed=i)
    model = NanoThink(VOCAB, whole.model, whole.mla, experts)
    if trained:
        frozen = {name: t.clone() for name, t in model.experts.state_dict().items()}
        randomise(model, seed=99)
        model.experts.load_state_dict(frozen)
    return model


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------------
# The start


@pytest.mark.parametrize("layers", [0, 2])
@pytest.mark.parametrize("kinds", [KINDS, ("state_space",), ("transformer", "transformer")])
def test_it_starts_as_the_uniform_log_linear_ensemble_of_its_experts(
    kinds: tuple[str, ...], layers: int
) -> None:
    model, x = build(*kinds, layers=layers, trained=False), tokens(3, 30)
    parts = [expert.logits(x).log_softmax(-1) for expert in model.experts]  # type: ignore[operator]
    ensemble = torch.stack(parts).mean(0).log_softmax(-1)
    found = model.logits(x).log_softmax(-1)
    torch.testing.assert_close(found, ensemble, rtol=1e-5, atol=1e-5)
    assert found.exp().max() > 3 / VOCAB  # far from uniform, so the comparison says something
    weights = model.routing(x)
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / len(kinds)))
    y = tokens(3, 30, seed=1)
    nats = -ensemble.gather(-1, y.unsqueeze(-1)).sum()
    torch.testing.assert_close(model.loss(x, y), nats, rtol=1e-5, atol=1e-4)


def test_what_it_takes_from_its_experts_is_a_copy() -> None:
    model = build(trained=False)
    heads = [expert.head_weight for expert in model.experts]
    for e, head in enumerate(heads):
        block = model.head_weight[:, 24 * e : 24 * (e + 1)]
        assert torch.equal(block, head)  # type: ignore[arg-type]
        assert block.untyped_storage().data_ptr() != head.untyped_storage().data_ptr()  # type: ignore[operator]
    assert not model.head_weight[:, 72:].any()
    table = model.experts[0].embedding.weight  # type: ignore[union-attr]
    rows = torch.nn.functional.rms_norm(table, (24,))  # type: ignore[arg-type]
    torch.testing.assert_close(model.embedding.weight, rows)
    assert model.embedding.weight.data_ptr() != table.data_ptr()  # type: ignore[operator]


def test_the_embeddings_come_from_a_transformer_where_there_is_one() -> None:
    model = build("state_space", "transformer", trained=False)
    table = model.experts[1].embedding.weight  # type: ignore[union-attr]
    torch.testing.assert_close(model.embedding.weight, torch.nn.functional.rms_norm(table, (24,)))  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------
# Frozen is frozen


def frozen_state(model: NanoThink) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.experts.state_dict().items()}


def test_training_moves_everything_but_the_experts() -> None:
    model = build(trained=False)
    model.train()
    assert not any(module.training for module in model.experts.modules())
    assert model.training
    groups = model.parameter_groups()
    named = {name for group in groups.values() for name, _ in group}
    assert named == {n for n, _ in model.named_parameters() if not n.startswith("experts.")}
    assert {name for name, _ in groups["other"]} >= {"router.weight", "router.bias", "log_scale"}
    assert [name for name, _ in groups["head"]] == ["lm_head.weight"]
    before = frozen_state(model)
    others = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    optimizer = GroupedOptimizer(groups, TrainMLAConfig(lr=1e-2))
    for step in range(5):
        model.loss(tokens(4, 20, seed=step), tokens(4, 20, seed=step + 9), scale=1 / 80).backward()
        assert all(p.grad is None for p in model.experts.parameters())
        optimizer.step()
        optimizer.zero_grad()
    after = frozen_state(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    still = [n for n, p in model.named_parameters() if n in others and torch.equal(p, others[n])]
    assert still == []


def test_training_mode_computes_what_evaluation_mode_computes() -> None:
    """No dropout, no statistics of the batch: a row does not depend on mode or on company."""
    model, x = build(), tokens(3, 20)
    training = model.train().logits(x)
    assert torch.equal(training, model.eval().logits(x))
    torch.testing.assert_close(model.logits(x[1:2]), training[1:2], rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------------------
# Causal


def outputs(model: NanoThink, x: Tensor, targets: Tensor) -> Iterator[tuple[str, Tensor]]:
    yield "logits", model.logits(x)
    yield "routing", model.routing(x)
    yield "log-likelihood", model.log_likelihood(x, targets)
    for name, expert in zip(model.names, model.experts, strict=True):
        yield name, expert.hidden(x)  # type: ignore[operator]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_tokens_after_t_change_nothing_at_or_before_t(training: bool, autocast: bool) -> None:
    model, x, targets = build().train(training), tokens(3, 40), tokens(3, 40, seed=9)
    assert len(dict(outputs(model, x, targets))) == 6
    assert_causal(lambda t: dict(outputs(model, t, targets)), x, VOCAB, autocast=autocast, atol=1e-5)


@pytest.mark.parametrize("training", [False, True])
def test_with_a_cache_too_the_past_decides_alone(training: bool) -> None:
    """What is read later leaves logits and weights given out earlier as those of the prefix alone."""
    model, x = build().train(training), tokens(2, 30)
    found = []
    for continuation in (x, torch.cat([x[:, :12], tokens(2, 18, seed=7)], 1)):
        state = model.start(2)
        model.step(continuation[:, :10], state)
        for t in range(10, 30):
            logits = model.step(continuation[:, t : t + 1], state)
            assert state.weights is not None
            found.append((logits, state.weights))
    for (logits, weights), (others, other_weights) in zip(found[:2], found[20:22], strict=True):
        assert torch.equal(logits, others)
        assert torch.equal(weights, other_weights)
    assert not torch.equal(found[2][0], found[22][0])


def test_every_earlier_token_and_every_expert_matters() -> None:
    model, x = build(), tokens(1, 12)
    logits, weights = model.logits(x)[:, -1], model.routing(x)[:, -1]
    for t in range(12):
        changed = x.clone()
        changed[:, t] = (changed[:, t] + 1) % VOCAB
        assert not torch.allclose(model.logits(changed)[:, -1], logits, atol=1e-4), t
        assert not torch.allclose(model.routing(changed)[:, -1], weights, atol=1e-5), t
    last_norms = {"transformer": "model.norm", "state_space": "backbone.norm_f", "diffuser": "encoder.norm"}
    for expert in model.experts:
        norm = expert.get_parameter(f"{last_norms[expert.kind]}.weight")  # type: ignore[index]
        kept = norm.clone()
        with torch.no_grad():
            norm.mul_(0.3)
            assert not torch.allclose(model.logits(x)[:, -1], logits, atol=1e-3)
            norm.copy_(kept)


# ---------------------------------------------------------------------------------------------------
# One model, two ways


@pytest.mark.parametrize("layers", [0, 2])
@pytest.mark.parametrize("chunks", [(1,) * 40, (40,), (20, 1, 1, 7, 1, 10), (39, 1)])
def test_stepwise_equals_parallel(chunks: tuple[int, ...], layers: int) -> None:
    model, x = build(layers=layers).eval(), tokens(3, 40)
    routing, states = model.routing(x).detach(), model.hidden(x).detach()

    def look(state: object, position: int) -> None:
        assert isinstance(state, JointState)
        torch.testing.assert_close(state.weights, routing[:, position - 1], rtol=1e-4, atol=1e-5)

    assert_steps_are_parallel(model, x, chunks, tolerance=3e-4, look=look)
    read = model.read(x, model.start(3))
    assert read.shape == (3, 40, 4 * 24)
    torch.testing.assert_close(read, states, rtol=1e-4, atol=1e-4)


def test_the_shortest_context_is_the_context() -> None:
    model = build(context=40, contexts={"diffuser": 9})
    assert model.context_length == 9
    state = model.start(1)
    model.step(tokens(1, 9), state)
    with pytest.raises(UsageError, match="context is 9"):
        model.step(tokens(1, 1), state)
    assert isinstance(state, JointState)
    assert state.latents.length == 9
    with pytest.raises(UsageError, match="10 tokens were given, but this model's context is 9"):
        model.hidden(tokens(1, 10))
    assert build("state_space", context=40).context_length == 40


# ---------------------------------------------------------------------------------------------------
# The rest of the contract


def test_loss_and_log_likelihood_agree_with_the_logits() -> None:
    model, x, y = build(), tokens(3, 16), tokens(3, 16, seed=1)
    y[0, 3:9] = IGNORE
    nats = torch.nn.functional.cross_entropy(model.logits(x).flatten(0, 1), y.flatten(), reduction="none")
    torch.testing.assert_close(model.log_likelihood(x, y), -nats.view(3, 16), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.loss(x, y, scale=0.5), 0.5 * nats.sum(), rtol=1e-5, atol=1e-4)


def test_weights_are_a_distribution_for_each_token_or_one_for_all() -> None:
    x = tokens(2, 20)
    by_token, overall = build().routing(x), build(router="global").routing(x)
    for weights in (by_token, overall):
        assert weights.shape == (2, 20, 3)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 20))
    assert by_token.std((0, 1)).min() > 1e-3
    assert overall.std((0, 1)).max() < 1e-7
    assert overall[0, 0].std() > 1e-3
    uniform, certain = torch.full((1, 4), 0.25), torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    assert routing_entropy(uniform).item() == pytest.approx(1.386294, rel=1e-5)
    assert routing_entropy(certain).item() == 0


def test_it_is_built_anew_from_descriptions_alone() -> None:
    """What a checkpoint does: kinds, settings and weights, and no other file."""
    first = build()
    described = [
        ExpertDescription(name, kind, config()) for name, kind in zip(first.names, KINDS, strict=True)
    ]
    again = build_model(COMBINED, config(), VOCAB, described)
    assert isinstance(again, NanoThink)
    assert again.names == first.names
    again.load_state_dict(first.state_dict())
    x = tokens(2, 20)
    assert torch.equal(first.logits(x), again.logits(x))
    assert torch.equal(first.routing(x), again.routing(x))


@pytest.mark.parametrize("layers", [0, 2])
def test_experts_of_unequal_width_begin_as_their_ensemble_and_stay_causal(layers: int) -> None:
    experts = {}
    for seed, (kind, width) in enumerate((("transformer", 24), ("state_space", 40), ("transformer", 16))):
        expert = build_model(kind, config(width=width), VOCAB)
        randomise(expert, seed)
        experts[f"{kind}-{width}"] = expert.eval()
    model = NanoThink(VOCAB, config(layers=layers).model, config(layers=layers).mla, experts).eval()
    assert model.head_weight.shape == (VOCAB, 24 + 40 + 16 + 24)
    x = tokens(2, 20)
    with torch.no_grad():
        mean = torch.stack([expert.logits(x) for expert in experts.values()]).mean(0)
        torch.testing.assert_close(model.logits(x), mean, rtol=1e-4, atol=1e-4)
        randomise(model, 5, 0.1)
        whole = model.logits(x)
        changed = x.clone()
        changed[:, 12:] = (changed[:, 12:] + 1) % VOCAB
        torch.testing.assert_close(model.logits(changed)[:, :12], whole[:, :12], rtol=0, atol=0)
        state = model.start(2)
        for t in range(20):
            torch.testing.assert_close(model.step(x[:, t : t + 1], state), whole[:, t], rtol=1e-3, atol=1e-3)
    model.train()
    model.loss(x, x).backward()
    grad = model.expert_projs[1].weight.grad
    assert grad is not None
    assert grad.shape == (24, 40)


def test_experts_that_do_not_fit_are_named() -> None:
    expert = build_model("transformer", config(width=16), VOCAB)
    with pytest.raises(UsageError, match="no expert has the width"):
        NanoThink(VOCAB, config().model, config().mla, {"odd": expert})
