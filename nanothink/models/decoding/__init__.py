"""Decoding a token at a time on a CPU: a step is one call into C++ instead of a hundred small operations.

A step of one token reads every weight once and computes next to nothing with it, so PyTorch's dispatch and
its allocations are most of the time: 80 % for a model of width 128.

program.py       a step as a list of operations over fixed buffers, built once for a decoding state
compiled.py      the library that runs it (operations.cpp), built at first use
steps.py         the steps of all models as such lists

Weights are read where they lie in the model, float32 and unfused, so that they are never out of date. A
program serves what it knows: a CPU, float32, no autocast, a few rows. Everything else, and a machine without
a compiler, takes the models' own step, which is the reference (docs/decisions/0031).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from nanothink.models.contract import State
    from nanothink.models.decoding.steps import Step

MAX_ROWS = 16
"""Rows (sequences x new tokens) up to which a program is used; more are a matter of matrix products."""

_allowed = True


def suits(tokens: Tensor, weight: Tensor) -> bool:
    """True if a program can read (B, T) tokens into a model with this weight. The first call may build."""
    if not _allowed or tokens.numel() > MAX_ROWS or weight.dtype is not torch.float32:
        return False
    if weight.device.type != "cpu" or tokens.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return False
    from nanothink.models.decoding import compiled

    return not compiled.unavailable()


def step_for(
    state: State,
    tokens: Tensor,
    table: Tensor,
    head: Tensor | None,
    build: Callable[[], Step | None],
) -> Step | None:
    """The compiled step that reads (B, T) tokens into a state; None where the model's own step is to run.

    Args:
        table: the model's embedding table.
        head: its LM head where logits are wanted.
        build: makes the step, for as many tokens as these at least.

    Raises:
        UsageError: the tokens do not fit.
    """
    if not suits(tokens, table):
        return None
    state.check_room(tokens)
    step = state.compiled
    if (
        step is None
        or step.address != table.data_ptr()
        or (head is not None and step.logits is None)
        or not state.has_room(tokens.shape[1])
    ):
        with torch.no_grad():
            state.compiled = step = build()
    return step


@contextmanager
def plain_steps() -> Iterator[None]:
    """Within the block every model takes its own step: for tests and measurements."""
    global _allowed
    before, _allowed = _allowed, False
    try:
        yield
    finally:
        _allowed = before
