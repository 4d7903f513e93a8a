"""The library behind programs: ``operations.cpp``, built at first use (``models/native``)."""

from __future__ import annotations

import ctypes
import functools
import math
from typing import Any

import torch
import torch.nn.functional as F

from nanothink.models import native
from nanothink.models.decoding.program import Operation, Program
from nanothink.models.native import waves
from nanothink.models.selective_scan import plain


def unavailable() -> str:
    """Reason that programs cannot run here; empty where they can. The first call may build the library."""
    return _load()[1]


def library() -> Any:
    """The library.

    Raises:
        RuntimeError: there is none here; ``unavailable()`` says why.
    """
    found, why_not = _load()
    if found is None:
        raise RuntimeError(f"there are no compiled decoding steps: {why_not}")
    return found


@functools.cache
def _load() -> tuple[Any, str]:
    return native.load(native.Source("nanothink.models.decoding", "operations.cpp", _declare, _error))


def _declare(found: Any) -> None:
    found.nanothink_decode.argtypes = [
        ctypes.POINTER(Operation),
        *[ctypes.c_int64] * 3,
        *[ctypes.c_void_p] * 2,
    ]
    found.nanothink_decode.restype = None


def _error(found: Any) -> float:
    """Largest of the relative errors of a small attention layer and a small state-space layer."""
    position, width, heads, room = 5, 22, 2, 9
    head, rows = width // heads, 3
    program = Program(found, max_rows=rows)
    x, weight = waves(rows, width), waves(width, width)
    keys, values = waves(1, heads, room, head), waves(1, heads, room, head).cos()
    normed = program.norm(program.hold(x), waves(width), 1e-6)
    query = program.linear(normed, weight)
    attended = program.attend(query, keys, values, head**-0.5)
    u = program.gate(normed, attended)
    n_states = 3
    bc, rates = waves(rows, 2 * n_states), -waves(n_states, width).exp()
    state = waves(1, n_states, width)
    scanned = program.scan(u, query, program.hold(bc), 0, rates / math.log(2), waves(width), state.clone())
    program.run(torch.zeros(1, rows, dtype=torch.int64), [position])

    expected = F.rms_norm(x, (width,), waves(width), 1e-6)
    q = expected @ weight.t()
    mask = torch.ones(rows, position + rows, dtype=torch.bool).tril(position)
    y = F.scaled_dot_product_attention(
        q.view(1, rows, heads, head).transpose(1, 2),
        keys[:, :, : position + rows],
        values[:, :, : position + rows],
        attn_mask=mask,
    )
    attention = y.transpose(1, 2).reshape(rows, width)
    opened = F.silu(expected) * attention
    B, C = bc[None].chunk(2, -1)
    last, _ = plain.scan(opened[None], F.softplus(q)[None], rates.t(), B, C, waves(width), state)
    pairs = ((attended, attention), (scanned, last[0]))
    return max(float((a[:rows] - b).abs().max() / b.abs().max()) for a, b in pairs)
