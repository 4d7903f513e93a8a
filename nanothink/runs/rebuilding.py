"""Building the model that a checkpoint describes, within the memory that its weights justify.

A file of one kilobyte can ask for a width of 16,384 and 256 layers. Since the weights are in the file too, a
model that needs far more memory than they do is refused before it is allocated, whichever setting asks for
it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from nanothink.checkpoints import ModelPayload
from nanothink.config import Config
from nanothink.errors import CheckpointMismatchError
from nanothink.models import ExpertDescription, build_model
from nanothink.models.contract import LanguageModel

TABLE_NUMBERS = 2**26
"""Numbers that a model may hold beside its weights: rotary tables of a million positions."""


def rebuild(
    kind: str,
    config: Config,
    vocab_size: int,
    experts: Sequence[ExpertDescription] = (),
    *,
    payload: ModelPayload,
    path: Path,
) -> LanguageModel:
    """``build_model`` for the weights of ``payload``, which was read from ``path``.

    Raises:
        CheckpointMismatchError: the model would have more than twice the numbers that the file has, so
            that less than half of it could be restored.
    """
    n_saved = sum(tensor.numel() for tensor in payload["model_state"].values())
    try:
        with _Allowance(2 * n_saved + TABLE_NUMBERS):
            return build_model(kind, config, vocab_size, experts)
    except _TooLarge:
        raise CheckpointMismatchError(
            f"{path}: hardly anything in it fits this model: its settings and tokenizer ask for more than "
            f"{2 * n_saved + TABLE_NUMBERS:,} numbers, and it holds {n_saved:,}. Use the settings it was "
            "trained with. If nothing was changed, the file is damaged or forged: use another checkpoint"
        ) from None


class _TooLarge(Exception):
    pass


class _Allowance(TorchFunctionMode):
    """Refuses an allocation of more than ``numbers``, or of so many in all by ``torch.empty``."""

    def __init__(self, numbers: int) -> None:
        super().__init__()
        self._numbers = self._left = numbers

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        count = _result_numbers(func, args, kwargs or {})
        if func is torch.empty:
            self._left -= count
        if count > self._numbers or self._left < 0:
            raise _TooLarge
        return func(*args, **(kwargs or {}))


_BY_SHAPE = {torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn}


def _result_numbers(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Upper bound on the elements allocated, computed from the arguments."""
    if func in _BY_SHAPE:
        shape = kwargs.get("size", args[0] if args and isinstance(args[0], (tuple, list)) else args)
        return math.prod(n for n in shape if isinstance(n, int))
    if func is torch.arange:
        start, end, step = (0, args[0], 1) if len(args) == 1 else (*args, 1)[:3]
        return int(abs((end - start) / step)) + 1
    tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
    if func is torch.outer:
        return math.prod(tensor.numel() for tensor in tensors)
    if func is torch.Tensor.repeat:
        return tensors[0].numel() * math.prod(n for n in args[1:] if isinstance(n, int))
    if func is torch.cat:
        return sum(tensor.numel() for tensor in args[0])
    return _broadcast_numbers([tensor.shape for tensor in tensors])


def _broadcast_numbers(shapes: Sequence[Sequence[int]]) -> int:
    """Elements of a pointwise result; of the largest shape if the shapes do not broadcast.

    torch.broadcast_shapes does it too, but imports sympy, which takes half a second.
    """
    numbers = 1
    for sizes in itertools.zip_longest(*(reversed(shape) for shape in shapes), fillvalue=1):
        wide = set(sizes) - {1}
        if len(wide) > 1:
            return max(map(math.prod, shapes))
        numbers *= wide.pop() if wide else 1
    return numbers
