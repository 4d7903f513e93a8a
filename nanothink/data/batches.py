"""Order of the training blocks: a pure function of (seed, position), so resuming needs one integer.

Positions count blocks from the start of a run. With D domains, sorted by name:

1. Each group of D positions holds every domain once, shuffled. Domains therefore have equal weight, however
   many blocks each has.
2. Group q takes the q-th block of each domain. A domain of n blocks is shuffled anew for every pass: that
   block is number q % n of pass q // n, so no block repeats within a pass.

Processes and micro-batches divide the positions among themselves and do not change the order.
"""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Iterator, Mapping
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from nanothink.data.split import SPLITMIX64_STEP, splitmix64
from nanothink.data.tokens import TokenStream

if TYPE_CHECKING:
    import torch


class TrainingBatches:
    """Blocks of ``length`` tokens from the training streams of all domains, in the order of ``seed``."""

    def __init__(self, streams: Mapping[str, TokenStream], length: int, seed: int) -> None:
        self._streams = dict(sorted(streams.items()))
        self._domains = tuple(self._streams)
        self._length, self._seed = length, seed
        self._sizes = {domain: stream.n_blocks(length) for domain, stream in self._streams.items()}
        self.n_blocks = sum(self._sizes.values())
        """Blocks of all domains together; one epoch is as many positions."""
        self._firsts = dict(zip(self._domains, accumulate(self._sizes.values(), initial=0), strict=False))
        self._starts = list(self._firsts.values())
        self._passes: dict[str, tuple[int, NDArray[np.int64]]] = {}
        self._group: tuple[int, NDArray[np.int64]] | None = None

    def place(self, position: int) -> tuple[str, int]:
        """Domain and block index at ``position`` >= 0."""
        group, slot = divmod(position, len(self._domains))
        domain = self._domains[self._order(group)[slot]]
        number, place = divmod(group, self._sizes[domain])
        return domain, int(self._shuffled(domain, number)[place])

    def numbered(self, number: int) -> tuple[str, int]:
        """Domain and block index of the block with this number, of ``n_blocks``."""
        place = bisect.bisect_right(self._starts, number) - 1
        return self._domains[place], number - self._starts[place]

    def number(self, position: int) -> int:
        """Number of the block at ``position``, of ``n_blocks``, counted domain by domain."""
        domain, index = self.place(position)
        return self._firsts[domain] + index

    def passes(self, position: int) -> int:
        """Passes over its domain that end before the one of ``position``."""
        group = position // len(self._domains)
        return group // self._sizes[self.place(position)[0]]

    def _order(self, group: int) -> NDArray[np.int64]:
        """Order of the domains in a group; kept until another group is asked for."""
        if self._group is None or self._group[0] != group:
            key = _key(self._seed, "domains", group)
            self._group = (group, _permutation(len(self._domains), key))
        return self._group[1]

    def _shuffled(self, domain: str, number: int) -> NDArray[np.int64]:
        """Order of a domain's blocks in a pass; kept until another pass is asked for."""
        kept = self._passes.get(domain)
        if kept is None or kept[0] != number:
            key = _key(self._seed, "blocks of " + domain, number)
            kept = self._passes[domain] = (number, _permutation(self._sizes[domain], key))
        return kept[1]

    def read(self, start: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets of positions start to start + count - 1.

        Both are int64 of shape (count, length) and own their memory.
        """
        return _stacked(
            self._streams[domain].block(index, self._length)
            for domain, index in map(self.place, range(start, start + count))
        )


class Mixture:
    """Order of a run whose blocks are some of a corpus and some that a model wrote, evenly spread among them.

    TrainingBatches says which block of the corpus comes when; the written ones are shuffled for each pass.
    """

    def __init__(self, n_corpus: int, n_written: int, seed: int) -> None:
        self._n_written, self._seed = n_written, seed
        self._pass: tuple[int, NDArray[np.int64]] | None = None
        self.n_blocks = n_corpus + n_written
        """Blocks of an epoch."""

    def source(self, position: int) -> tuple[bool, int]:
        """True and the number of a written block, or False and the position among those of the corpus."""
        before = position * self._n_written // self.n_blocks
        if (position + 1) * self._n_written // self.n_blocks == before:
            return False, position - before
        number, place = divmod(before, self._n_written)
        if self._pass is None or self._pass[0] != number:
            order = _permutation(self._n_written, _key(self._seed, "written blocks", number))
            self._pass = (number, order)
        return True, int(self._pass[1][place])


def validation_batches(
    stream: TokenStream, length: int, batch_size: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the stream in order, ``batch_size`` blocks or fewer: inputs and targets, (B, length) int64."""
    n_blocks = stream.n_blocks(length)
    for first in range(0, n_blocks, batch_size):
        indices = range(first, min(first + batch_size, n_blocks))
        yield _stacked(stream.block(index, length) for index in indices)


def _stacked(
    blocks: Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]],
) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    inputs, targets = zip(*blocks, strict=True)
    return torch.from_numpy(np.stack(inputs)), torch.from_numpy(np.stack(targets))


def _key(seed: int, purpose: str, number: int) -> int:
    """64-bit seed of one permutation."""
    named = f"{seed}\0{purpose}\0{number}".encode()
    return int.from_bytes(hashlib.blake2b(named, digest_size=8).digest(), "little")


def _permutation(n: int, key: int) -> NDArray[np.int64]:
    """A permutation of 0..n-1 by ``key``, the same with every version of numpy and on every machine.

    Sorts the indices by the outputs of SplitMix64 with seed ``key``; equal outputs keep their order.
    """
    states = np.uint64(key) + np.arange(n, dtype=np.uint64) * SPLITMIX64_STEP
    return np.argsort(splitmix64(states), kind="stable")
