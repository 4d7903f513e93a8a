"""The transformer: equal to Qwen3ForCausalLM, causal, the same step by step, started as designed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from promises import (
    assert_causal,
    assert_every_token_matters,
    assert_steps_are_parallel,
    assert_steps_stay_close_under_autocast,
    plain_outputs,
)
from torch import Tensor, nn

from nanothink.config import ModelConfig, TransformerConfig
from nanothink.data.tokens import IGNORE
from nanothink.errors import UsageError
from nanothink.models.key_value_cache import KeyValueCache
from nanothink.models.transformer import Transformer, inner_width, to_qwen3_config

VOCAB = 61


def build(
    *,
    width: int = 24,
    layers: int = 2,
    heads: int = 2,
    context: int = 48,
    seed: int = 0,
    trained: bool = True,
    **shape: Any,
) -> Transformer:
    """A small model; ``trained`` gives every weight a random value, so that nothing is hidden by a zero."""
    torch.manual_seed(seed)
    model = Transformer(
        VOCAB,
        ModelConfig(d_model=width, max_seq_len=context),
        TransformerConfig(n_layers=layers, n_heads=heads, **shape),
    )
    if trained:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.3 + (1.0 if parameter.ndim == 1 else 0.0))
    return model


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("width", "layers", "heads", "length", "mult", "tied", "theta", "attention"),
    [
        (24, 2, 2, 17, 4.0, False, 10_000.0, "sdpa"),
        (24, 2, 2, 17, 4.0, True, 10_000.0, "eager"),
        (40, 3, 5, 31, 2.7, False, 500.0, "eager"),
        (56, 1, 7, 2, 8 / 3, True, 1e6, "sdpa"),
        (32, 2, 1, 48, 1.0, False, 10_000.0, "sdpa"),
    ],
)
def test_logits_and_all_gradients_equal_qwen3(
    width: int, layers: int, heads: int, length: int, mult: float, tied: bool, theta: float, attention: str
) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    model = build(
        width=width, layers=layers, heads=heads, ffn_mult=mult, tie_embeddings=tied, rope_theta=theta
    )
    config = Qwen3Config(**to_qwen3_config(model), attn_implementation=attention)
    reference = Qwen3ForCausalLM(config)
    missing, unexpected = reference.load_state_dict(model.state_dict(), strict=False)
    reference.tie_weights()
    assert unexpected == []
    assert missing == (["lm_head.weight"] if tied else [])

    x, y = tokens(3, length), tokens(3, length, seed=1)
    expected = reference(input_ids=x).logits
    torch.testing.assert_close(model.logits(x), expected, rtol=1e-4, atol=1e-4)

    nn.functional.cross_entropy(expected.flatten(0, 1), y.flatten()).backward()
    model.loss(x, y, scale=1 / y.numel()).backward()
    theirs = {name: p.grad for name, p in reference.named_parameters()}
    ours = {name: p.grad for name, p in model.named_parameters()}
    assert theirs.keys() == ours.keys()
    for name, gradient in ours.items():
        assert gradient is not None, name
        assert gradient.any(), f"{name}: a gradient of zero compares nothing"
        expected = theirs[name]
        assert expected is not None, name
        # against the size of the whole tensor: single entries near zero are rounding noise
        tolerance = 1e-4 * float(expected.abs().max())
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=tolerance, msg=f"{name}: {{}}".format)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_tokens_after_t_change_nothing_at_or_before_t(training: bool, autocast: bool) -> None:
    outputs = plain_outputs(build(layers=3).train(training), tokens(4, 40, seed=9))
    assert_causal(outputs, tokens(4, 40), VOCAB, autocast=autocast)


def test_every_earlier_token_matters() -> None:
    assert_every_token_matters(build().hidden, tokens(1, 12), VOCAB)


@pytest.mark.parametrize("chunks", [(1,) * 48, (48,), (20, 1, 1, 7, 1, 18), (1, 47), (5, 43), (47, 1)])
def test_stepwise_logits_equal_parallel_logits(chunks: tuple[int, ...]) -> None:
    assert_steps_are_parallel(build(layers=3).eval(), tokens(3, 48), chunks, tolerance=2e-5)


def test_steps_under_autocast_stay_close() -> None:
    assert_steps_stay_close_under_autocast(build().eval(), tokens(2, 48))


def test_the_cache_grows_with_the_text_and_never_past_the_context() -> None:
    model = build(context=300)
    state = model.start(1)
    sizes = []
    for t in range(300):
        model.step(tokens(1, 1, seed=t), state)
        sizes.append(_capacity(state))
    assert sizes[0] == 256
    assert set(sizes) == {256, 300}
    assert sizes[-1] == 300
    fresh = model.start(1)
    model.step(tokens(1, 280), fresh)
    assert _capacity(fresh) == 280


def test_a_full_state_says_what_to_do() -> None:
    model = build(context=8)
    state = model.start(2)
    model.step(tokens(2, 7), state)
    with pytest.raises(UsageError, match=r"holds 7 tokens and 2 more .* context is 8"):
        model.step(tokens(2, 2), state)
    model.step(tokens(2, 1), state)  # the refusal changed nothing
    with pytest.raises(UsageError, match="start a new state"):
        model.step(tokens(2, 1), state)
    with pytest.raises(UsageError, match="for 2 sequences, but 3"):
        model.step(tokens(3, 1), model.start(2))
    with pytest.raises(UsageError, match="9 tokens were given"):
        model.hidden(tokens(1, 9))


def test_it_starts_as_designed() -> None:
    model = build(width=96, layers=2, heads=2, trained=False)
    for name, parameter in model.named_parameters():
        spread = float(parameter.detach().std())
        if name.endswith(("o_proj.weight", "down_proj.weight", "lm_head.weight")):
            assert not parameter.any(), name
        elif name == "model.embed_tokens.weight":
            assert spread == pytest.approx(1.0, rel=0.05)
        elif parameter.ndim == 2:
            assert spread == pytest.approx(0.6 * parameter.shape[1] ** -0.5, rel=0.05), name
        else:
            assert (parameter == 1).all(), name
    x = tokens(2, 20)
    assert model.loss(x, x, scale=1 / x.numel()).item() == pytest.approx(math.log(VOCAB), rel=1e-5)


def test_a_tied_model_starts_near_uniform() -> None:
    model = build(width=96, heads=2, tie_embeddings=True, trained=False)
    x = tokens(4, 40)
    assert model.loss(x, tokens(4, 40, seed=1), scale=1 / x.numel()).item() == pytest.approx(
        math.log(VOCAB), rel=0.1
    )


def test_weights_stay_float32_and_outputs_come_in_float32_under_autocast() -> None:
    model, x = build(), tokens(2, 16)
    with torch.autocast("cpu", torch.bfloat16):
        states = model.hidden(x)
        loss = model.loss(x, x)
    loss.backward()
    assert states.dtype == loss.dtype == model.logits(x).dtype == torch.float32
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
    states, exact = states.detach(), model.hidden(x).detach()
    assert 0 < float((states - exact).norm() / exact.norm()) < 0.05  # it did compute in bfloat16


def test_loss_and_log_likelihood_agree_with_the_logits() -> None:
    model, x, y = build(), tokens(3, 16), tokens(3, 16, seed=1)
    y[0, 3:9] = IGNORE
    nats = nn.functional.cross_entropy(model.logits(x).flatten(0, 1), y.flatten(), reduction="none")
    found = model.log_likelihood(x, y)
    assert found.shape == (3, 16)
    torch.testing.assert_close(found, -nats.view(3, 16), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.loss(x, y, scale=0.5), 0.5 * nats.sum(), rtol=1e-5, atol=1e-5)


def test_the_state_dict_holds_weights_only() -> None:
    model = build()
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_folded_scale_gives_the_same_logits(norm: str, tied: bool) -> None:
    model, x = build(norm=norm, tie_embeddings=tied), tokens(2, 9)
    model.logit_scale = 0.7
    expected = model.logits(x).detach()
    model.fold_logit_scale()
    assert model.logit_scale == 1.0
    torch.testing.assert_close(model.logits(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("width", "mult", "inner"), [(384, 4.0, 1536), (128, 8 / 3, 344), (24, 2.7, 64), (8, 0.1, 8)]
)
def test_inner_width(width: int, mult: float, inner: int) -> None:
    assert inner_width(width, mult) == inner


def _capacity(state: KeyValueCache) -> int:
    keys = state._keys[0]
    assert keys is not None
    return keys.shape[2]
