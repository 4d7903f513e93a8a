"""The fast path gives the tokenizer's own ids, whatever the text."""

from __future__ import annotations

import time
import unicodedata
from collections.abc import Sequence

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from nanothink.data import byte_level
from nanothink.data.byte_level import ByteLevelEncoder
from nanothink.data.tokenizer import Tokenizer, train_tokenizer

SAMPLE = (
    "It's the first of its kind, isn't it? They'll say we've 1,234 reasons -- or 5.\n\n"
    "\tdef f(x):\n\t\treturn x  +  1\n“Curly quotes” – naïve café, Ünïcödé; Ελληνικά, русский, 漢字かな.\r\n"
) * 4

# Everything that decides where a word ends, known and unknown, next to each other in every order.
HOSTILE = st.text(
    st.sampled_from(
        "aZé9½²'sltrevmd!-_ \n\t\r\x0b\x0c\x00\x1c\x85\xa0\u2003\u3000\u0301\u200d漢한ßǅ७😀𝔸\ufeff\ue000"
    ),
    max_size=40,
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([SAMPLE], 600, n_bytes=len(SAMPLE))


def _backend(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer.from_str(tokenizer.to_state()["tokenizer_json"])
    backend.encode_special_tokens = True
    return backend


@pytest.fixture(scope="module")
def whole(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    return _backend(tokenizer)


class _Counting:
    """The tokenizer itself, with a record of what it was asked."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self.backend = backend
        self.asked: list[str] = []

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        self.asked += texts
        return [self.backend.encode(text, add_special_tokens=False).ids for text in texts]


@settings(max_examples=400, deadline=None)
@given(texts=st.lists(st.one_of(HOSTILE, st.text(max_size=30)), max_size=5))
def test_ids_are_the_tokenizers_own(whole: tokenizers.Tokenizer, texts: list[str]) -> None:
    encode = _Counting(whole)
    encoder = ByteLevelEncoder(encode)
    expected = encode(texts)
    for _ in range(2):  # new words, then known ones
        assert [ids.tolist() for ids in encoder(texts)] == expected


def test_words_are_encoded_once(whole: tokenizers.Tokenizer) -> None:
    encode = _Counting(whole)
    encoder = ByteLevelEncoder(encode)
    encoder([SAMPLE])
    first = list(encode.asked)
    assert len(first) == len(set(first))
    assert max(map(len, first)) < 20  # words, not the document
    encoder([SAMPLE, SAMPLE])
    assert encode.asked == first


def test_random_strings_are_encoded_whole_and_not_remembered(whole: tokenizers.Tokenizer) -> None:
    encode = _Counting(whole)
    encoder = ByteLevelEncoder(encode)
    encoder([SAMPLE])
    before = len(encode.asked)
    noise = " ".join(f"{chr(97 + i % 26)}{chr(97 + i // 26)}q" for i in range(600))
    for _ in range(2):
        assert encoder([noise])[0].tolist() == encode([noise])[0]
    assert set(encode.asked[before:]) == {noise}


def test_a_long_document_is_cut_without_a_trace(
    whole: tokenizers.Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(byte_level, "ROUND_CHARS", 50)
    monkeypatch.setattr(byte_level, "MAX_WORDS", 20)  # the table is emptied again and again
    encode = _Counting(whole)
    texts = [SAMPLE, "", "x" * 500, SAMPLE[::-1], "漢字😀" * 100 + " a b"]
    assert [ids.tolist() for ids in ByteLevelEncoder(encode)(texts)] == encode(texts)
    assert len(byte_level._parts(SAMPLE)) > 5


@pytest.mark.parametrize("unit", [".", " ", "\n", "\u754c", "\U0001f600", "ACGTTGCA", "0", "\u0378"])
def test_a_long_run_without_a_break_is_encoded_in_seconds(tokenizer: Tokenizer, unit: str) -> None:
    run = (unit * 200_000)[:200_000]
    start = time.process_time()
    (ids,) = tokenizer.encode_batch([run])
    assert tokenizer.decode(ids.tolist()) == run
    assert time.process_time() - start < 10  # one second on an idle machine; its square would be minutes


def test_every_known_character_has_the_class_the_tokenizer_gives_it() -> None:
    """Between two of its class it is one word with them: exactly what the pattern takes for granted."""
    cutter = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    beside = {"letter": "a", "number": "1", "other": "!"}
    characters = [chr(code) for code in range(0x21, 0x10000)]
    known = [(c, kind) for c in characters if (kind := byte_level._class_of(c)) is not None]
    assert len(known) > 49_000
    wrong = [
        unicodedata.name(c, hex(ord(c)))
        for c, kind in known
        if len(cutter.pre_tokenize_str(beside[kind] + c + beside[kind])) != 1
    ]
    assert wrong == []


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "Lowercase"}},
        {
            "pre_tokenizer": {
                "type": "ByteLevel",
                "add_prefix_space": True,
                "trim_offsets": True,
                "use_regex": True,
            }
        },
        {
            "pre_tokenizer": {
                "type": "ByteLevel",
                "add_prefix_space": False,
                "trim_offsets": True,
                "use_regex": False,
            }
        },
        {"pre_tokenizer": None},
        {"added_tokens": [{"id": 5, "content": "xyz", "special": False}]},
        {"model": {"type": "Unigram"}},
        {"model": {"type": "BPE", "dropout": 0.1}},
    ],
)
def test_other_tokenizers_do_not_take_the_fast_path(change: dict[str, object]) -> None:
    state: dict[str, object] = {
        "added_tokens": [{"id": 0, "content": "<|endoftext|>", "special": True}],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": True,
        },
        "model": {"type": "BPE", "dropout": None},
    }
    assert byte_level.is_byte_level(state)
    assert not byte_level.is_byte_level({**state, **change})
