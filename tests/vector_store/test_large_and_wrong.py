"""Stores beyond 2^32 keys, and files that are sound and wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any, cast

import numpy as np
import orjson
import pytest
import torch
from numpy.typing import NDArray
from stores import (
    EXACT,
    LENGTH,
    WIDTH,
    Make,
    Read,
    all_places,
    states,
)

from nanothink.errors import (
    VectorStoreDamagedError,
)
from nanothink.models.store_gate import NO_TOKEN
from nanothink.vector_store import store as store_module
from nanothink.vector_store.compact import merge_duplicates
from nanothink.vector_store.contents import VectorStore
from nanothink.vector_store.index import NeighbourIndex
from nanothink.vector_store.manifest import digest_of
from nanothink.vector_store.neighbours import TrainingNeighbours, number_dtype
from nanothink.vector_store.store import open_store


class _FarTokens:
    """Tokens whose numbers begin at ``first``; nothing stands before."""

    def __init__(self, tokens: NDArray[Any], first: int) -> None:
        self._tokens, self._first, self.dtype = tokens, first, tokens.dtype

    def __len__(self) -> int:
        return self._first + len(self._tokens)

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return self._tokens[at.start - self._first : at.stop - self._first]
        at = np.asarray(at)
        return self._tokens[np.where(at >= self._first, at - self._first, 0)]


def moved(store: VectorStore, first: int) -> VectorStore:
    """The same keys under numbers that begin at ``first``."""
    kept = store.contents
    index = NeighbourIndex.create("exact", WIDTH, store.index.n_keys, 8)
    for numbers, keys in store.index.groups():
        index.add(keys, numbers + first)
    documents = kept.documents.copy()
    documents["end"] += first
    contents = replace(
        kept,
        tokens=cast(Any, _FarTokens(kept.tokens, first)),
        documents=documents,
        merged=kept.merged + first,
    )
    return VectorStore(
        store.folder, store.owner, index, contents, n_neighbours=store.n_neighbours, generation="far"
    )


def test_numbers_of_keys_may_exceed_32_bits(read: Read, make: Make) -> None:
    tokens, first = read(), (1 << 32) - 2000  # a few thousand tokens: some below 2^32, most beyond
    here = make(tokens)
    writable = open_store(here.folder, EXACT, writable=True)
    far = moved(writable, first)
    merged_here, merged_far = (merge_duplicates(one, 0.95) for one in (writable, far))
    assert len(merged_far.merged) > 100
    assert np.array_equal(merged_far.merged, merged_here.merged + first)
    near = VectorStore(
        here.folder, here.owner, writable.index, merged_here, n_neighbours=8, generation="near"
    )
    far = VectorStore(here.folder, here.owner, far.index, merged_far, n_neighbours=8, generation="far")
    assert number_dtype(len(far.contents.tokens)) == np.uint64
    assert number_dtype(0xFFFFFFFE) == np.uint32

    places = all_places(tokens)[::3]
    found = []
    for store in (near, far):
        known = TrainingNeighbours(store, tokens, LENGTH, states)
        missing = known.missing(places)
        assert known.n_bytes(missing) == len(places) * LENGTH * 8 * (6 if store is near else 10)
        known.find(missing)
        found.append(known.read(places))
        known.close()
    assert torch.equal(found[0].tokens, found[1].tokens)
    assert torch.equal(found[0].similarities, found[1].similarities)
    assert found[0].counts is not None
    assert found[1].counts is not None
    assert torch.equal(found[0].counts, found[1].counts)
    assert (found[0].tokens != NO_TOKEN).sum() > 1000

    numbers = np.concatenate([n for n, _ in near.index.groups()])[None, :500]
    texts = near.contents.documents["key"][:1]
    assert np.array_equal(far.is_of(numbers + first, texts), near.is_of(numbers, texts))
    assert near.is_of(numbers, texts).any()
    assert far.passage(int(numbers[0, -1]) + first, 9) == near.passage(int(numbers[0, -1]), 9)


def test_products_of_keys_and_documents_do_not_overflow(read: Read, make: Make) -> None:
    """Keys beyond 2^62, of which a product with the number of documents would be another number."""
    store = make(read())
    writable = open_store(store.folder, EXACT, writable=True)
    merged = merge_duplicates(writable, 0.95)
    near = VectorStore(store.folder, store.owner, writable.index, merged, n_neighbours=8)
    first = (1 << 62) + 12345
    far = moved(near, first)
    numbers = merged.merged[:50, 1][None]
    for text in near.contents.documents["key"]:
        own = np.array([text])
        assert np.array_equal(far.is_of(numbers + first, own), near.is_of(numbers, own))


def test_an_index_with_keys_that_have_no_token_is_damaged(read: Read, make: Make) -> None:
    store = make(read())
    n_tokens = len(store.contents.tokens)
    with pytest.raises(VectorStoreDamagedError, match="keys without a token"):
        store.neighbours(np.ones((1, 1), np.float32), np.array([[n_tokens]]))


@pytest.mark.parametrize(
    ("role", "content"),
    [
        ("tokens", np.zeros(10)),
        ("tokens", np.zeros((2, 5), np.uint16)),
        ("documents", np.zeros(10, np.int64)),
        ("heldout", np.zeros(10, np.int32)),
        ("heads", np.zeros(10, np.uint64)),
        ("merged", np.zeros((4, 3), np.int64)),
        ("documents", "beyond"),
        ("documents", "no such file"),
        ("index", None),
    ],
)
def test_a_file_that_is_sound_and_wrong_is_refused(role: str, content: Any, read: Read, make: Make) -> None:
    """With digests that fit: by another program, or a stranger."""
    store = make(read())
    manifest = json.loads((store.folder / "manifest.json").read_text())
    facts = manifest["files"][role]
    path = store.folder / facts["name"]
    if isinstance(content, str):
        documents = np.load(path)
        documents["end" if content == "beyond" else "file"] += 10**6
        content = documents
    if content is None:
        path.write_bytes(b"no index at all")
    else:
        np.save(path, content)
    facts |= {"bytes": path.stat().st_size, "digest": store_module._digest(path)}
    manifest["digest"] = digest_of(manifest)
    (store.folder / "manifest.json").write_bytes(orjson.dumps(manifest))
    with pytest.raises(VectorStoreDamagedError, match=f"{facts['name']} is damaged"):
        open_store(store.folder, EXACT)


@pytest.mark.parametrize(
    ("entry", "value"),
    [("generation", "../x"), ("owner", {}), ("files", []), ("tokens", -1), ("index", {"kind": "flat"})],
)
def test_a_manifest_that_makes_no_sense_is_refused(entry: str, value: Any, read: Read, make: Make) -> None:
    store = make(read())
    manifest = json.loads((store.folder / "manifest.json").read_text()) | {entry: value}
    manifest["digest"] = digest_of(manifest)
    (store.folder / "manifest.json").write_bytes(orjson.dumps(manifest))
    with pytest.raises(VectorStoreDamagedError, match=rf"its entry '{entry}.*' makes no sense"):
        open_store(store.folder, EXACT)
