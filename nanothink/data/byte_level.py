"""Byte-level encoding (GPT-2) with a cache of words: the same ids, three times as fast as the library.

A GPT-2-like tokenizer splits a text into words and encodes each word by itself. Natural text repeats its
words (17 MB of English and code have 3.6 million, of which 90,000 differ), so a table saves most work:

1. Split the text where the tokenizer certainly splits it.
2. Encode each new word once, by the tokenizer itself, all new words of a round together.
3. Look up the ids of every word and concatenate them in numpy.

Unicode versions disagree on what is a letter or a number. The words here hold only characters whose class has
not changed since Unicode 3.2 (2002). Text around any other character goes to the tokenizer unsplit, from the
last certain split before it to the first one after it.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.uint32]

ROUND_CHARS = 1 << 20
"""Characters that are cut into words at a time; bounds memory for documents of any number and size."""

MAX_WORDS = 1 << 18
"""Words kept before the table is emptied: about 40 MB. A 17 MB corpus fills a third of it."""

MAX_WORD_CHARS = 1 << 22
"""Characters kept before the table is emptied, for texts whose words are long."""

MAX_NEW_FRACTION = 0.25
"""Share of new words in a round above which the texts are encoded whole (random strings, Chinese): the
tokenizer takes about four times as long for single words as for the same text."""

_SPACE = r"\t\n\x0b\x0c\r "
_CLASSES = {"L": "letter", "N": "number", "M": "other", "P": "other", "S": "other"}


def is_byte_level(state: dict[str, Any]) -> bool:
    """Return whether a tokenizer (its parsed JSON) splits and encodes text as this module assumes."""
    model, cutter = state["model"], state.get("pre_tokenizer") or {}
    return (
        model.get("type") == "BPE"
        and not model.get("dropout")
        and state.get("normalizer") is None
        and cutter.get("type") == "ByteLevel"
        and cutter.get("use_regex", True) is True
        and cutter.get("add_prefix_space") is False
        # Added tokens that are not special are found in the text before it is cut into words.
        and all(token.get("special") for token in state.get("added_tokens") or ())
    )


class ByteLevelEncoder:
    """Encoder with a table of words; not thread-safe.

    ``encode`` is the tokenizer itself: texts to lists of ids, without special tokens.
    """

    def __init__(self, encode: Callable[[Sequence[str]], list[list[int]]]) -> None:
        self._encode = encode
        self._table = _Table()
        # Of word number n: _lengths[n] ids from place _starts[n] of _ids on.
        self._starts: NDArray[np.int64] = np.empty(0, np.int64)
        self._lengths: NDArray[np.int64] = np.empty(0, np.int64)
        self._ids: Ids = np.empty(0, np.uint32)
        self._n_chars = 0

    def __call__(self, texts: Sequence[str]) -> list[Ids]:
        """Encode texts: one array of ids each, equal to the tokenizer's."""
        parts: list[str] = []
        counts = []
        for text in texts:
            before = len(parts)
            parts += _parts(text)
            counts.append(len(parts) - before)
        pieces = iter([ids for group in rounds(parts) for ids in self._round(group)])
        joined = []
        for count in counts:
            own = [next(pieces) for _ in range(count)]
            joined.append(own[0] if count == 1 else np.concatenate(own))
        return joined

    def _round(self, parts: list[str]) -> list[Ids]:
        known = len(self._table)
        numbers = [np.fromiter(map(self._table.__getitem__, _words(part)), dtype=np.int64) for part in parts]
        new = self._table.new
        n_words = sum(map(len, numbers))
        if len(new) > MAX_NEW_FRACTION * n_words and known:
            for word in new:
                del self._table[word]
            new.clear()
            return [np.array(ids, dtype=np.uint32) for ids in self._encode(parts)]
        self._learn(new)
        new.clear()

        order = np.concatenate(numbers) if numbers else np.empty(0, np.int64)
        lengths = self._lengths[order]
        ends = np.cumsum(lengths)
        # Token j of a word at place p is ids[start of word + j]; ends - lengths is where the word lands.
        shift = np.repeat(self._starts[order] - (ends - lengths), lengths)
        ids = self._ids[shift + np.arange(len(shift))]
        word_ends = np.cumsum([len(own) for own in numbers])
        token_ends = np.concatenate(([0], ends))[word_ends]
        split = np.split(ids, token_ends[:-1])
        if len(self._table) > MAX_WORDS or self._n_chars > MAX_WORD_CHARS:
            self._forget()
        return split

    def _learn(self, words: list[str]) -> None:
        if not words:
            return
        encoded = self._encode(words)
        lengths = np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded))
        flat = np.fromiter((i for ids in encoded for i in ids), dtype=np.uint32, count=int(lengths.sum()))
        self._starts = np.concatenate((self._starts, len(self._ids) + np.cumsum(lengths) - lengths))
        self._lengths = np.concatenate((self._lengths, lengths))
        self._ids = np.concatenate((self._ids, flat))
        self._n_chars += sum(map(len, words))

    def _forget(self) -> None:
        self._table, self._n_chars = _Table(), 0
        self._starts, self._lengths, self._ids = self._starts[:0], self._lengths[:0], self._ids[:0]


class _Table(dict[str, int]):
    """Numbers of words, in order of first appearance; ``new`` lists the words not yet encoded."""

    def __init__(self) -> None:
        self.new: list[str] = []

    def __missing__(self, word: str) -> int:
        number = self[word] = len(self)
        self.new.append(word)
        return number


class _Patterns(NamedTuple):
    word: re.Pattern[str]
    """GPT-2's pattern, over characters of known class."""
    unknown: re.Pattern[str]
    """A run of characters whose class depends on the version of Unicode."""
    cut: re.Pattern[str]
    """A place between a known character that is no space and an ASCII space. No alternative of GPT-2's
    pattern crosses it, and none looks further ahead, so the tokenizer certainly splits there."""


def _class_of(character: str) -> str | None:
    now = _CLASSES.get(unicodedata.category(character)[0])
    then = _CLASSES.get(unicodedata.ucd_3_2_0.category(character)[0])
    return now if now == then else None


@functools.cache
def _patterns() -> _Patterns:
    # Compiled on first use: 65,000 look-ups take 50 ms, which a command without tokens need not pay.
    sets = {"letter": "", "number": "", "other": "", None: ""}
    for kind, run in groupby(range(0x21, 0x10000), key=lambda code: _class_of(chr(code))):
        codes = list(run)
        sets[kind] += f"\\u{codes[0]:04x}-\\u{codes[-1]:04x}"
    letter, number, other = sets["letter"], sets["number"], sets["other"]
    return _Patterns(
        word=re.compile(
            rf"'(?:s|t|re|ve|m|ll|d)| ?[{letter}]+| ?[{number}]+| ?[{other}]+"
            rf"|[{_SPACE}]+(?![^{_SPACE}])|[{_SPACE}]+"
        ),
        unknown=re.compile(rf"[^{_SPACE}{letter}{number}{other}]+"),
        cut=re.compile(rf"(?<=[{letter}{number}{other}])(?=[{_SPACE}])"),
    )


def _parts(text: str) -> list[str]:
    """Split a text, where the tokenizer certainly does, into parts of about ROUND_CHARS."""
    parts = []
    start = 0
    while len(text) - start > ROUND_CHARS:
        cut = _patterns().cut.search(text, start + ROUND_CHARS)
        if cut is None:
            break
        parts.append(text[start : cut.start()])
        start = cut.start()
    parts.append(text[start:] if start else text)
    return parts


def rounds(parts: Sequence[str]) -> Iterator[list[str]]:
    """Group texts, in order, into rounds of about ROUND_CHARS characters; a longer text is its own round."""
    group: list[str] = []
    size = 0
    for part in parts:
        group.append(part)
        size += len(part)
        if size >= ROUND_CHARS:
            yield group
            group, size = [], 0
    if group:
        yield group


def _words(text: str) -> list[str]:
    """Split a text into words; text around characters of unknown class is one word."""
    patterns = _patterns()
    if patterns.unknown.search(text) is None:
        return patterns.word.findall(text)
    cuts = [0, *(found.start() for found in patterns.cut.finditer(text)), len(text)]
    words: list[str] = []
    done = 0
    for found in patterns.unknown.finditer(text):
        if found.start() < done:
            continue
        start = cuts[bisect_right(cuts, found.start()) - 1]
        stop = cuts[bisect_left(cuts, found.end())]
        words += patterns.word.findall(text, done, start)
        words.append(text[start:stop])
        done = stop
    words += patterns.word.findall(text, done)
    return words
