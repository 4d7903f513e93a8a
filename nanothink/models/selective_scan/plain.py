"""The selective scan in plain PyTorch, for any device and without a compiler.

Time is worked off in chunks of a few steps. Within a chunk all decays and inputs are made at once in
buffers of shape (batch, chunk, N, D), D innermost, so that every broadcast runs along contiguous memory;
then one fused multiply-add a step turns the inputs into states in place, and batched products contract
N. Only the state at the start of each chunk is kept for the backward pass, which computes the states
inside a chunk again (Gu & Dao 2023, section 3.3.2: recomputation).

With Gₜ the gradient of the loss by the state hₜ = aₜ hₜ₋₁ + Δₜ uₜ Bₜ, where aₜ = exp(Δₜ A):

    Gₜ = Cₜ ∂yₜ + aₜ₊₁ Gₜ₊₁            ∂A  = Σₜ Qₜ Δₜ      with Qₜ = Gₜ aₜ hₜ₋₁
    ∂Bₜ = Σ_D Gₜ Δₜ uₜ                  ∂Δₜ = Σ_N Qₜ A + uₜ Σ_N Gₜ Bₜ
    ∂Cₜ = Σ_D hₜ ∂yₜ                    ∂uₜ = Δₜ Σ_N Gₜ Bₜ + D ∂yₜ
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 32
"""Steps worked off at a time: the best of 4 to 64 on a CPU, where every operation costs its start."""

_LOG2_E = 1 / math.log(2)  # exp(x) = 2^(x log2 e), and exp2 takes half the time of exp on a CPU

_CACHE_BYTES = 2 << 20  # a buffer on a CPU; other devices take the whole batch at a time


def scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See ``selective_scan``. Computes in float32, or in float64 for float64 inputs."""
    wide = torch.float64 if u.dtype == torch.float64 else torch.float32
    h = u.new_zeros(u.shape[0], A.shape[1], u.shape[2], dtype=wide) if state is None else state
    inputs = (z.to(wide) for z in (u, delta, A, B, C, D, h))
    y, last = _PlainScan.apply(*inputs)  # type: ignore[no-untyped-call]
    return y.to(u.dtype), last


class _PlainScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        u, delta, B, C = (z.contiguous() for z in (u, delta, B, C))
        At = A.t().contiguous()  # (N, D)
        with torch.autocast(u.device.type, enabled=False):
            du, rates = delta * u, At * _LOG2_E
            y = torch.empty_like(u)
            last = torch.empty_like(state)
            starts = state.new_empty(u.shape[0], -(-u.shape[1] // CHUNK), *At.shape)
            buffers = _Buffers(u, At, 2)
            for rows in _tiles(u, At):
                h = state[rows]
                for c, time in enumerate(_chunks(u)):
                    starts[rows, c] = h
                    decay, x = buffers.views(rows, time)  # (b, k, N, D)
                    torch.mul(delta[rows, time, None, :], rates, out=decay).exp2_()
                    torch.mul(du[rows, time, None, :], B[rows, time, :, None], out=x)
                    h = starts[rows, c]
                    for a, x_t in zip(decay.unbind(1), x.unbind(1), strict=True):
                        h = x_t.addcmul_(a, h)
                    y[rows, time] = torch.matmul(C[rows, time, None, :], x).squeeze(2)
                last[rows] = h
            y.addcmul_(u, D)
        ctx.save_for_backward(u, delta, At, B, C, D, starts)
        return y, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, grad_last: Tensor) -> tuple[Tensor | None, ...]:
        u, delta, At, B, C, D, starts = ctx.saved_tensors
        grad_y = grad_y.contiguous()
        with torch.autocast(u.device.type, enabled=False):
            du, rates = delta * u, At * _LOG2_E
            grad_du, grad_delta, grad_B, grad_C = (torch.empty_like(z) for z in (u, u, B, C))
            grad_A = torch.zeros_like(At)
            grad_state = torch.empty_like(grad_last)
            buffers = _Buffers(u, At, 4)
            for rows in _tiles(u, At):
                carried = grad_last[rows]  # a_{t+1} G_{t+1} of the step after this chunk
                for c, time in reversed(list(enumerate(_chunks(u)))):
                    decay, x, G, scratch = buffers.views(rows, time)
                    gy, du_c, B_c = grad_y[rows, time], du[rows, time], B[rows, time]
                    # the states of this chunk again, as in the forward pass
                    torch.mul(delta[rows, time, None, :], rates, out=decay).exp2_()
                    torch.mul(du_c[:, :, None, :], B_c[..., None], out=x)
                    start = starts[rows, c]
                    decays, states, Gs = decay.unbind(1), x.unbind(1), G.unbind(1)
                    h = start
                    for a, x_t in zip(decays, states, strict=True):
                        h = x_t.addcmul_(a, h)
                    # their gradients, backwards in time
                    torch.mul(C[rows, time, :, None], gy[:, :, None, :], out=G)
                    g = Gs[-1].add_(carried)
                    for i in range(len(Gs) - 2, -1, -1):
                        g = Gs[i].addcmul_(decays[i + 1], g)
                    carried = decays[0] * g
                    grad_C[rows, time] = torch.mul(x, gy[:, :, None, :], out=scratch).sum(3)
                    grad_B[rows, time] = torch.mul(G, du_c[:, :, None, :], out=scratch).sum(3)
                    grad_du[rows, time] = torch.matmul(B_c[:, :, None, :], G).squeeze(2)
                    Q = decay.mul_(G)
                    Q[:, 0].mul_(start)
                    Q[:, 1:].mul_(x[:, :-1])
                    grad_delta[rows, time] = torch.mul(Q, At, out=x).sum(2)
                    grad_A.add_(Q.mul_(delta[rows, time, None, :]).sum((0, 1)))
                grad_state[rows] = carried
            grad_D = (grad_y * u).sum((0, 1))
            grad_delta.addcmul_(grad_du, u)
            grad_u = grad_du.mul_(delta).addcmul_(grad_y, D)
        return grad_u, grad_delta, grad_A.t(), grad_B, grad_C, grad_D, grad_state


class _Buffers:
    """Buffers of shape (rows, chunk, N, D), used again for every chunk and every tile of the batch."""

    def __init__(self, u: Tensor, At: Tensor, count: int) -> None:
        n_rows = _tile_rows(u, At)
        self._whole = [u.new_empty(n_rows, min(CHUNK, u.shape[1]), *At.shape) for _ in range(count)]

    def views(self, rows: slice, time: slice) -> list[Tensor]:
        n_rows, n_steps = rows.stop - rows.start, time.stop - time.start
        # A shorter last chunk takes the front of the memory, so that it stays contiguous.
        return [
            whole
            if whole.shape[:2] == (n_rows, n_steps)
            else whole.flatten()[: n_rows * n_steps * whole[0, 0].numel()].view(
                n_rows, n_steps, *whole.shape[2:]
            )
            for whole in self._whole
        ]


def _tile_rows(u: Tensor, At: Tensor) -> int:
    if u.device.type != "cpu":
        return u.shape[0]
    return max(1, min(u.shape[0], _CACHE_BYTES // (CHUNK * At.numel() * u.element_size())))


def _tiles(u: Tensor, At: Tensor) -> Iterator[slice]:
    size = _tile_rows(u, At)
    for start in range(0, u.shape[0], size):
        yield slice(start, min(start + size, u.shape[0]))


def _chunks(u: Tensor) -> Iterator[slice]:
    for start in range(0, u.shape[1], CHUNK):
        yield slice(start, min(start + CHUNK, u.shape[1]))
