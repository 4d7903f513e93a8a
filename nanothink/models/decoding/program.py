"""A decoding step as a list of operations over fixed buffers. See operations.cpp for what each computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from nanothink.models.decoding.int8 import codes_of


@dataclass(frozen=True)
class Operation:
    """One operation: what its sizes and tensors mean, operations.cpp says."""

    kind: str
    sizes: tuple[int, ...]
    number: float
    tensors: tuple[Tensor, ...]
    """float32, rows contiguous; not parameters themselves, which can be given other memory. The last is
    written to."""


Runner: TypeAlias = Callable[[int, Tensor, Sequence[int], bool], None]
"""Runs the first operations, so many, for (B, T) tokens and the position of each sequence's first. If
True, it predicts after every token, not after the last alone."""


class Program:
    """Operations, added one by one in the order in which they run, and the buffers that they write.

    A method adds an operation and returns its result's buffer, (max_rows, width), of which a run fills the
    first rows. Caches and states are written in place.

    Args:
        bind: makes what runs the operations: ``compiled.bind`` or ``plain.bind``.
        max_rows: most rows (sequences x new tokens) of a run.
    """

    def __init__(self, bind: Callable[[Sequence[Operation]], Runner], max_rows: int) -> None:
        self.max_rows = max_rows
        self._bind = bind
        self._operations: list[Operation] = []
        self._runner: Runner | None = None

    @property
    def run_by(self) -> str:
        """The module that runs it: "compiled" or "plain"."""
        return self._bind.__module__.rpartition(".")[2]

    def __len__(self) -> int:
        """Number of operations."""
        return len(self._operations)

    def run(
        self,
        tokens: Tensor,
        positions: Sequence[int],
        n_operations: int | None = None,
        *,
        every: bool = False,
    ) -> None:
        """Run the first operations, all by default, for (B, T) new tokens.

        Args:
            positions: of the first new token of each sequence.
            every: products of the last new tokens are of all of them.
        """
        if self._runner is None:
            self._runner = self._bind(self._operations)
        assert tokens.numel() <= self.max_rows
        count = len(self._operations) if n_operations is None else n_operations
        self._runner(count, tokens.contiguous(), positions, every)

    def buffer(self, width: int) -> Tensor:
        """Room for rows of a width."""
        return torch.empty(self.max_rows, width)

    def embed(self, table: Tensor) -> Tensor:
        """The rows of (V, D) that the tokens name."""
        width = table.shape[1]
        return self._add("embed", [width], [table], self.buffer(width))

    def norm(self, x: Tensor, weight: Tensor, eps: float, *, in_place: bool = False) -> Tensor:
        """RMSNorm of each part of a row that is as wide as the weight."""
        width, row = weight.shape[0], x.stride(0)
        y = x if in_place else self.buffer(x.shape[1])
        return self._add("norm", [width, x.shape[1] // width, row, y.stride(0)], [x, weight], y, eps)

    def linear(
        self,
        x: Tensor,
        weight: Tensor,
        *,
        add_to: Tensor | None = None,
        last: bool = False,
        coded: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """``x @ weight.T``, added to a buffer if one is given; of the last new tokens alone if ``last``,
        unless a run is for every one.

        Of a weight that was rounded (``int8.py``) the codes are read, or those that are given.
        The weight may be bfloat16; its products are float32.
        """
        n_out, n_in = weight.shape
        assert x.is_contiguous()
        y = self.buffer(n_out) if add_to is None else add_to
        codes, scales = coded or codes_of(weight) or (torch.empty(0), torch.empty(0))
        sizes = [n_in, n_out, int(add_to is not None), int(last), int(weight.dtype is torch.bfloat16)]
        return self._add("linear", sizes, [weight, codes, scales, x], y)

    def spread(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """``x @ weight + bias`` for the first few columns of x, as many as ``weight`` (n, E) has rows."""
        n_in, n_out = weight.shape
        return self._add("spread", [n_in, n_out, x.shape[1]], [weight, x, bias], self.buffer(n_out))

    def gate(self, gate: Tensor, x: Tensor) -> Tensor:
        """``silu(gate) * x``."""
        return self._add("gate", [x.shape[1]], [gate, x], self.buffer(x.shape[1]))

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor, width: int) -> Tensor:
        """Rotary positions, in place, on the first features of each head of a width.

        The last head may lack what lies behind those features.
        """
        sizes = [-(-x.shape[1] // width), width, cos.shape[1], x.stride(0)]
        return self._add("rotate", sizes, [cos, sin], x)

    def append(self, x: Tensor, cache: Tensor) -> None:
        """Put rows (G K) into a cache (B, G, S, K) at their positions."""
        _, groups, room, width = cache.shape
        self._add("append", [groups, width, room, x.stride(0)], [x], cache)

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        """Causal attention of heads (H K) to caches (B, G, S, K), which hold the new tokens already."""
        _, groups, room, width = keys.shape
        sizes = [queries.shape[1] // width, groups, width, room]
        return self._add("attend", sizes, [queries, keys, values], self.buffer(queries.shape[1]), scale)

    def attend_latents(
        self, queries: Tensor, latents: Tensor, keys: Tensor, expand: Tensor, n_heads: int, scale: float
    ) -> Tensor:
        """Latent attention to caches (B, 1, S, C) of latents and (B, 1, S, Q) of rotary keys.

        Args:
            queries: (H (K + Q)).
            expand: (H 2 K, C), from a latent to each head's key and value.
        """
        _, _, room, latent = latents.shape
        width, rotary = expand.shape[0] // (2 * n_heads), keys.shape[3]
        y = self.buffer(n_heads * width)
        found = [queries, latents, keys, expand]
        return self._add("attend_latents", [n_heads, width, rotary, latent, room], found, y, scale)

    def modulate(self, x: Tensor, of_row: Tensor, of_level: Tensor) -> Tensor:
        """``shift + x * (1 + scale)``; both lie one after the other in the terms, and are added up."""
        return self._add(
            "modulate", [x.shape[1], of_row.stride(0)], [x, of_row, of_level], self.buffer(x.shape[1])
        )

    def add_gated(self, y: Tensor, of_row: Tensor, of_level: Tensor, x: Tensor) -> None:
        """``x += y * (1 + gate)``, the gate a sum of two terms."""
        self._add("add_gated", [x.shape[1], of_row.stride(0)], [y, of_row, of_level], x)

    def route(
        self, u: Tensor, weight: Tensor | None, bias: Tensor, log_scale: Tensor, states: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The weight of each expert (E), and the input of the combined head ((E + 1) D).

        Args:
            weight, bias: the router's.
            states: (E, max_rows, D).
        """
        n_experts, _, width = states.shape
        weights, y = self.buffer(n_experts), self.buffer((n_experts + 1) * width)
        none = torch.empty(0)
        found = [u, none if weight is None else weight, bias, log_scale, states, weights]
        self._add("route", [width, n_experts, states.stride(0)], found, y)
        return weights, y

    def convolve(self, x: Tensor, taps: Tensor, bias: Tensor, before: Tensor) -> Tensor:
        """Causal filter (W, E) over the inputs ``before`` (B, W - 1, E), which move on, and x; then silu."""
        width, channels = taps.shape
        y = self.buffer(channels)
        return self._add("convolve", [channels, width], [x, taps, bias, before], y)

    def scan(
        self, u: Tensor, delta: Tensor, bc: Tensor, offset: int, rates: Tensor, skip: Tensor, state: Tensor
    ) -> Tensor:
        """A step of the selective scan, which advances ``state`` (B, N, E).

        Args:
            u, delta: (E), delta before its softplus.
            bc: a buffer with B and C in its columns from ``offset``.
            rates: (N, E), A log2 e.
            skip: (E), the paper's D.
        """
        n_states, channels = rates.shape
        sizes = [channels, n_states, bc.shape[1]]
        found = [u, delta, bc[:, offset:], rates, skip, state]
        return self._add("scan", sizes, found, self.buffer(channels))

    def _add(
        self, kind: str, sizes: list[int], inputs: Sequence[Tensor], output: Tensor, number: float = 0.0
    ) -> Tensor:
        for tensor in (*inputs, output):
            assert tensor.dtype is torch.float32 or (kind == "linear" and tensor is inputs[0])
            assert tensor.dim() == 0 or tensor.stride(-1) == 1
        tensors = tuple(tensor.detach() for tensor in (*inputs, output))
        self._operations.append(Operation(kind, tuple(sizes), number, tensors))
        self._runner = None
        return output
