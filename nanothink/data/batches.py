"""Which block comes when: a pure function of (seed, position), so that resuming needs one integer.

Positions count blocks from the start of a run. With D domains, sorted by name:

1. Positions are dealt out in groups of D, and each group holds every domain once, in an order of its
   own. So domains have exactly equal weight, however many blocks each has.
2. Group q takes block draw q of each domain. A domain of n blocks gives them all in a shuffled order
   before any comes again: draw q is place q % n of pass q // n, and every pass is shuffled anew.

Processes and micro-batches only share positions out, so they change nothing about what comes when.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

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
        """Blocks of all domains together: as many positions are one epoch."""
        self._firsts = dict(zip(self._domains, accumulate(self._sizes.values(), initial=0), strict=False))
        self._passes: dict[str, tuple[int, NDArray[np.int64]]] = {}
        self._group: tuple[int, NDArray[np.int64]] | None = None

    def place(self, position: int) -> tuple[str, int]:
        """Domain and block index at ``position`` >= 0."""
        group, slot = divmod(position, len(self._domains))
        domain = self._domains[self._order(group)[slot]]
        number, place = divmod(group, self._sizes[domain])
        return domain, int(self._shuffled(domain, number)[place])

    def number(self, position: int) -> int:
        """Which of the ``n_blocks`` blocks comes at ``position``; they are numbered domain by domain."""
        domain, index = self.place(position)
        return self._firsts[domain] + index

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


def validation_batches(
    stream: TokenStream, length: int, batch_size: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The stream in order, at most ``batch_size`` blocks at a time: inputs and targets (B, length) int64."""
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
    """64 bits that name one permutation."""
    named = f"{seed}\0{purpose}\0{number}".encode()
    return int.from_bytes(hashlib.blake2b(named, digest_size=8).digest(), "little")


def _permutation(n: int, key: int) -> NDArray[np.int64]:
    """A permutation of 0..n-1 by ``key``, the same with every version of numpy and on every machine.

    Sorts the indices by SplitMix64's output (Steele, Lea and Flood 2014) for seed ``key``; equal hashes
    keep their order.
    """
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is meant
        state = np.uint64(key) + np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state ^= state >> np.uint64(31)
    return np.argsort(state, kind="stable")
