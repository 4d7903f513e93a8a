"""A small tokenizer, and a corpus of two domains."""

from __future__ import annotations

from pathlib import Path

import pytest
from token_corpora import some_texts, write_texts

from nanothink.data.tokenizer import Tokenizer, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    text = "It was the best of times, it was the worst of times; " * 30
    return train_tokenizer([text], 350, n_bytes=len(text))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_texts(tmp_path / "data" / "a" / "1.jsonl", some_texts("apples", 40))
    write_texts(tmp_path / "data" / "a" / "2.jsonl", some_texts("avocados", 25))
    write_texts(tmp_path / "data" / "b" / "1.jsonl", some_texts("bananas", 30))
    return tmp_path / "data"
