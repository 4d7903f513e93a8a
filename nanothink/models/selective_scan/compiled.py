"""The selective scan compiled for the processor at hand: ``scan.cpp``, built at first use.

How it is built: ``models/native``. Without a compiler, ``selective_scan`` takes the plain path. Whatever
types, strides and autocast the caller has, the library gets plain float32 memory.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanothink.models import native
from nanothink.models.native import pointers, waves
from nanothink.models.selective_scan import plain


def scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See ``selective_scan``. CPU only; computes in float32, and hands float64 to the plain path.

    Raises:
        RuntimeError: there is no library here; ``unavailable()`` says why.
    """
    if u.device.type != "cpu":
        raise ValueError(f"the compiled scan runs on a CPU, but u is on {u.device}")
    if u.dtype == torch.float64:
        return plain.scan(u, delta, A, B, C, D, state)
    h = u.new_zeros(u.shape[0], A.shape[1], u.shape[2], dtype=torch.float32) if state is None else state
    inputs = (z.float() for z in (u, delta, A, B, C, D, h))
    y, last = _CompiledScan.apply(*inputs)  # type: ignore[no-untyped-call]
    return y.to(u.dtype), last


def unavailable() -> str:
    """Reason that the compiled scan cannot be used here; empty where it can. The first call may build it."""
    return _load()[1]


class _CompiledScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        library = _library()
        u, delta, B, C, D, state = (z.contiguous() for z in (u, delta, B, C, D, state))
        At = A.t().contiguous()  # (N, D)
        sizes = (*u.shape, At.shape[0])
        y, last = torch.empty_like(u), torch.empty_like(state)
        starts = None
        if any(ctx.needs_input_grad):
            n_chunks = -(-u.shape[1] // library.nanothink_scan_chunk())
            starts = u.new_empty(u.shape[0], n_chunks, *At.shape)
            ctx.save_for_backward(u, delta, At, B, C, D, starts)
        library.nanothink_scan_forward(
            *sizes, *pointers(u, delta, At, B, C, D, state, y, last, starts), torch.get_num_threads()
        )
        return y, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, grad_last: Tensor) -> tuple[Tensor | None, ...]:
        library = _library()
        u, delta, At, B, C, D, starts = ctx.saved_tensors
        grad_y, grad_last = grad_y.contiguous(), grad_last.contiguous()
        batch, _, width = u.shape
        n_segments = -(-width // library.nanothink_scan_segment())
        grad_u, grad_delta, grad_state = (torch.empty_like(z) for z in (u, delta, grad_last))
        grad_A, grad_D = u.new_empty(batch, *At.shape), u.new_empty(batch, width)
        grad_B, grad_C = (u.new_empty(n_segments, *B.shape) for _ in range(2))
        library.nanothink_scan_backward(
            *u.shape,
            At.shape[0],
            *pointers(u, delta, At, B, C, D, starts, grad_y, grad_last),
            *pointers(grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_state),
            torch.get_num_threads(),
        )
        return grad_u, grad_delta, grad_A.sum(0).t(), grad_B.sum(0), grad_C.sum(0), grad_D.sum(0), grad_state


def _library() -> Any:
    library, why_not = _load()
    if library is None:
        raise RuntimeError(f"there is no compiled scan: {why_not}")
    return library


@functools.cache
def _load() -> tuple[Any, str]:
    return native.load(native.Source("nanothink.models.selective_scan", ("scan.cpp",), _declare, _error))


def _declare(library: Any) -> None:
    sizes, pointer = [ctypes.c_int64] * 4, ctypes.c_void_p
    library.nanothink_scan_chunk.restype = library.nanothink_scan_segment.restype = ctypes.c_int64
    library.nanothink_scan_forward.argtypes = [*sizes, *[pointer] * 10, ctypes.c_int]
    library.nanothink_scan_backward.argtypes = [*sizes, *[pointer] * 16, ctypes.c_int]
    library.nanothink_scan_forward.restype = library.nanothink_scan_backward.restype = None


def _error(library: Any) -> float:
    batch, length, width, n_states = 2, 21, 19, 3
    u, delta = waves(batch, length, width), waves(batch, length, width).exp()
    At, B, C = -waves(n_states, width).exp(), waves(batch, length, n_states), waves(batch, length, n_states)
    D, state = waves(width), waves(batch, n_states, width)
    y, last = torch.empty_like(u), torch.empty_like(state)
    library.nanothink_scan_forward(
        *u.shape, n_states, *pointers(u, delta, At, B, C, D, state, y, last, None), torch.get_num_threads()
    )
    expected, _ = plain.scan(u, delta, At.t(), B, C, D, state)
    return float((y - expected).abs().max() / expected.abs().max())
