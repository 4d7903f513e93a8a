"""Compaction: near-duplicate keys with the same token are merged.

One of them stays and counts for all: its weight in p_mem is multiplied by their number. The others are
removed from the index. The text stays whole, so passages can still be shown, and the documents of a key are
still known.

Only keys in one inverted list are compared, since near-duplicates share a list; the cost is linear in the
number of lists. In each list, and for each token, keys are taken in the order of the text; one that is nearer
than the threshold to a key that stays is merged into the first such key (leader clustering, Hartigan 1975,
chapter 3).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from nanothink.reporter import SILENT, Reporter
from nanothink.vector_store.contents import Contents, VectorStore
from nanothink.vector_store.index import Float32, Int64

_AT_ONCE = 4096  # keys of a group compared at a time: a matrix of 64 MB


def merge_duplicates(store: VectorStore, similarity: float, reporter: Reporter = SILENT) -> Contents:
    """Merge keys with the same token and at least this similarity (0 to 1); changes the index of ``store``.

    Returns the contents to write with it.
    """
    pairs = []
    advance = reporter.counter("vector store: comparing keys", store.index.n_keys)
    for numbers, keys in store.index.groups():
        order = np.lexsort((numbers, store.contents.tokens[numbers]))
        numbers, keys = numbers[order], _unit(keys[order])
        tokens = store.contents.tokens[numbers]
        starts = np.flatnonzero(np.append(True, tokens[1:] != tokens[:-1]))
        for start, stop in zip(starts, np.append(starts[1:], len(tokens)), strict=True):
            for first in range(start, stop, _AT_ONCE):
                part = slice(first, min(first + _AT_ONCE, stop))
                if part.stop - part.start > 1:
                    leaders = _leaders(keys[part], similarity)
                    merged = np.flatnonzero(leaders != np.arange(len(leaders)))
                    pairs.append(np.stack([numbers[part][merged], numbers[part][leaders[merged]]], 1))
        advance(len(numbers))
    new = np.concatenate(pairs or [np.empty((0, 2), np.int64)])
    store.index.remove(new[:, 0])
    old = np.asarray(store.contents.merged)
    if len(old) and len(new):  # keys merged earlier into one that is merged now
        at = np.argsort(new[:, 0])
        found = np.searchsorted(new[at, 0], old[:, 1]).clip(max=len(new) - 1)
        moved = new[at[found], 0] == old[:, 1]
        old = np.stack([old[:, 0], np.where(moved, new[at[found], 1], old[:, 1])], 1)
    return replace(store.contents, merged=np.concatenate([old, new]))


def _leaders(keys: Float32, similarity: float) -> Int64:
    """For each of (n, D) keys, the key that it is merged into, or itself."""
    near = keys @ keys.T >= similarity
    leaders = np.full(len(keys), -1, np.int64)
    for i in range(len(keys)):
        if leaders[i] < 0:
            leaders[(leaders < 0) & near[i]] = i
            leaders[i] = i
    return leaders


def _unit(keys: Float32) -> Float32:
    """Keys scaled to length 1, of which coded keys lose a little."""
    lengths = np.linalg.norm(keys, axis=1, keepdims=True)
    unit: Float32 = (keys / np.maximum(lengths, 1e-12)).astype(np.float32)
    return unit
