"""What a model was trained on stays on the training side, and what it held out on the other, in any data."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import made_up_texts, write_domain
from hypothesis import given, settings
from hypothesis import strategies as st

from nanothink.data.corpus import find_corpus
from nanothink.data.split import (
    NOTHING,
    HeldOutText,
    SplitRule,
    TrainedText,
    cut_text,
    normalised,
    text_key,
)
from nanothink.data.tokenizer import Tokenizer, load_tokenizer
from nanothink.data.tokens import TokenisedCorpus, TokenStream, tokenise
from nanothink.errors import DataError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two domains with texts in common, and one of a single text, which the first has too."""
    letters, manuals = made_up_texts(0, 12, 20), made_up_texts(1, 8, 20)
    book = " ".join(made_up_texts(2, 10))
    write_domain(tmp_path / "letters", [*letters, book])
    write_domain(tmp_path / "manuals", [*manuals, *letters[:3]])
    write_domain(tmp_path / "book", [book])
    return tmp_path


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer: Path) -> Tokenizer:
    return load_tokenizer(str(tiny_tokenizer))


def documents(side: dict[str, TokenStream]) -> dict[str, list[int]]:
    return {domain: stream.documents().keys.tolist() for domain, stream in side.items()}


def sides(tokens: TokenisedCorpus) -> list[dict[str, list[int]]]:
    return [documents(side) for side in (tokens.train, tokens.val, tokens.test)]


RULES = [SplitRule(0.1), SplitRule(0.01), SplitRule(0.5), SplitRule(0.2, 0.2)]


@pytest.mark.parametrize("rule", RULES)
def test_a_run_that_goes_on_has_the_same_sides(root: Path, tokenizer: Tokenizer, rule: SplitRule) -> None:
    corpus = find_corpus(root)
    first = tokenise(corpus, tokenizer, split=rule)
    again = tokenise(corpus, tokenizer, split=rule, trained=first.trained_text, held_out=first.held_out)
    assert sides(again) == sides(first)
    assert (again.fingerprint, again.kept_in_training) == (first.fingerprint, 0)
    assert again.trained_text == first.trained_text


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("domain", ["letters", "manuals", "book"])
def test_a_domain_by_itself_has_the_sides_that_it_has_among_the_others(
    root: Path, tokenizer: Tokenizer, rule: SplitRule, domain: str
) -> None:
    whole = tokenise(find_corpus(root), tokenizer, split=rule)
    part = tokenise(
        find_corpus(root, [domain]),
        tokenizer,
        split=rule,
        trained=whole.trained_text,
        held_out=whole.held_out,
    )
    assert sides(part) == [{domain: side[domain]} for side in sides(whole)]


def test_a_larger_fraction_holds_out_no_text_that_was_trained_on(root: Path, tokenizer: Tokenizer) -> None:
    corpus = find_corpus(root)
    first = tokenise(corpus, tokenizer, split=SplitRule(0.1))
    larger = tokenise(corpus, tokenizer, split=SplitRule(0.6), trained=first.trained_text)
    assert larger.kept_in_training > 0
    assert documents(larger.val) == documents(first.val)
    without = tokenise(corpus, tokenizer, split=SplitRule(0.6))
    n_held_out = sum(stream.n_documents for stream in without.val.values())
    assert n_held_out - sum(s.n_documents for s in larger.val.values()) == larger.kept_in_training


def test_all_of_a_corpus_may_have_been_trained_on(root: Path, tokenizer: Tokenizer) -> None:
    corpus = find_corpus(root)
    whole = tokenise(corpus, tokenizer, split=None)
    tokens = tokenise(corpus, tokenizer, split=SplitRule(0.1), trained=whole.trained_text)
    assert not any(stream.n_tokens for stream in tokens.val.values())
    assert documents(tokens.train) == documents(whole.train)
    assert tokens.kept_in_training > 0


def test_a_head_that_was_trained_on_makes_its_text_and_itself_known(root: Path, tokenizer: Tokenizer) -> None:
    trained = tokenise(find_corpus(root), tokenizer, split=SplitRule(0.1)).trained_text
    book = " ".join(made_up_texts(2, 10))
    assert list(trained.heads) == [text_key(book)]
    n_chars = trained.heads[text_key(book)]
    known, tail = (np.array([text_key(text)], np.uint64) for text in (book[:n_chars], book[n_chars:]))
    assert trained.holds(known).all()
    assert not trained.holds(tail).any()


FRACTIONS = st.tuples(st.sampled_from([0.05, 0.1, 0.2, 0.4]), st.sampled_from([0.0, 0.05, 0.1, 0.3]))


@settings(max_examples=100, deadline=None)
@given(FRACTIONS, FRACTIONS, st.integers(0, 20), st.integers(3, 60))
def test_a_cut_text_is_tested_on_what_neither_of_two_rules_trains_or_validates(
    one: tuple[float, float], other: tuple[float, float], seed: int, n_words: int
) -> None:
    """And validated on what neither trains, under the smallest rule of two models that see the same text."""
    (text,) = made_up_texts(seed, 1, n_words)
    rules = [SplitRule(*one), SplitRule(*other)]
    cuts = [cut_text(text, rule, "domain") for rule in rules]
    n_chars = max(len(normalised(head)) for head, _, _ in cuts)
    smallest = SplitRule(min(one[0], other[0]), min(one[1], other[1]))
    head, middle, tail = cut_text(text, smallest, "domain", n_chars)
    assert head + middle + tail == text
    for own_head, own_middle, _ in cuts:
        assert len(own_head) <= len(head)
        assert not tail or len(own_head + own_middle) <= len(head + middle)
    assert cut_text(text, rules[0], "domain", len(normalised(cuts[0][0]))) == cuts[0]


def test_what_two_models_were_trained_on_and_held_out() -> None:
    def keys(*numbers: int) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
        return np.array(numbers, np.uint64)

    both = TrainedText(keys(1, 2), {9: 5}) | TrainedText(keys(2, 3), {9: 7, 8: 1}, keys(4))
    assert both == TrainedText(keys(1, 2, 3), {8: 1, 9: 7}, keys(4))
    assert both != TrainedText(keys(1, 2, 3), {8: 1, 9: 6}, keys(4))
    assert both | NOTHING == both
    held_out = HeldOutText(keys(1), keys(2, 3)) | HeldOutText(keys(3), keys(4))
    assert held_out.val.tolist() == [1, 3]
    assert held_out.test.tolist() == [2, 4]
    again = HeldOutText.from_state(held_out.to_state())
    assert (again.val.tolist(), again.test.tolist()) == ([1, 3], [2, 4])


def test_trained_text_adds_up() -> None:
    one = TrainedText(np.array([1, 5], np.uint64), {7: 10, 8: 4}, np.array([3], np.uint64))
    other = TrainedText(np.array([2, 5], np.uint64), {7: 6, 9: 1})
    both = one | other
    assert both == other | one
    assert both.keys.tolist() == [1, 2, 5]
    assert both.heads == {7: 10, 8: 4, 9: 1}
    assert both.holds(np.array([0, 1, 7, 9, 10], np.uint64)).tolist() == [False, True, True, True, False]
    assert NOTHING | one == one != other


def test_trained_text_goes_through_a_file_that_holds_only_tensors_and_plain_values() -> None:
    keys = np.sort(np.random.default_rng(0).integers(2**64, size=5000, dtype=np.uint64))
    whole = TrainedText(keys, {2**64 - 1: 10, 3: 2**40}, keys[:7])
    file = io.BytesIO()
    torch.save(whole.to_state(), file)
    assert len(file.getvalue()) < 8 * len(keys) + 4000, "8 bytes a document"
    file.seek(0)
    assert TrainedText.from_state(torch.load(file, weights_only=True)) == whole
    assert TrainedText.from_state(NOTHING.to_state()) == NOTHING


@pytest.mark.parametrize(
    "damage",
    [
        {"keys": torch.tensor([2, 1])},
        {"keys": torch.tensor([1, 1])},
        {"keys": torch.tensor([1.0])},
        {"keys": torch.tensor([[1]])},
        {"keys": [1]},
        {"groups": torch.tensor([-1, 1])},  # as unsigned numbers the other way round
        {"head_keys": torch.tensor([1, 2])},
        {"head_chars": torch.tensor([0])},
        {"more": 1},
    ],
)
def test_damaged_trained_text_is_refused(damage: dict[str, Any]) -> None:
    state = TrainedText(np.array([1], np.uint64), {4: 5}).to_state()
    assert TrainedText.from_state(state).heads == {4: 5}
    with pytest.raises(ValueError, match="trained text"):
        TrainedText.from_state({**state, **damage})
    for missing in state:
        with pytest.raises(ValueError, match="trained text"):
            TrainedText.from_state({name: part for name, part in state.items() if name != missing})
    with pytest.raises(ValueError, match="trained text"):
        TrainedText.from_state([])  # type: ignore[arg-type]


def test_a_rule_goes_through_plain_values() -> None:
    rule = SplitRule(0.2, 0.1, seed=7)
    assert SplitRule.from_dict(rule.to_dict()) == rule
    for wrong in (
        {},
        {**rule.to_dict(), "more": 1},
        {**rule.to_dict(), "seed": 1.5},
        {**rule.to_dict(), "seed": -1},
        {**rule.to_dict(), "val_split": "0.1"},
        {**rule.to_dict(), "val_split": float("nan")},
        {**rule.to_dict(), "test_split": 0.8},
        {**rule.to_dict(), "val_split": 0},
    ):
        with pytest.raises(ValueError, match="split"):
            SplitRule.from_dict(wrong)


# One text


def test_a_text_is_cut_at_white_space_near_the_fractions() -> None:
    text = "word " * 1000
    head, middle, tail = cut_text(text, SplitRule(0.1), "d")
    assert (head + middle + tail, tail) == (text, "")
    assert middle[0] == " "
    assert len(middle) == pytest.approx(500, abs=5)
    parts = cut_text(text, SplitRule(0.1, 0.2), "d")
    assert "".join(parts) == text
    assert [len(part) for part in parts] == pytest.approx([3500, 500, 1000], abs=5)
    assert cut_text("ab", SplitRule(0.1, 0.2), "d") == ("a", "b", "")
    assert [len(part) for part in cut_text("abc", SplitRule(0.1, 0.2), "d")] == [1, 1, 1]


@settings(max_examples=100, deadline=None)
@given(
    st.text("ab \n\r\u00e9e\u0301", min_size=2, max_size=60),
    st.sampled_from([0.01, 0.1, 0.5, 0.9]),
    st.sampled_from([0.0, 0.05]),
    st.integers(0, 40),
)
def test_the_head_holds_all_that_was_trained_on(text: str, val: float, test: float, n_chars: int) -> None:
    known = normalised(text)[:n_chars]
    try:
        head, middle, tail = cut_text(text, SplitRule(val, test), "d", len(known))
    except DataError:
        assert len(known) >= len(normalised(text[:-1]))
        return
    assert head + middle + tail == text
    assert head
    assert middle
    assert len(normalised(head)) >= len(known)


def test_a_text_that_was_trained_on_whole_is_not_cut() -> None:
    with pytest.raises(DataError, match="all of which the model was trained on"):
        cut_text("a b c", SplitRule(0.1), "d", 5)
    with pytest.raises(DataError, match=r"one character.*--domains"):
        cut_text("a", SplitRule(0.1), "d")
