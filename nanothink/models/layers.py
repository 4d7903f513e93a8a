"""Building blocks of the models: RMSNorm, rotary positions, attention with a cache, SwiGLU, a block of both.

Parameters of attention, feed-forward and block are named as in ``transformers``' Qwen3.

Weights are float32 and stay so; under autocast the matrix products run in the autocast type, norms and
rotations in float32. A norm returns its result in the type of the matrix products that read it, so that it
is converted once and not once per product.

Norm, rotation and feed-forward have their own backward passes, which recompute cheap intermediate results
instead of keeping them: 8 MiB of activations per layer for 512 tokens of width 384 under bfloat16 autocast,
where autograd kept 15.5.

Shapes: B batch, T time, S keys (cached and new), D model width, H heads, K = D / H width of a head,
F inner width of the feed-forward.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nanothink.errors import UsageError
from nanothink.models.contract import State
from nanothink.models.dropout import Dropout
from nanothink.models.precision import matmul_dtype

if TYPE_CHECKING:
    from nanothink.models.decoding.experts import Step

NORM_EPS = 1e-6

_FIRST_CAPACITY = 64  # tokens a new cache has room for; it doubles when full


def linear(n_in: int, n_out: int, *, zero: bool = False) -> nn.Linear:
    """A linear layer without bias; normal of standard deviation 0.6 / sqrt(n_in), or zero."""
    layer = _UndrawnLinear(n_in, n_out, bias=False)
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


class RMSNorm(nn.Module):
    """Root-mean-square norm (Zhang & Sennrich 2019) over the last dimension, computed in float32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """(..., width) -> (..., width) in ``dtype``."""
        if (
            x.device.type == "cuda" or not torch.is_grad_enabled()
        ):  # one kernel, which keeps no more than ours
            return F.rms_norm(x.float(), self.weight.shape, self.weight, NORM_EPS).to(dtype)
        y: Tensor = _RMSNormFunction.apply(x, self.weight, dtype)  # type: ignore[no-untyped-call]
        return y


class _RMSNormFunction(torch.autograd.Function):
    """Keeps its input and one number per row; autograd would keep the normalised rows too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        wide = x.float()
        inverse = (wide.square().mean(-1, keepdim=True) + NORM_EPS).rsqrt_()  # 1 / RMS of each row
        ctx.save_for_backward(x, weight, inverse)
        return (wide * inverse).mul_(weight).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        grad = grad.float()
        unit = x.float() * inverse  # rows of RMS 1
        grad_unit = grad * weight
        grad_weight = (grad * unit).flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        inward = (grad_unit * unit).mean(-1, keepdim=True)  # the part along the row itself
        grad_x = grad_unit.sub_(unit.mul_(inward)).mul_(inverse).to(x.dtype)
        return grad_x, grad_weight, None


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
    """Rotate (B, H, T, K) by the angles of its positions, the same in each row or not. Returns ``dtype``."""
    y: Tensor = _RotateFunction.apply(x, *rotation, dtype)  # type: ignore[no-untyped-call]
    return y


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


class KeyValueCache(State):
    """Keys and values of the tokens read so far, for each layer, in buffers that double when full.

    Each row begins in the first column. Where rows are of different lengths, columns past the end of a row
    hold nothing that counts, and a mask hides them; they are zero at first, as 0 times NaN is NaN.

    Args:
        n_layers: how many layers write to it.
        batch_size: B.
        max_length: the most tokens it may hold.
    """

    def __init__(self, n_layers: int, batch_size: int, max_length: int) -> None:
        self.batch_size = batch_size
        self.max_length = max_length
        self.length = 0
        """Tokens in the longest row."""
        self._lengths: list[int] | None = None  # of each row, where they differ
        self._positions: Tensor | None = None  # (B, T) of the new tokens, where the lengths differ
        self._seen: Tensor | None = None  # (B, 1, T, S), the mask where the lengths differ
        self.compiled: Step | None = None
        """Writes to these buffers; nothing once one of them has been replaced."""
        self._keys: list[Tensor | None] = [None] * n_layers
        self._values: list[Tensor | None] = [None] * n_layers

    @property
    def lengths(self) -> list[int]:
        """Tokens in each row."""
        return self._lengths or [self.length] * self.batch_size

    def begin(self, rotary: Rotary, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Prepare for (B, T) new tokens; returns the rotation of their positions.

        Raises:
            UsageError: they do not fit.
        """
        self.check_room(tokens)
        n_new, device = tokens.shape[1], tokens.device
        if self._lengths is None:
            together: tuple[Tensor, Tensor] = rotary(self.length, n_new)
            return together
        lengths = torch.tensor(self._lengths, device=device)
        self._positions = lengths.unsqueeze(1) + torch.arange(n_new, device=device)  # (B, T)
        columns = torch.arange(self.length + n_new, device=device)
        self._seen = (columns <= self._positions.unsqueeze(2)).unsqueeze(1)
        return rotary.at(self._positions)

    def mask(self, n_new: int, device: torch.device) -> Tensor | None:
        """Which of the S keys each new token may look at: (T, S) or (B, 1, T, S) bool; None for all."""
        if self._lengths is not None:
            return self._seen
        if n_new == 1:
            return None
        ones = torch.ones(n_new, self.length + n_new, dtype=torch.bool, device=device)
        return ones.tril(self.length)

    def join(self, other: State) -> None:
        """See ``State.join``."""
        assert isinstance(other, KeyValueCache)
        self.compiled = None
        lengths = [*self.lengths, *other.lengths]
        for buffers, others in ((self._keys, other._keys), (self._values, other._values)):
            for layer, theirs in enumerate(others):
                if theirs is not None:
                    buffers[layer] = self._with_rows(buffers[layer], theirs[: other.batch_size])
        self.batch_size = len(lengths)
        self._set_lengths(lengths)

    def drop(self, row: int) -> None:
        """See ``State.drop``."""
        lengths, last = self.lengths, self.batch_size - 1
        for buffer in (*self._keys, *self._values):
            if buffer is not None and row != last:
                buffer[row, :, : lengths[last]] = buffer[last, :, : lengths[last]]
        lengths[row] = lengths[last]
        self.batch_size = last
        self._set_lengths(lengths[:last])

    def _set_lengths(self, lengths: list[int]) -> None:
        self.length = max(lengths, default=0)
        self._lengths = None if len(set(lengths)) <= 1 else lengths

    def _with_rows(self, buffer: Tensor | None, theirs: Tensor) -> Tensor:
        """A layer's buffer with rows (b, H, s, K) after its B rows, in a larger one if there is no room."""
        n_rows, n_columns = self.batch_size + theirs.shape[0], theirs.shape[2]
        if buffer is None or buffer.shape[0] < n_rows or buffer.shape[2] < n_columns:
            before = (0, 0) if buffer is None else (buffer.shape[0], buffer.shape[2])
            rows = n_rows if n_rows <= before[0] else max(n_rows, 2 * before[0])
            larger = theirs.new_zeros(rows, theirs.shape[1], max(before[1], n_columns), theirs.shape[3])
            if buffer is not None:
                larger[: self.batch_size, :, : self.length] = buffer[: self.batch_size, :, : self.length]
            buffer = larger
        buffer[self.batch_size : n_rows, :, :n_columns] = theirs
        return buffer

    def check_room(self, tokens: Tensor) -> None:
        """Raise UsageError for (B, T) tokens that do not fit."""
        batch_size, n_tokens = tokens.shape
        if batch_size != self.batch_size:
            raise UsageError(
                f"this decoding state is for {self.batch_size} sequences, but {batch_size} were given"
            )
        if self.length + n_tokens > self.max_length:
            raise UsageError(
                f"the decoding state holds {self.length} tokens and {n_tokens} more were given, but the "
                f"context is {self.max_length} tokens; start a new state from the last tokens of the text"
            )

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append (B, H, T, K) to a layer. Returns all its keys and values, (B, H, S, K) views.

        Rows of different lengths need ``begin`` before.

        ``length`` changes in ``advance`` alone, after every layer has been extended.
        """
        self._keys[layer] = self._append(self._keys[layer], keys)
        self._values[layer] = self._append(self._values[layer], values)
        stop = self.length + keys.shape[2]
        all_keys, all_values = self._keys[layer], self._values[layer]
        assert all_keys is not None
        assert all_values is not None
        n = self.batch_size
        return all_keys[:n, :, :stop], all_values[:n, :, :stop]

    def room(self, layer: int, n_new: int, n_heads: int, width: int) -> tuple[Tensor, Tensor]:
        """Buffers of a layer, (B, n_heads, S, width) float32 each, with room for ``n_new`` more tokens."""
        new = torch.empty(self.batch_size, n_heads, n_new, width)
        keys = self._keys[layer] = self._with_room(self._keys[layer], new)
        values = self._values[layer] = self._with_room(self._values[layer], new)
        return keys, values

    def has_room(self, n_new: int) -> bool:
        """True if the buffers can take ``n_new`` more tokens as they are."""
        first = self._keys[0]
        return first is not None and self.length + n_new <= first.shape[2]

    def advance(self, n_tokens: int) -> None:
        self.length += n_tokens
        if self._lengths is not None:
            self._lengths = [length + n_tokens for length in self._lengths]

    def _append(self, buffer: Tensor | None, new: Tensor) -> Tensor:
        buffer = self._with_room(buffer, new)
        if self._lengths is None:
            buffer[: self.batch_size, :, self.length : self.length + new.shape[2]] = new
        else:
            rows_of = torch.arange(self.batch_size, device=new.device).unsqueeze(1)
            buffer[rows_of, :, self._positions] = new.transpose(1, 2)  # (B, T, H, K)
        return buffer

    def _with_room(self, buffer: Tensor | None, new: Tensor) -> Tensor:
        stop = self.length + new.shape[2]
        if buffer is not None and buffer.shape[2] >= stop:
            return buffer
        doubled = _FIRST_CAPACITY if buffer is None else 2 * buffer.shape[2]
        capacity = min(max(doubled, stop), self.max_length)
        rows = new.shape[0] if buffer is None else buffer.shape[0]
        larger = new.new_zeros(rows, new.shape[1], capacity, new.shape[3])
        if buffer is not None:
            larger[:, :, : self.length] = buffer[:, :, : self.length]
        self.compiled = None
        return larger


class Attention(nn.Module):
    """Causal multi-head attention with rotary positions and an RMSNorm per head on queries and keys.

    QK-norm: Dehghani et al. 2023, section 2; here before the rotation and with a learned weight, as in Qwen3.
    """

    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.q_proj = linear(width, width)
        self.k_proj = linear(width, width)
        self.v_proj = linear(width, width)
        self.q_norm = RMSNorm(width // n_heads)
        self.k_norm = RMSNorm(width // n_heads)
        self.o_proj = linear(width, width, zero=True)

    def forward(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], cache: KeyValueCache | None = None, layer: int = 0
    ) -> Tensor:
        """(B, T, D) -> (B, T, D). With a cache, the T tokens follow those it holds and are added to it."""
        q = rotate(self.q_norm(self._split(self.q_proj(x))), rotation, x.dtype)  # (B, H, T, K)
        k = rotate(self.k_norm(self._split(self.k_proj(x))), rotation, x.dtype)
        v = self._split(self.v_proj(x))
        if cache is None or cache.length == 0:
            if cache is not None:
                cache.extend(layer, k, v)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            k, v = cache.extend(layer, k, v)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=cache.mask(x.shape[1], x.device))
        output: Tensor = self.o_proj(y.transpose(1, 2).flatten(2))  # (B, H, T, K) -> (B, T, D)
        return output

    def _split(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, H, T, K)."""
        return x.view(*x.shape[:2], self.n_heads, -1).transpose(1, 2)


class SwiGLU(nn.Module):
    """Gated feed-forward: ``down_proj(silu(gate_proj(x)) * up_proj(x))`` (Shazeer 2020)."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = linear(width, inner)
        self.up_proj = linear(width, inner)
        self.down_proj = linear(inner, width, zero=True)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        return gated_product(self.gate_proj(x), self.up_proj(x), self.down_proj.weight)


class Block(nn.Module):
    """One layer: attention of either kind, then feed-forward, each on a normalised copy of the stream."""

    def __init__(self, width: int, attention: nn.Module, inner: int, dropout: Dropout) -> None:
        super().__init__()
        self.dropout = dropout
        self.input_layernorm = RMSNorm(width)
        self.self_attn = attention
        self.post_attention_layernorm = RMSNorm(width)
        self.mlp = SwiGLU(width, inner)

    def forward(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], cache: KeyValueCache | None = None, layer: int = 0
    ) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        dtype = matmul_dtype(x)
        x = x + self.dropout(self.self_attn(self.input_layernorm(x, dtype), rotation, cache, layer))
        update: Tensor = self.dropout(self.mlp(self.post_attention_layernorm(x, dtype)))
        return x + update


def gated_product(gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
    """``(silu(gate) * up) @ weight.T``: (..., F), (..., F), (D, F) -> (..., D), in the type of ``gate``."""
    if not torch.is_grad_enabled():
        return F.linear(F.silu(gate).mul_(up), weight)
    y: Tensor = _GatedProduct.apply(gate, up.to(gate.dtype), weight.to(gate.dtype))  # type: ignore[no-untyped-call]
    return y


class _GatedProduct(torch.autograd.Function):
    """Keeps gate and up, and recomputes the rest in the backward pass."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up, weight)
        with torch.autocast(gate.device.type, enabled=False):
            return F.linear(F.silu(gate).mul_(up), weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, weight = ctx.saved_tensors
        with torch.autocast(gate.device.type, enabled=False):
            opened = F.silu(gate)
            grad_weight = None
            if ctx.needs_input_grad[2]:
                grad_weight = grad.flatten(0, -2).t() @ (opened * up).flatten(0, -2)
            grad_inner = grad @ weight  # (B, T, F)
            grad_up = opened.mul_(grad_inner)
            grad_gate = torch.ops.aten.silu_backward(grad_inner.mul_(up), gate)
        return grad_gate, grad_up, grad_weight
