"""The store: what goes in, what never does, whole or not at all, and its own model's alone."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import orjson
import pytest
import torch
from numpy.typing import NDArray
from reports import Told

from nanothink.config import VectorStoreConfig
from nanothink.data.corpus import find_corpus
from nanothink.data.split import SplitRule, text_key
from nanothink.data.tokenizer import Tokenizer, resolve_tokenizer
from nanothink.data.tokens import IGNORE, Documents, TokenisedCorpus, TokenStream, tokenise
from nanothink.errors import (
    StorageError,
    VectorStoreDamagedError,
    VectorStoreMismatchError,
    VectorStoreNotFoundError,
)
from nanothink.models.store_gate import NO_TOKEN
from nanothink.reporter import SILENT, Reporter
from nanothink.vector_store import building, neighbours
from nanothink.vector_store import store as store_module
from nanothink.vector_store.building import States, build, held_out_texts, plan_build
from nanothink.vector_store.compact import merge_duplicates
from nanothink.vector_store.contents import Owner, VectorStore
from nanothink.vector_store.index import Float32, NeighbourIndex
from nanothink.vector_store.manifest import digest_of, read_manifest
from nanothink.vector_store.neighbours import RepeatedSearch, TrainingNeighbours, number_dtype
from nanothink.vector_store.store import open_store, store_bytes, write_store

WIDTH, LENGTH = 16, 24

EXACT = VectorStoreConfig(enabled=True, n_neighbours=8, exact_below=10_000_000)
PQ = VectorStoreConfig(enabled=True, n_neighbours=8, index="pq", n_probe=8)
LISTS = VectorStoreConfig(enabled=True, n_neighbours=8, index="sq8", n_probe=8)


def states(tokens: torch.Tensor) -> Float32:
    """(B, T) -> (B, T, D) of length 1, by the tokens up to t, the last ones most."""
    table = np.random.default_rng(0).standard_normal((2000, WIDTH)).astype(np.float32)
    embedded = table[tokens.numpy()]
    mixed = embedded.copy()
    for back, weight in ((1, 0.7), (2, 0.5), (3, 0.3)):
        mixed[:, back:] += weight * embedded[:, :-back]
    return mixed / np.linalg.norm(mixed, axis=-1, keepdims=True)


@pytest.fixture
def corpus_folder(tiny_corpus: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    shutil.copytree(tiny_corpus, folder)
    return folder


@pytest.fixture
def tokenizer(tiny_tokenizer: Path, corpus_folder: Path) -> Tokenizer:
    return resolve_tokenizer(str(tiny_tokenizer), find_corpus(corpus_folder), split=SplitRule(0.1))


@pytest.fixture
def read(corpus_folder: Path, tokenizer: Tokenizer) -> Callable[..., TokenisedCorpus]:
    def tokens(*domains: str, folder: Path | None = None) -> TokenisedCorpus:
        return tokenise(
            find_corpus(folder or corpus_folder, domains or None), tokenizer, split=SplitRule(0.1)
        )

    return tokens


@pytest.fixture
def owner(tokenizer: Tokenizer) -> Owner:
    return Owner("wise", "state_space", "d" * 32, tokenizer.fingerprint, WIDTH, LENGTH)


@pytest.fixture
def make(tmp_path: Path, owner: Owner, tokenizer: Tokenizer) -> Callable[..., VectorStore]:
    """Build a store, or add to one, and open it."""

    def made(
        tokens: TokenisedCorpus,
        settings: VectorStoreConfig = EXACT,
        store: VectorStore | None = None,
        by: States = states,
        folder: Path = tmp_path / "m.store",
        reporter: Reporter = SILENT,
    ) -> VectorStore:
        plan = plan_build(tokens, settings, owner, by, store)
        build(
            plan,
            folder,
            settings,
            owner,
            by,
            tokens,
            vocab_size=tokenizer.vocab_size,
            store=store,
            reporter=reporter,
        )
        return open_store(folder, settings, owner=owner, reporter=reporter)

    return made


Read = Callable[..., TokenisedCorpus]
Make = Callable[..., VectorStore]


def made_up_texts(seed: int, n_texts: int) -> list[str]:
    words = ["salt", "fire", "snow", "door", "wind", "moon", "house", "question", "river", "garden"]
    rng = random.Random(seed)
    return [" ".join(rng.choice(words) for _ in range(60)) + f" {i}." for i in range(n_texts)]


def write_domain(folder: Path, texts: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "texts.jsonl").write_text("".join(lines))


def training_pairs(tokens: TokenisedCorpus) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Every training token with the state before it, by the plain way: block by block."""
    keys, said = [], []
    for stream in tokens.train.values():
        for block in range(stream.n_blocks(LENGTH)):
            inputs, targets = stream.block(block, LENGTH)
            valid = targets != IGNORE
            keys.append(states(torch.from_numpy(inputs[None]))[0][valid])
            said.append(targets[valid])
    return np.concatenate(keys), np.concatenate(said)


def test_every_training_token_is_there_with_the_state_before_it(read: Read, make: Make) -> None:
    tokens = read()
    store = make(tokens)
    keys, said = training_pairs(tokens)
    np.testing.assert_array_equal(store.contents.tokens, said)
    numbers, kept = next(store.index.groups())
    np.testing.assert_allclose(kept[np.argsort(numbers)], keys, rtol=1e-5, atol=1e-6)
    found = store.search(torch.from_numpy(keys[100:105]))
    assert found.similarities[:, 0] == pytest.approx(np.ones(5), abs=1e-5)
    near = keys[100:105] @ keys.T
    np.testing.assert_allclose(found.similarities, -np.sort(-near, axis=1)[:, :8], rtol=1e-5, atol=1e-5)
    for row in range(5):  # like contexts tie: any of them may come first
        assert int(found.tokens[row, 0]) in said[near[row] > near[row].max() - 1e-5]
    assert found.counts is None
    assert found.tokens.shape == (5, 8)


def test_every_document_is_known_by_its_place(
    read: Read, make: Make, corpus_folder: Path, tokenizer: Any
) -> None:
    tokens = read()
    store = make(tokens)
    documents = store.contents.documents
    assert len(documents) == sum(stream.n_documents for stream in tokens.train.values())
    assert int(documents["end"][-1]) == len(store.contents.tokens)
    for i in (0, 31, len(documents) - 1):
        begin = int(documents["end"][i - 1]) if i else 0
        text = tokenizer.decode([int(t) for t in store.contents.tokens[begin : documents["end"][i] - 1]])
        domain = store.contents.domains[documents["domain"][i]]
        path = store.contents.files[documents["file"][i]]
        line = (corpus_folder / path).read_text().splitlines()[documents["line"][i] - 1]
        assert json.loads(line)["text"] == text
        assert path == f"{domain}/texts.jsonl"
        numbers = np.array([begin, documents["end"][i] - 1])
        assert store.document(numbers).tolist() == [i, i]
        assert store.passage(begin, 5) == []
        assert store.passage(begin + 9, 3) == [int(t) for t in store.contents.tokens[begin + 6 : begin + 9]]


def test_what_is_held_out_is_never_in(read: Read, make: Make, corpus_folder: Path) -> None:
    tokens = read()
    store = make(tokens)
    held_out = held_out_texts(tokens)
    assert len(held_out) >= 6
    assert not np.isin(store.contents.documents["key"], held_out).any()
    assert (store.documents_of(held_out) == -1).all()
    np.testing.assert_array_equal(store.contents.held_out, held_out)
    # Text held out here stays out when it comes back in other data, on the training side there.
    line = next(
        line
        for line in (corpus_folder / "letters" / "texts.jsonl").read_text().splitlines()
        if np.isin(np.uint64(text_key(json.loads(line)["text"])), held_out)
    )
    other = corpus_folder.parent / "other"
    write_domain(other / "back", [json.loads(line)["text"]])
    write_domain(other / "new", made_up_texts(77, 20))
    again = read(folder=other)
    # A domain of one text has it cut in two, and the parts are texts of their own: put it among others.
    write_domain(other / "back", [json.loads(line)["text"], *made_up_texts(78, 20)])
    again = read(folder=other)
    forced = replace(
        again,
        val={k: v for k, v in again.val.items() if k == "new"},
        train=again.val | {"new": again.train["new"]},
    )
    writable = open_store(store.folder, EXACT, writable=True)
    plan = plan_build(forced, EXACT, store.owner, states, writable)
    assert plan.n_held_out >= 1
    grown = make(forced, store=writable)
    assert (grown.documents_of(held_out) == -1).all()
    assert len(grown.contents.documents) > len(store.contents.documents)


def test_a_token_never_meets_its_own_document_or_a_copy_of_it(
    corpus_folder: Path, read: Read, make: Make
) -> None:
    texts = made_up_texts(5, 12)
    write_domain(corpus_folder / "copies", [*texts, *texts])
    write_domain(corpus_folder / "more", [*texts[:6], *made_up_texts(6, 12)])
    for settings in (EXACT, LISTS):
        tokens = read()
        store = make(tokens, settings)
        assert len(np.unique(store.contents.documents["key"])) == len(store.contents.documents)
        for stream in tokens.train.values():
            documents = stream.documents()
            ends = np.cumsum(documents.n_tokens)
            for block in range(0, stream.n_blocks(LENGTH), 5):
                inputs, targets = stream.block(block, LENGTH)
                n = int((targets != IGNORE).sum())
                own = documents.keys[np.searchsorted(ends, block * LENGTH + np.arange(n), side="right")]
                queries = states(torch.from_numpy(inputs[None]))[0, :n]
                _, numbers = store.search_elsewhere(queries, own, 8)
                of = store.contents.documents["key"][store.document(numbers)]
                assert not ((of == own[:, None]) & (numbers >= 0)).any()
                assert (numbers >= 0).sum() > numbers.size / 2
                # without that rule the token itself would be found
                _, anywhere = store.index.search(queries, 8)
                assert (store.contents.documents["key"][store.document(anywhere)] == own[:, None]).any()


def test_what_is_left_is_in_order_and_the_rest_missing(read: Read, make: Make) -> None:
    tokens = read("tales")
    store = make(tokens)
    key = tokens.train["tales"].documents().keys[:1]
    inputs, _ = tokens.train["tales"].block(0, LENGTH)
    queries = states(torch.from_numpy(inputs[None]))[0, 3:4]
    similarities, numbers = store.search_elsewhere(queries, key, len(store.contents.tokens))
    n = int((numbers >= 0).sum())
    document = store.documents_of(key)[0]
    assert n == len(store.contents.tokens) - int(store.contents.documents["end"][0])
    assert document == 0
    assert (np.diff(similarities[0, :n]) <= 0).all()
    assert (numbers[0, n:] == -1).all()
    assert (similarities[0, n:] == -np.inf).all()
    assert (store.neighbours(similarities, numbers).tokens[0, n:] == NO_TOKEN).all()


def test_a_new_domain_is_added_and_known_text_is_not(corpus_folder: Path, read: Read, make: Make) -> None:
    for settings in (EXACT, LISTS):
        before = make(read("letters"), settings)
        writable = open_store(before.folder, settings, writable=True)
        tokens = read("letters", "tales")
        plan = plan_build(tokens, settings, before.owner, states, writable)
        assert plan.n_known == tokens.train["letters"].n_documents
        assert plan.n_lists == before.index.n_lists  # they are not trained again
        after = make(tokens, settings, writable)
        assert after.contents.domains == ("letters", "tales")
        assert len(after.contents.tokens) == len(before.contents.tokens) + tokens.train["tales"].n_tokens
        assert after.index.n_keys == len(after.contents.tokens)
        assert after.index.kind == before.index.kind
        inputs, targets = tokens.train["tales"].block(1, LENGTH)
        found = after.search(torch.from_numpy(states(torch.from_numpy(inputs[None]))[0]))
        assert (found.tokens.numpy() == targets[:, None]).any(1).mean() > 0.8
        assert (
            make(tokens, settings, open_store(after.folder, settings, writable=True)).index.n_keys
            == after.index.n_keys
        )


def test_an_exact_store_that_outgrows_itself_gets_lists(read: Read, make: Make) -> None:
    first = read("letters")
    small = VectorStoreConfig(enabled=True, exact_below=first.train["letters"].n_tokens + 10, n_neighbours=4)
    before = make(first, small)
    assert before.index.kind == "exact"
    after = make(read(), small, open_store(before.folder, small, writable=True))
    assert after.index.kind == "sq8"
    assert after.index.n_keys == len(after.contents.tokens)
    inputs, targets = first.train["letters"].block(2, LENGTH)
    found = after.search(torch.from_numpy(states(torch.from_numpy(inputs[None]))[0]))
    assert (found.tokens.numpy() == targets[:, None]).any(1).mean() > 0.8


def test_a_bound_on_keys_spreads_them_over_the_text(read: Read, make: Make) -> None:
    tokens = read()
    total = sum(stream.n_tokens for stream in tokens.train.values())
    store = make(tokens, EXACT.model_copy(update={"max_keys": total // 3}))
    assert len(store.contents.tokens) == pytest.approx(total / 3, rel=0.1)
    sizes = np.diff(store.contents.documents["end"], prepend=0)
    for i, (domain, stream) in enumerate(sorted(tokens.train.items())):
        own = int(sizes[store.contents.documents["domain"] == i].sum())
        assert store.contents.domains[i] == domain
        assert own == pytest.approx(stream.n_tokens / 3, rel=0.25)


def test_however_low_the_bound_there_is_something_to_recall(read: Read, make: Make) -> None:
    store = make(read(), EXACT.model_copy(update={"max_keys": 1}))
    assert store.index.n_keys > 0
    query = torch.nn.functional.normalize(torch.ones(1, WIDTH), dim=-1)
    assert store.search(query).tokens[0, 0] != NO_TOKEN


def test_what_is_added_is_added_in_full_whatever_the_bound(read: Read, make: Make) -> None:
    bounded = EXACT.model_copy(update={"max_keys": 500})
    before = make(read("letters"), bounded)
    tokens = read("tales")
    after = make(tokens, bounded, open_store(before.folder, bounded, writable=True))
    assert after.index.n_keys - before.index.n_keys == tokens.train["tales"].n_tokens


# ---------------------------------------------------------------------------------------------------
# Whole or not at all


def test_each_stage_of_a_build_is_told_from_its_start_to_its_end(
    read: Read, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "BATCH_TOKENS", 5 * LENGTH)
    told: dict[str, list[float]] = {}
    reporter = Told(progress=lambda stage, done, total: told.setdefault(stage, []).append(done / total))
    tokens = read()
    store = make(tokens, PQ, reporter=reporter)
    known = TrainingNeighbours(store, tokens, LENGTH, states)
    known.find({domain: np.arange(12) for domain in tokens.train}, reporter)
    stages = (
        "reading a sample, learning lists, learning codes, adding keys, writing, checksums, verifying, "
        "training neighbours"
    )
    assert list(told) == [f"vector store: {stage}" for stage in stages.split(", ")]
    for stage, shares in told.items():
        assert shares == sorted(shares), stage
        assert (shares[0], shares.index(1.0)) == (0, len(shares) - 1), (stage, shares)


def fingerprint(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file() and p.name != "lock"}


@pytest.mark.parametrize("step", ["index", "save", "fsync", "manifest"])
def test_a_failed_write_leaves_the_old_store(
    step: str, read: Read, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = make(read("letters"))
    old = fingerprint(before.folder)
    writable = open_store(before.folder, EXACT, writable=True)

    def full(*_args: Any, **_more: Any) -> None:
        raise OSError(28, "No space left on device")

    if step == "index":
        monkeypatch.setattr(NeighbourIndex, "write", full)
    elif step == "save":
        monkeypatch.setattr(np, "save", full)
    elif step == "fsync":
        monkeypatch.setattr(os, "fsync", full)
    else:
        monkeypatch.setattr("nanothink.disk.write.os.replace", full)
    with pytest.raises(StorageError, match="No space left"):
        make(read(), store=writable)
    monkeypatch.undo()
    now = fingerprint(before.folder)
    assert {name: now[name] for name in old} == old
    again = open_store(before.folder, EXACT, owner=before.owner)
    assert again.index.n_keys == before.index.n_keys
    after = make(read(), store=open_store(before.folder, EXACT, writable=True))
    assert not set(fingerprint(after.folder)) - {
        "manifest.json",
        *(facts["name"] for facts in read_manifest(after.folder)["files"].values()),
    }  # what the failed one left is swept up


def test_a_manifest_that_cannot_be_read_costs_no_file(
    read: Read, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error of the disk says nothing of the store, so nothing of it is swept up."""
    store = make(read("letters"))
    old = fingerprint(store.folder)
    writable = open_store(store.folder, EXACT, writable=True)
    really = Path.read_bytes

    def failing(path: Path) -> bytes:
        if path.name == "manifest.json":
            raise OSError(5, "Input/output error")
        return really(path)

    monkeypatch.setattr(Path, "read_bytes", failing)
    with pytest.raises(StorageError, match=r"Cannot read .*manifest\.json: Input/output error"):
        make(read(), store=writable)
    monkeypatch.undo()
    assert fingerprint(store.folder) == old


@pytest.mark.parametrize("role", ["index", "tokens", "documents", "heldout", "merged"])
@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_a_damaged_file_is_named(role: str, damage: str, read: Read, make: Make) -> None:
    store = make(read("tales"))
    path = next(store.folder.glob(f"{role}-*"))
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif damage == "cut":
        path.write_bytes(content[:-1])
    else:
        path.unlink()
    with pytest.raises(VectorStoreDamagedError, match=path.name) as error:
        open_store(store.folder, EXACT, owner=store.owner)
    assert "store build --overwrite" in str(error.value)


def test_a_damaged_manifest_is_named(read: Read, make: Make) -> None:
    store = make(read("tales"))
    path = store.folder / "manifest.json"
    whole = path.read_bytes()
    for broken in (whole[:-5], whole.replace(b'"tales"', b'"tails"'), b"[]", b"{}"):
        path.write_bytes(broken)
        with pytest.raises(VectorStoreDamagedError, match=r"manifest\.json is damaged"):
            open_store(store.folder, EXACT)
    path.unlink()
    with pytest.raises(VectorStoreNotFoundError, match="nanothink store build"):
        open_store(store.folder, EXACT)


def test_a_manifest_cannot_name_files_elsewhere(read: Read, make: Make, tmp_path: Path) -> None:
    store = make(read("tales"))
    manifest = read_manifest(store.folder)
    shutil.copy(next(store.folder.glob("tokens-*")), tmp_path / "elsewhere.npy")
    manifest["files"]["tokens"]["name"] = "../elsewhere.npy"
    manifest["digest"] = digest_of(manifest)
    (store.folder / "manifest.json").write_bytes(orjson.dumps(manifest))
    with pytest.raises(VectorStoreDamagedError, match="places tokens elsewhere"):
        open_store(store.folder, EXACT)


def test_nothing_is_unpickled(read: Read, make: Make) -> None:
    store = make(read("tales"))
    manifest = read_manifest(store.folder)
    path = store.folder / manifest["files"]["merged"]["name"]
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    manifest["files"]["merged"] |= {"bytes": path.stat().st_size, "digest": store_module._digest(path)}
    manifest["digest"] = digest_of(manifest)
    (store.folder / "manifest.json").write_bytes(orjson.dumps(manifest))
    with pytest.raises(VectorStoreDamagedError, match=path.name):
        open_store(store.folder, EXACT)


@pytest.mark.parametrize("changed", [{"digest": "e" * 32}, {"tokenizer": "other"}, {"width": 8}])
def test_another_models_store_is_refused(changed: dict[str, Any], read: Read, make: Make) -> None:
    store = make(read("tales"))
    with pytest.raises(VectorStoreMismatchError, match="belongs to another model"):
        open_store(store.folder, EXACT, owner=replace(store.owner, **changed))
    renamed = replace(store.owner, expert="other name")  # the same weights under another name are the same
    assert open_store(store.folder, EXACT, owner=renamed).index.n_keys == store.index.n_keys


# ---------------------------------------------------------------------------------------------------
# Smaller


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


def everything(store: VectorStore, queries: Float32) -> Float32:
    """p_mem over the tokens, by all keys: (Q, V)."""
    n = store.neighbours(*store.index.search(queries, store.index.n_keys))
    scores = n.similarities / 0.02 + (0.0 if n.counts is None else n.counts.log())
    # lists that were not looked into are missing
    weights = scores.masked_fill(n.tokens == NO_TOKEN, -torch.inf).softmax(-1)
    return torch.zeros(len(queries), 400).scatter_add(1, n.tokens.clamp_min(0), weights).numpy()


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


# ---------------------------------------------------------------------------------------------------
# Found once


def all_places(tokens: TokenisedCorpus) -> list[tuple[str, int]]:
    return [(d, b) for d, stream in tokens.train.items() for b in range(stream.n_blocks(LENGTH))]


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


# ---------------------------------------------------------------------------------------------------
# Beyond 2^32 keys


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
    with pytest.raises(VectorStoreDamagedError, match=rf"its entry {entry}.* makes no sense"):
        open_store(store.folder, EXACT)
