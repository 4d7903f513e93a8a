"""Text to score models on: without the documents that they were trained on, in whichever file those are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Literal

import numpy as np

from nanothink.data.corpus import Corpus
from nanothink.data.problems import Problems
from nanothink.data.split import NOTHING, SplitRule, TrainedText
from nanothink.data.tokenizer import Tokenizer
from nanothink.data.tokens import TokenisedCorpus, TokenStream, tokenise
from nanothink.errors import DataError, SeenTextError, UsageError
from nanothink.reporter import SILENT, Reporter
from nanothink.runs.inherited_split import (
    FRACTIONS,
    all_held_out,
    binding_rules,
    described_as_seen,
    seen_documents,
    spelled,
)
from nanothink.runs.trained_model import TrainedModel
from nanothink.suggestions import again, suggest
from nanothink.wording import counted

Side = Literal["train", "val", "test", "all"]


@dataclass(frozen=True)
class ScoredText:
    """The text that models are scored on, by domain, in the tokens of one tokenizer."""

    streams: dict[str, TokenStream]
    n_seen: tuple[int, ...]
    """Number of documents that each model was trained on, or has in its vector store; 0 unless allowed."""
    left_out: Problems
    """Bad lines, which were skipped."""


class TextToScore:
    """The part of a corpus that some models may be scored on.

    ``val`` and ``test``: the documents that the rules of all models hold out, without those that one of them
    was trained on or has in its vector store. ``train`` and ``all``: such documents are refused.

    Args:
        max_tokens: upper bound on the tokens scored in each domain.
        allow_seen: neither leave out nor refuse documents that were trained on.
    """

    def __init__(
        self,
        corpus: Corpus,
        models: Sequence[TrainedModel],
        side: Side,
        *,
        max_tokens: int | None = None,
        allow_seen: bool = False,
        skip_bad_records: bool = False,
        reporter: Reporter = SILENT,
    ) -> None:
        self._corpus, self._models, self._side, self._allow_seen = corpus, models, side, allow_seen
        self._max_tokens = max_tokens
        self._skip_bad_records = skip_bad_records or any(m.config.data.skip_bad_records for m in models)
        self._reporter = reporter
        self._found: dict[object, ScoredText] = {}

    def in_tokens_of(self, tokenizer: Tokenizer) -> ScoredText:
        """The text in the tokens of this tokenizer.

        Raises:
            SeenTextError: a model was trained on some of it, or on all that could be held out.
            DataError: there is none.
        """
        key = tokenizer.fingerprint, tokenizer.chat
        if key not in self._found:
            self._found[key] = self._read(tokenizer)
        return self._found[key]

    def _read(self, tokenizer: Tokenizer) -> ScoredText:
        root, side = self._corpus.root, self._side
        rules = binding_rules(model.split for model in self._models)
        rule, trained = smallest(rules), NOTHING if self._allow_seen else self._everything()
        if side == "train":
            rule = _largest(rules)
            trained = reduce(_common, (model.split.trained for model in self._models))
        if side == "test" and not rule.test_split:
            without = next(
                model.path
                for model in self._models
                if model.split.rule in rules and not model.split.rule.test_split
            )
            raise UsageError(
                f"{without} was trained without a test side (data.test_split=0). Score what it held out for "
                f"validation: {suggest('eval --split val')}"
            )
        tokens = self._tokenise(tokenizer, rule if side != "all" else None, trained)
        of_side = {"val": tokens.val, "test": tokens.test}.get(side, tokens.train)
        streams = {domain: stream for domain, stream in of_side.items() if stream.n_tokens}
        scored = {domain: stream.sample(self._max_tokens) for domain, stream in streams.items()}
        n_seen = tuple(seen_documents(scored, model.trained_text) for model in self._models)
        if any(n_seen) and not self._allow_seen:
            raise self._refusal(scored, tokenizer)
        if tokens.kept_in_training and side in ("val", "test"):
            if not streams:
                raise SeenTextError(
                    f"Nothing in {root} was held out: {self._seen_by(tokens.train)}. Name other text: "
                    f"--data-dir DIR. Or score it all the same, and have it marked: {again('--allow-seen')}"
                )
            if not self._found:
                self._reporter.note(
                    f"Left out: {counted(tokens.kept_in_training, 'document')} of {root} that "
                    f"{spelled(rule)} would hold out, but that a model was trained on."
                )
        if not streams:
            raise DataError(f"There is no text in the {side} part of {root}.")
        return ScoredText(streams, n_seen, tokens.left_out)

    def _tokenise(
        self, tokenizer: Tokenizer, rule: SplitRule | None, trained: TrainedText
    ) -> TokenisedCorpus:
        return tokenise(
            self._corpus,
            tokenizer,
            split=rule,
            trained=trained,
            held_out=all_held_out(model.split for model in self._models),
            skip_bad_records=self._skip_bad_records,
            reporter=self._reporter,
        )

    def _everything(self) -> TrainedText:
        return reduce(TrainedText.__or__, (model.trained_text for model in self._models))

    def _refusal(self, streams: Mapping[str, TokenStream], tokenizer: Tokenizer) -> SeenTextError:
        honest = held_out(
            self._corpus,
            self._models,
            tokenizer,
            skip_bad_records=self._skip_bad_records,
            reporter=self._reporter,
        )
        ways = []
        if any(stream.n_tokens for stream in honest.val.values()):
            ways.append(f"Score what is held out: {suggest('eval --split val')}.")
        if not any(seen_documents(streams, model.split.trained) for model in self._models):
            ways.append(f"Leave the vector store out: {again('--no-vector-store')}.")
        ways.append(f"Score it all the same, and have it marked: {again('--allow-seen')}")
        return SeenTextError(
            f"{self._seen_by(streams)}. Figures on them say nothing about other text. {' '.join(ways)}"
        )

    def _seen_by(self, streams: Mapping[str, TokenStream]) -> str:
        trained_by = {name: text for model in self._models for name, text in model.seen_by().items()}
        return described_as_seen(streams, trained_by)


def held_out(
    corpus: Corpus,
    models: Sequence[TrainedModel],
    tokenizer: Tokenizer,
    *,
    skip_bad_records: bool = False,
    reporter: Reporter = SILENT,
) -> TokenisedCorpus:
    """The corpus with validation and test sides that none of the models was trained on.

    On the models' own data these are the sides that their runs held out. A domain may have no such text.
    """
    return tokenise(
        corpus,
        tokenizer,
        split=smallest(binding_rules(model.split for model in models)),
        trained=reduce(TrainedText.__or__, (model.trained_text for model in models)),
        held_out=all_held_out(model.split for model in models),
        skip_bad_records=skip_bad_records,
        reporter=reporter,
    )


def smallest(rules: Sequence[SplitRule]) -> SplitRule:
    """The rule whose sides are held out by all of them: fractions are nested."""
    return SplitRule(*(min(getattr(rule, name) for rule in rules) for name in FRACTIONS))


def _largest(rules: Sequence[SplitRule]) -> SplitRule:
    """The rule whose training side is on that of all of them."""
    fractions = [max(getattr(rule, name) for rule in rules) for name in FRACTIONS]
    try:
        return SplitRule(*fractions)
    except ValueError:
        raise UsageError(
            "There is no text that all of these checkpoints were trained on by the rules of their splits "
            f"({'; '.join(map(spelled, rules))}). Score one at a time."
        ) from None


def _common(one: TrainedText, other: TrainedText) -> TrainedText:
    """The text that both were trained on."""
    heads = {}
    for key in one.heads.keys() | other.heads.keys():
        of_each = [
            text.heads.get(key, math.inf if text.holds(np.array([key], np.uint64))[0] else 0)
            for text in (one, other)
        ]
        if min(of_each):
            heads[key] = int(min(of_each))
    return TrainedText(np.intersect1d(one.keys, other.keys), heads, np.intersect1d(one.groups, other.groups))
