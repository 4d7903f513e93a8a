"""The operations of a program in PyTorch: without a compiler, and what operations.cpp is tested against.

Each function binds one operation to a number of sequences and new tokens and returns what a run calls, with
the views made once: one to four small operations of PyTorch are left, without modules or allocations. One
token of one sequence has its own (one_row.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from nanothink.models.decoding import one_row
from nanothink.models.decoding.program import Operation, Runner

_FEW_ROWS = 4


@dataclass
class Run:
    """The new tokens (B T) of a run, and the position of each sequence's first."""

    tokens: Tensor
    positions: Sequence[int]
    n_new: int
    _rotations: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _token_rotations: dict[int, tuple[NDArray[np.float32], NDArray[np.float32]]] = field(default_factory=dict)

    @cached_property
    def together(self) -> list[tuple[slice, int]]:
        """Sequences that are at one position, and the position."""
        if len(set(self.positions)) == 1:
            return [(slice(0, len(self.positions)), self.positions[0])]
        return [(slice(row, row + 1), first) for row, first in enumerate(self.positions)]

    def rotation(self, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """(R, 1, 2, half) each: factors of a head's halves, and of its halves exchanged."""
        key = cos.data_ptr()
        if key not in self._rotations:
            if len(self.positions) * self.n_new == 1:
                at = slice(self.positions[0], self.positions[0] + 1)
                c, s = cos[at], sin[at]
            else:
                rows = [first + t for first in self.positions for t in range(self.n_new)]
                c, s = cos[rows], sin[rows]
            self._rotations[key] = (torch.stack([c, c], 1)[:, None], torch.stack([-s, s], 1)[:, None])
        return self._rotations[key]

    @cached_property
    def token(self) -> int:
        """The only token."""
        return int(self.tokens)

    def token_rotation(self, cos: Tensor, sin: Tensor) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """The same of the only token as arrays, (2, half) each."""
        key = cos.data_ptr()
        if key not in self._token_rotations:
            c, s = cos[self.positions[0]].numpy(), sin[self.positions[0]].numpy()
            self._token_rotations[key] = np.stack([c, c]), np.stack([-s, s])
        return self._token_rotations[key]


_Bound: TypeAlias = Callable[[Run], object]
_Bind: TypeAlias = Callable[[Operation, int, int], _Bound]


def embed(op: Operation, batch: int, n_new: int) -> _Bound:
    table, y = op.tensors
    y = y[: batch * n_new]
    return lambda run: torch.index_select(table, 0, run.tokens, out=y)


def norm(op: Operation, batch: int, n_new: int) -> _Bound:
    x, weight, y = op.tensors
    n_rows, width = batch * n_new, weight.shape[0]
    x, y = _parts(x[:n_rows], width), _parts(y[:n_rows], width)
    return lambda run: y.copy_(F.rms_norm(x, (width,), weight, op.number))


def _parts(rows: Tensor, width: int) -> Tensor:
    """(R, n width) -> (R, n, width), a view."""
    return rows.as_strided((len(rows), rows.shape[1] // width, width), (rows.stride(0), width, 1))


def linear(op: Operation, batch: int, n_new: int) -> _Bound:
    """W X^T for a few rows: MKL's product of a matrix and one vector takes twice to three times as long."""
    weight, _, _, x, y = op.tensors  # a rounded weight holds what its codes mean
    _, n_out, adds, last, _ = op.sizes
    weight = weight.float()  # a copy where it is bfloat16: without a compiler no memory is saved
    x = x[: batch * n_new]
    if last:
        x = x[n_new - 1 :: n_new]
    y = y[: x.shape[0]]
    if x.shape[0] > _FEW_ROWS:
        if adds:
            return lambda run: torch.addmm(y, x, weight.t(), out=y)
        return lambda run: torch.mm(x, weight.t(), out=y)
    turned = torch.empty(n_out, max(2, x.shape[0]))
    columns = torch.empty(turned.shape[1], x.shape[1])  # one row twice: two columns are no vector
    product = turned[:, : x.shape[0]].t()

    def run_linear(run: Run) -> None:
        torch.mm(weight, columns.copy_(x).t(), out=turned)
        y.add_(product) if adds else y.copy_(product)

    return run_linear


def spread(op: Operation, batch: int, n_new: int) -> _Bound:
    weight, x, bias, y = op.tensors
    x, y = x[: batch * n_new, : weight.shape[0]], y[: batch * n_new]
    return lambda run: torch.addmm(bias, x, weight, out=y)


def gate(op: Operation, batch: int, n_new: int) -> _Bound:
    opening, x, y = (tensor[: batch * n_new] for tensor in op.tensors)
    return lambda run: torch.mul(F.silu(opening), x, out=y)


def rotate(op: Operation, batch: int, n_new: int) -> _Bound:
    cos, sin, x = op.tensors
    n_heads, width, half = op.sizes[:3]
    rows = x[: batch * n_new]
    heads = rows.as_strided((len(rows), n_heads, 2, half), (rows.stride(0), width, half, 1))

    def run_rotate(run: Run) -> None:
        own, exchanged = run.rotation(cos, sin)
        swapped = heads.flip(2)
        heads.mul_(own).addcmul_(swapped, exchanged)

    return run_rotate


def append(op: Operation, batch: int, n_new: int) -> _Bound:
    x, cache = op.tensors
    _, n_heads, _, width = cache.shape
    rows = x[: batch * n_new].view(batch, n_new, n_heads, width).transpose(1, 2)  # (B, G, T, K)

    def run_append(run: Run) -> None:
        for at, first in run.together:
            cache[at, :, first : first + n_new] = rows[at]

    return run_append


def attend(op: Operation, batch: int, n_new: int) -> _Bound:
    queries, keys, values, y = op.tensors
    n_heads, n_groups, width, _ = op.sizes
    q = queries[: batch * n_new].view(batch, n_new, n_heads, width).transpose(1, 2)  # (B, H, T, K)
    to = y[: batch * n_new].view(batch, n_new, n_heads, width).transpose(1, 2)
    grouped = n_heads != n_groups

    def run_attend(run: Run) -> None:
        for at, first in run.together:
            k, v = keys[at, :, : first + n_new], values[at, :, : first + n_new]
            mask = None if n_new == 1 else _seen(first, n_new)
            to[at] = F.scaled_dot_product_attention(
                q[at], k, v, attn_mask=mask, scale=op.number, enable_gqa=grouped
            )

    return run_attend


def attend_latents(op: Operation, batch: int, n_new: int) -> _Bound:
    queries, latents, keys, expand, y = op.tensors
    n_heads, width, rotary, latent, _ = op.sizes
    q = queries[: batch * n_new].view(batch, n_new, n_heads, width + rotary).transpose(1, 2)
    to_key, to_value = expand.view(n_heads, 2, width, latent).unbind(1)  # (H, K, C)
    to = y[: batch * n_new].view(batch, n_new, n_heads, width).transpose(1, 2)

    def run_attend(run: Run) -> None:
        for at, first in run.together:
            seen, key = latents[at, :, : first + n_new], keys[at, :, : first + n_new]  # (b, 1, S, C or Q)
            content, turned = q[at][..., :width], q[at][..., width:]  # (b, H, T, K or Q)
            scores = ((content @ to_key) @ seen.mT + turned @ key.mT) * op.number  # (b, H, T, S)
            if n_new > 1:
                scores = scores.masked_fill(~_seen(first, n_new), -torch.inf)
            to[at] = scores.softmax(-1) @ seen @ to_value.mT

    return run_attend


def _seen(first: int, n_new: int) -> Tensor:
    return torch.ones(n_new, first + n_new, dtype=torch.bool).tril(first)


def convolve(op: Operation, batch: int, n_new: int) -> _Bound:
    x, taps, bias, before, y = op.tensors
    channels = taps.shape[1]
    x, y = (tensor[: batch * n_new].view(batch, n_new, channels) for tensor in (x, y))
    kept = before[:batch]

    def run_convolve(run: Run) -> None:
        whole = torch.cat([kept, x], 1)
        for t in range(n_new):
            y[:, t] = F.silu((whole[:, t : t + len(taps)] * taps).sum(1).add_(bias))
        kept.copy_(whole[:, n_new:])

    return run_convolve


def scan(op: Operation, batch: int, n_new: int) -> _Bound:
    u, delta, both, rates, skip, state, y = op.tensors
    n_states, channels = rates.shape
    u, delta, y = (tensor[: batch * n_new].view(batch, n_new, 1, channels) for tensor in (u, delta, y))
    both = both[: batch * n_new].as_strided(
        (batch, n_new, 2 * n_states), (n_new * both.stride(0), both.stride(0), 1)
    )
    B, C = both[..., :n_states, None], both[..., None, n_states:]  # (B, T, N, 1), (B, T, 1, N)
    h = state[:batch]

    def run_scan(run: Run) -> None:
        for t in range(n_new):
            step, now = F.softplus(delta[:, t]), u[:, t]  # (B, 1, E)
            h.mul_((step * rates).exp2_()).addcmul_(B[:, t], step * now)
            y[:, t] = (C[:, t] @ h).addcmul_(skip, now)

    return run_scan


def modulate(op: Operation, batch: int, n_new: int) -> _Bound:
    x, of_row, of_level, y = op.tensors
    n_rows, width = batch * n_new, x.shape[1]

    def run_modulate(run: Run) -> None:
        terms = of_row[:n_rows, : 2 * width] + of_level[: 2 * width]
        torch.addcmul(terms[:, :width], x[:n_rows], 1 + terms[:, width:], out=y[:n_rows])

    return run_modulate


def add_gated(op: Operation, batch: int, n_new: int) -> _Bound:
    y, of_row, of_level, x = op.tensors
    n_rows, width = batch * n_new, x.shape[1]
    return lambda run: x[:n_rows].addcmul_(y[:n_rows], 1 + of_row[:n_rows, :width] + of_level[:width])


def route(op: Operation, batch: int, n_new: int) -> _Bound:
    u, weight, bias, log_scale, states, weights, y = op.tensors
    n_rows, n_experts = batch * n_new, len(states)

    def run_route(run: Run) -> None:
        stream = u[:n_rows]
        scores = bias.expand(n_rows, -1) if not weight.numel() else F.linear(stream, weight, bias)
        found = weights[:n_rows].copy_(scores.softmax(-1))
        weighted = [of_expert[:n_rows] * found[:, e : e + 1] for e, of_expert in enumerate(states)]
        torch.mul(torch.cat([*weighted, stream], -1), log_scale.exp(), out=y[:n_rows])

    assert n_experts == weights.shape[1]
    return run_route


FUNCTIONS: Mapping[str, _Bind] = {
    function.__name__: function
    for function in (
        *(embed, norm, linear, spread, gate, rotate, append, attend, convolve, scan),
        *(attend_latents, modulate, add_gated, route),
    )
}
"""The function of each operation, by its name, in the order of operations.cpp."""


def _for_every(op: Operation) -> Operation:
    """The product of all new tokens where that of the last ones was meant."""
    n_in, n_out, adds, _, narrow = op.sizes
    return replace(op, sizes=(n_in, n_out, adds, 0, narrow))


def bind(operations: Sequence[Operation]) -> Runner:
    """What runs these operations."""
    bound: dict[tuple[int, int, bool], list[_Bound]] = {}

    def run(n_operations: int, tokens: Tensor, positions: Sequence[int], every: bool) -> None:
        batch, n_new = tokens.shape
        if (batch, n_new, every) not in bound:
            own = [_for_every(op) if every and op.kind == "linear" else op for op in operations]
            calls: Sequence[_Bound | None] = one_row.bind(own) if batch * n_new == 1 else [None] * len(own)
            bound[batch, n_new, every] = [
                call or FUNCTIONS[op.kind](op, batch, n_new) for op, call in zip(own, calls, strict=True)
            ]
        now = Run(tokens.flatten(), positions, n_new)
        with torch.no_grad(), np.errstate(all="ignore"):
            for call in bound[batch, n_new, every][:n_operations]:
                call(now)

    return run
