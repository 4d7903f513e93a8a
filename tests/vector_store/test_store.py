"""The store: what goes in, what never does, whole or not at all, and its own model's alone."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
import torch
from reports import Told
from stores import (
    EXACT,
    LENGTH,
    LISTS,
    PQ,
    WIDTH,
    Make,
    Read,
    fingerprint,
    made_up_texts,
    states,
    training_pairs,
    write_domain,
)

from nanothink.config import VectorStoreConfig
from nanothink.data.split import text_key
from nanothink.data.tokens import IGNORE
from nanothink.errors import (
    StorageError,
    VectorStoreDamagedError,
    VectorStoreMismatchError,
    VectorStoreNotFoundError,
)
from nanothink.models.store_gate import NO_TOKEN
from nanothink.vector_store import building
from nanothink.vector_store import store as store_module
from nanothink.vector_store.building import held_out_texts, plan_build
from nanothink.vector_store.index import NeighbourIndex
from nanothink.vector_store.manifest import digest_of, read_manifest
from nanothink.vector_store.neighbours import TrainingNeighbours
from nanothink.vector_store.store import open_store


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
