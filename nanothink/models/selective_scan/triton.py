"""The selective scan on CUDA: one Triton kernel forward, one backward.

A program takes one sequence and BLOCK_D channels through all of time, step after step, with the (N, BLOCK_D)
states in registers. Only the state at the start of each CHUNK of steps goes to memory; the backward pass
goes through the chunks backwards and computes the states inside again, formulas as in plain.py.

Why a loop over time and not an associative scan over tiles of time: the loop needs one multiply-add a state
and step where the scan's combine needs three operations and holds (time, N, D) in registers; it multiplies
no decays with each other, so that nothing vanishes or cancels; and at training sizes the programs, batch *
D / BLOCK_D of them, fill a card without parallelism in time. At batch 1 they do not, and a scan would win.

Programs share no sum: what several of them add to (A, B, C, D) each writes to a place of its own, and the
places are summed in a fixed order. There are no atomics and no autotuning: equal inputs give equal bits.

Shapes: u, delta, y (batch, T, D); B, C (batch, T, N); rates (N, D), which are A log2 e; state (batch, N, D);
starts (batch, T / CHUNK, N, D); inner (batch, CHUNK / GROUP, N, D), used again for every chunk; by sequence
grad_A (batch, N, D) and grad_D (batch, D); by block of channels grad_B, grad_C (D / BLOCK_D, batch, T, N).
Quotients are rounded up.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanothink.models.selective_scan import plain

CHUNK = 64
"""Steps between saved states: they take N / CHUNK of the memory of ``u`` in float32, a quarter for N = 16."""

GROUP = 4
"""Steps whose inputs are loaded together while the group before is worked off, and whose states the
backward pass holds in registers at once. Divides CHUNK."""

_SIZES = ["batch", "length", "n_states"]  # a size of 1 would else become a constant, and a kernel of its own

_LOG2_E: float = 1 / math.log(2)  # exp(x) = 2^(x log2 e), which is one instruction


def scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See ``selective_scan``. Computes in float32 from inputs of any type; hands float64 to the plain path.

    Neither ``u`` nor ``delta``, ``B`` and ``C`` are widened in memory, and none is copied whose last
    dimension is contiguous.
    """
    if u.dtype == torch.float64:
        return plain.scan(u, delta, A, B, C, D, state)
    h = u.new_zeros(u.shape[0], A.shape[1], u.shape[2], dtype=torch.float32) if state is None else state
    inputs = [z.float() if z.dtype == torch.float64 else z for z in (u, delta, A, B, C, D, h)]
    keep = torch.is_grad_enabled() and any(z.requires_grad for z in inputs)
    y, last = _TritonScan.apply(*inputs, keep)  # type: ignore[no-untyped-call]
    return y, last


class _TritonScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor,
        state: Tensor,
        keep: bool,
    ) -> tuple[Tensor, Tensor]:
        u, delta, B, C = (_rows(z) for z in (u, delta, B, C))
        rates = (A.t().float() * _LOG2_E).contiguous()  # (N, D)
        skip, first = D.float().contiguous(), state.float().contiguous()
        batch, length, width = u.shape
        y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
        last = torch.empty_like(first)
        starts = first.new_empty(batch, triton.cdiv(length, CHUNK) if keep else 0, *rates.shape)
        grid, tile = _launch(u, rates)
        with _on(u.device):
            _forward_kernel[grid](
                *(u, delta, rates, B, C, skip, first, y, last, starts),
                *(batch, length, width, rates.shape[0]),
                *_strides(u, delta, B, C),
                KEEP=keep,
                **tile,
            )
        if keep:
            ctx.save_for_backward(u, delta, rates, B, C, skip, starts)
            ctx.types = A.dtype, D.dtype, state.dtype
        return y, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, grad_last: Tensor) -> tuple[Tensor | None, ...]:
        u, delta, rates, B, C, skip, starts = ctx.saved_tensors
        grad_y, grad_last = _rows(grad_y), grad_last.contiguous()
        batch, length, width = u.shape
        n_states = rates.shape[0]
        grid, tile = _launch(u, rates)
        n_blocks = triton.cdiv(width, tile["BLOCK_D"])
        grad_u, grad_delta = (torch.empty(z.shape, dtype=z.dtype, device=z.device) for z in (u, delta))
        grad_A, grad_state = (rates.new_empty(batch, *rates.shape) for _ in range(2))
        grad_D = rates.new_empty(batch, width)
        grad_B, grad_C = (rates.new_empty(n_blocks, batch, length, n_states) for _ in range(2))
        inner = rates.new_empty(batch, CHUNK // GROUP, *rates.shape)
        with _on(u.device):
            _backward_kernel[grid](
                *(u, delta, rates, B, C, skip, starts, inner, grad_y, grad_last),
                *(grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_state),
                *(batch, length, width, n_states),
                *_strides(u, delta, B, C, grad_y),
                **tile,
            )
        type_A, type_D, type_state = ctx.types
        return (
            grad_u,
            grad_delta,
            grad_A.sum(0).t().to(type_A),
            grad_B.sum(0).to(B.dtype),
            grad_C.sum(0).to(C.dtype),
            grad_D.sum(0).to(type_D),
            grad_state.to(type_state),
            None,
        )


def _launch(u: Tensor, rates: Tensor) -> tuple[tuple[int], dict[str, Any]]:
    """Grid and options: a pure function of the sizes, so that two runs add up in the same order.

    A tile of N = 16 states and 16 channels on one warp is eight states a thread: for compute capability 9.0
    ptxas (of Triton 3.7 and 3.9) gives the forward kernel 94 registers and the backward one 238 to 254,
    nothing spilled, so that 20 and 8 programs fit on a multiprocessor. With one warp a program no sum over
    N or D waits for another warp. Twice the channels, or twice GROUP, spill in the backward pass; half
    the channels are half a memory sector of 16-bit inputs.
    """
    n_states, width = rates.shape
    N = triton.next_power_of_2(n_states)
    BLOCK_D = max(8, min(32, 256 // N))
    options = {
        "CHUNK": CHUNK,
        "GROUP": GROUP,
        "N": N,
        "BLOCK_D": BLOCK_D,
        "num_warps": max(1, N * BLOCK_D // 512),
        "enable_fp_fusion": True,  # multiply-adds; the default differs between versions of Triton
    }
    return (u.shape[0] * triton.cdiv(width, BLOCK_D),), options


def _rows(z: Tensor) -> Tensor:
    """``z`` if its last dimension is contiguous and steps within a chunk are below 2^31, else a copy."""
    return z if z.stride(2) == 1 and z.stride(1) < 2**31 // CHUNK else z.contiguous()


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for z in tensors for stride in z.stride()[:2]]


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Kernels start on the current device, whatever device their tensors are on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@triton.jit
def _load_group(matrix, first, stop, stride, columns, n_columns, GROUP: tl.constexpr):
    """GROUP rows of a matrix, from row ``first``, as float32; zero from row ``stop`` on."""
    group = ()
    for i in tl.static_range(GROUP):
        limit = tl.where(first + i < stop, n_columns, 0)
        row = tl.load(matrix + (first + i) * stride + columns, mask=columns < limit, other=0.0)
        group += (row.to(tl.float32),)  # type: ignore[assignment]
    return group


# Steps after T read as zero: with Δ = 0 the decay is 1 and nothing enters, so that they change no state and
# no gradient. States beyond N and channels beyond D stay zero in the same way.


@triton.jit(do_not_specialize=_SIZES)
def _forward_kernel(
    u, delta, rates, B, C, skip, state, y, last, starts,
    batch, length, width, n_states,
    u_b, u_t, delta_b, delta_t, B_b, B_t, C_b, C_t,
    KEEP: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    n_blocks = tl.cdiv(width, BLOCK_D)
    row = (tl.program_id(0) // n_blocks).to(tl.int64)
    d = (tl.program_id(0) % n_blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    n = tl.arange(0, N)
    d_in, n_in = d < width, n < n_states
    tile, tile_in = n[:, None] * width + d[None, :], n_in[:, None] & d_in[None, :]
    size = n_states.to(tl.int64) * width
    u += row * u_b
    delta += row * delta_b
    B += row * B_b
    C += row * C_b
    y += row * length * width
    starts += row * tl.cdiv(length, CHUNK) * size
    rate = tl.load(rates + tile, mask=tile_in, other=0.0)
    h = tl.load(state + row * size + tile, mask=tile_in, other=0.0)
    skip = tl.load(skip + d, mask=d_in, other=0.0)
    t = tl.zeros((), tl.int64)
    dt = _load_group(delta, t, length, delta_t, d, width, GROUP)
    ut = _load_group(u, t, length, u_t, d, width, GROUP)
    Bt = _load_group(B, t, length, B_t, n, n_states, GROUP)
    Ct = _load_group(C, t, length, C_t, n, n_states, GROUP)
    while t < length:
        # The next group is on its way from memory while this one is worked off.
        next_dt = _load_group(delta, t + GROUP, length, delta_t, d, width, GROUP)
        next_ut = _load_group(u, t + GROUP, length, u_t, d, width, GROUP)
        next_Bt = _load_group(B, t + GROUP, length, B_t, n, n_states, GROUP)
        next_Ct = _load_group(C, t + GROUP, length, C_t, n, n_states, GROUP)
        if KEEP:  # noqa: SIM102 - this one is settled when the kernel is compiled
            if t % CHUNK == 0:
                tl.store(starts + t // CHUNK * size + tile, h, mask=tile_in)
        for i in tl.static_range(GROUP):
            h = tl.exp2(dt[i][None, :] * rate) * h + (dt[i] * ut[i])[None, :] * Bt[i][:, None]
            out = tl.sum(Ct[i][:, None] * h, 0) + skip * ut[i]
            tl.store(y + (t + i) * width + d, out, mask=d < tl.where(t + i < length, width, 0))
        dt, ut, Bt, Ct = next_dt, next_ut, next_Bt, next_Ct
        t += GROUP
    tl.store(last + row * size + tile, h, mask=tile_in)


@triton.jit(do_not_specialize=_SIZES)
def _backward_kernel(
    u, delta, rates, B, C, skip, starts, inner, grad_y, grad_last,
    grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_state,
    batch, length, width, n_states,
    u_b, u_t, delta_b, delta_t, B_b, B_t, C_b, C_t, gy_b, gy_t,
    CHUNK: tl.constexpr, GROUP: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    n_blocks = tl.cdiv(width, BLOCK_D)
    row = (tl.program_id(0) // n_blocks).to(tl.int64)
    block = tl.program_id(0) % n_blocks
    d = block * BLOCK_D + tl.arange(0, BLOCK_D)
    n = tl.arange(0, N)
    d_in, n_in = d < width, n < n_states
    tile, tile_in = n[:, None] * width + d[None, :], n_in[:, None] & d_in[None, :]
    size = n_states.to(tl.int64) * width
    n_chunks = tl.cdiv(length, CHUNK)
    u += row * u_b
    delta += row * delta_b
    B += row * B_b
    C += row * C_b
    grad_y += row * gy_b
    grad_u += row * length * width
    grad_delta += row * length * width
    grad_B += (block * batch + row) * length * n_states
    grad_C += (block * batch + row) * length * n_states
    starts += row * n_chunks * size
    inner += row * (CHUNK // GROUP) * size
    rate = tl.load(rates + tile, mask=tile_in, other=0.0)
    skip = tl.load(skip + d, mask=d_in, other=0.0)
    g = tl.load(grad_last + row * size + tile, mask=tile_in, other=0.0)  # aₜ₊₁ Gₜ₊₁ of the step after
    sum_A = tl.zeros((N, BLOCK_D), tl.float32)
    sum_D = tl.zeros((BLOCK_D,), tl.float32)
    chunk = n_chunks - 1
    while chunk >= 0:
        # Pointers to this chunk, so that offsets within it fit into 32 bits and few registers.
        start = chunk.to(tl.int64) * CHUNK
        steps = tl.minimum(length - chunk * CHUNK, CHUNK)
        u_c, delta_c, gy_c = u + start * u_t, delta + start * delta_t, grad_y + start * gy_t
        B_c, C_c = B + start * B_t, C + start * C_t
        grad_u_c, grad_delta_c = grad_u + start * width, grad_delta + start * width
        grad_B_c, grad_C_c = grad_B + start * n_states, grad_C + start * n_states
        # The state at the start of each group, from the one at the start of the chunk.
        h = tl.load(starts + chunk * size + tile, mask=tile_in, other=0.0)
        for t in range(0, steps, GROUP):
            tl.store(inner + t // GROUP * size + tile, h, mask=tile_in)
            dt = _load_group(delta_c, t, steps, delta_t, d, width, GROUP)
            ut = _load_group(u_c, t, steps, u_t, d, width, GROUP)
            Bt = _load_group(B_c, t, steps, B_t, n, n_states, GROUP)
            for i in tl.static_range(GROUP):
                h = tl.exp2(dt[i][None, :] * rate) * h + (dt[i] * ut[i])[None, :] * Bt[i][:, None]
        tl.debug_barrier()  # what one thread wrote, another may read
        for group in range(tl.cdiv(steps, GROUP) - 1, -1, -1):
            t = group * GROUP
            h = tl.load(inner + group * size + tile, mask=tile_in, other=0.0)
            dt = _load_group(delta_c, t, steps, delta_t, d, width, GROUP)
            ut = _load_group(u_c, t, steps, u_t, d, width, GROUP)
            gy = _load_group(gy_c, t, steps, gy_t, d, width, GROUP)
            Bt = _load_group(B_c, t, steps, B_t, n, n_states, GROUP)
            Ct = _load_group(C_c, t, steps, C_t, n, n_states, GROUP)
            states = (h,)  # before each step, and after the last
            for i in tl.static_range(GROUP):
                h = tl.exp2(dt[i][None, :] * rate) * h + (dt[i] * ut[i])[None, :] * Bt[i][:, None]
                states += (h,)  # type: ignore[assignment]
            for i in tl.static_range(GROUP - 1, -1, -1):
                at = t + i
                d_there = d < tl.where(at < steps, width, 0)
                n_there = n < tl.where(at < steps, n_states, 0)
                G = g + Ct[i][:, None] * gy[i][None, :]
                sums_B = tl.sum(G * (dt[i] * ut[i])[None, :], 1)
                sums_C = tl.sum(states[i + 1] * gy[i][None, :], 1)
                tl.store(grad_B_c + at * n_states + n, sums_B, mask=n_there)
                tl.store(grad_C_c + at * n_states + n, sums_C, mask=n_there)
                grad_du = tl.sum(G * Bt[i][:, None], 0)
                g = tl.exp2(dt[i][None, :] * rate) * G
                Q = g * states[i]
                sum_A += Q * dt[i][None, :]
                sum_D += gy[i] * ut[i]
                grad_dt = tl.sum(Q * rate, 0) * 0.6931471805599453 + grad_du * ut[i]  # rate = A log2 e
                tl.store(grad_delta_c + at * width + d, grad_dt, mask=d_there)
                tl.store(grad_u_c + at * width + d, grad_du * dt[i] + gy[i] * skip, mask=d_there)
        tl.debug_barrier()  # the next chunk writes where this one read
        chunk -= 1
    tl.store(grad_A + row * size + tile, sum_A, mask=tile_in)
    tl.store(grad_D + row * width + d, sum_D, mask=d_in)
    tl.store(grad_state + row * size + tile, g, mask=tile_in)
