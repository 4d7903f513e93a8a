"""Near-duplicates: found whatever side and domain, in time that grows with the corpus."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import numpy as np
import pytest
from reports import Told

from nanothink.data.corpus import find_corpus
from nanothink.data.near_duplicates import THRESHOLD, _runs, _similar, find_near_duplicates
from nanothink.data.split import SplitRule
from nanothink.data.tokenizer import Tokenizer, load_tokenizer
from nanothink.data.tokens import tokenise
from nanothink.errors import DataError

pytest.importorskip("datasketch")

WORDS = [f"{a}{b}{c}" for a in "bdgkmpt" for b in "aeiou" for c in "lnrs"]


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer: Path) -> Tokenizer:
    return load_tokenizer(str(tiny_tokenizer))


def put(root: Path, name: str, texts: list[str]) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def written(rng: random.Random, n_words: int) -> list[str]:
    return [rng.choice(WORDS) for _ in range(n_words)]


def jaccard(one: str, other: str) -> float:
    a, b = ({run for runs in _runs(text) for run in runs} for text in (one, other))
    return len(a & b) / len(a | b)


def test_twins_are_found_and_counted_by_side(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rng = random.Random(0)
    originals = [written(rng, 200) for _ in range(300)]
    twins = []
    for words in originals[:100]:
        changed = list(words)
        changed[rng.randrange(200)] = "changed"
        twins.append(changed)
    cousins = [[*words[:100], *written(rng, 100)] for words in originals[100:200]]  # a third alike
    put(tmp_path, "one/a.jsonl", [" ".join(words) for words in originals])
    put(tmp_path, "two/a.jsonl", ["\n".join(words).upper() for words in twins])
    put(tmp_path, "two/b.jsonl", [" ".join(words) for words in cousins])
    put(tmp_path, "two/copies.jsonl", ["\r\n".join(words) for words in originals[200:]])
    texts = [" ".join(words) for words in (*originals, *twins)]
    assert min(jaccard(one, other) for one, other in zip(texts, texts[300:], strict=False)) > 0.9
    corpus = find_corpus(tmp_path)
    tokens = tokenise(corpus, tokenizer, split=SplitRule(0.3, 0.2))
    seen: list[tuple[int, int]] = []
    found = find_near_duplicates(corpus, tokens, reporter=Told(progress=lambda _, *at: seen.append(at)))
    assert found.n_documents == 500
    assert found.n_near_duplicates == 200
    side = {
        (documents.paths[0].split("/")[0], line): name
        for name, streams in (("train", tokens.train), ("val", tokens.val), ("test", tokens.test))
        for documents in (stream.documents() for stream in streams.values())
        for line, file in zip(documents.lines.tolist(), documents.files.tolist(), strict=True)
        if documents.paths[file].endswith("a.jsonl")
    }
    pairs = [(side["one", line], side["two", line]) for line in range(1, 101)]
    for name, counted in (("val", found.n_val_in_training), ("test", found.n_test_in_training)):
        assert counted == sum(set(pair) == {"train", name} for pair in pairs) > 5
    assert seen[-1] == (corpus.n_bytes, corpus.n_bytes)
    assert len(found.pairs) == 20
    for pair in found.pairs:
        assert {pair.first.file, pair.second.file} == {"one/a.jsonl", "two/a.jsonl"}
        assert pair.first.line == pair.second.line
        assert (pair.first.side == "train") != (pair.second.side == "train")
        assert (pair.first.side, pair.second.side) == pairs[pair.first.line - 1]
        assert THRESHOLD <= pair.similarity <= 1
    assert [pair.similarity for pair in found.pairs] == sorted(
        (p.similarity for p in found.pairs), reverse=True
    )
    assert json.loads(json.dumps(found.to_dict()))["pairs"][0]["first"]["line"] == found.pairs[0].first.line
    assert find_near_duplicates(corpus, tokens) == found


def test_without_spaces_characters_are_compared(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rng = random.Random(1)
    texts = ["".join(chr(0x4E00 + rng.randrange(3000)) for _ in range(400)) for _ in range(20)]
    put(tmp_path, "zh/a.jsonl", [*texts, *(text[:200] + "字" + text[201:] for text in texts[:10])])
    corpus = find_corpus(tmp_path)
    assert (
        find_near_duplicates(corpus, tokenise(corpus, tokenizer, split=SplitRule(0.2))).n_near_duplicates
        == 20
    )


def test_a_domain_of_one_text_and_texts_of_one_word(tmp_path: Path, tokenizer: Tokenizer) -> None:
    put(tmp_path, "one/a.jsonl", ["word " * 50])
    corpus = find_corpus(tmp_path)
    alone = find_near_duplicates(corpus, tokenise(corpus, tokenizer, split=SplitRule(0.2)))
    assert (alone.n_documents, alone.n_near_duplicates, alone.n_val, alone.pairs) == (1, 0, 0, ())
    put(tmp_path, "short/a.jsonl", ["yes", "no", "YES", "ja", "nein"])
    corpus = find_corpus(tmp_path)
    found = find_near_duplicates(corpus, tokenise(corpus, tokenizer, split=SplitRule(0.2)))
    assert (found.n_documents, found.n_near_duplicates) == (6, 2)


def test_runs_do_not_depend_on_where_a_long_text_is_read_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    text = " ".join(written(random.Random(2), 500))
    whole = {run for runs in _runs(text) for run in runs}
    monkeypatch.setattr("nanothink.data.split._PART_CHARS", 40)
    parts = list(_runs(text))
    assert len(parts) > 10
    assert {run for runs in parts for run in runs if len(run.split()) == 5} == whole


def test_thousands_of_copies_of_a_form_letter_take_seconds() -> None:
    """All alike: comparing each with each would be 10^7 pairs."""
    rng = np.random.default_rng(0)
    signatures = np.tile(rng.integers(2**32, size=126, dtype=np.uint32), (5_000, 1))
    changed = rng.random(signatures.shape) < 0.02
    signatures[changed] = rng.integers(2**32, size=int(changed.sum()), dtype=np.uint32)
    sides = (rng.random(5_000) < 0.1).astype(np.int64)
    begun = time.process_time()
    first, second, similarity = _similar(signatures, sides)
    assert time.process_time() - begun < 20
    assert (similarity >= THRESHOLD).all()
    assert len(np.union1d(first, second)) > 4_950
    straddling = sides[first] != sides[second]
    held_out = np.concatenate([d[straddling][sides[d[straddling]] == 1] for d in (first, second)])
    assert len(np.unique(held_out)) > 0.99 * sides.sum()


def test_a_file_that_has_grown_meanwhile(tmp_path: Path, tokenizer: Tokenizer) -> None:
    put(tmp_path, "a/a.jsonl", ["one", "two", "three"])
    corpus = find_corpus(tmp_path)
    tokens = tokenise(corpus, tokenizer, split=SplitRule(0.2))
    put(tmp_path, "a/a.jsonl", ["one", "two", "three", "four"])
    with pytest.raises(DataError, match="changed while it was being read"):
        find_near_duplicates(corpus, tokens)


def test_without_the_library_it_says_how_to_get_it(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, "a/a.jsonl", ["one", "two", "three"])
    corpus = find_corpus(tmp_path)
    tokens = tokenise(corpus, tokenizer, split=SplitRule(0.2))
    monkeypatch.setitem(__import__("sys").modules, "datasketch", None)
    with pytest.raises(DataError, match=r"pip install 'nanothink\[near_duplicates\]'"):
        find_near_duplicates(corpus, tokens)
