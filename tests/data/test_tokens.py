"""The corpus as tokens: nothing lost, nothing doubled, nothing done twice, nothing half-made trusted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reports import Told

from nanothink.config.data import SPLIT_SEED
from nanothink.data.corpus import find_corpus
from nanothink.data.pages import OpenFiles
from nanothink.data.split import SplitRule, hashed, normalised, text_key
from nanothink.data.token_files import DOCUMENT, TokenFile, is_whole, open_token_file, token_dtype
from nanothink.data.tokenizer import Tokenizer, train_tokenizer
from nanothink.data.tokens import IGNORE, TokenisedCorpus, TokenStream, tokenise
from nanothink.disk import locked
from nanothink.errors import BadRecordsError, DataError, StorageError, UnreadableError

EOS = 0


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    text = "It was the best of times, it was the worst of times; " * 30
    return train_tokenizer([text], 350, n_bytes=len(text))


def _write(path: Path, texts: list[str], *more_lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [*(json.dumps({"text": text}) for text in texts), *more_lines]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def _written(*paths: Path) -> list[str]:
    return [json.loads(line)["text"] for path in paths for line in path.read_text("utf-8").splitlines()]


def _texts(name: str, n: int) -> list[str]:
    return [f"{name} {i}: it was the best of times, it was {'very ' * (i % 7)}{name}." for i in range(n)]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    _write(tmp_path / "data" / "a" / "1.jsonl", _texts("apples", 40))
    _write(tmp_path / "data" / "a" / "2.jsonl", _texts("avocados", 25))
    _write(tmp_path / "data" / "b" / "1.jsonl", _texts("bananas", 30))
    return tmp_path / "data"


def _run(root: Path, tokenizer: Tokenizer, val_split: float = 0.2, **options: object) -> TokenisedCorpus:
    return tokenise(find_corpus(root), tokenizer, split=SplitRule(val_split), **options)  # type: ignore[arg-type]


def test_without_a_split_all_text_is_there_in_its_order(root: Path, tokenizer: Tokenizer) -> None:
    _write(root / "c" / "1.jsonl", ["x"])  # one text of one character: nothing to split
    corpus = find_corpus(root)
    tokens = tokenise(corpus, tokenizer, split=None)
    for domain, paths in corpus.domains.items():
        expected = [t for text in _written(*paths) for t in [*tokenizer.encode(text), tokenizer.eos_id]]
        stream = tokens.train[domain]
        _, targets = stream.block(0, stream.n_tokens)
        assert targets.tolist() == expected
        assert tokens.val[domain].n_tokens == 0


def _tokens(stream: TokenStream) -> list[int]:
    return stream._read(0, stream.n_tokens).tolist()


def _read_texts(stream: TokenStream, tokenizer: Tokenizer) -> list[str]:
    """The documents of a stream, decoded."""
    texts: list[str] = []
    document: list[int] = []
    for token in _tokens(stream):
        if token == tokenizer.eos_id:
            texts.append(tokenizer.decode(document))
            document = []
        else:
            document.append(token)
    assert document == []
    return texts


def _sides(tokens: TokenisedCorpus, tokenizer: Tokenizer) -> dict[str, set[str]]:
    """Every text and the sides it is on."""
    sides: dict[str, set[str]] = {}
    for side, streams in (("train", tokens.train), ("val", tokens.val)):
        for stream in streams.values():
            for text in _read_texts(stream, tokenizer):
                sides.setdefault(text, set()).add(side)
    return sides


def _entries(root: Path) -> dict[str, tuple[int, int]]:
    """Every tokenised file in the cache, with what changes when it is made again."""
    tokens = root / ".nanothink" / "tokens"
    return {
        str(path.relative_to(tokens)): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in tokens.glob("*/*.tokens")
    }


def _digests(root: Path) -> set[str]:
    return {name.split("/")[1].removesuffix(".tokens") for name in _entries(root)}


# --- one stream --------------------------------------------------------------------------------


def _stream(lengths: list[int], chosen: list[bool], n_files: int = 1) -> tuple[TokenStream, list[int]]:
    """A stream over made-up documents spread over files, and the tokens it has to give."""
    expected: list[int] = []
    parts = []
    documents = list(enumerate(zip(lengths, chosen, strict=True)))
    for group in np.array_split(np.arange(len(documents)), n_files):
        tokens: list[int] = []
        rows = []
        for i in group:
            _, (length, mine) = documents[i]
            document = [1 + (7 * i + j) % 250 for j in range(length)] + [EOS]
            tokens += document
            rows.append((len(tokens), 3 * length, i, 0, i + 1))
            expected += document if mine else []
        file = TokenFile(np.array(tokens, np.uint16), np.array(rows, DOCUMENT))
        parts.append((file, np.array([chosen[i] for i in group], dtype=np.bool_)))
    return TokenStream("d", EOS, parts), expected


documents = st.lists(st.tuples(st.integers(0, 30), st.booleans()), min_size=1, max_size=25).filter(
    lambda drawn: any(mine for _, mine in drawn)
)


@settings(max_examples=300, deadline=None)
@given(drawn=documents, length=st.integers(1, 40), n_files=st.integers(1, 4))
def test_packing_loses_and_doubles_nothing(drawn: list[tuple[int, bool]], length: int, n_files: int) -> None:
    stream, expected = _stream([n for n, _ in drawn], [mine for _, mine in drawn], n_files)
    assert stream.n_tokens == len(expected)
    assert stream.n_documents == sum(mine for _, mine in drawn)
    assert stream.n_bytes == sum(3 * n for n, mine in drawn if mine)
    assert stream.n_blocks(length) == -(-len(expected) // length)
    inputs, targets = zip(*(stream.block(k, length) for k in range(stream.n_blocks(length))), strict=True)
    assert all(part.dtype == np.int64 and part.shape == (length,) for part in (*inputs, *targets))
    flat_inputs, flat_targets = np.concatenate(inputs).tolist(), np.concatenate(targets).tolist()
    n = len(expected)
    assert flat_targets == expected + [IGNORE] * (len(flat_targets) - n)
    assert flat_inputs == ([EOS, *expected] + [EOS] * len(flat_inputs))[: len(flat_inputs)]


@settings(max_examples=200, deadline=None)
@given(drawn=documents, max_tokens=st.integers(1, 300), n_files=st.integers(1, 4))
def test_a_sample_is_whole_documents_in_order(
    drawn: list[tuple[int, bool]], max_tokens: int, n_files: int
) -> None:
    stream, _ = _stream([n for n, _ in drawn], [mine for _, mine in drawn], n_files)
    sample, more = stream.sample(max_tokens), stream.sample(max_tokens + 20)
    assert sample.n_tokens <= max_tokens or sample.n_documents == 1
    of_all, of_sample, of_more = (s.documents() for s in (stream, sample, more))
    assert of_sample.keys.tolist() == [key for key in of_all.keys if key in of_sample.keys]
    assert set(of_sample.keys) <= set(of_more.keys)
    tokens = _tokens(stream)
    places = np.cumsum([0, *of_all.n_tokens])
    expected = [
        token
        for i, key in enumerate(of_all.keys)
        if key in of_sample.keys
        for token in tokens[places[i] : places[i + 1]]
    ]
    assert _tokens(sample) == expected
    assert sample.n_bytes == of_sample.n_bytes.sum()
    assert stream.sample(None) is stream


def test_a_file_sorted_by_difficulty_gives_no_easier_sample() -> None:
    n = 2000
    rows = np.zeros(n, DOCUMENT)
    rows["end"] = 10 * np.arange(1, n + 1)
    rows["key"] = [text_key(f"text {i}") for i in range(n)]
    rows["n_bytes"] = difficulty = np.arange(n)
    stream = TokenStream("d", EOS, [(TokenFile(np.ones(10 * n, np.uint16), rows), np.ones(n, np.bool_))])
    for fraction in (0.05, 0.2, 0.5):
        found = stream.sample(round(fraction * stream.n_tokens)).documents().n_bytes
        assert len(found) == fraction * n
        assert abs(found.mean() - difficulty.mean()) < 3 * difficulty.std() / len(found) ** 0.5
    # Nor does the side of the split say anything about who is drawn.
    drawn = np.isin(difficulty, found)
    val = hashed(rows["key"], SPLIT_SEED) < np.uint64(2**62)
    assert abs(drawn[val].mean() - 0.5) < 0.06


def test_a_block_that_is_not_there() -> None:
    stream, _ = _stream([5, 5], [True, True])
    for index in (-1, 3):
        with pytest.raises(IndexError, match="of 3"):
            stream.block(index, 4)


def test_smallest_type_that_fits() -> None:
    assert [token_dtype(size).str for size in (257, 65536, 65537)] == ["<u2", "<u2", "<u4"]


# --- a corpus ----------------------------------------------------------------------------------


def test_every_document_is_there_once_with_its_bytes(root: Path, tokenizer: Tokenizer) -> None:
    _write(root / "c" / "odd.jsonl", ["é\0ü", "a<|endoftext|>b", "\r\n x \n", "漢字😀" * 50, "z"])
    tokens = _run(root, tokenizer)
    assert list(tokens.train) == list(tokens.val) == ["a", "b", "c"]
    for domain, paths in find_corpus(root).domains.items():
        written = _written(*paths)
        streams = (tokens.train[domain], tokens.val[domain])
        read = [text for stream in streams for text in _read_texts(stream, tokenizer)]
        assert sorted(read) == sorted(written)
        assert sum(stream.n_bytes for stream in streams) == sum(len(text.encode()) for text in written)
        assert all(stream.n_documents > 0 for stream in streams)
        for stream in streams:
            found = stream.documents()
            own = _read_texts(stream, tokenizer)
            assert found.keys.tolist() == [text_key(text) for text in own]
            assert found.n_bytes.tolist() == [len(text.encode()) for text in own]
            assert found.n_tokens.tolist() == [len(tokenizer.encode(text)) + 1 for text in own]
    lines = tokens.train["c"].documents().lines.tolist() + tokens.val["c"].documents().lines.tolist()
    assert sorted(lines) == [1, 2, 3, 4, 5]


def test_the_split_is_stable_when_the_corpus_grows_and_is_reordered(root: Path, tokenizer: Tokenizer) -> None:
    before = _sides(_run(root, tokenizer), tokenizer)
    texts = _written(root / "a" / "1.jsonl")
    _write(root / "a" / "1.jsonl", _texts("figs", 20) + texts[::-1])
    (root / "a" / "2.jsonl").rename(root / "a" / "0.jsonl")
    _write(root / "new" / "1.jsonl", _texts("new", 20))
    after = _sides(_run(root, tokenizer), tokenizer)
    assert {text: after[text] for text in before} == before
    assert {side for sides in before.values() for side in sides} == {"train", "val"}
    assert len(after) == len(before) + 40


def test_copies_never_straddle_the_split(root: Path, tokenizer: Tokenizer) -> None:
    shared = _texts("apples", 40)
    _write(root / "b" / "2.jsonl", shared[::-1] + shared)
    _write(root / "one" / "x.jsonl", shared[:1] * 3)  # this domain's only text is cut, and so are its copies
    _write(root / "two" / "x.jsonl", shared[:2])
    sides = _sides(_run(root, tokenizer, 0.4), tokenizer)
    assert all(len(of) == 1 for of in sides.values())
    assert shared[0] not in sides  # only ever in two parts
    assert {frozenset(sides[text]) for text in shared[1:]} == {frozenset({"train"}), frozenset({"val"})}


def test_val_split_changes_nothing_on_disk(root: Path, tokenizer: Tokenizer) -> None:
    small = _run(root, tokenizer, 0.1)
    made = _entries(root)
    large = _run(root, tokenizer, 0.5)
    assert _entries(root) == made
    assert large.val["a"].n_tokens > small.val["a"].n_tokens


def test_equal_fingerprints_mean_equal_blocks(root: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    first = _run(root, tokenizer)
    assert _run(root, tokenizer).fingerprint == first.fingerprint
    assert first.tokenizer_fingerprint == tokenizer.fingerprint
    other = Tokenizer.from_state({**tokenizer.to_state(), "eos_token": "<end>"})
    different = [
        _run(root, tokenizer, 0.3).fingerprint,
        _run(root, other).fingerprint,
        tokenise(find_corpus(root, ["a"]), tokenizer, split=SplitRule(0.2)).fingerprint,
    ]
    _write(root / "a" / "1.jsonl", _texts("apples", 41))
    different.append(_run(root, tokenizer).fingerprint)
    assert len({first.fingerprint, *different}) == 5


def test_smaller_than_a_block(tmp_path: Path, tokenizer: Tokenizer) -> None:
    _write(tmp_path / "a" / "x.jsonl", ["ab", "cd"])
    tokens = _run(tmp_path, tokenizer)
    for stream in (tokens.train["a"], tokens.val["a"]):
        inputs, targets = stream.block(0, 512)
        assert stream.n_blocks(512) == 1
        assert inputs[: stream.n_tokens + 1].tolist() == [tokenizer.eos_id, *_tokens(stream)]
        assert (targets != IGNORE).sum() == stream.n_tokens


@pytest.mark.parametrize("text", ["ab", "It was the best of times. " * 50, "wörd" * 400, " \n a"])
def test_a_single_text_is_cut_in_two(tmp_path: Path, tokenizer: Tokenizer, text: str) -> None:
    _write(tmp_path / "a" / "x.jsonl", [text, text])
    tokens = _run(tmp_path, tokenizer, 0.1)
    (head,), (tail,) = (_read_texts(side["a"], tokenizer) for side in (tokens.train, tokens.val))
    assert head
    assert tail
    assert head + tail == text
    assert (tokens.train["a"].n_bytes, tokens.val["a"].n_bytes) == (len(head.encode()), len(tail.encode()))
    if len(text) > 1000:
        assert 0.85 < len(head) / len(text) < 0.95
        assert tail[0] == " " or " " not in text
        wider = _run(tmp_path, tokenizer, 0.5)
        assert wider.fingerprint != tokens.fingerprint
        assert 0.4 < wider.train["a"].n_bytes / len(text.encode()) < 0.6


def test_a_single_character_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    _write(tmp_path / "a" / "x.jsonl", ["é"])
    with pytest.raises(DataError, match=r"one character.*--domains"):
        _run(tmp_path, tokenizer)


def test_texts_that_domains_share_until_none_is_left(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for domain, pair in (("a", "xy"), ("b", "yz"), ("c", "zx")):
        _write(tmp_path / domain / "x.jsonl", [f"text {letter}" for letter in pair])
    with pytest.raises(DataError, match=r"nothing to (train|validate) on"):
        _run(tmp_path, tokenizer)


def _records(path: Path, *records: Mapping[str, object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def _lines(stream: TokenStream) -> list[tuple[str, int]]:
    found = stream.documents()
    return [(found.paths[f], n) for f, n in zip(found.files.tolist(), found.lines.tolist(), strict=True)]


def test_a_copy_with_other_line_ends_is_on_the_same_side(tmp_path: Path, tokenizer: Tokenizer) -> None:
    texts = [f"{i}: it was the best of times,\nit was the worst of times.\n\nIt was {i}." for i in range(60)]
    _write(tmp_path / "a" / "x.jsonl", texts)
    _write(tmp_path / "a" / "y.jsonl", [text.replace("\n", "\r\n") + "\r\n" for text in texts])
    tokens = _run(tmp_path, tokenizer)
    train, val = ({line for _, line in _lines(side["a"])} for side in (tokens.train, tokens.val))
    assert val
    assert not train & val
    assert tokens.train["a"].n_documents == 2 * len(train)
    _write(tmp_path / "one" / "x.jsonl", texts[:1])
    (tmp_path / "one" / "y.jsonl").write_bytes((tmp_path / "a" / "y.jsonl").read_bytes().splitlines(True)[0])
    tokens = _run(tmp_path, tokenizer)  # one text in that domain too, which is cut
    assert (tokens.train["one"].n_documents, tokens.val["one"].n_documents) == (1, 1)


def test_groups_and_sources_are_on_one_side(tmp_path: Path, tokenizer: Tokenizer) -> None:
    by = {
        "groups": lambda i: {"group": f"g{i % 20}", "source": f"s{i}"},
        "sources": lambda i: {"source": f"s{i % 20}"},
        "numbers": lambda i: {"group": i % 20},
    }
    for domain, naming in by.items():
        _records(tmp_path / domain / "x.jsonl", *({"text": f"{domain} {i}", **naming(i)} for i in range(200)))
    _records(
        tmp_path / "book" / "x.jsonl", *({"text": f"page {i}", "group": "book"} for i in range(100, 200))
    )
    one_source = [{"text": f"page {i} of all", "source": "book"} for i in range(100, 200)]
    _records(tmp_path / "one source" / "x.jsonl", *one_source)
    tokens = tokenise(find_corpus(tmp_path), tokenizer, split=SplitRule(0.2, 0.2))
    for domain in by:
        sides: dict[int, set[str]] = {}
        for name in ("train", "val", "test"):
            found = getattr(tokens, name)[domain].documents()
            assert len(found.lines)
            for line, group in zip(found.lines, found.groups, strict=True):
                sides.setdefault(line % 20, set()).add(f"{name} {group}")
        assert [len(of) for of in sides.values()] == [1] * 20
    lines = [[line for _, line in _lines(getattr(tokens, n)["book"])] for n in ("train", "test", "val")]
    assert lines == [list(range(1, 61)), list(range(61, 81)), list(range(81, 101))]
    assert len(np.unique(tokens.val["book"].documents().groups)) == 1
    of_one_source = tokens.val["one source"].documents()
    assert len(np.unique(of_one_source.groups)) == len(of_one_source.lines) > 1


def test_the_test_side_is_nowhere_else(root: Path, tokenizer: Tokenizer) -> None:
    _write(root / "one" / "x.jsonl", ["It was the best of times. " * 50])
    tokens = tokenise(find_corpus(root), tokenizer, split=SplitRule(0.1, 0.3))
    without = _run(root, tokenizer, 0.1)
    for domain in ("a", "b"):
        train, val, test = (set(_lines(side[domain])) for side in (tokens.train, tokens.val, tokens.test))
        assert test
        assert len(train) + len(val) + len(test) == len(train | val | test)
        assert train | val | test == {
            place for side in (without.train, without.val) for place in _lines(side[domain])
        }
        assert 0.1 < len(test) / len(train | val | test) < 0.5
    parts = [_read_texts(side["one"], tokenizer) for side in (tokens.train, tokens.val, tokens.test)]
    assert [len(part) for part in parts] == [1, 1, 1]
    assert "".join(part[0] for part in parts) == "It was the best of times. " * 50
    assert without.test["one"].n_documents == without.test["a"].n_documents == 0
    keys = np.concatenate([tokens.test[d].documents().keys for d in ("a", "b")])
    assert not tokens.trained_text.holds(keys).any()


def test_what_was_trained_on_stays_in_training(root: Path, tokenizer: Tokenizer) -> None:
    text = "It was the best of times, it was the worst of times. " * 40
    _write(root / "one" / "x.jsonl", [text])
    _records(root / "book" / "x.jsonl", *({"text": f"page {i}", "group": "book"} for i in range(50)))
    corpus = find_corpus(root)
    first = tokenise(corpus, tokenizer, split=SplitRule(0.1))
    trained = first.trained_text
    assert len(trained.keys) == sum(stream.n_documents for stream in first.train.values())
    ((key, n_chars),) = trained.heads.items()
    assert key == text_key(text)
    assert normalised(text)[:n_chars] == normalised(_read_texts(first.train["one"], tokenizer)[0])
    same = tokenise(corpus, tokenizer, split=SplitRule(0.1), trained=trained)
    assert same.fingerprint == first.fingerprint
    assert same.trained_text == trained

    wider = tokenise(corpus, tokenizer, split=SplitRule(0.4, 0.1), trained=trained)
    for held_out in (wider.val, wider.test):
        for domain in ("a", "b", "book"):
            documents = held_out[domain].documents()
            assert not trained.holds(documents.keys).any()
    assert len(_read_texts(wider.train["one"], tokenizer)[0]) >= len(
        _read_texts(first.train["one"], tokenizer)[0]
    )

    # The same text, saved elsewhere; then no longer the only one of its domain.
    _write(root / "one" / "x.jsonl", [text.replace(" ", "\r\n")])
    crlf = tokenise(find_corpus(root), tokenizer, split=SplitRule(0.4), trained=trained)
    assert len(normalised(_read_texts(crlf.train["one"], tokenizer)[0])) >= n_chars
    _write(root / "one" / "y.jsonl", _texts("ones", 5))
    grown = tokenise(find_corpus(root), tokenizer, split=SplitRule(0.9), trained=trained)
    assert len(normalised(_read_texts(grown.train["one"], tokenizer)[-1])) >= n_chars
    assert key not in grown.val["one"].documents().keys


# --- bad input ---------------------------------------------------------------------------------


def test_bad_records_are_named_and_counted(root: Path, tokenizer: Tokenizer) -> None:
    _write(root / "a" / "3.jsonl", ["good"], "{", '{"text": 5}', "nonsense")
    _write(root / "b" / "3.jsonl", ["fine"], *["["] * 10)
    for _ in range(2):
        with pytest.raises(BadRecordsError) as caught:
            _run(root, tokenizer)
        message = str(caught.value)
        assert "13 bad lines" in message
        assert f"{root / 'a' / '3.jsonl'}:2:" in message
        assert "and 8 more" in message
        assert "nanothink data validate" in message
        assert "--skip-bad-records" in message
    tokens = _run(root, tokenizer, skip_bad_records=True)
    assert tokens.skipped_records == 13
    assert {"good", "fine"} <= set(_sides(tokens, tokenizer))
    with pytest.raises(BadRecordsError, match="13 bad lines"):  # tokens are kept by now: still refused
        _run(root, tokenizer)


def test_nothing_valid(root: Path, tokenizer: Tokenizer) -> None:
    _write(root / "c" / "x.jsonl", [], "{")
    with pytest.raises(DataError, match=r"'c'.*no valid record"):
        _run(root, tokenizer, skip_bad_records=True)
    (root / "c" / "x.jsonl").write_text("")
    with pytest.raises(DataError, match=r"'c'.*no valid record"):
        _run(root, tokenizer)


def test_a_file_that_has_gone(root: Path, tokenizer: Tokenizer) -> None:
    corpus = find_corpus(root)
    (root / "b" / "1.jsonl").unlink()
    with pytest.raises(DataError, match=r"Cannot read .*b/1\.jsonl: the file is gone"):
        tokenise(corpus, tokenizer, split=SplitRule(0.1))


def test_a_file_that_changes_meanwhile(root: Path, tokenizer: Tokenizer) -> None:
    path = root / "b" / "1.jsonl"
    size = path.stat().st_size

    def append(stage: str, done: int, total: int) -> None:
        if done and path.stat().st_size == size:
            with path.open("a") as file:
                file.write('{"text": "more"}\n')

    with pytest.raises(DataError, match="changed while it was being read"):
        _run(root, tokenizer, reporter=Told(progress=append))
    _run(root, tokenizer)


# --- the cache ---------------------------------------------------------------------------------


def test_only_new_and_changed_files_are_done_again(root: Path, tokenizer: Tokenizer) -> None:
    _run(root, tokenizer)
    first = _entries(root)
    assert len(_digests(root)) == 3
    _run(root, tokenizer)
    assert _entries(root) == first
    _write(root / "a" / "1.jsonl", _texts("apples", 41))
    _write(root / "b" / "2.jsonl", _texts("blueberries", 9))
    (root / "a" / "2.jsonl").rename(root / "a" / "3.jsonl")
    _run(root, tokenizer)
    second = _entries(root)
    assert {name: second[name] for name in first} == first
    assert len(_digests(root)) == 5


def test_the_same_content_is_tokenised_once(root: Path, tokenizer: Tokenizer) -> None:
    _write(root / "b" / "copy.jsonl", _texts("apples", 40))
    tokens = _run(root, tokenizer)
    assert len(_digests(root)) == 3
    n_documents = tokens.train["b"].n_documents + tokens.val["b"].n_documents
    assert n_documents == 70


def test_unchanged_files_are_not_even_read(root: Path, tokenizer: Tokenizer) -> None:
    _run(root, tokenizer)
    time.sleep(2.1)  # a younger file could still change within the clock's tick
    before = _run(root, tokenizer)
    # Same size, time and inode: only by reading it could one know.
    path = root / "b" / "1.jsonl"
    manifest = json.loads((root / ".nanothink" / "manifest.json").read_text())
    assert sorted(manifest) == ["a/1.jsonl", "a/2.jsonl", "b/1.jsonl"]
    content, status = path.read_bytes(), path.stat()
    path.write_bytes(content.replace(b"best", b"rest"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    changed = path.stat()
    manifest["b/1.jsonl"][2] = changed.st_ctime_ns
    (root / ".nanothink" / "manifest.json").write_text(json.dumps(manifest))
    assert _run(root, tokenizer).fingerprint == before.fingerprint
    manifest["b/1.jsonl"][2] -= 1  # the change of inode that no program can undo
    (root / ".nanothink" / "manifest.json").write_text(json.dumps(manifest))
    assert _run(root, tokenizer).fingerprint != before.fingerprint


def _kept(root: Path, tokenizer: Tokenizer) -> list[Path]:
    return sorted((root / ".nanothink" / "tokens" / tokenizer.fingerprint[:16]).glob("*.tokens"))


@pytest.mark.parametrize("damage", ["cut off", "empty", "gone", "tokens", "rows", "summary", "end"])
def test_damaged_tokens_are_made_again(root: Path, tokenizer: Tokenizer, damage: str) -> None:
    before = _run(root, tokenizer)
    expected = [_tokens(stream) for stream in before.train.values()]
    path = _kept(root, tokenizer)[0]
    whole = path.read_bytes()
    kept = open_token_file(path, OpenFiles())
    assert kept is not None
    flipped = bytearray(whole)
    end_of_tokens = len(kept.tokens) * 2 + 4
    places = {"tokens": 5, "rows": end_of_tokens + 9, "summary": -30, "end": -3}
    if damage in places:
        flipped[places[damage]] ^= 4
        path.write_bytes(flipped)
    elif damage == "cut off":
        os.truncate(path, len(whole) - 2)
    elif damage == "empty":
        os.truncate(path, 0)
    else:
        path.unlink()
    assert not is_whole(path, OpenFiles())
    notes: list[str] = []
    after = _run(root, tokenizer, reporter=Told(notes.append))
    assert [_tokens(stream) for stream in after.train.values()] == expected
    assert after.fingerprint == before.fingerprint
    assert ["damaged" in note for note in notes] == ([] if damage == "gone" else [True])
    assert path.read_bytes() == whole


def test_tokens_that_are_damaged_or_lost_while_they_are_used_are_made_again(
    root: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda _which: (8, 8))  # one file open at a time
    _run(root, tokenizer)
    used = _kept(root, tokenizer)
    _write(root / "single" / "x.jsonl", ["The only text here, which is cut in two. " * 20])
    notes: list[str] = []
    tokens = _run(root, tokenizer, reporter=Told(notes.append))
    used += [path for path in _kept(root, tokenizer) if path.name.startswith("cut-")]
    expected = [_tokens(stream) for stream in tokens.train.values()]
    whole = {path: path.read_bytes() for path in used}
    for path, content in whole.items():
        os.truncate(path, 10)  # the same file, which is open
        assert [_tokens(stream) for stream in tokens.train.values()] == expected
        assert path.read_bytes() == content
    assert ["damaged" in note for note in notes] == [True] * 3  # a cut text is silently cut again
    for path in whole:
        path.unlink()
    assert [_tokens(stream) for stream in tokens.train.values()] == expected

    # With another text in its place there is nothing to make the lost tokens from.
    _write(root / "b" / "1.jsonl", ["other"])
    for path in root.rglob("*.tokens"):
        os.truncate(path, 10)
    with pytest.raises(DataError, match=r"b/1\.jsonl changed while"):
        _tokens(tokens.train["b"])


def test_any_bit_that_flips_is_found(root: Path, tokenizer: Tokenizer) -> None:
    _run(root, tokenizer)
    path = _kept(root, tokenizer)[0]
    whole = path.read_bytes()
    for bit in range(0, 8 * len(whole), 41):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        assert not is_whole(path, OpenFiles()), bit
    path.write_bytes(whole)
    assert is_whole(path, OpenFiles())


def test_progress_counts_bytes_to_the_end(root: Path, tokenizer: Tokenizer) -> None:
    total = find_corpus(root).n_bytes
    for _ in range(2):
        seen: list[tuple[int, int]] = []
        _run(root, tokenizer, reporter=Told(progress=lambda _, *at: seen.append(at)))  # noqa: B023
        assert seen == sorted(seen)
        assert seen[-1] == (total, total)
        assert {at[1] for at in seen} == {total}


def test_a_data_root_that_cannot_be_written_to(
    root: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (root / ".nanothink").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    notes: list[str] = []
    first = _run(root, tokenizer, reporter=Told(notes.append))
    assert len(notes) == 1
    assert str(tmp_path / "cache" / "nanothink") in notes[0]
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.tokens")}
    assert len(made) == 3
    again = _run(root, tokenizer)
    assert again.fingerprint == first.fingerprint
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.tokens")} == made


def test_no_place_at_all(
    root: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (root / ".nanothink").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(root / ".nanothink"))
    monkeypatch.setattr("tempfile.tempdir", str(root / ".nanothink"))
    with pytest.raises(StorageError, match="XDG_CACHE_HOME"):
        _run(root, tokenizer)


def test_a_home_that_is_not_there(
    root: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (root / ".nanothink").write_text("in the way")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(root / ".nanothink"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    notes: list[str] = []
    _run(root, tokenizer, reporter=Told(notes.append))
    assert str(tmp_path / "nanothink-") in notes[0]


# --- processes ---------------------------------------------------------------------------------

_SCRIPT = """
import sys
from pathlib import Path
from nanothink.data.corpus import find_corpus
from nanothink.data.split import SplitRule
from nanothink.data.tokenizer import load_tokenizer
from nanothink.data.tokens import tokenise
from nanothink.reporter import Reporter
root, tokenizer = sys.argv[1:3]
exec(sys.argv[3])
class Printer(Reporter):
    def progress(self, stage, done, total):
        if done: print(done, flush=True)
tokens = tokenise(find_corpus(root), load_tokenizer(tokenizer), split=SplitRule(0.1), reporter=Printer())
print(tokens.fingerprint, flush=True)
status = Path("/proc/self/status").read_text()  # getrusage's peak would include that of the parent
print(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")), flush=True)
"""


@pytest.fixture
def saved(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    from nanothink.data.tokenizer import save_tokenizer

    return save_tokenizer(tokenizer, tmp_path / "tokenizer")


def _start(
    root: Path, saved: Path, first: str = "", environment: Mapping[str, str] | None = None
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _SCRIPT, str(root), str(saved), first],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **(environment or {})},
    )


def _finish(process: subprocess.Popen[str]) -> list[str]:
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    return out.split()


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A few megabytes in one file after a small one: enough to be caught in the middle."""
    root = tmp_path / "large"
    _write(root / "a" / "1.jsonl", _texts("small", 20))
    _write(root / "a" / "2.jsonl", [f"{i} {text * 9}" for i in range(40) for text in _texts("large", 100)])
    return root


def test_a_killed_build_leaves_nothing_that_is_trusted(
    large: Path, tokenizer: Tokenizer, saved: Path, tmp_path: Path
) -> None:
    process = _start(large, saved)
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) > (large / "a" / "1.jsonl").stat().st_size:  # within the second file
            break
    process.send_signal(signal.SIGKILL)
    process.communicate()
    folder = large / ".nanothink" / "tokens" / tokenizer.fingerprint[:16]
    left = [path.name for path in folder.iterdir()]
    assert sum(name.endswith(".tmp") for name in left) == 1  # caught in the middle
    assert len(left) == 2
    after = _run(large, tokenizer, 0.1)
    assert not list(folder.glob(".*.tmp"))

    # The same as if nothing had happened.
    other = tmp_path / "other"
    (other / "a").mkdir(parents=True)
    for path in (large / "a").iterdir():
        os.link(path, other / "a" / path.name)
    undisturbed = _run(other, tokenizer, 0.1)
    assert after.fingerprint == undisturbed.fingerprint
    for path in (other / ".nanothink" / "tokens").rglob("*.tokens"):
        twin = large / path.relative_to(other)
        assert twin.read_bytes() == path.read_bytes()


def test_tokens_do_not_depend_on_the_number_of_threads(large: Path, saved: Path) -> None:
    made = []
    for threads in ("1", "3"):
        _finish(_start(large, saved, environment={"RAYON_NUM_THREADS": threads}))
        files = sorted((large / ".nanothink").rglob("*.tokens"))
        assert len(files) == 2
        made.append([path.read_bytes() for path in files])
        for path in files:
            path.unlink()
    assert made[0] == made[1]


def test_two_at_once_do_the_work_once(large: Path, saved: Path, tokenizer: Tokenizer) -> None:
    processes = [_start(large, saved) for _ in range(2)]
    fingerprints = {_finish(process)[-2] for process in processes}
    assert len(fingerprints) == 1
    assert len(_digests(large)) == 2
    assert not list((large / ".nanothink").rglob(".*.tmp"))


def test_waiting_for_another_process_is_said(
    root: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nanothink.disk.lock.PATIENCE_SECONDS", 0.05)
    (root / ".nanothink").mkdir()
    held = locked(root / ".nanothink")
    held.__enter__()
    notes: list[str] = []

    def let_go(message: str) -> None:
        notes.append(message)
        held.__exit__(None, None, None)

    _run(root, tokenizer, reporter=Told(let_go))
    assert len(notes) == 1
    assert "waiting" in notes[0]
    with locked(root / ".nanothink"):
        _run(root, tokenizer, reporter=Told(pytest.fail))  # nothing to write: nothing to wait for


def test_a_full_disk_is_a_clear_error_and_loses_nothing(large: Path, saved: Path) -> None:
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))"
    process = _start(large, saved, limit)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 1
    assert error.splitlines()[-1].startswith("nanothink.errors.StorageError: Cannot write ")
    assert "raise the limit" in error.splitlines()[-1]
    assert not list((large / ".nanothink").rglob(".*.tmp"))
    _finish(_start(large, saved))


@pytest.mark.parametrize(
    ("shape", "megabytes", "bound"),
    [
        ("documents", 20, 10),  # far less than the tokens alone
        ("one document", 12, 8 * 12),  # a few copies of the line and its ids
    ],
)
def test_memory_does_not_grow_with_the_corpus(
    tmp_path: Path, saved: Path, shape: str, megabytes: int, bound: int
) -> None:
    peaks = []
    sentence = "it was the best of times, it was the worst of times, number {}; "
    for name, size in (("small", 2), ("large", megabytes)):
        n = size * 2**20 // 66
        if shape == "documents":
            texts = [f"{i} " + sentence.format(i % 100) * 66 for i in range(n // 66)]
        else:
            texts = [sentence.format(1) * n, "another"]
        _write(tmp_path / name / "a" / "x.jsonl", texts)
        peaks.append(int(_finish(_start(tmp_path / name, saved))[-1]) / 1024)
    assert peaks[1] - peaks[0] < bound, peaks


# --- real text ---------------------------------------------------------------------------------


@pytest.fixture
def linked_corpora(shared_data: Path, tmp_path: Path) -> Path:
    root = tmp_path / "corpora"
    for domain in ("academic", "philosophy"):
        (root / domain).mkdir(parents=True)
        path = min((shared_data / "corpora" / domain).iterdir(), key=lambda path: path.stat().st_size)
        (root / domain / path.name).symlink_to(path)
    return root


def test_real_text_has_the_tokens_gpt2_gives_it(shared_data: Path, linked_corpora: Path) -> None:
    from nanothink.data.tokenizer import load_tokenizer

    gpt2 = load_tokenizer(str(shared_data / "tokenizers" / "gpt2"))
    tokens = tokenise(find_corpus(linked_corpora), gpt2, split=SplitRule(0.1))
    for domain, paths in find_corpus(linked_corpora).domains.items():
        texts = _written(*paths)
        expected = sorted([*gpt2.encode(text), gpt2.eos_id] for text in texts)
        streams = (tokens.train[domain], tokens.val[domain])
        ends = [np.cumsum(stream.documents().n_tokens) for stream in streams]
        found = [
            stream._read(int(end - size), int(end)).tolist()
            for stream, own in zip(streams, ends, strict=True)
            for size, end in zip(stream.documents().n_tokens, own, strict=True)
        ]
        assert sorted(found) == expected


@pytest.mark.parametrize("name", ["folder.jsonl", "pipe.jsonl", "link.jsonl"])
def test_what_is_no_file_is_an_error_and_never_left_out(
    tmp_path: Path, tokenizer: Tokenizer, name: str
) -> None:
    """A folder, a pipe or a dangling link called like data: named and not hung on."""
    path = tmp_path / "d" / name
    _write(tmp_path / "d" / "good.jsonl", _texts("d", 20))
    if name.startswith("folder"):
        path.mkdir()
    elif name.startswith("pipe"):
        os.mkfifo(path)
    else:
        path.symlink_to("nowhere")
    for skip in (False, True):
        with pytest.raises(UnreadableError, match=f"Cannot read {path}: "):
            tokenise(find_corpus(tmp_path), tokenizer, split=SplitRule(0.1), skip_bad_records=skip)
