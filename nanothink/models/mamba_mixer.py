"""The mixer of Mamba-1 (Gu & Dao 2023, "Mamba", figure 3): causal convolution, selective scan and gate.

Shapes: B batch, T time, D model width; E = expand x D channels, N state, R rank of Δ, W width of the
convolution.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nanothink.config import StateSpaceConfig
from nanothink.errors import UsageError
from nanothink.models import passes
from nanothink.models.contract import State, without_row
from nanothink.models.drafts import MOST_DRAFTS
from nanothink.models.feed_forward import gated_product
from nanothink.models.layers import linear
from nanothink.models.low_rank import weight_of
from nanothink.models.selective_scan import selective_scan

if TYPE_CHECKING:
    pass

_DELTA_MIN, _DELTA_MAX, _DELTA_FLOOR = 0.001, 0.1, 1e-4


class Recurrence(State):
    """Decoding state of every layer. Its size does not depend on how many tokens were read.

    Args:
        n_layers: how many layers write to it.
        batch_size: B.
    """

    def __init__(self, n_layers: int, batch_size: int) -> None:
        self.batch_size = batch_size
        self.layers: list[LayerState | None] = [None] * n_layers  # None before the first token
        self._past: deque[list[tuple[Tensor, Tensor]]] = deque(maxlen=MOST_DRAFTS + 1)

    rewind_every = 1

    def remember(self) -> None:
        """See ``State.remember``."""
        # of each layer conv_state and ssm_state
        known = [own for own in self.layers if own is not None]
        self._past.append([(own.conv_state.clone(), own.ssm_state.clone()) for own in known])

    def rewind(self, n_tokens: int) -> None:
        """See ``State.rewind``."""
        for own, (conv_state, ssm_state) in zip(self.layers, self._past[-n_tokens], strict=True):
            assert own is not None
            own.conv_state.copy_(conv_state)
            own.ssm_state.copy_(ssm_state)
        for _ in range(n_tokens):
            self._past.pop()

    def check_room(self, tokens: Tensor) -> None:
        """Raise UsageError for (B, T) tokens of another number of sequences."""
        if tokens.shape[0] != self.batch_size:
            raise UsageError(
                f"this decoding state is for {self.batch_size} sequences, but {tokens.shape[0]} were given"
            )

    def of(self, layer: int, mixer: Mixer) -> LayerState:
        """The state of a layer; before the first token it is zero."""
        state = self.layers[layer]
        if state is None:
            channels, width = mixer.D.shape[0], mixer.conv1d.weight.shape[-1]
            state = LayerState(
                torch.zeros(self.batch_size, width - 1, channels),
                torch.zeros(self.batch_size, mixer.splits[1], channels),
            )
            self.layers[layer] = state
        return state

    def join(self, other: State) -> None:
        """See ``State.join``."""
        assert isinstance(other, Recurrence)
        self.step = None
        for i, (own, theirs) in enumerate(zip(self.layers, other.layers, strict=True)):
            if own is None and theirs is not None:
                conv_state, ssm_state = theirs.conv_state.clone(), theirs.ssm_state.clone()
                self.layers[i] = replace(theirs, conv_state=conv_state, ssm_state=ssm_state)
            elif own is not None and theirs is not None:
                own.conv_state = torch.cat([own.conv_state, theirs.conv_state])
                own.ssm_state = torch.cat([own.ssm_state, theirs.ssm_state])
        self.batch_size += other.batch_size

    def drop(self, row: int) -> None:
        """See ``State.drop``."""
        self.step = None
        for own in self.layers:
            if own is not None:
                own.conv_state = cast(Tensor, without_row(own.conv_state, row))
                own.ssm_state = cast(Tensor, without_row(own.ssm_state, row))
        self.batch_size -= 1


@dataclass
class LayerState:
    """Decoding state of one layer."""

    conv_state: Tensor  # (B, W - 1, E): the last inputs of the convolution
    ssm_state: Tensor  # (B, N, E): the state of the scan
    weights: StepWeights | None = None  # made at the first step that needs them


@dataclass
class StepWeights:
    """Copies of a layer's weights in the layout that its own step reads fastest."""

    in_proj: Tensor  # (D, 2 E): the input projection; one row times this takes half the time of its transpose
    taps: Tensor  # (W, E): the weights of the convolution
    rates: Tensor  # (N, E): A log2 e, for exp(delta A) = 2^(delta A log2 e)


class CausalConv1d(nn.Module):
    """One causal filter a channel, then ``silu``. Its weight has the shape of a depthwise ``nn.Conv1d``'s."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, width).uniform_(-0.5, 0.5))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, E) -> (B, T, E) in the type of ``x``."""
        y: Tensor = _Convolution.apply(x, self.weight.squeeze(1), self.bias)  # type: ignore[no-untyped-call]
        return y

    def taps(self) -> Tensor:
        """(W, E): a copy of the weights, oldest input first."""
        return self.weight.squeeze(1).t().contiguous()


class Mixer(nn.Module):
    """Projection, causal convolution, selective scan, gate, projection. Parameters are named as in Mamba."""

    def __init__(self, width: int, shape: StateSpaceConfig) -> None:
        super().__init__()
        channels, rank = shape.expand * width, delta_rank(width, shape)
        self.splits = [rank, shape.d_state, shape.d_state]
        self.scan, self.norm_eps = shape.scan, shape.mixer_norm_eps
        self.in_proj = linear(width, 2 * channels)  # the channels, then their gates
        self.conv1d = CausalConv1d(channels, shape.conv_width)
        self.x_proj = linear(channels, sum(self.splits))  # Δ (of low rank), B and C of each token
        self.dt_proj = nn.Linear(rank, channels)
        self.A_log = nn.Parameter(torch.arange(1.0, shape.d_state + 1).log().repeat(channels, 1))
        self.D = nn.Parameter(torch.ones(channels))
        self.out_proj = linear(channels, width, zero=True)
        with torch.no_grad():
            nn.init.uniform_(self.dt_proj.weight, -(rank**-0.5), rank**-0.5)
            low, high = math.log(_DELTA_MIN), math.log(_DELTA_MAX)
            start = torch.empty(channels).uniform_(low, high).exp_().clamp_(min=_DELTA_FLOOR)
            self.dt_proj.bias.copy_(start + torch.log(-torch.expm1(-start)))  # softplus of it is start

    def forward(self, x: Tensor, recurrence: Recurrence | None = None, layer: int = 0) -> Tensor:
        """(B, T, D) -> (B, T, D). With a decoding state, the T tokens follow those it has read."""
        before = None if recurrence is None else recurrence.layers[layer]
        if before is not None and x.shape[1] == 1:
            return self._step(x, before)
        x, gate = self.in_proj(x).chunk(2, dim=-1)  # (B, T, E)
        whole = x if before is None else torch.cat([before.conv_state, x], 1)
        u = self.conv1d(whole)[:, -x.shape[1] :]
        rank, B, C = self._selected(u)  # (B, T, R), (B, T, N), (B, T, N)
        delta: Tensor = _Softplus.apply(F.linear(rank, self.dt_proj.weight), self.dt_proj.bias)  # type: ignore[no-untyped-call]
        state = None if before is None else before.ssm_state
        y, last = self.scanned(u, delta, self.rates(), B, C, self.D, state)
        if recurrence is not None:
            kept = self.conv1d.weight.shape[-1] - 1
            padded = F.pad(whole, (0, 0, max(0, kept - whole.shape[1]), 0))
            weights = None if before is None else before.weights
            recurrence.layers[layer] = LayerState(padded[:, -kept:].clone(), last, weights)
        return gated_product(gate, y, self.out_proj)

    def scanned(self, *inputs: Tensor | None) -> tuple[Tensor, Tensor]:
        """``selective_scan`` of its inputs: in training a kernel of its own, in no compiled graph."""
        return selective_scan(*inputs, name=self.scan)  # type: ignore[arg-type]

    def _selected(self, u: Tensor) -> tuple[Tensor, ...]:
        """Δ (of low rank), B and C of each token; normalised if that is set (FalconMamba, 2024)."""
        parts: tuple[Tensor, ...] = self.x_proj(u).split(self.splits, dim=-1)
        if self.norm_eps is None:
            return parts
        return tuple(
            F.rms_norm(part.float(), part.shape[-1:], None, self.norm_eps).to(u.dtype) for part in parts
        )

    def rates(self) -> Tensor:
        """(E, N): A, below zero."""
        return -self.A_log.float().exp()

    def _step(self, x: Tensor, state: LayerState) -> Tensor:
        """(B, 1, D) -> (B, 1, D): one step of the recurrence, a fixed number of small operations."""
        if state.weights is None:
            in_proj = weight_of(self.in_proj).t().to(x.dtype).contiguous()
            rates = (self.rates() / math.log(2)).t().contiguous()
            state.weights = StepWeights(in_proj, self.conv1d.taps(), rates)
        weights = state.weights
        x, gate = (x @ weights.in_proj).chunk(2, dim=-1)  # (B, 1, E)
        window = torch.cat([state.conv_state, x], 1)  # (B, W, E)
        state.conv_state = window[:, 1:].contiguous()
        u = F.silu((window * weights.taps).sum(1, keepdim=True).add_(self.conv1d.bias)).to(x.dtype)
        rank, B, C = self._selected(u)
        delta = F.softplus(F.linear(rank, self.dt_proj.weight).float().add_(self.dt_proj.bias))
        decay = (delta * weights.rates).exp2_()  # (B, N, E)
        state.ssm_state = decay.mul_(state.ssm_state).addcmul_(B.float().mT, delta * u)
        y = (C.float() @ state.ssm_state).addcmul_(self.D, u).to(gate.dtype)
        return gated_product(gate, y, self.out_proj)


class _Convolution(torch.autograd.Function):
    """Causal convolution and ``silu``. Keeps its input alone and recomputes the sum in the backward pass.

    On a CPU it is one pass (``passes``); without a compiler PyTorch handles one sequence at a time, which
    stays in the cache: four times as fast as ``F.conv1d``.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        if passes.serve_filter(x, taps := weight.t().contiguous(), bias):
            return passes.filtered(x, taps, bias)
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        for rows in _cache_rows(x):
            y[rows] = F.silu(_filtered(x[rows], weight, bias))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        x, weight, bias = ctx.saved_tensors
        n_tokens, width = x.shape[1], weight.shape[1]
        taps = weight.t().contiguous()  # (W, E)
        if passes.serve_filter(x, taps, bias):
            found = passes.filtered_backward(x, taps, bias, grad.to(x.dtype).contiguous())
            return found[0], found[1].t(), found[2]
        grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
        grad_taps, grad_bias = torch.zeros_like(taps), torch.zeros_like(bias)
        for rows in _cache_rows(x):
            before = _filtered(x[rows], weight, bias)
            inner = torch.ops.aten.silu_backward(grad[rows].to(before.dtype), before)  # (b, T, E)
            part = inner * taps[-1]
            grad_bias += inner.sum((0, 1))
            for back in range(min(width, n_tokens)):  # the tap that looks `back` steps back
                after, source = inner[:, back:], x[rows, : n_tokens - back]
                if back:
                    part[:, : n_tokens - back].addcmul_(after, taps[-1 - back])
                grad_taps[-1 - back] += (after * source).sum((0, 1))
            grad_x[rows] = part
        return grad_x, grad_taps.t(), grad_bias


def _filtered(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(B, T, E) -> (B, T, E) float32: bias plus the last W inputs, weighted by (E, W), oldest first."""
    taps = weight.t().contiguous()  # (W, E)
    y = torch.addcmul(bias, x, taps[-1])
    for back in range(1, min(taps.shape[0], x.shape[1])):
        y[:, back:].addcmul_(x[:, :-back], taps[-1 - back])
    return y


def _cache_rows(x: Tensor) -> Iterator[slice]:
    size = 1 if x.device.type == "cpu" else x.shape[0]
    for start in range(0, x.shape[0], size):
        yield slice(start, start + size)


class _Softplus(torch.autograd.Function):
    """``softplus(x + bias)`` in float32. Its slope follows from its value, so only the value is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor) -> Tensor:
        if passes.serve(x, bias) and bias.dtype is torch.float32:
            y = passes.softplus(x, bias)
        else:
            y = F.softplus(x.float() + bias)
        ctx.save_for_backward(y)
        ctx.dtype = x.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        (y,) = ctx.saved_tensors
        grad = grad.contiguous()
        if passes.serve(y, grad, into=ctx.dtype) and y.dtype is grad.dtype is torch.float32:
            return passes.softplus_backward(y, grad, ctx.dtype)
        grad = torch.expm1(-y).neg_().mul_(grad)  # sigmoid(x) = 1 - exp(-softplus(x))
        return grad.to(ctx.dtype), grad.flatten(0, -2).sum(0)


def delta_rank(width: int, shape: StateSpaceConfig) -> int:
    """R: as set, else a sixteenth of the model width, rounded up (the paper's default)."""
    return shape.delta_rank or -(-width // 16)
