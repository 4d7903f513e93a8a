"""Counts of a corpus, for ``nanothink data inspect``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nanothink.data.corpus import Corpus
from nanothink.data.tokens import Documents, TokenisedCorpus, TokenStream

_LARGEST_BARS = 14
_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class DomainSummary:
    """Counts of one domain. ``n_tokens`` includes the end-of-text token of each record.

    If the domain's only text is cut, its sides have a few tokens more than the whole.
    """

    name: str
    n_files: int
    n_records: int
    n_bytes: int
    n_tokens: int
    n_train_tokens: int
    n_val_tokens: int
    n_test_tokens: int
    n_train_blocks: int
    n_duplicates: int
    """Records whose text occurred before, but for white space and the form of Unicode, in this domain (in any
    domain for the total)."""
    median_tokens: float
    longest_tokens: int
    n_targets: int
    """Tokens that are trained on: all of a text, the answers of a conversation."""
    n_conversations: int
    n_answers: int


@dataclass(frozen=True)
class CorpusSummary:
    domains: tuple[DomainSummary, ...]
    total: DomainSummary
    length_edges: tuple[int, ...]
    """Edges of the histogram of record lengths, in tokens; one more than there are counts."""
    length_counts: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, domains by name."""
        return {
            "domains": {d.name: _without_name(d) for d in self.domains},
            "total": _without_name(self.total),
            "record_lengths": {"edges": self.length_edges, "counts": self.length_counts},
        }


def summarise(
    corpus: Corpus, whole: TokenisedCorpus, split: TokenisedCorpus, *, block_tokens: int
) -> CorpusSummary:
    """Count records, bytes, tokens, blocks of ``block_tokens``, duplicates and lengths.

    Args:
        whole: the corpus tokenised without a split, for the records as they stand in the files.
        split: the same with one.
    """
    domains = []
    lengths, keys = [], []
    for name, files in corpus.domains.items():
        documents = whole.train[name].documents()
        sides = (split.train[name], split.val[name], split.test[name])
        domains.append(_summarise(name, len(files), documents, whole.train[name], sides, block_tokens))
        lengths.append(documents.n_tokens)
        keys.append(documents.keys)
    all_lengths, all_keys = np.concatenate(lengths), np.concatenate(keys)
    summed = {field: sum(getattr(d, field) for d in domains) for field in _SUMMED}
    total = DomainSummary(
        name="all",
        n_duplicates=len(all_keys) - len(np.unique(all_keys)),
        median_tokens=float(np.median(all_lengths)),
        longest_tokens=int(all_lengths.max()),
        **summed,
    )
    edges = _edges(int(all_lengths.max()))
    counts, _ = np.histogram(all_lengths, bins=[*edges[:-1], edges[-1] + 1])
    return CorpusSummary(tuple(domains), total, edges, tuple(int(c) for c in counts))


_SUMMED = tuple(
    (
        "n_files n_records n_bytes n_tokens n_train_tokens n_val_tokens n_test_tokens n_train_blocks "
        "n_targets n_conversations n_answers"
    ).split()
)


def _summarise(
    name: str,
    n_files: int,
    documents: Documents,
    stream: TokenStream,
    sides: Sequence[TokenStream],
    block_tokens: int,
) -> DomainSummary:
    train, val, test = sides
    n_conversations, n_answers = _conversations(stream, documents.n_tokens)
    return DomainSummary(
        name=name,
        n_files=n_files,
        n_records=len(documents.keys),
        n_bytes=int(documents.n_bytes.sum()),
        n_tokens=int(documents.n_tokens.sum()),
        n_train_tokens=train.n_tokens,
        n_val_tokens=val.n_tokens,
        n_test_tokens=test.n_tokens,
        n_train_blocks=train.n_blocks(block_tokens),
        n_duplicates=len(documents.keys) - len(np.unique(documents.keys)),
        median_tokens=float(np.median(documents.n_tokens)),
        longest_tokens=int(documents.n_tokens.max()),
        n_targets=stream.n_targets,
        n_conversations=n_conversations,
        n_answers=n_answers,
    )


def _conversations(stream: TokenStream, sizes: NDArray[np.int64]) -> tuple[int, int]:
    """Documents of which a part is not trained on, and the parts of these that are."""
    if not stream.has_conversations:
        return 0, 0
    ends, questions = np.cumsum(sizes), stream.with_bos_targets()
    starts, first, n_conversations, n_answers = ends - sizes, 0, 0, 0
    while first < len(sizes):
        stop = max(first + 1, int(np.searchsorted(ends, starts[first] + _AT_ONCE)))
        trained = questions.trained(int(starts[first]), int(ends[stop - 1]))
        bounds = starts[first:stop] - starts[first]
        begun = trained & ~np.append(False, trained[:-1])
        begun[bounds] = trained[bounds]
        partly = ~np.logical_and.reduceat(trained, bounds)
        n_conversations += int(partly.sum())
        n_answers += int(np.add.reduceat(begun, bounds, dtype=np.int64)[partly].sum())
        first = stop
    return n_conversations, n_answers


def _edges(longest: int) -> tuple[int, ...]:
    """Powers of two up to the longest record: lengths of texts spread over orders of magnitude."""
    edges: Sequence[int] = [0]
    while edges[-1] <= longest:
        edges = [*edges, max(16, 2 * edges[-1])]
    return tuple(edges[-_LARGEST_BARS:]) if len(edges) <= _LARGEST_BARS else (0, *edges[1 - _LARGEST_BARS :])


def _without_name(summary: DomainSummary) -> dict[str, Any]:
    values = asdict(summary)
    del values["name"]
    return values
