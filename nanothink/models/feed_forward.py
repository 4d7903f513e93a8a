"""The feed-forward of a block: SwiGLU, and GPT-2's with GELU. Parameters are named as in Qwen3.

SwiGLU has its own backward pass, which recomputes cheap intermediate results instead of keeping them.

Shapes: D model width, F inner width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nanothink.config import TransformerConfig
from nanothink.models import passes
from nanothink.models.layers import linear
from nanothink.models.low_rank import AdaptedLinear


class SwiGLU(nn.Module):
    """Gated feed-forward: ``down_proj(silu(gate_proj(x)) * up_proj(x))`` (Shazeer 2020)."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = linear(width, inner)
        self.up_proj = linear(width, inner)
        self.down_proj = linear(inner, width, zero=True)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        return gated_product(self.gate_proj(x), self.up_proj(x), self.down_proj)


class GeluMLP(nn.Module):
    """Feed-forward ``down_proj(gelu(up_proj(x)))`` with biases: that of GPT-2 and GPT-NeoX.

    Args:
        width: D.
        inner: F.
        tanh: take GELU's approximation by tanh (Hendrycks & Gimpel 2016), as GPT-2 does.
    """

    def __init__(self, width: int, inner: int, *, tanh: bool) -> None:
        super().__init__()
        self.approximate = "tanh" if tanh else "none"
        self.up_proj = linear(width, inner, bias=True)
        self.down_proj = linear(inner, width, zero=True, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        output: Tensor = self.down_proj(F.gelu(self.up_proj(x), approximate=self.approximate))
        return output


def feed_forward(width: int, inner: int, shape: TransformerConfig) -> SwiGLU | GeluMLP:
    """The feed-forward that ``shape`` asks for."""
    if shape.feed_forward == "swiglu":
        return SwiGLU(width, inner)
    return GeluMLP(width, inner, tanh=shape.feed_forward == "gelu_tanh")


def gated_product(gate: Tensor, up: Tensor, layer: nn.Linear) -> Tensor:
    """``layer(silu(gate) * up)``: (..., F), (..., F) -> (..., D), in the type of ``gate``. No bias."""
    output = _gated_product(gate, up, layer.weight)
    if isinstance(layer, AdaptedLinear):
        output = layer.adapted(output, _gated_product(gate, up, layer.lora_A))
    return output


def _gated_product(gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
    """``(silu(gate) * up) @ weight.T``: (..., F), (..., F), (D, F) -> (..., D), in the type of ``gate``."""
    if not torch.is_grad_enabled():
        return F.linear(F.silu(gate).mul_(up), weight.to(gate.dtype))
    y: Tensor = _GatedProduct.apply(gate, up.to(gate.dtype), weight.to(gate.dtype))  # type: ignore[no-untyped-call]
    return y


class _GatedProduct(torch.autograd.Function):
    """Keeps gate and up, and recomputes the rest in the backward pass."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up, weight)
        with torch.autocast(gate.device.type, enabled=False):
            y = passes.gate(gate, up) if passes.serve(gate, up) else F.silu(gate).mul_(up)
            return F.linear(y, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, weight = ctx.saved_tensors
        with torch.autocast(gate.device.type, enabled=False):
            grad_weight = None
            grad_inner = grad @ weight  # (B, T, F)
            if passes.serve(gate, up, grad_inner):
                y, grad_gate, grad_up = passes.gate_backward(gate, up, grad_inner)
                if ctx.needs_input_grad[2]:
                    grad_weight = grad.flatten(0, -2).t() @ y.flatten(0, -2)
                return grad_gate, grad_up, grad_weight
            opened = F.silu(gate)
            if ctx.needs_input_grad[2]:
                grad_weight = grad.flatten(0, -2).t() @ (opened * up).flatten(0, -2)
            grad_up = opened.mul_(grad_inner)
            grad_gate = torch.ops.aten.silu_backward(grad_inner.mul_(up), gate)
        return grad_gate, grad_up, grad_weight
