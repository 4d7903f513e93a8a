"""The corpus as tokens: nothing lost, nothing doubled, each text on one side."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from reports import Told
from token_corpora import (
    cached_files,
    documents_of,
    sides_by_text,
    some_texts,
    texts_in,
    tokenised,
    tokens_of,
    write_texts,
)

from nanothink.data.corpus import find_corpus
from nanothink.data.split import SplitRule, normalised, text_key
from nanothink.data.token_files import token_dtype
from nanothink.data.tokenizer import Tokenizer
from nanothink.data.tokens import IGNORE, TokenStream, tokenise
from nanothink.errors import BadRecordsError, DataError


def test_without_a_split_all_text_is_there_in_its_order(root: Path, tokenizer: Tokenizer) -> None:
    write_texts(root / "c" / "1.jsonl", ["x"])  # one text of one character: nothing to split
    corpus = find_corpus(root)
    tokens = tokenise(corpus, tokenizer, split=None)
    for domain, paths in corpus.domains.items():
        expected = [t for text in texts_in(*paths) for t in [*tokenizer.encode(text), tokenizer.eos_id]]
        stream = tokens.train[domain]
        _, targets = stream.block(0, stream.n_tokens)
        assert targets.tolist() == expected
        assert tokens.val[domain].n_tokens == 0


def test_smallest_type_that_fits() -> None:
    assert [token_dtype(size).str for size in (257, 65536, 65537)] == ["<u2", "<u2", "<u4"]


def test_every_document_is_there_once_with_its_bytes(root: Path, tokenizer: Tokenizer) -> None:
    write_texts(root / "c" / "odd.jsonl", ["é\0ü", "a<|endoftext|>b", "\r\n x \n", "漢字😀" * 50, "z"])
    tokens = tokenised(root, tokenizer)
    assert list(tokens.train) == list(tokens.val) == ["a", "b", "c"]
    for domain, paths in find_corpus(root).domains.items():
        written = texts_in(*paths)
        streams = (tokens.train[domain], tokens.val[domain])
        read = [text for stream in streams for text in documents_of(stream, tokenizer)]
        assert sorted(read) == sorted(written)
        assert sum(stream.n_bytes for stream in streams) == sum(len(text.encode()) for text in written)
        assert all(stream.n_documents > 0 for stream in streams)
        for stream in streams:
            found = stream.documents()
            own = documents_of(stream, tokenizer)
            assert found.keys.tolist() == [text_key(text) for text in own]
            assert found.n_bytes.tolist() == [len(text.encode()) for text in own]
            assert found.n_tokens.tolist() == [len(tokenizer.encode(text)) + 1 for text in own]
    lines = tokens.train["c"].documents().lines.tolist() + tokens.val["c"].documents().lines.tolist()
    assert sorted(lines) == [1, 2, 3, 4, 5]


def test_the_split_is_stable_when_the_corpus_grows_and_is_reordered(root: Path, tokenizer: Tokenizer) -> None:
    before = sides_by_text(tokenised(root, tokenizer), tokenizer)
    texts = texts_in(root / "a" / "1.jsonl")
    write_texts(root / "a" / "1.jsonl", some_texts("figs", 20) + texts[::-1])
    (root / "a" / "2.jsonl").rename(root / "a" / "0.jsonl")
    write_texts(root / "new" / "1.jsonl", some_texts("new", 20))
    after = sides_by_text(tokenised(root, tokenizer), tokenizer)
    assert {text: after[text] for text in before} == before
    assert {side for sides in before.values() for side in sides} == {"train", "val"}
    assert len(after) == len(before) + 40


def test_copies_never_straddle_the_split(root: Path, tokenizer: Tokenizer) -> None:
    shared = some_texts("apples", 40)
    write_texts(root / "b" / "2.jsonl", shared[::-1] + shared)
    write_texts(root / "one" / "x.jsonl", shared[:1] * 3)  # its only text is cut, and so are copies of it
    write_texts(root / "two" / "x.jsonl", shared[:2])
    sides = sides_by_text(tokenised(root, tokenizer, 0.4), tokenizer)
    assert all(len(of) == 1 for of in sides.values())
    assert shared[0] not in sides  # only ever in two parts
    assert {frozenset(sides[text]) for text in shared[1:]} == {frozenset({"train"}), frozenset({"val"})}


def test_val_split_changes_nothing_on_disk(root: Path, tokenizer: Tokenizer) -> None:
    small = tokenised(root, tokenizer, 0.1)
    made = cached_files(root)
    large = tokenised(root, tokenizer, 0.5)
    assert cached_files(root) == made
    assert large.val["a"].n_tokens > small.val["a"].n_tokens


def test_equal_fingerprints_mean_equal_blocks(root: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    first = tokenised(root, tokenizer)
    assert tokenised(root, tokenizer).fingerprint == first.fingerprint
    assert first.tokenizer_fingerprint == tokenizer.fingerprint
    other = Tokenizer.from_state({**tokenizer.to_state(), "eos_token": "<end>"})
    different = [
        tokenised(root, tokenizer, 0.3).fingerprint,
        tokenised(root, other).fingerprint,
        tokenise(find_corpus(root, ["a"]), tokenizer, split=SplitRule(0.2)).fingerprint,
    ]
    write_texts(root / "a" / "1.jsonl", some_texts("apples", 41))
    different.append(tokenised(root, tokenizer).fingerprint)
    assert len({first.fingerprint, *different}) == 5


def test_smaller_than_a_block(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_texts(tmp_path / "a" / "x.jsonl", ["ab", "cd"])
    tokens = tokenised(tmp_path, tokenizer)
    for stream in (tokens.train["a"], tokens.val["a"]):
        inputs, targets = stream.block(0, 512)
        assert stream.n_blocks(512) == 1
        assert inputs[: stream.n_tokens + 1].tolist() == [tokenizer.eos_id, *tokens_of(stream)]
        assert (targets != IGNORE).sum() == stream.n_tokens


@pytest.mark.parametrize("text", ["ab", "It was the best of times. " * 50, "wörd" * 400, " \n a"])
def test_a_single_text_is_cut_in_two(tmp_path: Path, tokenizer: Tokenizer, text: str) -> None:
    write_texts(tmp_path / "a" / "x.jsonl", [text, text])
    tokens = tokenised(tmp_path, tokenizer, 0.1)
    (head,), (tail,) = (documents_of(side["a"], tokenizer) for side in (tokens.train, tokens.val))
    assert head
    assert tail
    assert head + tail == text
    assert (tokens.train["a"].n_bytes, tokens.val["a"].n_bytes) == (len(head.encode()), len(tail.encode()))
    if len(text) > 1000:
        assert 0.85 < len(head) / len(text) < 0.95
        assert tail[0] == " " or " " not in text
        wider = tokenised(tmp_path, tokenizer, 0.5)
        assert wider.fingerprint != tokens.fingerprint
        assert 0.4 < wider.train["a"].n_bytes / len(text.encode()) < 0.6


def test_a_single_character_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_texts(tmp_path / "a" / "x.jsonl", ["é"])
    with pytest.raises(DataError, match=r"one character.*--domains"):
        tokenised(tmp_path, tokenizer)


def test_texts_that_domains_share_until_none_is_left(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for domain, pair in (("a", "xy"), ("b", "yz"), ("c", "zx")):
        write_texts(tmp_path / domain / "x.jsonl", [f"text {letter}" for letter in pair])
    with pytest.raises(DataError, match=r"nothing to (train|validate) on"):
        tokenised(tmp_path, tokenizer)


def write_rows(path: Path, *records: Mapping[str, object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def lines_of(stream: TokenStream) -> list[tuple[str, int]]:
    found = stream.documents()
    return [(found.paths[f], n) for f, n in zip(found.files.tolist(), found.lines.tolist(), strict=True)]


def test_a_copy_with_other_line_ends_is_on_the_same_side(tmp_path: Path, tokenizer: Tokenizer) -> None:
    texts = [f"{i}: it was the best of times,\nit was the worst of times.\n\nIt was {i}." for i in range(60)]
    write_texts(tmp_path / "a" / "x.jsonl", texts)
    write_texts(tmp_path / "a" / "y.jsonl", [text.replace("\n", "\r\n") + "\r\n" for text in texts])
    tokens = tokenised(tmp_path, tokenizer)
    train, val = ({line for _, line in lines_of(side["a"])} for side in (tokens.train, tokens.val))
    assert val
    assert not train & val
    assert tokens.train["a"].n_documents == 2 * len(train)
    write_texts(tmp_path / "one" / "x.jsonl", texts[:1])
    (tmp_path / "one" / "y.jsonl").write_bytes((tmp_path / "a" / "y.jsonl").read_bytes().splitlines(True)[0])
    tokens = tokenised(tmp_path, tokenizer)  # one text in that domain too, which is cut
    assert (tokens.train["one"].n_documents, tokens.val["one"].n_documents) == (1, 1)


def test_groups_and_sources_are_on_one_side(tmp_path: Path, tokenizer: Tokenizer) -> None:
    by = {
        "groups": lambda i: {"group": f"g{i % 20}", "source": f"s{i}"},
        "sources": lambda i: {"source": f"s{i % 20}"},
        "numbers": lambda i: {"group": i % 20},
    }
    for domain, naming in by.items():
        write_rows(
            tmp_path / domain / "x.jsonl", *({"text": f"{domain} {i}", **naming(i)} for i in range(200))
        )
    write_rows(
        tmp_path / "book" / "x.jsonl", *({"text": f"page {i}", "group": "book"} for i in range(100, 200))
    )
    one_source = [{"text": f"page {i} of all", "source": "book"} for i in range(100, 200)]
    write_rows(tmp_path / "one source" / "x.jsonl", *one_source)
    tokens = tokenise(find_corpus(tmp_path), tokenizer, split=SplitRule(0.2, 0.2))
    for domain in by:
        sides: dict[int, set[str]] = {}
        for name in ("train", "val", "test"):
            found = getattr(tokens, name)[domain].documents()
            assert len(found.lines)
            for line, group in zip(found.lines, found.groups, strict=True):
                sides.setdefault(line % 20, set()).add(f"{name} {group}")
        assert [len(of) for of in sides.values()] == [1] * 20
    lines = [[line for _, line in lines_of(getattr(tokens, n)["book"])] for n in ("train", "test", "val")]
    assert lines == [list(range(1, 61)), list(range(61, 81)), list(range(81, 101))]
    assert len(np.unique(tokens.val["book"].documents().groups)) == 1
    of_one_source = tokens.val["one source"].documents()
    assert len(np.unique(of_one_source.groups)) == len(of_one_source.lines) > 1


def test_the_test_side_is_nowhere_else(root: Path, tokenizer: Tokenizer) -> None:
    write_texts(root / "one" / "x.jsonl", ["It was the best of times. " * 50])
    tokens = tokenise(find_corpus(root), tokenizer, split=SplitRule(0.1, 0.3))
    without = tokenised(root, tokenizer, 0.1)
    for domain in ("a", "b"):
        train, val, test = (set(lines_of(side[domain])) for side in (tokens.train, tokens.val, tokens.test))
        assert test
        assert len(train) + len(val) + len(test) == len(train | val | test)
        assert train | val | test == {
            place for side in (without.train, without.val) for place in lines_of(side[domain])
        }
        assert 0.1 < len(test) / len(train | val | test) < 0.5
    parts = [documents_of(side["one"], tokenizer) for side in (tokens.train, tokens.val, tokens.test)]
    assert [len(part) for part in parts] == [1, 1, 1]
    assert "".join(part[0] for part in parts) == "It was the best of times. " * 50
    assert without.test["one"].n_documents == without.test["a"].n_documents == 0
    keys = np.concatenate([tokens.test[d].documents().keys for d in ("a", "b")])
    assert not tokens.trained_text.holds(keys).any()


def test_what_was_trained_on_stays_in_training(root: Path, tokenizer: Tokenizer) -> None:
    text = "It was the best of times, it was the worst of times. " * 40
    write_texts(root / "one" / "x.jsonl", [text])
    write_rows(root / "book" / "x.jsonl", *({"text": f"page {i}", "group": "book"} for i in range(50)))
    corpus = find_corpus(root)
    first = tokenise(corpus, tokenizer, split=SplitRule(0.1))
    trained = first.trained_text
    assert len(trained.keys) == sum(stream.n_documents for stream in first.train.values())
    ((key, n_chars),) = trained.heads.items()
    assert key == text_key(text)
    assert normalised(text)[:n_chars] == normalised(documents_of(first.train["one"], tokenizer)[0])
    same = tokenise(corpus, tokenizer, split=SplitRule(0.1), trained=trained)
    assert same.fingerprint == first.fingerprint
    assert same.trained_text == trained

    wider = tokenise(corpus, tokenizer, split=SplitRule(0.4, 0.1), trained=trained)
    for held_out in (wider.val, wider.test):
        for domain in ("a", "b", "book"):
            documents = held_out[domain].documents()
            assert not trained.holds(documents.keys).any()
    assert len(documents_of(wider.train["one"], tokenizer)[0]) >= len(
        documents_of(first.train["one"], tokenizer)[0]
    )

    # The same text, saved elsewhere; then no longer the only one of its domain.
    write_texts(root / "one" / "x.jsonl", [text.replace(" ", "\r\n")])
    crlf = tokenise(find_corpus(root), tokenizer, split=SplitRule(0.4), trained=trained)
    assert len(normalised(documents_of(crlf.train["one"], tokenizer)[0])) >= n_chars
    write_texts(root / "one" / "y.jsonl", some_texts("ones", 5))
    grown = tokenise(find_corpus(root), tokenizer, split=SplitRule(0.9), trained=trained)
    assert len(normalised(documents_of(grown.train["one"], tokenizer)[-1])) >= n_chars
    assert key not in grown.val["one"].documents().keys


def test_bad_records_are_named_and_counted(root: Path, tokenizer: Tokenizer) -> None:
    write_texts(root / "a" / "3.jsonl", ["good"], "{", '{"text": 5}', "nonsense")
    write_texts(root / "b" / "3.jsonl", ["fine"], *["["] * 10)
    for _ in range(2):
        with pytest.raises(BadRecordsError) as caught:
            tokenised(root, tokenizer)
        message = str(caught.value)
        assert "13 bad lines" in message
        assert f"{root / 'a' / '3.jsonl'}:2:" in message
        assert "and 8 more" in message
        assert "nanothink data validate" in message
        assert "--skip-bad-records" in message
    tokens = tokenised(root, tokenizer, skip_bad_records=True)
    assert tokens.skipped_records == 13
    assert {"good", "fine"} <= set(sides_by_text(tokens, tokenizer))
    with pytest.raises(BadRecordsError, match="13 bad lines"):  # tokens are kept by now: still refused
        tokenised(root, tokenizer)


def test_nothing_valid(root: Path, tokenizer: Tokenizer) -> None:
    write_texts(root / "c" / "x.jsonl", [], "{")
    with pytest.raises(DataError, match=r"'c'.*no valid record"):
        tokenised(root, tokenizer, skip_bad_records=True)
    (root / "c" / "x.jsonl").write_text("")
    with pytest.raises(DataError, match=r"'c'.*no valid record"):
        tokenised(root, tokenizer)


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
        tokenised(root, tokenizer, reporter=Told(progress=append))
    tokenised(root, tokenizer)


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
        texts = texts_in(*paths)
        expected = sorted([*gpt2.encode(text), gpt2.eos_id] for text in texts)
        streams = (tokens.train[domain], tokens.val[domain])
        ends = [np.cumsum(stream.documents().n_tokens) for stream in streams]
        found = [
            stream._read(int(end - size), int(end)).tolist()
            for stream, own in zip(streams, ends, strict=True)
            for size, end in zip(stream.documents().n_tokens, own, strict=True)
        ]
        assert sorted(found) == expected
