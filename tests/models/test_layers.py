"""The backward passes written by hand, against autograd through the plain formulas."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanothink.config import ModelConfig, TransformerConfig
from nanothink.models.feed_forward import SwiGLU
from nanothink.models.key_value_cache import KeyValueCache
from nanothink.models.layers import NORM_EPS, RMSNorm, Rotary, rotate
from nanothink.models.transformer import Transformer


def randomised(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            parameter.copy_(
                torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)) * 0.3 + 0.1
            )
    return module


def gradients(output: Callable[[Tensor], Tensor], x: Tensor, module: nn.Module | None = None) -> list[Tensor]:
    """Output, gradient of the input and of every parameter, for one fixed incoming gradient."""
    leaf = x.detach().clone().requires_grad_()
    y = output(leaf)
    parameters = list(module.parameters()) if module is not None else []
    incoming = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, [leaf, *parameters], incoming)]


def compare(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for ours, plain in zip(found, expected, strict=True):
        assert plain.any()
        reach = float(plain.abs().max())
        torch.testing.assert_close(ours.float(), plain.float(), rtol=tolerance, atol=tolerance * reach)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 7, 12, generator=torch.Generator().manual_seed(0))


def test_norm(x: Tensor) -> None:
    norm = randomised(RMSNorm(12))
    assert isinstance(norm, RMSNorm)
    plain = gradients(lambda t: F.rms_norm(t, (12,), norm.weight, NORM_EPS), x, norm)
    compare(gradients(norm, x, norm), plain, 1e-5)


def test_norm_of_zeros_is_zero_and_of_bfloat16_is_computed_in_float32(x: Tensor) -> None:
    norm = randomised(RMSNorm(12))
    assert not norm(torch.zeros(2, 12)).any()
    narrow = (1000 * x).bfloat16()
    found = norm(narrow)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, norm(narrow.float()), rtol=0, atol=0)
    assert norm(narrow, torch.bfloat16).dtype == torch.bfloat16


def test_rotation(x: Tensor) -> None:
    cos, sin = Rotary(12, 20, 100.0)(5, 7)

    def plain(t: Tensor) -> Tensor:
        turned = torch.view_as_complex(torch.stack([t[..., :6], t[..., 6:]], dim=-1)) * torch.complex(
            cos, sin
        )
        return torch.cat([turned.real, turned.imag], dim=-1)

    compare(gradients(lambda t: rotate(t, (cos, sin)), x), gradients(plain, x), 1e-6)


def test_rotated_products_depend_on_the_distance_alone() -> None:
    rotary = Rotary(8, 64, 10_000.0)
    q, k = torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(0))

    def product(i: int, j: int) -> float:
        return float((rotate(q, rotary(i, 1)) * rotate(k, rotary(j, 1))).sum())

    assert product(9, 4) == pytest.approx(product(60, 55), abs=1e-5)
    assert product(9, 4) != pytest.approx(product(9, 5), abs=1e-3)


@pytest.mark.parametrize(("autocast", "tolerance"), [(False, 1e-5), (True, 0.03)])
def test_feed_forward(x: Tensor, autocast: bool, tolerance: float) -> None:
    feed_forward = randomised(SwiGLU(12, 40))
    assert isinstance(feed_forward, SwiGLU)

    def plain(t: Tensor) -> Tensor:
        gate, up = feed_forward.gate_proj(t), feed_forward.up_proj(t)
        return F.linear(F.silu(gate) * up, feed_forward.down_proj.weight)

    expected = gradients(plain, x, feed_forward)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = gradients(feed_forward, x, feed_forward)
    assert found[0].dtype == (torch.bfloat16 if autocast else torch.float32)
    compare(found, expected, tolerance)


def test_frozen_weights_get_no_gradient(x: Tensor) -> None:
    for module in (RMSNorm(12), SwiGLU(12, 40)):
        randomised(module).requires_grad_(False)
        leaf = x.clone().requires_grad_()
        module(leaf).sum().backward()
        assert leaf.grad is not None
        assert all(p.grad is None for p in module.parameters())


def test_a_block_keeps_little_for_backward() -> None:
    """Bytes saved per token, block and feature: what makes a large batch fit (docs/benchmarks.md)."""
    width, length, layers = 64, 32, 3
    torch.manual_seed(0)
    shape = TransformerConfig(n_layers=layers, n_heads=2, ffn_mult=4)
    model = Transformer(11, ModelConfig(d_model=width, max_seq_len=length), shape)
    tokens = torch.zeros(32, length, dtype=torch.int64)
    kept: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().nbytes() >= 2 * tokens.numel() * width:  # activations, not weights
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with (
        torch.autocast("cpu", torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
    ):
        model.hidden(tokens).sum()
    saved = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    per_feature = saved / (layers * tokens.numel() * width)
    # two residual states in float32 (8 bytes), eight bfloat16 tensors of width D (16), two of 4 D (16): 40,
    # and a third of the one residual state that the last norm keeps
    assert per_feature < 42


def test_the_cache_keeps_what_it_was_given_across_growth() -> None:
    cache = KeyValueCache(1, 2, 300)
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(2, 3, 300, 4, generator=generator)
    position = 0
    for size in (1, 63, 1, 70, 165):
        part = whole[:, :, position : position + size]
        keys, values = cache.extend(0, part, -part)
        cache.advance(size)
        position += size
        assert torch.equal(keys, whole[:, :, :position])
        assert torch.equal(values, -whole[:, :, :position])
