"""Building blocks of the models: norms, rotary positions, attention with a cache, a block.

Parameters of attention and block are named as in ``transformers``' Qwen3. ``LayerNorm`` and the options of
``Attention`` and ``Block`` are there for published models: no model has them unless they are set.

Weights are float32 and stay so; under autocast the matrix products run in the autocast type, norms and
rotations in float32. A norm returns its result in the type of the matrix products that read it, so that it
is converted once and not once per product.

Norm and rotation (and feed_forward.py) have their own backward passes, which recompute cheap intermediate
results instead of keeping them: 8 MiB of activations per layer for 512 tokens of width 384 under bfloat16
autocast, where autograd kept 15.5.

Shapes: B batch, T time, S keys (cached and new), D model width, H heads, G heads of keys and values (H unless
set), K width of a head (D / H unless set), R rotated features of a head (K unless set).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nanothink.config import TransformerConfig
from nanothink.models import passes
from nanothink.models.causal_attention import causal_attention
from nanothink.models.dropout import Dropout
from nanothink.models.key_value_cache import KeyValueCache
from nanothink.models.low_rank import weight_for
from nanothink.models.precision import matmul_dtype

NORM_EPS = 1e-6


def linear(n_in: int, n_out: int, *, zero: bool = False, bias: bool = False) -> nn.Linear:
    """A linear layer: normal of standard deviation 0.6 / sqrt(n_in), or zero. A bias starts at zero."""
    layer = _UndrawnLinear(n_in, n_out, bias=bias)
    if bias:
        nn.init.zeros_(layer.bias)
    if zero:
        nn.init.zeros_(layer.weight)
    else:
        nn.init.normal_(layer.weight, std=0.6 * n_in**-0.5)
    return layer


def embedding(vocab_size: int, width: int, *, std: float) -> nn.Embedding:
    """An embedding table, normal of standard deviation ``std``."""
    table = nn.Embedding(vocab_size, width, _weight=torch.empty(vocab_size, width))
    nn.init.normal_(table.weight, std=std)
    return table


class _UndrawnLinear(nn.Linear):
    # Filled once, by the caller. PyTorch's way, the device "meta", imports its compiler: two seconds.
    def reset_parameters(self) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, weight_for(x, self), self.bias)


class RMSNorm(nn.Module):
    """Root-mean-square norm (Zhang & Sennrich 2019) over the last dimension, computed in float32."""

    def __init__(self, width: int, eps: float = NORM_EPS) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """(..., width) -> (..., width) in ``dtype``."""
        if (
            x.device.type == "cuda" or not torch.is_grad_enabled()
        ):  # one kernel, which keeps no more than ours
            return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps).to(dtype)
        y: Tensor = _RMSNormFunction.apply(x, self.weight, self.eps, dtype)  # type: ignore[no-untyped-call]
        return y


class _RMSNormFunction(torch.autograd.Function):
    """Keeps its input and one number per row; autograd would keep the normalised rows too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        ctx.eps, ctx.in_one_pass = eps, passes.serve(x, weight, into=dtype)
        if ctx.in_one_pass:
            ctx.save_for_backward(x, weight)
            return passes.norm(x, weight, eps, dtype)
        wide = x.float()
        inverse = (wide.square().mean(-1, keepdim=True) + eps).rsqrt_()  # 1 / RMS of each row
        ctx.save_for_backward(x, weight, inverse)
        return (wide * inverse).mul_(weight).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.in_one_pass:
            x, weight = ctx.saved_tensors
            return *passes.norm_backward(x, weight, ctx.eps, grad.contiguous()), None, None
        x, weight, inverse = ctx.saved_tensors
        grad = grad.float()
        unit = x.float() * inverse  # rows of RMS 1
        grad_unit = grad * weight
        grad_weight = (grad * unit).flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        inward = (grad_unit * unit).mean(-1, keepdim=True)  # the part along the row itself
        grad_x = grad_unit.sub_(unit.mul_(inward)).mul_(inverse).to(x.dtype)
        return grad_x, grad_weight, None, None


class _NormRotateFunction(torch.autograd.Function):
    """Norm and rotation of (B, T, H, K) in one pass; keeps its input."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(x, weight, cos, sin)
        ctx.eps = eps
        return passes.norm(x, weight, eps, dtype, (cos, sin))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *rotation = ctx.saved_tensors
        cos, sin = rotation
        found = passes.norm_backward(x, weight, ctx.eps, grad.contiguous(), (cos, sin))
        return *found, None, None, None, None


class LayerNorm(nn.Module):
    """Layer norm with weight and bias (Ba et al. 2016), computed in float32: that of GPT-2 and GPT-NeoX."""

    def __init__(self, width: int, eps: float = NORM_EPS) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """(..., width) -> (..., width) in ``dtype``."""
        return F.layer_norm(x.float(), self.weight.shape, self.weight, self.bias, self.eps).to(dtype)


def norm(width: int, shape: TransformerConfig) -> RMSNorm | LayerNorm:
    """The norm that ``shape`` asks for."""
    return (RMSNorm if shape.norm == "rms" else LayerNorm)(width, shape.norm_eps)


class Rotary(nn.Module):
    """Rotary positions (Su et al. 2021) in the half-split layout: feature k rotates with feature k + K/2.

    The tables are computed in float64, kept in float32, and are not part of the state dict.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, head_width: int, n_positions: int, theta: float) -> None:
        super().__init__()
        frequencies = theta ** -(torch.arange(0, head_width, 2, dtype=torch.float64) / head_width)
        angles = torch.outer(
            torch.arange(n_positions, dtype=torch.float64), frequencies
        )  # (n_positions, K/2)
        self.register_buffer("cos", angles.cos().float(), persistent=False)
        self.register_buffer("sin", angles.sin().float(), persistent=False)

    def forward(self, start: int, length: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine, (length, K/2) each, of positions ``start`` to ``start + length - 1``."""
        return self.cos[start : start + length], self.sin[start : start + length]

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine, (B, 1, T, K/2) each, of (B, T) positions."""
        return self.cos[positions].unsqueeze(1), self.sin[positions].unsqueeze(1)


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
    """Rotate (B, H, T, K) by the angles of its positions, the same in each row or not. Returns ``dtype``.

    Of each head the first R features are rotated, twice the width of the tables, and the rest stays.
    """
    turned, rest = x, None
    if (n_rotated := 2 * rotation[0].shape[-1]) < x.shape[-1]:
        turned, rest = x[..., :n_rotated], x[..., n_rotated:]
    y: Tensor = _RotateFunction.apply(turned, *rotation, dtype)  # type: ignore[no-untyped-call]
    return y if rest is None else torch.cat([y, rest.to(dtype)], -1)


class _RotateFunction(torch.autograd.Function):
    """The inverse of a rotation is the opposite rotation, so the backward pass needs the tables alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.dtype = x.dtype
        return _turn(x, cos, sin, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, -sin, ctx.dtype), None, None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    y = torch.empty_like(x, dtype=dtype)
    first, second = y.chunk(2, dim=-1)
    first.copy_(a * cos - b * sin)
    second.copy_(b * cos + a * sin)
    return y


class LearnedPositions(nn.Embedding):
    """An embedding of each position, added to that of the token: GPT-2's. It is asked as ``Rotary`` is."""

    def __init__(self, n_positions: int, width: int, *, std: float) -> None:
        super().__init__(n_positions, width, _weight=torch.empty(n_positions, width))
        nn.init.normal_(self.weight, std=std)

    def forward(self, start: int, length: int) -> Tensor:  # type: ignore[override]
        """(length, D): the embeddings of positions ``start`` to ``start + length - 1``."""
        return self.weight[start : start + length]

    def at(self, positions: Tensor) -> Tensor:
        """(B, T, D): the embeddings of (B, T) positions."""
        return F.embedding(positions, self.weight)


class Attention(nn.Module):
    """Causal multi-head attention with rotary positions and an RMSNorm per head on queries and keys.

    QK-norm: Dehghani et al. 2023, section 2; here before the rotation and with a learned weight, as in Qwen3.
    Grouped keys: Ainslie et al. 2023; each head of keys and values serves H / G heads of queries.

    Args:
        width: D.
        shape: heads and their width, biases, QK-norm.
    """

    def __init__(self, width: int, shape: TransformerConfig) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads = shape.n_heads, shape.n_kv_heads or shape.n_heads
        self.head_dim = head = head_width(width, shape)
        own, shared = self.n_heads * head, self.n_kv_heads * head
        biased = shape.attention_bias != "none"
        self.q_proj = linear(width, own, bias=biased)
        self.k_proj = linear(width, shared, bias=biased)
        self.v_proj = linear(width, shared, bias=biased)
        self.q_norm = RMSNorm(head, shape.norm_eps) if shape.qk_norm else None
        self.k_norm = RMSNorm(head, shape.norm_eps) if shape.qk_norm else None
        self.o_proj = linear(own, width, zero=True, bias=shape.attention_bias == "all")

    def forward(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor] | None,
        cache: KeyValueCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        """(B, T, D) -> (B, T, D). With a cache, the T tokens follow those it holds and are added to it.

        Args:
            rotation: cosine and sine of the positions; None where positions are in the embeddings.
        """
        q = self._placed(self.q_proj(x), self.n_heads, self.q_norm, rotation, x.dtype)  # (B, H, T, K)
        k = self._placed(self.k_proj(x), self.n_kv_heads, self.k_norm, rotation, x.dtype)
        v = self._split(self.v_proj(x), self.n_kv_heads)  # (B, G, T, K)
        grouped = self.n_kv_heads != self.n_heads
        if cache is None or cache.length == 0:
            if cache is not None:
                cache.extend(layer, k, v)
            y = causal_attention(q, k, v)
        else:
            k, v = cache.extend(layer, k, v)
            mask = cache.mask(x.shape[1], x.device)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
        output: Tensor = self.o_proj(y.transpose(1, 2).flatten(2))  # (B, H, T, K) -> (B, T, D)
        return output

    def _placed(
        self,
        x: Tensor,
        n_heads: int,
        norm: RMSNorm | None,
        rotation: tuple[Tensor, Tensor] | None,
        dtype: torch.dtype,
    ) -> Tensor:
        """Queries or keys of (B, T, H K), normalised and rotated: (B, H, T, K) in ``dtype``."""
        heads = x.view(*x.shape[:2], n_heads, -1)  # (B, T, H, K)
        in_one_pass = (
            norm is not None
            and rotation is not None
            and rotation[0].ndim == 2
            and torch.is_grad_enabled()
            and passes.serve(heads, norm.weight, *rotation, into=dtype)
        )
        if in_one_pass:
            assert norm is not None
            y: Tensor = _NormRotateFunction.apply(  # type: ignore[no-untyped-call]
                heads, norm.weight, norm.eps, *(rotation or ()), dtype
            )
            return y.transpose(1, 2)
        x = heads.transpose(1, 2) if norm is None else norm(heads.transpose(1, 2))
        return x.to(dtype) if rotation is None else rotate(x, rotation, dtype)

    @staticmethod
    def _split(x: Tensor, n_heads: int) -> Tensor:
        """(B, T, H K) -> (B, H, T, K)."""
        return x.view(*x.shape[:2], n_heads, -1).transpose(1, 2)


def head_width(width: int, shape: TransformerConfig) -> int:
    """K: as set, else D / H."""
    return shape.head_dim or width // shape.n_heads


class Block(nn.Module):
    """One layer: attention of any kind, then feed-forward, each on a normalised copy of the stream.

    Args:
        width: D.
        attention: (B, T, D) -> (B, T, D).
        mlp: (B, T, D) -> (B, T, D).
        dropout: of what each adds to the stream.
        shape: norms, and whether both read the same stream; the default when None.
    """

    def __init__(
        self,
        width: int,
        attention: nn.Module,
        mlp: nn.Module,
        dropout: Dropout,
        shape: TransformerConfig | None = None,
    ) -> None:
        super().__init__()
        shape = shape or TransformerConfig()
        self.dropout, self.parallel = dropout, shape.parallel
        self.input_layernorm = norm(width, shape)
        self.self_attn = attention
        self.post_attention_layernorm = norm(width, shape)
        self.mlp = mlp

    def forward(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor] | None,
        cache: KeyValueCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        dtype = matmul_dtype(x)
        attended = x + self.dropout(self.self_attn(self.input_layernorm(x, dtype), rotation, cache, layer))
        read = x if self.parallel else attended
        y: Tensor = attended + self.dropout(self.mlp(self.post_attention_layernorm(read, dtype)))
        return y
