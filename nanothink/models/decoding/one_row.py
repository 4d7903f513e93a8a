"""The operations of a program in NumPy, for one new token of one sequence: most steps, without a compiler.

A call of NumPy that writes into a given array takes 0.5 µs, one of PyTorch two to four. At a width of 128
that is most of a step. What is not here runs in PyTorch (plain.py), which this is tested against.

Each function binds one operation and returns what a run calls, with the views made once.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from nanothink.models.decoding.program import Operation

if TYPE_CHECKING:
    from nanothink.models.decoding.plain import Run

_Array: TypeAlias = NDArray[np.float32]
_Bound: TypeAlias = Callable[["Run"], object]

_CACHED_BYTES = 32 << 20
"""Weights of a program up to which they are expected in the processor's caches from the last step."""


def bind(operations: Sequence[Operation]) -> list[_Bound | None]:
    """A call for each operation, None for those that are not here."""
    _one_thread()
    own = dict(FUNCTIONS)
    # From memory PyTorch's product of two equal columns reads 17 GB/s, NumPy's of one 11.
    if sum(op.tensors[0].nbytes for op in operations if op.kind == "linear") > _CACHED_BYTES:
        del own["linear"]
    return [own[op.kind](op) if op.kind in own else None for op in operations]


@functools.cache
def _one_thread() -> None:
    """Have the OpenBLAS of NumPy's wheels compute in one thread, as a step does otherwise.

    Its threads wait for each other by turning in circles: with other programs on the cores a step of
    NanoThink took twice as long. Nothing else here multiplies matrices by NumPy.
    """
    for path in (Path(np.__file__).parent.parent / "numpy.libs").glob("*openblas*"):
        library = ctypes.CDLL(str(path))  # the one that NumPy has loaded
        for name in (
            "scipy_openblas_set_num_threads64_",
            "openblas_set_num_threads64_",
            "openblas_set_num_threads",
        ):
            if hasattr(library, name):
                getattr(library, name)(1)
                break


def _first(*rows: Tensor) -> list[_Array]:
    return [tensor[0].numpy() for tensor in rows]


def embed(op: Operation) -> _Bound:
    table, y = op.tensors[0].numpy(), op.tensors[1][0].numpy()
    return lambda run: np.copyto(y, table[run.token])


def norm(op: Operation) -> _Bound:
    weight = op.tensors[1].numpy()
    width = len(weight)
    x, y = (row.reshape(-1, width) for row in _first(op.tensors[0], op.tensors[2]))
    if len(x) == 1:
        x, y = x[0], y[0]

    def run_norm(run: Run) -> None:
        scale = np.dot(x, x) / width + op.number
        np.multiply(x, weight * (1 / math.sqrt(scale)), out=y)

    squares, scales = np.empty_like(x), np.empty((len(x), 1), np.float32)

    def run_norms(run: Run) -> None:
        np.multiply(x, x, out=squares)
        np.add.reduce(squares, 1, keepdims=True, out=scales)
        np.divide(scales, width, out=scales)
        np.add(scales, op.number, out=scales)
        np.divide(x, np.sqrt(scales, out=scales), out=squares)
        np.multiply(squares, weight, out=y)

    return run_norm if x.ndim == 1 else run_norms


def linear(op: Operation) -> _Bound:
    weight, (x, y) = op.tensors[0].float().numpy(), _first(*op.tensors[3:])
    if not op.sizes[2]:
        return lambda run: np.dot(weight, x, out=y)
    product = np.empty_like(y)
    return lambda run: np.add(y, np.dot(weight, x, out=product), out=y)


def spread(op: Operation) -> _Bound:
    weight, bias = op.tensors[0].numpy(), op.tensors[2].numpy()
    x, y = _first(op.tensors[1][:, : len(weight)], op.tensors[3])
    return lambda run: np.add(np.dot(x, weight, out=y), bias, out=y)


def _silu(x: _Array, y: _Array) -> None:
    np.exp(np.negative(x, out=y), out=y)  # infinite below -88, where x / (1 + it) is 0
    np.divide(x, np.add(y, 1, out=y), out=y)


def gate(op: Operation) -> _Bound:
    opening, x, y = _first(*op.tensors)

    def run_gate(run: Run) -> None:
        _silu(opening, y)
        np.multiply(y, x, out=y)

    return run_gate


def rotate(op: Operation) -> _Bound:
    cos, sin, x = op.tensors
    n_heads, width, half = op.sizes[:3]
    heads: _Array = x[0].as_strided((n_heads, 2, half), (width, half, 1)).numpy()
    swapped, turned = heads[:, ::-1], np.empty((n_heads, 2, half), np.float32)

    def run_rotate(run: Run) -> None:
        own, exchanged = run.token_rotation(cos, sin)
        np.multiply(swapped, exchanged, out=turned)
        np.multiply(heads, own, out=heads)
        np.add(heads, turned, out=heads)

    return run_rotate


def append(op: Operation) -> _Bound:
    x, (cache,) = op.tensors[0][0].numpy(), _first(op.tensors[1])
    groups, _, width = cache.shape
    rows = x.reshape(groups, width)

    def run_append(run: Run) -> None:
        cache[:, run.positions[0]] = rows

    return run_append


def attend(op: Operation) -> _Bound:
    queries, keys, values, y = _first(*op.tensors)
    _, n_groups, width, _ = op.sizes
    queries, y = (row.reshape(n_groups, -1, width) for row in (queries, y))  # (G, heads of a group, K)
    turned, scaled = keys.transpose(0, 2, 1), np.empty_like(queries)  # (G, K, S)

    def run_attend(run: Run) -> None:
        n = run.positions[0] + 1
        scores = np.matmul(np.multiply(queries, op.number, out=scaled), turned[:, :, :n])
        np.subtract(scores, np.maximum.reduce(scores, 2, keepdims=True), out=scores)
        total = np.add.reduce(np.exp(scores, out=scores), 2, keepdims=True)
        np.matmul(scores, values[:, :n], out=y)
        np.divide(y, total, out=y)

    return run_attend


def convolve(op: Operation) -> _Bound:
    x, before, y = _first(op.tensors[0], *op.tensors[3:])
    taps, bias = op.tensors[1].numpy(), op.tensors[2].numpy()
    product = np.empty_like(taps)

    def run_convolve(run: Run) -> None:
        np.multiply(before, taps[:-1], out=product[:-1])
        np.multiply(x, taps[-1], out=product[-1])
        before[:-1] = before[1:]
        before[-1] = x
        _silu(np.add(np.add.reduce(product, 0), bias), y)

    return run_convolve


def scan(op: Operation) -> _Bound:
    u, delta, both, state, y = _first(*op.tensors[:3], *op.tensors[5:])
    rates, skip = op.tensors[3].numpy(), op.tensors[4].numpy()
    rates = rates * np.float32(math.log(2))  # for exp: NumPy's exp2 is slower
    n_states = len(rates)
    B, C = both[:n_states, None], both[n_states : 2 * n_states]
    product, step, now = np.empty_like(rates), np.empty_like(u), np.empty_like(u)

    def run_scan(run: Run) -> None:
        np.log1p(np.exp(np.negative(np.abs(delta, out=step), out=step), out=step), out=step)
        np.add(step, np.maximum(delta, 0, out=now), out=step)  # softplus
        np.multiply(state, np.exp(np.multiply(rates, step, out=product), out=product), out=state)
        np.add(state, np.multiply(B, np.multiply(step, u, out=now), out=product), out=state)
        np.add(np.dot(C, state, out=y), np.multiply(skip, u, out=now), out=y)

    return run_scan


FUNCTIONS: Mapping[str, Callable[[Operation], _Bound]] = {
    function.__name__: function
    for function in (embed, norm, linear, spread, gate, rotate, append, attend, convolve, scan)
}
"""The function of each operation, by the name of the operation."""
