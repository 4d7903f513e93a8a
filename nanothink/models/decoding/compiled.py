"""Running a program by one call of a library: ``operations.cpp``, built at first use (``models/native``)."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nanothink.models import native
from nanothink.models.decoding import plain
from nanothink.models.decoding.program import Operation, Program, Runner
from nanothink.models.native import waves

_KINDS = tuple(plain.FUNCTIONS)


class _Operation(ctypes.Structure):
    """See operations.cpp."""

    _fields_ = (
        ("kind", ctypes.c_int64),
        ("sizes", ctypes.c_int64 * 6),
        ("number", ctypes.c_double),
        ("pointers", ctypes.c_void_p * 7),
    )


def unavailable() -> str:
    """Reason that there is no library here; empty where there is. The first call may build it."""
    return _load()[1]


def bind(operations: Sequence[Operation]) -> Runner:
    """What runs these operations.

    Raises:
        RuntimeError: there is no library here; ``unavailable()`` says why.
    """
    library, why_not = _load()
    if library is None:
        raise RuntimeError(f"there are no compiled decoding steps: {why_not}")
    return _bind(library, operations)


def _bind(library: Any, operations: Sequence[Operation]) -> Runner:
    array = (_Operation * len(operations))()
    for to, operation in zip(array, operations, strict=True):
        to.kind, to.number = _KINDS.index(operation.kind), operation.number
        to.sizes[: len(operation.sizes)] = operation.sizes
        to.pointers[: len(operation.tensors)] = [tensor.data_ptr() for tensor in operation.tensors]
    kept = tuple(operations)  # their tensors are what the array points to

    def run(n_operations: int, tokens: Tensor, positions: Sequence[int], every: bool) -> None:
        assert n_operations <= len(kept)
        batch, n_new = tokens.shape
        firsts = (ctypes.c_int64 * batch)(*positions)
        library.nanothink_decode(array, n_operations, batch, n_new, every, firsts, tokens.data_ptr())

    return run


@functools.cache
def _load() -> tuple[Any, str]:
    return native.load(SOURCE)


def _declare(library: Any) -> None:
    sizes, pointer = [ctypes.c_int64] * 4, ctypes.c_void_p
    library.nanothink_decode.argtypes = [ctypes.POINTER(_Operation), *sizes, pointer, pointer]
    library.nanothink_decode.restype = None


def _error(library: Any) -> float:
    """Largest relative error of a small program, against the same in PyTorch."""
    mine, expected = (_results(bind) for bind in (functools.partial(_bind, library), plain.bind))
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(mine, expected, strict=True))


def _results(bind: Callable[[Sequence[Operation]], Runner]) -> list[Tensor]:
    position, width, heads, n_states, rows = 5, 22, 2, 3, 3
    program = Program(bind, max_rows=rows)
    keys, values = waves(1, heads, 9, width // heads), waves(1, heads, 9, width // heads).cos()
    normed = program.norm(waves(rows, width), waves(width), 1e-6)
    query = program.linear(normed, waves(width, width).bfloat16())
    query = program.linear(query, waves(width, width))
    attended = program.attend(query, keys, values, 0.3)
    opened = program.gate(normed, attended)
    rates, state = -waves(n_states, width).exp(), waves(1, n_states, width)
    y = program.scan(opened, query, waves(rows, 2 * n_states), 0, rates, waves(width), state)
    program.run(torch.zeros(1, rows, dtype=torch.int64), [position])
    return [attended, y, state]


SOURCE = native.Source("nanothink.models.decoding", ("products.h", "operations.cpp"), _declare, _error)
