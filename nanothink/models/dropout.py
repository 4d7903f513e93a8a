"""Dropout whose masks are a pure function of (seed, block of text, place in the model).

Dropout (Srivastava et al. 2014, "Dropout: a simple way to prevent neural networks from overfitting", section
4) on the embedding, on what each layer adds to the stream, and on the final state. It differs in its random
numbers: torch's come from one global generator, so that a mask depends on everything drawn before it. Here
each block of the run has a generator of its own. A resumed run, and a run on another number of processes,
draws the same masks again, and nothing has to be saved.

Shapes: B blocks, T time, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from nanothink.models.noise import block_generator

_LEVELS = 256  # a mask compares random bytes, 3 times as fast as random floats, with a threshold


class Dropout:
    """One instance serves all places of a model: each draws the next mask of the blocks.

    No module: its layers would share it, and one's ``eval()`` would change the others.
    """

    def __init__(self) -> None:
        self.rate = 0.0
        """Fraction of the features that is zeroed in training, to the nearest 256th."""
        self._generators: Sequence[torch.Generator] = ()
        self._device = torch.device("cpu")

    @contextmanager
    def masks(self, seed: int, positions: Sequence[int], device: torch.device) -> Iterator[None]:
        """Drop in the context, whose forward passes are on the blocks at these positions of the run."""
        if self.rate:
            self._device = device
            self._generators = [block_generator(seed, "dropout", position, device) for position in positions]
        try:
            yield
        finally:
            self._generators = ()

    def states(self) -> list[Tensor]:
        """States of the blocks' generators, from which ``masks_again`` draws the masks that follow."""
        return [generator.get_state() for generator in self._generators]

    @contextmanager
    def masks_again(self, states: Sequence[Tensor]) -> Iterator[None]:
        """Drop in the context as after ``states()``, for what is computed a second time."""
        before = self._generators
        self._generators = [torch.Generator(self._device) for _ in states]
        for generator, state in zip(self._generators, states, strict=True):
            generator.set_state(state)
        try:
            yield
        finally:
            self._generators = before

    def __call__(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D): features zeroed, the others scaled up; unchanged outside ``masks``."""
        return self.mask(x) if self.rate else x

    def mask(self, x: Tensor) -> Tensor:
        """``__call__`` at any rate."""
        if not self._generators:
            return x
        assert len(self._generators) == len(x), "masks() was told of other blocks"
        dropped = min(round(self.rate * _LEVELS), _LEVELS - 1)
        words = torch.empty(len(x), -(-x[0].numel() // 8), dtype=torch.int64, device=x.device)  # 8 bytes each
        for row, generator in zip(words, self._generators, strict=True):
            row.random_(-(1 << 63), None, generator=generator)
        kept = words.view(torch.uint8)[:, : x[0].numel()].view(x.shape) >= dropped
        return x * kept * (_LEVELS / (_LEVELS - dropped))
