"""Contents of a vector store, and search in it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from nanothink.data.split import TrainedText
from nanothink.models.store_gate import NO_TOKEN, Neighbours
from nanothink.vector_store.index import Float32, Int64, NeighbourIndex, damaged

DOCUMENT = np.dtype([("end", "<i8"), ("key", "<u8"), ("line", "<i8"), ("domain", "<i4"), ("file", "<i4")])
"""A document: end of its tokens (they begin where the one before ends), hash of its text, and its source;
domain and file are indices into the manifest's lists."""


@dataclass(frozen=True)
class Owner:
    """The frozen expert whose states the keys are. Any model that contains this expert can use the store."""

    expert: str
    kind: str
    digest: str
    """Digest of its weights."""
    tokenizer: str
    """Fingerprint of its tokenizer."""
    width: int
    block_length: int
    """Tokens in a block of text from which keys were computed."""


@dataclass(frozen=True)
class Contents:
    """The text of a store. N tokens, M merged keys."""

    tokens: NDArray[Any]
    """(N,) unsigned: token n followed key n."""
    documents: NDArray[Any]
    """(documents,) of DOCUMENT, in the order of their tokens; no two have the same text."""
    domains: tuple[str, ...]
    files: tuple[str, ...]
    held_out: NDArray[np.uint64]
    """Sorted hashes of validation and test texts, which never go in."""
    heads: NDArray[np.uint64] = field(default_factory=lambda: np.empty((0, 2), np.uint64))
    """(H, 2): hash of a text of which only the head may go in, and normalised characters of that head."""
    merged: Int64 = field(default_factory=lambda: np.empty((0, 2), np.int64))
    """(M, 2): a key that was removed, and the key that stands for it."""

    @property
    def trained_text(self) -> TrainedText:
        """The texts of which the store holds all or a part."""
        return trained_text(self.documents, self.heads)

    @classmethod
    def empty(cls, vocab_size: int) -> Contents:
        dtype = np.uint16 if vocab_size <= 1 << 16 else np.uint32
        return cls(np.empty(0, dtype), np.empty(0, DOCUMENT), (), (), np.empty(0, np.uint64))


class VectorStore:
    """An open store; a ``NeighbourSearch`` for a model. See ``open_store``."""

    def __init__(
        self,
        folder: Path,
        owner: Owner,
        index: NeighbourIndex,
        contents: Contents,
        *,
        n_neighbours: int,
        generation: str = "",
    ) -> None:
        self.folder, self.owner, self.index, self.contents = folder, owner, index, contents
        self.n_neighbours = n_neighbours
        self.generation = generation
        self._ends = contents.documents["end"].copy()

    @property
    def trained_text(self) -> TrainedText:
        """The texts that are in the store, wholly or in part."""
        return self.contents.trained_text

    def search(self, queries: torch.Tensor) -> Neighbours:
        """(Q, D) queries of length 1 -> Q rows of ``n_neighbours``, on their device."""
        found = self.index.search(queries.detach().float().cpu().numpy(), self.n_neighbours)
        return self.neighbours(*found).to(queries.device)

    def search_elsewhere(
        self, queries: Float32, own: NDArray[np.uint64], n_neighbours: int
    ) -> tuple[Float32, Int64]:
        """Neighbours outside the query's own document.

        Searches twice as many as are wanted. If too few of them remain, the rest is missing.

        Args:
            queries: (Q, D).
            own: (Q,) hash of the text of each query.

        Returns:
            similarities and numbers (Q, K), nearest first; -inf and -1 where missing.
        """
        similarities, numbers = self.index.search(queries, 2 * n_neighbours)
        gone = self.is_of(numbers, own)
        similarities[gone], numbers[gone] = -np.inf, -1
        order = np.argsort(numbers < 0, axis=1, kind="stable")[:, :n_neighbours]
        return np.take_along_axis(similarities, order, 1), np.take_along_axis(numbers, order, 1)

    def is_of(self, numbers: Int64, texts: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """(Q, K) keys, (Q,) hashes of texts -> (Q, K), True if the key or one it stands for is of it."""
        documents = self.documents_of(texts)[:, None]
        known = (numbers >= 0) & (documents >= 0)
        same = known & (self.document(numbers) == documents)
        if len(self._members):
            keys, _ = self._counts
            place = np.searchsorted(keys, numbers).clip(max=len(keys) - 1)
            pairs = place * len(self._ends) + documents
            at = np.searchsorted(self._members, pairs).clip(max=len(self._members) - 1)
            same |= known & (keys[place] == numbers) & (self._members[at] == pairs)
        return cast(NDArray[np.bool_], same)

    def document(self, numbers: Int64) -> Int64:
        """Index of the document of each key; arbitrary where the number is -1."""
        return np.searchsorted(self._ends, numbers, side="right").clip(max=max(len(self._ends) - 1, 0))

    def documents_of(self, texts: NDArray[np.uint64]) -> Int64:
        """Index of the document with each hash; -1 if the store has no such text."""
        order, sorted_keys = self._by_text
        if not len(order):
            return np.full(len(texts), -1, np.int64)
        at = np.searchsorted(sorted_keys, texts).clip(max=len(order) - 1)
        return np.where(sorted_keys[at] == texts, order[at], -1)

    def neighbours(self, similarities: Float32, numbers: Int64) -> Neighbours:
        """Result of a search of the index, with tokens and counts."""
        there = numbers >= 0
        if numbers.size and int(numbers.max()) >= len(self.contents.tokens):
            raise damaged(self.folder, "its index has keys without a token")
        tokens = np.where(there, self.contents.tokens[np.where(there, numbers, 0)].astype(np.int64), NO_TOKEN)
        counts = None
        if len(self.contents.merged):
            keys, of_key = self._counts
            at = np.searchsorted(keys, numbers).clip(max=len(keys) - 1)
            counts = torch.from_numpy(np.where(keys[at] == numbers, of_key[at], 1).astype(np.float32))
        return Neighbours(torch.from_numpy(similarities), torch.from_numpy(tokens), counts)

    def passage(self, number: int, n_before: int) -> list[int]:
        """At most ``n_before`` tokens before the token of key ``number``, in its document."""
        document = int(self.document(np.array([number]))[0])
        start = int(self._ends[document - 1]) if document else 0
        return [int(t) for t in self.contents.tokens[max(start, number - n_before) : number]]

    @cached_property
    def _by_text(self) -> tuple[Int64, NDArray[np.uint64]]:
        keys = self.contents.documents["key"]
        order = np.argsort(keys, kind="stable")
        return order, keys[order]

    @cached_property
    def _counts(self) -> tuple[Int64, Int64]:
        """Sorted keys that stand for others, and the number of keys that each stands for, itself included."""
        keys, others = np.unique(self.contents.merged[:, 1], return_counts=True)
        return keys, others + 1

    @cached_property
    def _members(self) -> Int64:
        """Sorted codes, place in ``_counts`` × documents + document, of the documents that a key stands for.

        Places instead of keys, since products with keys could exceed 2^63.
        """
        if not len(self.contents.merged):
            return np.empty(0, np.int64)
        member, key = self.contents.merged[:, 0], self.contents.merged[:, 1]
        place = np.searchsorted(self._counts[0], key)
        return np.unique(place * len(self._ends) + self.document(member))


def trained_text(documents: NDArray[Any], heads: NDArray[np.uint64]) -> TrainedText:
    """The texts of a store's ``documents`` and ``heads``."""
    return TrainedText(np.unique(documents["key"]), {int(key): int(chars) for key, chars in heads})
