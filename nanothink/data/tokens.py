"""Token streams: each file is tokenised once, each side of the split is read as one stream.

1. The tokens of each file are looked up by its content; missing ones are built (token_builder.py).
2. Each document is assigned to a side (sides.py). The only text of a domain is cut (split.py).
3. A ``TokenStream`` concatenates the documents of one domain and side, each with its EOS, without copying: it
   lists the ranges of the token files. Another ``val_split`` or selection of domains therefore costs neither
   tokenising nor disk.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import orjson
from numpy.typing import NDArray

from nanothink.data.corpus import Corpus
from nanothink.data.encoding import Tokenizer
from nanothink.data.problems import Problems
from nanothink.data.sides import CUT, TEST, TRAIN, VAL, Sides, assign_sides, group_keys, sources_count
from nanothink.data.split import NOTHING, NOTHING_HELD_OUT, HeldOutText, SplitRule, TrainedText, hashed
from nanothink.data.token_builder import Cut, TokenBuilder
from nanothink.data.token_files import DOCUMENT, TokenFile
from nanothink.errors import DataError
from nanothink.reporter import SILENT, Reporter

_COUNTED_AT_ONCE = 1 << 20

IGNORE = -100
"""Target that is not to be predicted (PyTorch's own convention)."""

SAMPLE_SEED = 43
"""Seed of ``TokenStream.sample``: fixed like the split's, and another one."""

FIT_SEED = 44
"""That of ``TokenStream.part_to_fit``."""

Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class Documents:
    """The documents of a stream, as columns with one value per document."""

    n_tokens: Int64
    """Tokens, with EOS."""
    n_bytes: Int64
    """UTF-8 bytes of the text; of a conversation those of its answers."""
    keys: NDArray[np.uint64]
    """Key of the text (split.text_key)."""
    groups: NDArray[np.uint64]
    """Key of the group (sides.group_keys)."""
    lines: Int64
    """Line in its file."""
    files: Int64
    """Index of its file in ``paths``."""
    paths: tuple[str, ...]
    """Files, relative to the data root."""


class TokenStream:
    """The documents of one domain and side, each followed by EOS, as one sequence of tokens.

    With ``bos_id`` each text begins with that token, which is not trained on: it says nothing of the text.
    ``n_tokens`` includes both; ``n_bytes`` is the UTF-8 text alone, of a conversation that of its answers.
    """

    def __init__(
        self,
        domain: str,
        eos_id: int,
        parts: Sequence[tuple[TokenFile, NDArray[np.bool_]]],
        sources_count: bool = True,
        bos_id: int | None = None,
    ) -> None:
        self.domain, self._bos_id = domain, bos_id
        self._sources_count = sources_count
        self._eos_id = eos_id
        self._parts = [(file, chosen) for file, chosen in parts if chosen.any()]
        runs, self.n_bytes = [], 0
        for file, chosen in self._parts:
            documents = file.documents
            runs.append(_runs(documents["end"], chosen))
            self.n_bytes += int(documents["n_bytes"][chosen].sum())
        sizes = np.concatenate([stops - starts for starts, stops in runs] or [np.empty(0, np.int64)])
        # Run r holds tokens [_ends[r] - size, _ends[r]) of the stream, found at _starts[r] of its file.
        self._ends: Int64 = np.cumsum(sizes)
        self._starts: Int64 = np.concatenate([starts for starts, _ in runs] or [np.empty(0, np.int64)])
        self._files = np.repeat(np.arange(len(runs)), [len(starts) for starts, _ in runs])
        self.n_tokens = int(sizes.sum())
        self.n_documents = sum(int(chosen.sum()) for _, chosen in self._parts)

    @property
    def has_conversations(self) -> bool:
        """Whether a file of it holds conversations, so that some tokens may not be trained on."""
        return any(file.bits is not None for file, _ in self._parts)

    @cached_property
    def n_targets(self) -> int:
        """Tokens that are trained on: all of a text and its EOS, the answers of a conversation."""
        if not self.has_conversations:
            return self.n_tokens - (0 if self._bos_id is None else self.n_documents)
        starts = range(0, self.n_tokens, _COUNTED_AT_ONCE)
        ends = (min(start + _COUNTED_AT_ONCE, self.n_tokens) for start in starts)
        return sum(int(self.trained(*part).sum()) for part in zip(starts, ends, strict=True))

    def with_all_targets(self) -> TokenStream:
        """The same with every token trained on, for what has to know the whole text."""
        parts = [(replace(file, bits=None), chosen) for file, chosen in self._parts]
        return TokenStream(self.domain, self._eos_id, parts, self._sources_count)

    def with_bos_targets(self) -> TokenStream:
        """The same with BOS trained on, so that only the questions of conversations are not."""
        return TokenStream(self.domain, self._eos_id, self._parts, self._sources_count)

    def n_blocks(self, length: int) -> int:
        """Blocks of ``length`` targets; the last one may be partly filled."""
        return -(-self.n_tokens // length)

    def block(self, index: int, length: int) -> tuple[Int64, Int64]:
        """Inputs and targets of block ``index``, both (length,) int64.

        The stream reads [EOS] d1 EOS d2 EOS ..., each d with its BOS if there is one; block k predicts tokens
        kL to kL + L - 1 from the token before each, so that over all blocks every token is a target exactly
        once. Past the end, inputs are EOS and targets IGNORE; so are targets that are not trained on.
        """
        if not 0 <= index < self.n_blocks(length):
            raise IndexError(f"block {index} of {self.n_blocks(length)} in domain '{self.domain}'")
        first = index * length
        tokens = self._read(max(first - 1, 0), min(first + length, self.n_tokens))
        if first == 0:
            tokens = np.concatenate(([self._eos_id], tokens))
        n = len(tokens) - 1  # tokens holds the one before the block as well
        inputs = np.full(length, self._eos_id, dtype=np.int64)
        targets = np.full(length, IGNORE, dtype=np.int64)
        inputs[: min(n + 1, length)] = tokens[:length]
        targets[:n] = tokens[1:]
        if self.has_conversations or self._bos_id is not None:
            targets[:n][~self.trained(first, first + n)] = IGNORE
        return inputs, targets

    def sample(self, max_tokens: int | None) -> TokenStream:
        """A random sample of whole documents of at most ``max_tokens`` tokens, at least one; in order.

        Documents are drawn by a hash of their text that has nothing to do with the split's, so that a file
        sorted by difficulty gives no easier sample. A larger sample holds the smaller ones.
        """
        if max_tokens is None or max_tokens >= self.n_tokens:
            return self
        documents = self.documents()
        order = np.argsort(hashed(documents.keys, SAMPLE_SEED), kind="stable")
        fit = int(np.searchsorted(np.cumsum(documents.n_tokens[order]), max_tokens, side="right"))
        drawn = np.zeros(self.n_documents, np.bool_)
        drawn[order[: max(fit, 1)]] = True
        return self._part(drawn)

    def part_to_fit(self, max_tokens: int) -> TokenStream:
        """Whole documents of at most ``max_tokens`` tokens and half of the text, perhaps none; in order.

        They are drawn by another hash than those of ``sample``, which so are as likely to be in it as others.
        """
        documents = self.documents()
        order = np.argsort(hashed(documents.keys, FIT_SEED), kind="stable")
        most = min(max_tokens, self.n_tokens // 2)
        fit = int(np.searchsorted(np.cumsum(documents.n_tokens[order]), most, side="right"))
        drawn = np.zeros(self.n_documents, np.bool_)
        drawn[order[:fit]] = True
        return self._part(drawn)

    def without(self, keys: NDArray[np.uint64]) -> TokenStream:
        """The documents whose keys are not among these."""
        return self._part(~np.isin(self.documents().keys, keys))

    def _part(self, drawn: NDArray[np.bool_]) -> TokenStream:
        """The documents for which ``drawn`` is True."""
        parts, first = [], 0
        for file, chosen in self._parts:
            count = int(chosen.sum())
            of_file = np.zeros(len(chosen), np.bool_)
            of_file[chosen] = drawn[first : first + count]
            parts.append((file, of_file))
            first += count
        return TokenStream(self.domain, self._eos_id, parts, self._sources_count, self._bos_id)

    def documents(self) -> Documents:
        """Properties of each document, in the stream's order; read from the disk at each call."""
        rows, sizes = [], []
        for file, chosen in self._parts:
            documents = file.documents
            rows.append(documents[chosen])
            sizes.append(np.diff(documents["end"], prepend=0)[chosen])
        found = np.concatenate(rows or [np.empty(0, DOCUMENT)])
        return Documents(
            n_tokens=np.concatenate(sizes or [np.empty(0, np.int64)]),
            n_bytes=found["n_bytes"].copy(),
            keys=found["key"].copy(),
            groups=group_keys(found, self._sources_count),
            lines=found["line"].copy(),
            files=np.repeat(np.arange(len(rows)), [len(of_file) for of_file in rows]),
            paths=tuple(file.path for file, _ in self._parts),
        )

    def _read(self, start: int, stop: int) -> Int64:
        """Tokens [start, stop) of the stream, copied."""
        found = np.empty(stop - start, dtype=np.int64)
        for at, file, part in self._pieces(start, stop):
            found[at : at + part.stop - part.start] = file.tokens[part]
        return found

    def trained(self, start: int, stop: int) -> NDArray[np.bool_]:
        """Which of the tokens [start, stop) of the stream are trained on."""
        found = np.empty(stop - start, np.bool_)
        for at, file, part in self._pieces(start, stop):
            found[at : at + part.stop - part.start] = file.trained(part.start, part.stop)
        if self._bos_id is not None:
            found &= self._read(start, stop) != self._bos_id
        return found

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[int, TokenFile, slice]]:
        """The files that [start, stop) lies in: the place of each part, its file, and its tokens there."""
        run = int(np.searchsorted(self._ends, start, side="right"))
        at = start
        while at < stop:
            end = int(self._ends[run])
            begin = end - self._run_size(run)
            upto = min(stop, end)
            source = int(self._starts[run]) - begin
            file = self._parts[int(self._files[run])][0]
            yield at - start, file, slice(source + at, source + upto)
            at, run = upto, run + 1

    def _run_size(self, run: int) -> int:
        return int(self._ends[run] - (self._ends[run - 1] if run else 0))

    def __repr__(self) -> str:
        return f"TokenStream({self.domain!r}, n_tokens={self.n_tokens}, n_documents={self.n_documents})"


def _runs(ends: Int64, chosen: NDArray[np.bool_]) -> tuple[Int64, Int64]:
    """Start and stop, in tokens of their file, of each run of consecutive chosen documents."""
    change = np.flatnonzero(np.diff(chosen.astype(np.int8), prepend=0, append=0))
    limits = np.concatenate(([0], ends))
    return limits[change[0::2]], limits[change[1::2]]


@dataclass(frozen=True)
class TokenisedCorpus:
    train: dict[str, TokenStream]
    val: dict[str, TokenStream]
    test: dict[str, TokenStream]
    """By domain, sorted. All three have every domain, some without text if nothing is held out."""
    fingerprint: str
    """Equal for two runs if and only if they have the same blocks on the same sides."""
    tokenizer_fingerprint: str
    left_out: Problems
    """Bad lines that were skipped (``skip_bad_records``), by kind."""
    trained_text: TrainedText
    """The text of the training side."""
    held_out: HeldOutText
    """The text of the other sides, without texts that are cut."""
    kept_in_training: int
    """Documents that the rule would hold out, but that are in ``trained``."""

    @property
    def has_conversations(self) -> bool:
        return any(s.has_conversations for side in (self.train, self.val, self.test) for s in side.values())

    @property
    def skipped_records(self) -> int:
        """Number of bad lines that were skipped."""
        return len(self.left_out)


def tokenise(
    corpus: Corpus,
    tokenizer: Tokenizer,
    *,
    split: SplitRule | None,
    trained: TrainedText = NOTHING,
    held_out: HeldOutText = NOTHING_HELD_OUT,
    skip_bad_records: bool = False,
    reporter: Reporter = SILENT,
) -> TokenisedCorpus:
    """Tokenise what is not tokenised yet, split the corpus, and open the streams.

    Without a ``split`` nothing is held out or cut: the training side is all there is, in its order. Documents
    in ``trained`` are on the training side whatever the rule says, others in ``held_out`` on the side that is
    theirs there. Notes are given where another folder is used, something damaged is made again, or another
    process is waited for.

    Raises BadRecordsError for lines that are no records (unless they are to be skipped), DataError for
    a domain without any text, or with nothing to train or validate on; TextLostError for a document that the
    tokenizer does not give back; StorageError when the tokens cannot be kept. With ``trained`` a domain may
    have nothing to validate on.
    """
    builder = TokenBuilder(corpus, tokenizer, skip_bad_records, reporter)
    files = builder.files()
    for domain, own in files.items():
        if not any(len(file.rows) for _, file in own):
            raise DataError(
                f"Domain '{domain}' in {corpus.root} holds no valid record. Add some, or leave it out with "
                "--domains."
            )
    rows = {domain: np.concatenate([file.documents for _, file in own]) for domain, own in files.items()}
    assigned = assign_sides(rows, split, trained, held_out)
    cuts: dict[int, Cut] = {}
    kept_in_training = 0
    if split is not None:
        for key, domain in assigned.cut.items():
            cuts[key] = builder.cut(key, corpus.domains[domain], domain, split, trained.heads.get(key, 0))
        if not trained.is_empty:
            drawn = assign_sides(rows, split).sides
            kept_in_training = sum(
                int(((own == TRAIN) & np.isin(drawn[domain], (VAL, TEST))).sum())
                for domain, own in assigned.sides.items()
            )
    streams: dict[int, dict[str, TokenStream]] = {TRAIN: {}, VAL: {}, TEST: {}}
    for domain in sorted(files):
        sides = assigned.sides[domain]
        parts = _by_file(files[domain], sides)
        cut_here = [cuts[key].file for key in np.unique(rows[domain]["key"][sides == CUT]).tolist()]
        for side, of_side in streams.items():
            chosen = [(file, own == side) for file, own in parts]
            chosen += [(file, _part_of_cut(len(file.rows), side)) for file in cut_here]
            sources = sources_count(rows[domain])
            of_side[domain] = TokenStream(domain, tokenizer.eos_id, chosen, sources, tokenizer.bos_id)
        if split is not None and trained.is_empty:
            _check_both_sides(domain, streams[TRAIN][domain], streams[VAL][domain])
    side_digests = {d: hashlib.blake2b(sides.tobytes()).hexdigest() for d, sides in assigned.sides.items()}
    identity = [
        tokenizer.fingerprint,
        [
            [d, side_digests[d], [[digest, file.checksum] for digest, file in own]]
            for d, own in sorted(files.items())
        ],
        sorted(cut.name for cut in cuts.values()),
    ]
    keys_on = {
        side: np.unique(np.concatenate([own["key"][assigned.sides[d] == side] for d, own in rows.items()]))
        for side in streams
    }
    heads = np.array([cut.file.documents["key"][0] for cut in cuts.values()], np.uint64)
    return TokenisedCorpus(
        train=streams[TRAIN],
        val=streams[VAL],
        test=streams[TEST],
        fingerprint=hashlib.blake2b(orjson.dumps(identity), digest_size=32).hexdigest(),
        tokenizer_fingerprint=tokenizer.fingerprint,
        left_out=builder.left_out,
        trained_text=TrainedText(
            np.union1d(keys_on[TRAIN], heads),
            {key: cut.trained_chars for key, cut in cuts.items()},
            assigned.trained_groups,
        ),
        held_out=HeldOutText(keys_on[VAL], keys_on[TEST]),
        kept_in_training=kept_in_training,
    )


def _check_both_sides(domain: str, train: TokenStream, val: TokenStream) -> None:
    if train.n_documents and val.n_documents:
        return
    purpose = "validate" if train.n_documents else "train"
    raise DataError(
        f"Domain '{domain}' has nothing to {purpose} on: all its texts are in other domains too, where they "
        "are needed on the other side. Add text of its own to it, or leave it out with --domains."
    )


def _part_of_cut(n_parts: int, side: int) -> NDArray[np.bool_]:
    chosen: NDArray[np.bool_] = np.arange(n_parts) == side  # TRAIN, VAL, TEST are 0, 1, 2
    return chosen


def _by_file(files: Sequence[tuple[str, TokenFile]], sides: Sides) -> list[tuple[TokenFile, Sides]]:
    """Pair each file with its part of the domain's sides."""
    ends = np.cumsum([len(file.rows) for _, file in files])
    return [(file, own) for (_, file), own in zip(files, np.split(sides, ends[:-1]), strict=True)]
