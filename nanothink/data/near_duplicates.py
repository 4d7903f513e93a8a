"""Near-duplicates by MinHash, for ``nanothink data inspect --near-duplicates``.

1. A document is the set of its 5-grams of words (12-grams of characters, where the script has no spaces), in
   lower case, white space normalised. The similarity of two documents is the Jaccard index of their sets.
2. Its signature is, for each of 126 hash functions, the smallest hash of any n-gram. The fraction of places
   at which two signatures agree estimates the similarity (Broder 1997), with a standard error of 0.04 or
   less.
3. Signatures are compared if a band of six places is equal, which finds a pair of similarity 0.8 with
   probability 0.998. If more than 8 documents share a band, each is compared with the next 7 and with one of
   the training side, so time is linear in the corpus.

Memory is 0.5 KB per document.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nanothink.data.corpus import Corpus
from nanothink.data.records import ignored, iter_records
from nanothink.data.split import normalised_parts, text_key
from nanothink.data.tokens import TokenisedCorpus
from nanothink.errors import DataError
from nanothink.reporter import SILENT, Reporter
from nanothink.suggestions import install

THRESHOLD = 0.8
"""Least similarity of near-duplicates."""

_ROWS, _BANDS = 6, 21
_WORDS, _CHARACTERS = 5, 12
_LONG_WORD = 20  # mean characters of a "word" from which on a script has no spaces
_COMPARED_AFTER = 7
_PAIRS_AT_ONCE = 1 << 16
_NAMED_PAIRS = 20
_SIDES = ("train", "val", "test")

Signatures = NDArray[np.uint32]
Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class Place:
    file: str
    """From the data root."""
    line: int
    side: str
    """train, val or test."""


@dataclass(frozen=True)
class Pair:
    similarity: float
    """Estimated."""
    first: Place
    second: Place

    @property
    def straddles(self) -> bool:
        """Return whether one is on the training side and the other is held out."""
        return (self.first.side == "train") != (self.second.side == "train")


@dataclass(frozen=True)
class NearDuplicates:
    n_documents: int
    """Distinct texts that were compared; exact copies count once."""
    n_near_duplicates: int
    """Those that have a near-duplicate."""
    n_val: int
    n_test: int
    """Documents on these sides."""
    n_val_in_training: int
    n_test_in_training: int
    """Documents of these sides with a near-duplicate on the training side."""
    pairs: tuple[Pair, ...]
    """At most 20: pairs that straddle first, then the most similar."""

    def to_dict(self) -> dict[str, Any]:
        return {"threshold": THRESHOLD, **asdict(self)}


def import_minhash() -> Any:
    """Import datasketch's MinHash. Raises DataError if it is not installed."""
    try:
        from datasketch import MinHash
    except ImportError:
        raise DataError(f"Near-duplicates need datasketch: {install('nanothink[near_duplicates]')}") from None
    return MinHash


def find_near_duplicates(
    corpus: Corpus, tokens: TokenisedCorpus, *, reporter: Reporter = SILENT
) -> NearDuplicates:
    """Compare all documents of a corpus, across domains.

    Args:
        tokens: the tokens of this corpus, which give the side of each document.

    Raises:
        DataError: the library is not installed, or a file has changed since it was tokenised.
    """
    empty = import_minhash()(num_perm=_ROWS * _BANDS)
    sides = _sides_by_line(tokens)
    signatures: list[Signatures] = []
    places: list[tuple[int, int]] = []
    side_of: list[int] = []
    paths: list[str] = []
    seen: set[int] = set()
    advance = reporter.counter("comparing", corpus.n_bytes)
    for _, path in corpus.files:
        paths.append(os.path.relpath(path, corpus.root))
        for line, record in iter_records(path, on_problem=ignored, on_bytes=advance):
            side = sides.get((paths[-1], line))
            if side is None:
                raise DataError(f"{path} changed while it was being read; run the command again.")
            if (key := text_key(record.text)) in seen:
                continue
            seen.add(key)
            signature = empty.copy()
            for runs in _runs(record.text):
                signature.update_batch(runs)
            signatures.append(signature.hashvalues.astype(np.uint32))
            places.append((len(paths) - 1, line))
            side_of.append(side)
    return _compared(np.stack(signatures), np.array(side_of), places, paths)


def _sides_by_line(tokens: TokenisedCorpus) -> dict[tuple[str, int], int]:
    """Side of each document, by file and line. A text that is cut counts as training text."""
    found = {}
    for side in reversed(range(len(_SIDES))):
        for stream in getattr(tokens, _SIDES[side]).values():
            documents = stream.documents()
            for file, line in zip(documents.files.tolist(), documents.lines.tolist(), strict=True):
                found[documents.paths[file], line] = side
    return found


def _runs(text: str) -> Iterator[list[bytes]]:
    """Yield the n-grams of a document, some thousands at a time."""
    before: list[str] = []
    for part in normalised_parts(text.lower()):
        words = part.split()
        size, glue = _WORDS, " "
        if len(part) > _LONG_WORD * len(words):
            words, size, glue = list(part), _CHARACTERS, ""
        words = before + words
        yield [glue.join(words[i : i + size]).encode() for i in range(max(1, len(words) - size + 1))]
        before = words[1 - size :]


def _compared(
    signatures: Signatures, sides: Int64, places: list[tuple[int, int]], paths: list[str]
) -> NearDuplicates:
    first, second, similarity = _similar(signatures, sides)
    straddling = (sides[first] == 0) != (sides[second] == 0)
    has_any = np.zeros(len(sides), np.bool_)
    has_any[first] = has_any[second] = True
    in_training = np.zeros(len(sides), np.bool_)
    in_training[first[straddling]] = in_training[second[straddling]] = True

    def place(document: int) -> Place:
        file, line = places[document]
        return Place(paths[file], line, _SIDES[sides[document]])

    def on(side: int, chosen: NDArray[np.bool_] | None = None) -> int:
        return int(np.count_nonzero((sides == side) if chosen is None else (sides == side) & chosen))

    order = np.lexsort((second, first, -similarity, ~straddling))[:_NAMED_PAIRS]
    return NearDuplicates(
        n_documents=len(sides),
        n_near_duplicates=int(has_any.sum()),
        n_val=on(1),
        n_test=on(2),
        n_val_in_training=on(1, in_training),
        n_test_in_training=on(2, in_training),
        pairs=tuple(
            Pair(round(float(similarity[i]), 3), place(int(first[i])), place(int(second[i]))) for i in order
        ),
    )


def _similar(signatures: Signatures, sides: Int64) -> tuple[Int64, Int64, NDArray[np.float64]]:
    """Find pairs of similarity THRESHOLD or more: first document (the lower number), second, similarity."""
    n = len(signatures)
    numbers = np.arange(n)
    weights = np.random.default_rng(0).integers(2**64, size=_ROWS, dtype=np.uint64) | np.uint64(1)
    codes: Int64 = np.empty(0, np.int64)  # first * n + second
    for band in range(_BANDS):
        rows = signatures[:, band * _ROWS : (band + 1) * _ROWS].astype(np.uint64)
        bucket = (rows * weights).sum(1, dtype=np.uint64)
        # Documents of other sides stand together with one of training.
        order = np.lexsort((numbers, sides, bucket))
        bucket = bucket[order]
        candidates = []
        for step in range(1, min(_COMPARED_AFTER, n - 1) + 1):
            same = np.flatnonzero(bucket[step:] == bucket[:-step])
            if not len(same):
                break
            candidates.append(np.sort(np.stack([order[same], order[same + step]]), axis=0))
        heads = np.flatnonzero(np.diff(bucket, prepend=bucket[:1] + np.uint64(1)))
        of_head = order[np.repeat(heads, np.diff(np.append(heads, n)))]
        apart = (sides[order] != 0) & (sides[of_head] == 0)
        candidates.append(np.sort(np.stack([of_head[apart], order[apart]]), axis=0))
        first, second = np.concatenate(candidates, axis=1)
        codes = np.union1d(codes, _alike(signatures, np.unique(first * n + second)))
    first, second = np.divmod(codes, n)
    return first, second, _similarity(signatures, first, second)


def _alike(signatures: Signatures, codes: Int64) -> Int64:
    first, second = np.divmod(codes, len(signatures))
    return codes[_similarity(signatures, first, second) >= THRESHOLD]


def _similarity(signatures: Signatures, first: Int64, second: Int64) -> NDArray[np.float64]:
    parts = [np.empty(0)]
    for start in range(0, len(first), _PAIRS_AT_ONCE):
        chosen = slice(start, start + _PAIRS_AT_ONCE)
        parts.append((signatures[first[chosen]] == signatures[second[chosen]]).mean(1))
    return np.concatenate(parts)
