"""Compaction, and the neighbours of the training blocks: found once, kept, found again."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from stores import (
    EXACT,
    LENGTH,
    LISTS,
    Make,
    Read,
    all_places,
    everything,
    states,
    training_pairs,
)

from nanothink.config import VectorStoreConfig
from nanothink.data.tokens import IGNORE, Documents, TokenStream
from nanothink.errors import (
    StorageError,
)
from nanothink.models.store_gate import NO_TOKEN
from nanothink.vector_store import neighbours
from nanothink.vector_store.compact import merge_duplicates
from nanothink.vector_store.contents import VectorStore
from nanothink.vector_store.index import Float32
from nanothink.vector_store.neighbours import RepeatedSearch, TrainingNeighbours
from nanothink.vector_store.store import open_store, store_bytes, write_store


@pytest.mark.parametrize("settings", [EXACT, LISTS])
def test_compaction_keeps_what_the_memory_says(settings: VectorStoreConfig, read: Read, make: Make) -> None:
    tokens = read()
    store = make(tokens, settings)
    keys, said = training_pairs(tokens)
    writable = open_store(store.folder, settings, writable=True)
    contents = merge_duplicates(writable, 0.98)
    n = len(contents.merged)
    assert n > 20
    write_store(store.folder, store.owner, writable.index, contents)
    after = open_store(store.folder, settings, owner=store.owner)
    assert after.index.n_keys == store.index.n_keys - n
    assert store_bytes(after.folder) > 0
    gone, kept = contents.merged.T
    assert (said[gone] == said[kept]).all()
    assert ((keys[gone] * keys[kept]).sum(-1) >= (0.98 - 0.01)).all()
    assert not set(gone.tolist()) & set(kept.tolist())
    # By all keys, and counts, the two say nearly the same; without counts they do not.
    said_before = everything(store, keys[:60])
    counted = np.abs(everything(after, keys[:60]) - said_before).mean()
    alone = replace(after.contents, merged=np.empty((0, 2), np.int64))
    uncounted = VectorStore(after.folder, after.owner, after.index, alone, n_neighbours=8)
    assert counted < np.abs(everything(uncounted, keys[:60]) - said_before).mean() / 3


def test_a_merged_key_belongs_to_all_its_documents(read: Read, make: Make) -> None:
    tokens = read()
    store = make(tokens)
    writable = open_store(store.folder, EXACT, writable=True)
    contents = merge_duplicates(writable, 0.98)
    write_store(store.folder, store.owner, writable.index, contents)
    after = open_store(store.folder, EXACT)
    texts = after.contents.documents["key"]
    across = [
        (gone, kept)
        for gone, kept in contents.merged
        if after.document(np.array([gone]))[0] != after.document(np.array([kept]))[0]
    ]
    assert across
    for gone, kept in across[:20]:
        for number in (gone, kept):
            own = texts[after.document(np.array([number]))]
            assert after.is_of(np.array([[kept]]), own).all()
    third = next(t for t in texts if not after.is_of(np.array([[across[0][1]]]), np.array([t])).any())
    assert third not in texts[after.document(np.array(across[0]))]


def test_compaction_twice_hands_counts_on(read: Read, make: Make) -> None:
    store = make(read())
    total = store.index.n_keys
    for similarity in (0.99, 0.9):
        writable = open_store(store.folder, EXACT, writable=True)
        write_store(store.folder, store.owner, writable.index, merge_duplicates(writable, similarity))
    after = open_store(store.folder, EXACT)
    numbers = np.concatenate([n for n, _ in after.index.groups()])
    counts = after.neighbours(np.ones((1, len(numbers)), np.float32), numbers[None]).counts
    assert counts is not None
    assert float(counts.sum()) == total
    assert set(after.contents.merged[:, 1].tolist()) <= set(numbers.tolist())


def test_neighbours_are_found_once_and_kept(read: Read, make: Make) -> None:
    tokens = read()
    store = make(tokens)
    places = all_places(tokens)
    asked: list[int] = []

    def counted(inputs: torch.Tensor) -> Float32:
        asked.append(len(inputs))
        return states(inputs)

    known = TrainingNeighbours(store, tokens, LENGTH, counted)
    some = places[::3]
    known.find(known.missing(some))
    assert sum(asked) == len(some)
    assert known.missing(some) == {}
    again = TrainingNeighbours(store, tokens, LENGTH, counted)  # as in another process
    left = again.missing(places)
    assert sum(map(len, left.values())) == len(places) - len(some)
    assert again.n_bytes(left) == (len(places) - len(some)) * LENGTH * 8 * 6
    again.find(left)
    assert sum(asked) == len(places)
    assert again.missing(places) == {}

    for domain, block in places[::7]:
        stream = tokens.train[domain]
        documents = stream.documents()
        inputs, targets = stream.block(block, LENGTH)
        n = int((targets != IGNORE).sum())
        own = documents.keys[
            np.searchsorted(np.cumsum(documents.n_tokens), block * LENGTH + np.arange(n), side="right")
        ]
        near, numbers = store.search_elsewhere(states(torch.from_numpy(inputs[None]))[0, :n], own, 8)
        expected = store.neighbours(near, numbers)
        found = again.read([(domain, block)])
        assert found.tokens.shape == (1, LENGTH, 8)
        assert torch.equal(found.tokens[0, :n], expected.tokens)
        torch.testing.assert_close(found.similarities[0, :n], expected.similarities, rtol=0, atol=2e-5)
        assert (found.tokens[0, n:] == NO_TOKEN).all()


def test_kept_neighbours_go_with_their_store(read: Read, make: Make) -> None:
    tokens = read()
    store = make(tokens)
    known = TrainingNeighbours(store, tokens, LENGTH, states)
    known.find(known.missing(all_places(tokens)))
    assert known.folder.exists()
    other = TrainingNeighbours(
        open_store(store.folder, EXACT.model_copy(update={"n_neighbours": 4})), tokens, LENGTH, states
    )
    assert other.missing(all_places(tokens))
    again = make(tokens)
    assert not known.folder.exists()
    assert TrainingNeighbours(again, tokens, LENGTH, states).missing(all_places(tokens))


def test_a_search_that_was_killed_goes_on(read: Read, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = read()
    store = make(tokens)
    monkeypatch.setattr("nanothink.vector_store.neighbours.BATCH_TOKENS", 4 * LENGTH)
    places = all_places(tokens)
    calls = 0

    def stopped(inputs: torch.Tensor) -> Float32:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt
        return states(inputs)

    known = TrainingNeighbours(store, tokens, LENGTH, stopped)
    with pytest.raises(KeyboardInterrupt):
        known.find(known.missing(places))
    left = TrainingNeighbours(store, tokens, LENGTH, states).missing(places)
    assert sum(map(len, left.values())) == len(places) - 20


def test_what_was_asked_before_is_remembered(read: Read, make: Make) -> None:
    tokens = read("tales")
    store = make(tokens)
    calls: list[int] = []

    class Counting(VectorStore):
        def search(self, queries: torch.Tensor) -> Any:
            calls.append(len(queries))
            return super().search(queries)

    counting = Counting(store.folder, store.owner, store.index, store.contents, n_neighbours=8)
    vector_store = RepeatedSearch(counting)
    keys, _ = training_pairs(tokens)
    one, two = torch.from_numpy(keys[:100]), torch.from_numpy(keys[100:200])
    found = [vector_store.search(q) for q in (one, two, one, two, one[:3], one[:3])]
    assert calls == [100, 100, 3, 3]
    assert torch.equal(found[2].tokens, store.search(one).tokens)
    assert torch.equal(found[3].similarities, store.search(two).similarities)


def test_a_disk_without_room_is_said_before_the_search(
    read: Read, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = read()
    known = TrainingNeighbours(make(tokens), tokens, LENGTH, states)
    usage = shutil.disk_usage(known.folder.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(StorageError, match="Make room"):
        known.find(known.missing(all_places(tokens)))
    assert not known.folder.exists()


def test_a_search_reads_the_documents_of_a_domain_once(
    read: Read, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are as many as the text is long: at every batch, that would grow with its square."""
    tokens = read()
    known = TrainingNeighbours(make(tokens), tokens, LENGTH, states)
    asked: list[str] = []
    of_stream = TokenStream.documents

    def counted(stream: TokenStream) -> Documents:
        asked.append(stream.domain)
        return of_stream(stream)

    monkeypatch.setattr(TokenStream, "documents", counted)
    monkeypatch.setattr(neighbours, "BATCH_TOKENS", 2 * LENGTH)
    known.find(known.missing(all_places(tokens)))
    assert sorted(asked) == sorted(tokens.train)


def test_files_of_neighbours_are_closed_and_opened_again(read: Read, make: Make) -> None:
    tokens = read()
    known = TrainingNeighbours(make(tokens), tokens, LENGTH, states)
    places = all_places(tokens)[:2]
    known.find(known.missing(places))
    expected = known.read(places)
    n_open = len(os.listdir("/proc/self/fd"))
    known.close()
    assert len(os.listdir("/proc/self/fd")) == n_open - 2  # blocks and marks of the one domain
    assert torch.equal(known.read(places).tokens, expected.tokens)
    known.close()


def test_neighbours_that_are_gone_are_no_traceback(read: Read, make: Make) -> None:
    tokens = read()
    known = TrainingNeighbours(make(tokens), tokens, LENGTH, states)
    with pytest.raises(StorageError, match="built again meanwhile"):
        known.read(all_places(tokens)[:1])


@pytest.mark.parametrize("damage", ["flipped", "cut", "emptied", "marks flipped", "marks cut"])
def test_damaged_neighbours_are_searched_again(damage: str, read: Read, make: Make) -> None:
    tokens = read()
    store = make(tokens)
    places = all_places(tokens)
    known = TrainingNeighbours(store, tokens, LENGTH, states)
    known.find(known.missing(places))
    expected = known.read(places)
    for path in known.folder.iterdir():
        if path.suffix == (".marks" if "marks" in damage else ".blocks"):
            content = bytearray(path.read_bytes())
            if "flipped" in damage:
                content[len(content) // 2] ^= 64
            cut = {"cut": content[:-100], "emptied": bytearray(), "marks cut": content[:-9]}
            path.write_bytes(cut.get(damage, content))
    again = TrainingNeighbours(store, tokens, LENGTH, states)
    again.find(again.missing(places))
    for _ in range(2):
        found = again.read(places)
        assert torch.equal(found.tokens, expected.tokens)
        assert torch.equal(found.similarities, expected.similarities)
    assert not again.missing(places)


def test_more_domains_than_files_that_may_be_open(
    read: Read, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = read()
    places = all_places(tokens)
    places = [place for pair in zip(places, places[::-1], strict=True) for place in pair]
    known = TrainingNeighbours(make(tokens), tokens, LENGTH, states)
    known.find(known.missing(places))
    expected = known.read(places)
    known.close()
    n_open = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(neighbours, "_MOST_OPEN", 1)
    assert torch.equal(known.read(places).tokens, expected.tokens)
    assert len(os.listdir("/proc/self/fd")) == n_open + 2
