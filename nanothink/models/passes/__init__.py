"""Elementwise passes of a training step on a CPU, each in one walk through its memory: ``passes.cpp``.

PyTorch walks once for each operation, and once more for each change of type. How the library is built:
``models/native``. A caller asks ``serve`` first; where the answer is False it computes the same in PyTorch,
which is the reference. Nothing here is differentiated: callers have backward passes of their own.

Shapes: R rows, V vocabulary, N sequences x heads, Q queries, S keys, H heads, K their width, B batch, T time,
E channels, W width of the filter.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from nanothink.models import native
from nanothink.models.native import waves

_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_off = False
_in_check: Any = None
"""A library that is being checked, and not yet the one that is used."""


def serve(*tensors: Tensor, into: torch.dtype = torch.float32) -> bool:
    """True if the library is here and knows these tensors and the type of a result. May build it."""
    return (
        not _off
        and into in _NAMES
        and all(x.device.type == "cpu" and x.dtype in _NAMES and x.is_contiguous() for x in tensors)
        and not torch.compiler.is_compiling()
        and _load()[0] is not None
    )


@contextmanager
def switched_off() -> Iterator[None]:
    """Within the block PyTorch computes everything: for tests and measurements."""
    global _off
    before, _off = _off, True
    try:
        yield
    finally:
        _off = before


def softmax_gradient_(logits: Tensor, targets: Tensor, factor: Tensor | None) -> tuple[Tensor, Tensor]:
    """Negative log-likelihoods, and logarithms of the greatest probabilities, (R,) float32 each.

    ``logits`` (R, V) becomes ``factor * (softmax - one_hot)`` in place; without a factor (R,) it stays.
    """
    rows, width = logits.shape
    nats, peaks = torch.empty(2, rows)
    assert targets.dtype is torch.int64
    targets = targets.reshape(rows).contiguous()
    factors = None if factor is None else factor.reshape(rows).contiguous()
    found = [logits, targets, factors, nats, peaks]
    _call("softmax", logits, rows, width, *found)
    return nats, peaks


def add_(total: Tensor, x: Tensor) -> None:
    """``total += x``: (R, ...) float32, whose rows may lie apart."""
    assert total.shape == x.shape
    assert total[0].is_contiguous()
    _call("add", x, len(x), x[0].numel(), total.stride(0), total, x)


def causal_softmax_(scores: Tensor, first: int, scale: float) -> Tensor:
    """Scores (N, Q, S) of queries, at positions from ``first``, with keys become weights in place.

    Returns:
        (N, Q): logarithms of the sums that they were divided by.
    """
    n, n_queries, n_keys = scores.shape
    logs = torch.empty(n, n_queries)
    assert first + n_queries <= n_keys
    _call("causal", scores, n * n_queries, n_keys, n_queries, first, scale, scores, logs)
    return logs


def causal_softmax_backward_(
    scores: Tensor, first: int, scale: float, grads: Tensor, logs: Tensor, inner: Tensor
) -> None:
    """Scores become weights again, and the gradients of the weights those of the scores, in place.

    Args:
        logs: of ``causal_softmax_``, (N, Q).
        inner: (N, Q), of each row the sum of weights times their gradients.
    """
    n, n_queries, n_keys = scores.shape
    assert scores.shape == grads.shape
    assert logs.is_contiguous()
    assert inner.is_contiguous()
    sizes = n * n_queries, n_keys, n_queries, first, scale
    _call("causal_back", scores, *sizes, scores, grads, logs, inner)


def gate(opening: Tensor, x: Tensor) -> Tensor:
    """``silu(opening) * x``."""
    y = torch.empty_like(x)
    _call("gate", x, x.numel(), opening, x, y)
    return y


def gate_backward(opening: Tensor, x: Tensor, grad_y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``gate`` again, and the gradients of both; that of x takes the memory of ``grad_y``."""
    assert opening.shape == x.shape == grad_y.shape
    y, grad_opening = torch.empty_like(x), torch.empty_like(x)
    _call("gate_back", x, x.numel(), opening, x, grad_y, y, grad_opening, grad_y)
    return y, grad_opening, grad_y


def softplus(x: Tensor, bias: Tensor) -> Tensor:
    """``softplus(x + bias)`` of (..., E) and (E,), float32."""
    y = torch.empty_like(x, dtype=torch.float32)
    assert bias.shape == x.shape[-1:]
    assert bias.dtype is torch.float32
    _call("softplus", x, x.numel() // len(bias), len(bias), x, bias, y)
    return y


def softplus_backward(y: Tensor, grad_y: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The gradients of x, in ``dtype``, and bias, from the result and its gradient."""
    grad_x, grad_bias = torch.empty_like(y, dtype=dtype), y.new_empty(y.shape[-1])
    assert y.dtype is grad_y.dtype is torch.float32
    assert y.shape == grad_y.shape
    _call("softplus_back", grad_x, y.numel() // len(grad_bias), len(grad_bias), y, grad_y, grad_x, grad_bias)
    return grad_x, grad_bias


class _Norm(ctypes.Structure):
    """See passes.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("n", "heads", "width", "length", "half")),
        ("eps", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("weight", "cos", "sin")),
    )


Rotation: TypeAlias = tuple[Tensor, Tensor]


def norm(
    x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, rotation: Rotation | None = None
) -> Tensor:
    """RMSNorm over the last dimension in ``dtype``, then a rotation by positions.

    Args:
        x: (..., K); (..., T, H, K) where there is a rotation.
        rotation: cosines and sines (T, R / 2) for the first R features.
    """
    y = torch.empty_like(x, dtype=dtype)
    function, shape = _norm("norm", x, dtype, weight, eps, rotation)
    function(shape, x.data_ptr(), y.data_ptr(), torch.get_num_threads())
    return y


def norm_backward(
    x: Tensor, weight: Tensor, eps: float, grad_y: Tensor, rotation: Rotation | None = None
) -> tuple[Tensor, Tensor]:
    """The gradients of x and weight, from that of ``norm``."""
    assert x.shape == grad_y.shape
    grad_x, grad_weight = torch.empty_like(x), torch.empty_like(weight)
    function, shape = _norm("norm_back", x, grad_y.dtype, weight, eps, rotation)
    parts = (part.data_ptr() for part in (x, grad_y, grad_x, grad_weight))
    function(shape, *parts, torch.get_num_threads())
    return grad_x, grad_weight


def _norm(
    name: str, x: Tensor, dtype: torch.dtype, weight: Tensor, eps: float, rotation: Rotation | None
) -> tuple[Any, Any]:
    """The function for these types, and what it wants to know about shapes."""
    width, (cos, sin) = x.shape[-1], rotation or (weight, weight)
    heads, length, half = (x.shape[-2], *cos.shape) if rotation else (1, 1, 0)
    assert weight.shape == (width,)
    assert all(part.dtype is torch.float32 and part.is_contiguous() for part in (weight, cos, sin))
    addresses = (part.data_ptr() for part in (weight, cos, sin))
    shape = _Norm(x.numel() // (heads * width), heads, width, length, half, eps, *addresses)
    return _function(f"{name}_{_NAMES[x.dtype]}_{_NAMES[dtype]}"), ctypes.byref(shape)


class _Filter(ctypes.Structure):
    """See passes.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("n", "width", "length", "stride", "n_taps")),
        *((name, ctypes.c_void_p) for name in ("taps", "bias")),
    )


def serve_filter(x: Tensor, taps: Tensor, bias: Tensor) -> bool:
    """True if ``filtered`` knows (B, T, E) rows, which may lie apart."""
    apart = x.stride(2) == 1 and x.stride(0) == x.shape[1] * x.stride(1)
    return apart and taps.dtype is bias.dtype is torch.float32 and serve(x.new_empty(0), taps, bias)


def filtered(x: Tensor, taps: Tensor, bias: Tensor) -> Tensor:
    """Causal filter of each channel of (B, T, E) with taps (W, E), oldest input first, then silu."""
    y = torch.empty(x.shape, dtype=x.dtype)
    shape = _filter(x, taps, bias)
    _function(f"filter_{_NAMES[x.dtype]}")(shape, x.data_ptr(), y.data_ptr(), torch.get_num_threads())
    return y


def filtered_backward(x: Tensor, taps: Tensor, bias: Tensor, grad_y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of input, taps and bias."""
    assert grad_y.is_contiguous()
    assert grad_y.dtype is x.dtype
    grad_x, grads = torch.empty_like(grad_y), taps.new_empty(len(taps) + 1, taps.shape[1])
    parts = (part.data_ptr() for part in (x, grad_y, grad_x, grads))
    shape = _filter(x, taps, bias)
    _function(f"filter_back_{_NAMES[x.dtype]}")(shape, *parts, torch.get_num_threads())
    return grad_x, grads[:-1], grads[-1]


def _filter(x: Tensor, taps: Tensor, bias: Tensor) -> Any:
    batch, length, width = x.shape
    assert taps.is_contiguous()
    assert bias.shape == taps.shape[1:] == (width,)
    sizes = batch * length, width, length, x.stride(1), len(taps)
    return ctypes.byref(_Filter(*sizes, taps.data_ptr(), bias.data_ptr()))


def _function(name: str) -> Any:
    return getattr(_in_check or _load()[0], f"nanothink_{name}")


def _call(name: str, typed: Tensor, *arguments: Tensor | float | None) -> None:
    function = _function(f"{name}_{_NAMES[typed.dtype]}")
    function(*(x.data_ptr() if isinstance(x, Tensor) else x for x in arguments), torch.get_num_threads())


@functools.cache
def _load() -> tuple[Any, str]:
    return native.load(SOURCE)


_ARGUMENTS = {
    "softmax": "iippppp",
    "add": "iiipp",
    "gate": "ippp",
    "gate_back": "ipppppp",
    "causal": "iiiifpp",
    "causal_back": "iiiifpppp",
    "softplus": "iippp",
    "softplus_back": "iipppp",
}
"""Types of a function's arguments: integers, numbers and pointers."""


def _declare(library: Any) -> None:
    size, pointer = ctypes.c_int64, ctypes.c_void_p
    by_letter = {"i": size, "f": ctypes.c_float, "p": pointer}
    types: dict[str, list[Any]] = {
        f"{name}_{number}": [by_letter[letter] for letter in letters]
        for name, letters in _ARGUMENTS.items()
        for number in _NAMES.values()
    } | {
        f"{name}_{a}_{b}": [ctypes.POINTER(_Norm), *[pointer] * n_pointers]
        for name, n_pointers in (("norm", 2), ("norm_back", 4))
        for a in _NAMES.values()
        for b in _NAMES.values()
    }
    for number in _NAMES.values():
        types[f"filter_{number}"] = [ctypes.POINTER(_Filter), pointer, pointer]
        types[f"filter_back_{number}"] = [ctypes.POINTER(_Filter), *[pointer] * 4]
    for name, arguments in types.items():
        function = getattr(library, f"nanothink_{name}")
        function.argtypes, function.restype = [*arguments, size], None


def _error(library: Any) -> float:
    """Largest relative error of small passes, against the same in PyTorch."""
    global _in_check
    _in_check = library
    try:
        pairs = list(_comparisons())
    finally:
        _in_check = None
    return max(float((found - right).abs().max() / right.abs().max()) for found, right in pairs)


def _comparisons() -> Iterator[tuple[Tensor, Tensor]]:
    """Results, and what they should be."""
    logits, targets, factor = waves(3, 37) * 5, torch.tensor([0, 36, 5]), waves(3)
    p = logits.softmax(1)
    yield softmax_gradient_(logits, targets, factor)[0], -p[[0, 1, 2], targets].log()
    yield logits, factor[:, None] * (p - F.one_hot(targets, 37))
    opening, x, weight = waves(3, 37) * 3, waves(3, 37).cos(), waves(37)
    add_(x[:, :20], waves(3, 20).bfloat16())
    yield x[:, :20], waves(3, 37).cos()[:, :20] + waves(3, 20).bfloat16()
    y, grad_opening, _ = gate_backward(opening, x, p.clone())
    yield y, F.silu(opening) * x
    yield grad_opening, torch.ops.aten.silu_backward(p * x, opening)
    yield norm(x, weight, 1e-6, torch.float32), F.rms_norm(x, (37,), weight, 1e-6)


SOURCE = native.Source("nanothink.models.passes", ("passes.cpp",), _declare, _error)
