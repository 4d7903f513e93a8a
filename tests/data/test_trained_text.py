"""What a model was trained on stays on the training side, and what it held out on the other, in any data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
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
