"""Latent attention: equal to DeepseekV3Attention, the same absorbed as expanded, a small cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nanothink.config import MLAConfig, TransformerConfig
from nanothink.models.key_value_cache import KeyValueCache
from nanothink.models.latent_attention import LatentAttention, latent_widths
from nanothink.models.layers import Attention, Rotary


def build(
    width: int = 24, heads: int = 3, head: int = 10, rope: int = 6, latent: int = 14
) -> LatentAttention:
    """With random weights, so that nothing is hidden by a zero."""
    torch.manual_seed(0)
    attention = LatentAttention(width, heads, head, rope, latent)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.4 + (1.0 if parameter.ndim == 1 else 0.0))
    return attention


def stream(batch: int, length: int, width: int = 24, seed: int = 0) -> Tensor:
    return torch.randn(batch, length, width, generator=torch.Generator().manual_seed(seed))


def reference(ours: LatentAttention, width: int, *, interleave: bool) -> nn.Module:
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

    config = DeepseekV3Config(
        hidden_size=width,
        num_attention_heads=ours.n_heads,
        num_key_value_heads=ours.n_heads,
        q_lora_rank=None,
        kv_lora_rank=ours.latent_dim,
        qk_nope_head_dim=ours.head_dim,
        qk_rope_head_dim=ours.rope_dim,
        v_head_dim=ours.head_dim,
        rope_interleave=interleave,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        max_position_embeddings=64,
        attention_dropout=0.0,
        attn_implementation="eager",
    )
    theirs: nn.Module = DeepseekV3Attention(config, layer_idx=0)
    theirs.load_state_dict(ours.state_dict())
    return theirs


def call(theirs: nn.Module, x: Tensor, rotary: Rotary) -> Tensor:
    cos, sin = (torch.cat([half, half], -1)[None] for half in rotary(0, x.shape[1]))
    mask = torch.full((x.shape[1], x.shape[1]), -torch.inf).triu(1)[None, None]
    output: Tensor = theirs(x, (cos, sin), mask)[0]
    return output


@pytest.mark.parametrize(
    ("heads", "head", "rope", "latent", "length"), [(3, 10, 6, 14, 17), (1, 8, 8, 40, 33), (6, 4, 2, 5, 2)]
)
def test_outputs_and_all_gradients_equal_deepseek(
    heads: int, head: int, rope: int, latent: int, length: int
) -> None:
    ours = build(24, heads, head, rope, latent)
    theirs = reference(ours, 24, interleave=False)
    rotary = Rotary(rope, 64, 500.0)
    x, upstream = stream(3, length), stream(3, length, seed=1)
    inputs = [x.clone().requires_grad_(True) for _ in range(2)]
    found, expected = ours(inputs[0], rotary(0, length)), call(theirs, inputs[1], rotary)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.detach().abs().max()))
    (found * upstream).sum().backward()
    (expected * upstream).sum().backward()
    pairs: dict[str, tuple[Any, Any]] = {"x": (inputs[0].grad, inputs[1].grad)}
    named = dict(theirs.named_parameters())
    pairs |= {name: (p.grad, named[name].grad) for name, p in ours.named_parameters()}
    assert len(pairs) == 6
    for name, (gradient, wanted) in pairs.items():
        assert gradient.any(), f"{name}: a gradient of zero compares nothing"
        tolerance = 1e-4 * float(wanted.abs().max())
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=tolerance, msg=f"{name}: {{}}".format)


def test_the_layout_of_the_rotation_is_the_only_other_difference() -> None:
    """Their released weights pair neighbouring features; reordered rows give the same attention."""
    ours = build()
    theirs = reference(ours, 24, interleave=True)
    rotary, x = Rotary(6, 64, 500.0), stream(2, 12)
    neighbours = torch.arange(6).view(3, 2).t().flatten()  # 0, 2, 4, 1, 3, 5: pairs apart
    inverse = neighbours.argsort()
    assert not torch.allclose(ours(x, rotary(0, 12)), call(theirs, x, rotary), atol=1e-3)
    with torch.no_grad():
        query = theirs.get_parameter("q_proj.weight").view(3, 16, 24)
        query[:, 10:] = query[:, 10:][:, inverse].clone()
        compress = theirs.get_parameter("kv_a_proj_with_mqa.weight")
        compress[14:] = compress[14:][inverse].clone()
    torch.testing.assert_close(ours(x, rotary(0, 12)), call(theirs, x, rotary), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chunks", [(1,) * 40, (40,), (25, 1, 1, 6, 1, 6), (1, 39), (39, 1)])
def test_absorbed_decoding_equals_the_expanded_path(chunks: tuple[int, ...]) -> None:
    attention, rotary, x = build(), Rotary(6, 40, 10_000.0), stream(3, 40)
    with torch.no_grad():
        whole = attention(x, rotary(0, 40))
        cache, start, found = KeyValueCache(1, 3, 40), 0, []
        for size in chunks:
            found.append(attention(x[:, start : start + size], rotary(start, size), cache, 0))
            cache.advance(size)
            start += size
    torch.testing.assert_close(torch.cat(found, 1), whole, rtol=1e-4, atol=1e-5)


def test_later_tokens_change_nothing_and_earlier_ones_do() -> None:
    attention, rotary, x = build(), Rotary(6, 20, 10_000.0), stream(2, 20)
    before = attention(x, rotary(0, 20))
    for t in (0, 7, 18):
        changed = x.clone()
        changed[:, t + 1 :] = stream(2, 19 - t, seed=5)
        after = attention(changed, rotary(0, 20))
        torch.testing.assert_close(after[:, : t + 1], before[:, : t + 1], rtol=0, atol=1e-6)
        assert not torch.allclose(after[:, t + 1 :], before[:, t + 1 :])
        changed = x.clone()
        changed[:, t] += 1
        assert not torch.allclose(attention(changed, rotary(0, 20))[:, -1], before[:, -1], atol=1e-5)


def test_position_matters() -> None:
    """Of two equal tokens, near and far, a rotary key tells which is which."""
    attention, rotary, x = build(), Rotary(6, 20, 100.0), stream(1, 5)
    swapped = x[:, [1, 0, 2, 3, 4]]
    assert not torch.allclose(
        attention(x, rotary(0, 5))[:, -1], attention(swapped, rotary(0, 5))[:, -1], atol=1e-4
    )


def cached_bytes(cache: KeyValueCache) -> int:
    return sum(t.untyped_storage().nbytes() for t in (*cache._keys, *cache._values) if t is not None)


@pytest.mark.parametrize(("width", "heads"), [(384, 6), (128, 4), (768, 12)])
def test_the_cache_takes_a_quarter_of_a_multi_head_cache_or_less(width: int, heads: int) -> None:
    """Measured in bytes, at the sizes of the presets: docs/models/nanothink.md states them."""
    shape = MLAConfig(n_heads=heads)
    attention = LatentAttention(width, heads, *latent_widths(width, shape))
    x, n_tokens = stream(1, 64, width), 64
    latents, pairs = KeyValueCache(1, 1, n_tokens), KeyValueCache(1, 1, n_tokens)
    head_dim, rope_dim, latent_dim = latent_widths(width, shape)
    with torch.no_grad():
        attention(x, Rotary(rope_dim, 64, 1e4)(0, 64), latents, 0)
        Attention(width, TransformerConfig(n_heads=heads))(
            x, Rotary(width // heads, 64, 1e4)(0, 64), pairs, 0
        )
    assert cached_bytes(latents) == n_tokens * 4 * (latent_dim + rope_dim)
    assert cached_bytes(pairs) == n_tokens * 4 * 2 * width
    measured = {384: (640, 3072), 128: (256, 1024), 768: (1152, 6144)}[width]
    assert (cached_bytes(latents) // n_tokens, cached_bytes(pairs) // n_tokens) == measured
    assert head_dim == width // heads


@pytest.mark.parametrize("n_cached", [0, 11])
def test_under_autocast_products_are_narrow_and_close(n_cached: int) -> None:
    attention, rotary, x = build(), Rotary(6, 40, 10_000.0), stream(2, 12)
    with torch.no_grad():
        exact = attention(x, rotary(0, 12))
        cache = KeyValueCache(1, 2, 40)
        with torch.autocast("cpu", torch.bfloat16):
            if n_cached:
                attention(x[:, :n_cached].bfloat16(), rotary(0, n_cached), cache, 0)
                cache.advance(n_cached)
            found = attention(x[:, n_cached:].bfloat16(), rotary(n_cached, 12 - n_cached), cache, 0)
    assert found.dtype == torch.bfloat16
    wanted = exact[:, n_cached:]
    assert 0 < float((found.float() - wanted).norm() / wanted.norm()) < 0.05


def test_widths_follow_the_model_unless_set() -> None:
    assert latent_widths(384, MLAConfig()) == (64, 32, 128)
    assert latent_widths(32, MLAConfig()) == (6, 4, 16)
    assert latent_widths(100, MLAConfig(head_dim=7, rope_dim=4, kv_latent_dim=9)) == (7, 4, 9)
