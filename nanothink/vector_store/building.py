"""Building a store from text, or adding text to one.

A document that is in the store already, or that any of its data holds out for validation, is left out; a text
that stands in several places goes in once. Keys are computed block by block, as training reads the text: once
for an evenly spread sample, on which the index is trained, and once for all blocks, batch by batch. So the
memory needed is that of the index, which holds compressed keys, and of the sample.

Shapes: B blocks, T tokens of a block, N tokens, D width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nanothink.config import VectorStoreConfig
from nanothink.data.split import TrainedText
from nanothink.data.tokens import IGNORE, Documents, TokenisedCorpus, TokenStream
from nanothink.reporter import SILENT, Reporter
from nanothink.vector_store.contents import DOCUMENT, Contents, Owner, VectorStore
from nanothink.vector_store.index import (
    Float32,
    Int64,
    Kind,
    NeighbourIndex,
    bytes_per_key,
    choose_kind,
    choose_lists,
    sample_size,
)
from nanothink.vector_store.store import write_store

States = Callable[[torch.Tensor], Float32]
"""The key expert: (B, T) int64 tokens -> (B, T, D) states of length 1, on the CPU."""


BATCH_TOKENS = 8192
"""Tokens that the key expert reads at a time."""

_PROBED_BLOCKS = 4  # blocks read to see how fast the expert is
_SCANNED_PER_SECOND = 3.5e9  # numbers of a coded key that one thread compares a second, about


@dataclass(frozen=True)
class Intake:
    """The training text of one domain, and the part of it that goes in."""

    domain: str
    stream: TokenStream
    documents: Documents
    ends: Int64
    """End of each document in the stream, in tokens."""
    fresh: NDArray[np.bool_]
    """For each document: True if it goes in."""
    blocks: Int64
    """Blocks in which such a document has a token."""

    def block(self, index: int, length: int) -> tuple[Int64, Int64, Int64]:
        """Inputs and targets, (T,), and the document of each target; -1 if it does not go in."""
        inputs, targets = self.stream.block(index, length)
        places = index * length + np.arange(length)
        document = np.searchsorted(self.ends, places, side="right").clip(max=len(self.ends) - 1)
        wanted = (targets != IGNORE) & self.fresh[document]
        return inputs, targets, np.where(wanted, document, -1)


@dataclass(frozen=True)
class BuildPlan:
    """The text that a build puts in, and its cost."""

    intakes: tuple[Intake, ...]
    n_keys: int
    """New keys; an estimate under ``max_keys``."""
    n_old: int
    """Keys that are in the store already."""
    n_known: int
    """Documents left out: in the store already, or twice in the data."""
    n_held_out: int
    """Documents left out: held out by other data."""
    kind: Kind
    n_lists: int
    disk_bytes: int
    memory_bytes: int
    seconds: float
    """Estimated."""


def plan_build(
    tokens: TokenisedCorpus,
    settings: VectorStoreConfig,
    owner: Owner,
    states: States,
    store: VectorStore | None = None,
) -> BuildPlan:
    """Choose documents and blocks, and estimate the cost. Reads a few blocks to time the expert.

    Args:
        tokens: the data whose training side goes in.
        store: the store to add to; None for a new one.
    """
    length = owner.block_length
    held_out = held_out_texts(tokens)
    if store is not None:
        held_out = np.union1d(held_out, store.contents.held_out)
    known = store.contents.documents["key"] if store is not None else np.empty(0, np.uint64)
    found = {domain: stream.documents() for domain, stream in tokens.train.items()}
    keys = np.concatenate([documents.keys for documents in found.values()] or [np.empty(0, np.uint64)])
    out = np.isin(keys, held_out)
    let_in = np.zeros(len(keys), np.bool_)
    let_in[np.unique(keys, return_index=True)[1]] = True
    let_in &= ~out & ~np.isin(keys, known)
    n_held_out, n_known = int(out.sum()), int((~let_in & ~out).sum())
    chosen: list[tuple[str, TokenStream, Documents, Int64, NDArray[np.bool_], Int64]] = []
    start = 0
    for domain, documents in found.items():
        fresh = let_in[start : start + len(documents.keys)]
        start += len(documents.keys)
        ends = np.cumsum(documents.n_tokens)
        touched = _blocks_of(ends, documents.n_tokens, fresh, length)
        chosen.append((domain, tokens.train[domain], documents, ends, fresh, touched))
    n_blocks = sum(len(touched) for *_, touched in chosen)
    n_fresh = sum(
        round(int(documents.n_tokens[fresh].sum()) * stream.n_targets / max(1, stream.n_tokens))
        for _, stream, documents, _, fresh, _ in chosen
    )
    n_old = store.index.n_keys if store is not None else 0
    share = 1.0
    if settings.max_keys is not None and store is None:  # additions go in whole
        share = min(1.0, settings.max_keys / max(1, n_fresh))
    intakes = tuple(
        # at least one block, however low the bound: an empty store cannot be searched
        Intake(domain, stream, documents, ends, fresh, _evenly(touched, max(1, round(share * len(touched)))))
        for domain, stream, documents, ends, fresh, touched in chosen
    )
    read = sum(len(intake.blocks) for intake in intakes)
    n_keys = round(n_fresh * read / max(1, n_blocks))
    total = n_old + n_keys
    kind = (
        store.index.kind
        if store is not None and store.index.kind != "exact"
        else choose_kind(settings, total)
    )
    if store is not None and store.index.kind == kind:  # the lists stay as they are
        sample, lists = 0, store.index.n_lists
    else:
        sample, lists = sample_size(kind, total), 0 if kind == "exact" else choose_lists(total)
    per_key = bytes_per_key(kind, owner.width)
    return BuildPlan(
        intakes=intakes,
        n_keys=n_keys,
        n_old=n_old,
        n_known=n_known,
        n_held_out=n_held_out,
        kind=kind,
        n_lists=lists,
        disk_bytes=total * (per_key + 4) + lists * owner.width * 4,
        memory_bytes=total * per_key + sample * owner.width * 4 + lists * owner.width * 4,
        seconds=_seconds(intakes, owner, states, n_keys + sample, lists, sample),
    )


def build(
    plan: BuildPlan,
    folder: Path,
    settings: VectorStoreConfig,
    owner: Owner,
    states: States,
    tokens: TokenisedCorpus,
    *,
    vocab_size: int,
    store: VectorStore | None = None,
    reporter: Reporter = SILENT,
) -> None:
    """Carry out ``plan``: write a new store to ``folder``, or add to ``store``, which is opened writable.

    Raises:
        StorageError: it cannot be written; the old store is intact.
    """
    old = store.contents if store is not None else Contents.empty(vocab_size)
    index = _prepared_index(plan, settings, owner, states, store, reporter)
    domains, files = ({name: place for place, name in enumerate(names)} for names in (old.domains, old.files))
    parts: list[NDArray[Any]] = [np.asarray(old.tokens)]
    rows: list[NDArray[Any]] = [np.asarray(old.documents)]
    number = len(old.tokens)
    n_blocks = sum(len(intake.blocks) for intake in plan.intakes)
    advance = reporter.counter("vector store: adding keys", n_blocks)
    for intake in plan.intakes:
        domain = _place(domains, intake.domain)
        sources = np.array([_place(files, path) for path in intake.documents.paths], np.int64)
        for n_read, keys, targets, documents in _keys(intake, intake.blocks, owner.block_length, states):
            index.add(keys, number + np.arange(len(keys)))
            parts.append(targets.astype(old.tokens.dtype))
            rows.append(_rows(intake, documents, number, domain, sources))
            number += len(keys)
            advance(n_read)
    held_out = np.union1d(held_out_texts(tokens), old.held_out)
    contents = Contents(
        np.concatenate(parts),
        _joined(np.concatenate(rows)),
        tuple(domains),
        tuple(files),
        held_out,
        _heads(old, tokens.trained_text),
        old.merged,
    )
    write_store(folder, owner, index, contents, reporter=reporter)


def _heads(old: Contents, trained: TrainedText) -> NDArray[np.uint64]:
    """(H, 2): hash of each text of which only the head may be in the store, and characters of that head."""
    heads = (old.trained_text | trained).heads
    return np.array(sorted(heads.items()), np.uint64).reshape(-1, 2)


def held_out_texts(tokens: TokenisedCorpus) -> NDArray[np.uint64]:
    """Sorted hashes of all validation and test texts."""
    streams = [*tokens.val.values(), *tokens.test.values()]
    keys = [stream.documents().keys for stream in streams]
    return np.unique(np.concatenate(keys or [np.empty(0, np.uint64)]))


def _prepared_index(
    plan: BuildPlan,
    settings: VectorStoreConfig,
    owner: Owner,
    states: States,
    store: VectorStore | None,
    reporter: Reporter,
) -> NeighbourIndex:
    """A trained index that holds the old keys, for the new ones to be added to."""
    if store is not None and store.index.kind == plan.kind:
        return store.index
    total = plan.n_old + plan.n_keys
    old = list(store.index.groups()) if store is not None else []  # exact, so few
    wanted = sample_size(plan.kind, total)
    if not wanted:
        index = NeighbourIndex.create(plan.kind, owner.width, total, settings.n_probe)
    else:
        sample = [keys for _, keys in old]
        missing = wanted - sum(map(len, sample))
        every = np.concatenate(
            [np.stack([np.full(len(i.blocks), n), i.blocks]) for n, i in enumerate(plan.intakes)], 1
        )
        some = _evenly(np.arange(every.shape[1]), -(-missing // owner.block_length))
        advance = reporter.counter("vector store: reading a sample", len(some))
        for n, intake in enumerate(plan.intakes):
            chosen = every[1, some[every[0, some] == n]]
            for n_read, keys, _, _ in _keys(intake, chosen, owner.block_length, states):
                sample.append(keys)
                advance(n_read)
        keys = np.concatenate(sample or [np.empty((0, owner.width), np.float32)])
        # The sample is smaller than planned if little of each block goes in. No more lists than keys.
        n_keys = total if len(keys) >= choose_lists(total) else len(keys)
        index = NeighbourIndex.create(plan.kind, owner.width, n_keys, settings.n_probe)
        index.train(keys, reporter)
    for numbers, keys in old:
        index.add(keys, numbers)
    return index


def _keys(
    intake: Intake, blocks: Int64, length: int, states: States
) -> Iterator[tuple[int, Float32, Int64, Int64]]:
    """Yield a count of blocks read, their keys (n, D), the token after each (n,), and its document (n,)."""
    at_once = max(1, BATCH_TOKENS // length)
    for first in range(0, len(blocks), at_once):
        read = [intake.block(int(index), length) for index in blocks[first : first + at_once]]
        inputs, targets, documents = (np.stack(part) for part in zip(*read, strict=True))
        wanted = documents >= 0
        yield len(read), states(torch.from_numpy(inputs))[wanted], targets[wanted], documents[wanted]


def _rows(intake: Intake, documents: Int64, number: int, domain: int, sources: Int64) -> NDArray[Any]:
    """DOCUMENT rows of a batch whose first key is ``number``: one for each run of tokens of one document."""
    last = np.flatnonzero(np.diff(documents, append=-1))
    own = documents[last]
    rows = np.empty(len(last), DOCUMENT)
    rows["end"] = number + last + 1
    rows["key"] = intake.documents.keys[own]
    rows["line"] = intake.documents.lines[own]
    rows["domain"] = domain
    rows["file"] = sources[intake.documents.files[own]]
    return rows


def _joined(rows: NDArray[Any]) -> NDArray[Any]:
    """Rows with neighbours of the same document merged."""
    last = np.append(rows["key"][1:] != rows["key"][:-1], True) if len(rows) else np.empty(0, np.bool_)
    joined: NDArray[Any] = rows[last]
    return joined


def _place(names: dict[str, int], name: str) -> int:
    """Place of a name among ``names``, to which it is added if it is new."""
    return names.setdefault(name, len(names))


def _blocks_of(ends: Int64, sizes: Int64, chosen: NDArray[np.bool_], length: int) -> Int64:
    """Blocks in which a chosen document has a token."""
    first, last = (ends - sizes)[chosen] // length, (ends[chosen] - 1) // length
    touched = np.zeros(int(ends[-1] - 1) // length + 2 if len(ends) else 1, np.int64)
    np.add.at(touched, first, 1)
    np.add.at(touched, last + 1, -1)
    return np.flatnonzero(np.cumsum(touched))


def _evenly(values: Int64, n: int) -> Int64:
    """``n`` of the values, evenly spread; all of them if there are fewer."""
    if n >= len(values):
        return values
    return values[(np.arange(n) * len(values)) // max(n, 1)]


def _seconds(
    intakes: tuple[Intake, ...], owner: Owner, states: States, n_read: int, lists: int, sample: int
) -> float:
    """Estimated duration of a build: a timed trial for the expert, counted products for the lists."""
    longest = max(intakes, key=lambda intake: len(intake.blocks), default=None)
    if longest is None or not len(longest.blocks):
        return 0.0
    blocks = longest.blocks[:_PROBED_BLOCKS]
    inputs = torch.from_numpy(np.stack([longest.block(int(b), owner.block_length)[0] for b in blocks]))
    states(inputs)  # the first call with a shape sets up kernels
    begun = time.perf_counter()
    states(inputs)
    per_token = (time.perf_counter() - begun) / inputs.numel()
    left, right = torch.ones(1024, owner.width), torch.ones(owner.width, 1024)
    left @ right
    begun = time.perf_counter()
    left @ right
    per_product = (time.perf_counter() - begun) / (1024 * 1024 * owner.width)
    k_means = 10 * sample * lists * owner.width  # FAISS's ten rounds
    assigning = (n_read - sample) * lists * owner.width
    return n_read * per_token + (k_means + assigning) * per_product


def search_seconds(n_queries: int, n_keys: int, kind: Kind, n_probe: int, width: int) -> float:
    """Estimated duration of a search."""
    if kind == "exact":
        return n_queries * n_keys * width / 1e10
    lists = choose_lists(n_keys)
    scanned = lists + n_probe * n_keys / lists
    return n_queries * scanned * width / (_SCANNED_PER_SECOND * torch.get_num_threads())
