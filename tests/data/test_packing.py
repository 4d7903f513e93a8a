"""Blocks are packed from documents in their order, and samples are whole documents."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from token_corpora import (
    EOS,
    tokens_of,
)

from nanothink.config.data import SPLIT_SEED
from nanothink.data.split import hashed, text_key
from nanothink.data.token_files import DOCUMENT, TokenFile
from nanothink.data.tokens import IGNORE, TokenStream


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
    tokens = tokens_of(stream)
    places = np.cumsum([0, *of_all.n_tokens])
    expected = [
        token
        for i, key in enumerate(of_all.keys)
        if key in of_sample.keys
        for token in tokens[places[i] : places[i + 1]]
    ]
    assert tokens_of(sample) == expected
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
