"""Decoding a few tokens at a time on a CPU: a step is a list of operations over fixed buffers.

A step of one token reads every weight once and computes next to nothing with it, so PyTorch's dispatch and
its allocations are most of the time: 80 % for a model of width 128.

program.py       the list, written once for a decoding state
steps.py         the steps of all models as such lists
compiled.py      running a list by one call into C++ (operations.cpp), built at first use
plain.py         the same in PyTorch, where there is no compiler
one_row.py       the same in NumPy, for one token at a time

Weights are read where they lie in the model, float32 and unfused, so that they are never out of date. A
program serves what it knows: a CPU, float32, no autocast, a few rows. Everything else takes the models' own
step, which is the reference (docs/decisions/0031).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from nanothink.models.contract import State
    from nanothink.models.decoding.program import Program
    from nanothink.models.decoding.steps import Step

MAX_ROWS = 64
"""Rows (sequences x new tokens) that a program has room for."""

_ROWS_BESIDE_THREADS = 16
"""Rows up to which a program, which computes in one thread, is ahead of matrix products in several."""

_by: Literal["compiled", "plain", "model"] = "compiled"


def suits(tokens: Tensor, weight: Tensor) -> bool:
    """True if a program can read (B, T) tokens into a model with this weight."""
    most = MAX_ROWS if torch.get_num_threads() == 1 else _ROWS_BESIDE_THREADS
    if _by == "model" or tokens.numel() > most or weight.dtype is not torch.float32:
        return False
    on_cpu = weight.device.type == "cpu" and tokens.device.type == "cpu"
    return on_cpu and not torch.is_autocast_enabled("cpu")


def new_program(max_rows: int = MAX_ROWS) -> Program:
    """An empty program, to be run by the library; in PyTorch where there is none. May build the library."""
    from nanothink.models.decoding import compiled, plain
    from nanothink.models.decoding.program import Program

    return Program(plain.bind if _by == "plain" or compiled.unavailable() else compiled.bind, max_rows)


def step_for(
    state: State,
    tokens: Tensor,
    table: Tensor,
    head: Tensor | None,
    build: Callable[[], Step | None],
) -> Step | None:
    """The step that reads (B, T) tokens into a state; None where the model's own step is to run.

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
    step = state.step
    if (
        step is None
        or step.address != table.data_ptr()
        or (head is not None and step.logits is None)
        or not state.has_room(tokens.shape[1])
    ):
        with torch.no_grad():
            state.step = step = build()
    return step


def project(x: Tensor, weight: Tensor, coded: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """``F.linear`` of rows (..., D) and (V, D); of a few rows without gradients, as a program does it.

    Args:
        coded: codes and scales of the weight, if a program may read them in its place.
    """
    if torch.is_grad_enabled() or not suits(x[..., 0], weight) or x.dtype is not torch.float32:
        return F.linear(x, weight)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    program = new_program(len(rows))
    y = program.linear(rows, weight, coded=coded)
    program.run(torch.empty(1, len(rows), dtype=torch.int64), [0])
    return y.view(*x.shape[:-1], -1)


@contextmanager
def steps_by(name: Literal["compiled", "plain", "model"]) -> Iterator[None]:
    """Within the block new decoding states step in this way: for tests and measurements."""
    global _by
    before, _by = _by, name
    try:
        yield
    finally:
        _by = before
