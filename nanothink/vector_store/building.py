"""Text into a store: which documents, which keys, in a stream.

A document that the store has, or that any data it was made from holds out for validation, is never let in;
a text that stands in several places is let in once. Keys are computed block by block, as training reads the
text: once for a sample, spread evenly, that the index is trained on, and once for all, each batch going into
the index and out of memory. So beside the index, which holds compressed keys, memory depends on the sample.

Shapes: B blocks, T tokens of a block, N tokens, D width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
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
    """What of one domain's training text goes in."""

    domain: str
    stream: TokenStream
    documents: Documents
    ends: Int64
    """Where each document ends in the stream."""
    fresh: NDArray[np.bool_]
    """By document: let in."""
    blocks: Int64
    """Blocks that are read."""

    def block(self, index: int, length: int) -> tuple[Int64, Int64, Int64]:
        """Inputs and targets, (T,), and the document of each target; -1 where it is not let in."""
        inputs, targets = self.stream.block(index, length)
        places = index * length + np.arange(length)
        document = np.searchsorted(self.ends, places, side="right").clip(max=len(self.ends) - 1)
        wanted = (targets != IGNORE) & self.fresh[document]
        return inputs, targets, np.where(wanted, document, -1)


@dataclass(frozen=True)
class BuildPlan:
    """What a build would put in and what it would cost."""

    intakes: tuple[Intake, ...]
    n_keys: int
    """New ones, about where ``max_keys`` bounds them."""
    n_old: int
    """Keys that are there already."""
    n_known: int
    """Documents left out because the store has them, or because they stand twice in the data."""
    n_held_out: int
    """Documents left out because other data holds them out."""
    kind: Kind
    n_lists: int
    disk_bytes: int
    memory_bytes: int
    seconds: float
    """About."""


def plan_build(
    tokens: TokenisedCorpus,
    settings: VectorStoreConfig,
    owner: Owner,
    states: States,
    store: VectorStore | None = None,
) -> BuildPlan:
    """Choose documents and blocks, and estimate. Reads a few blocks to see how fast the expert is.

    Args:
        tokens: the data whose training side goes in.
        store: what it is added to; None for a new one.
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
    n_fresh = sum(int(documents.n_tokens[fresh].sum()) for _, _, documents, _, fresh, _ in chosen)
    n_old = store.index.n_keys if store is not None else 0
    share = 1.0
    if settings.max_keys is not None and store is None:  # what is added to one, somebody wants in it
        share = min(1.0, settings.max_keys / max(1, n_fresh))
    intakes = tuple(
        # at least one, however low the bound: a vector store of nothing could not be searched
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
    if store is not None and store.index.kind == kind:  # its lists are those it has
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
    """Carry out ``plan``: a new store in ``folder``, or ``store`` (opened writable) with more in it.

    Raises:
        StorageError: the disk refused; what was there before is intact.
    """
    old = store.contents if store is not None else Contents.empty(vocab_size)
    index = _prepared_index(plan, settings, owner, states, store, reporter)
    domains, files = _Places(old.domains), _Places(old.files)
    parts: list[NDArray[Any]] = [np.asarray(old.tokens)]
    rows: list[NDArray[Any]] = [np.asarray(old.documents)]
    number = len(old.tokens)
    done, n_blocks = 0, sum(len(intake.blocks) for intake in plan.intakes)
    for intake in plan.intakes:
        domain = domains.of(intake.domain)
        sources = np.array([files.of(path) for path in intake.documents.paths], np.int64)
        for keys, targets, documents in _keys(intake, intake.blocks, owner.block_length, states):
            index.add(keys, number + np.arange(len(keys)))
            parts.append(targets.astype(old.tokens.dtype))
            rows.append(_rows(intake, documents, number, domain, sources))
            number += len(keys)
            done += max(1, BATCH_TOKENS // owner.block_length)
            reporter.progress("keys into the index", min(done, n_blocks), n_blocks)
    held_out = np.union1d(held_out_texts(tokens), old.held_out)
    contents = Contents(
        np.concatenate(parts),
        _joined(np.concatenate(rows)),
        domains.names,
        files.names,
        held_out,
        _heads(old, tokens.trained_text),
        old.merged,
    )
    write_store(folder, owner, index, contents, reporter=reporter)


def _heads(old: Contents, trained: TrainedText) -> NDArray[np.uint64]:
    """Cut texts whose heads may be inside, each with the characters of the longest head."""
    heads = (old.trained_text | trained).heads
    return np.array(sorted(heads.items()), np.uint64).reshape(-1, 2)


def held_out_texts(tokens: TokenisedCorpus) -> NDArray[np.uint64]:
    """Sorted hashes of the validation and test texts."""
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
    """The index that the new keys go into: trained, and holding the old ones."""
    if store is not None and store.index.kind == plan.kind:
        return store.index
    total = plan.n_old + plan.n_keys
    old = list(store.index.groups()) if store is not None else []  # exact: few enough to hold
    wanted = sample_size(plan.kind, total)
    if not wanted:
        index = NeighbourIndex.create(plan.kind, owner.width, total, settings.n_probe)
    else:
        sample = [keys for _, keys in old]
        missing = wanted - sum(map(len, sample))
        every = np.concatenate(
            [np.stack([np.full(len(i.blocks), n), i.blocks]) for n, i in _numbered(plan)], 1
        )
        some = _evenly(np.arange(every.shape[1]), -(-missing // owner.block_length))
        read = 0
        for n, intake in _numbered(plan):
            for keys, _, _ in _keys(intake, every[1, some[every[0, some] == n]], owner.block_length, states):
                sample.append(keys)
                read += len(keys)
                reporter.progress("sample for the index", min(read, missing), missing)
        keys = np.concatenate(sample or [np.empty((0, owner.width), np.float32)])
        # Fewer than were planned where little of each block is let in; there are no more lists than keys.
        n_keys = total if len(keys) >= choose_lists(total) else len(keys)
        index = NeighbourIndex.create(plan.kind, owner.width, n_keys, settings.n_probe)
        index.train(keys, reporter)
    for numbers, keys in old:
        index.add(keys, numbers)
    return index


def _numbered(plan: BuildPlan) -> Iterator[tuple[int, Intake]]:
    return enumerate(plan.intakes)


def _keys(
    intake: Intake, blocks: Int64, length: int, states: States
) -> Iterator[tuple[Float32, Int64, Int64]]:
    """Keys (n, D), the token after each (n,), and its document (n,), batch by batch."""
    at_once = max(1, BATCH_TOKENS // length)
    for first in range(0, len(blocks), at_once):
        read = [intake.block(int(index), length) for index in blocks[first : first + at_once]]
        inputs, targets, documents = (np.stack(part) for part in zip(*read, strict=True))
        wanted = documents >= 0
        if wanted.any():
            yield states(torch.from_numpy(inputs))[wanted], targets[wanted], documents[wanted]


def _rows(intake: Intake, documents: Int64, number: int, domain: int, sources: Int64) -> NDArray[Any]:
    """A row for each stretch of one document in a batch that begins at key ``number``."""
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
    """Neighbouring rows of one document as one."""
    last = np.append(rows["key"][1:] != rows["key"][:-1], True) if len(rows) else np.empty(0, np.bool_)
    joined: NDArray[Any] = rows[last]
    return joined


class _Places:
    """Names in the order in which they came, and the place of each."""

    def __init__(self, names: Iterable[str]) -> None:
        self._places = {name: place for place, name in enumerate(names)}

    def of(self, name: str) -> int:
        """The place of a name, which is added if need be."""
        return self._places.setdefault(name, len(self._places))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._places)


def _blocks_of(ends: Int64, sizes: Int64, chosen: NDArray[np.bool_], length: int) -> Int64:
    """Blocks in which a chosen document has a token."""
    first, last = (ends - sizes)[chosen] // length, (ends[chosen] - 1) // length
    touched = np.zeros(int(ends[-1] - 1) // length + 2 if len(ends) else 1, np.int64)
    np.add.at(touched, first, 1)
    np.add.at(touched, last + 1, -1)
    return np.flatnonzero(np.cumsum(touched))


def _evenly(values: Int64, n: int) -> Int64:
    """``n`` of the values, spread evenly; all of them if there are no more."""
    if n >= len(values):
        return values
    return values[(np.arange(n) * len(values)) // max(n, 1)]


def _seconds(
    intakes: tuple[Intake, ...], owner: Owner, states: States, n_read: int, lists: int, sample: int
) -> float:
    """About how long a build takes: reading, by a trial; lists, by the products that they cost."""
    longest = max(intakes, key=lambda intake: len(intake.blocks), default=None)
    if longest is None or not len(longest.blocks):
        return 0.0
    blocks = longest.blocks[:_PROBED_BLOCKS]
    inputs = torch.from_numpy(np.stack([longest.block(int(b), owner.block_length)[0] for b in blocks]))
    states(inputs)  # the first call of a shape also sets up its kernels
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
    """About how long a search of many queries takes."""
    if kind == "exact":
        return n_queries * n_keys * width / 1e10
    lists = choose_lists(n_keys)
    scanned = lists + n_probe * n_keys / lists
    return n_queries * scanned * width / (_SCANNED_PER_SECOND * torch.get_num_threads())
