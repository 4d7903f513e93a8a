"""The text that a model was not trained on: what a run may validate on, and what models may be scored on.

A checkpoint has the rule of its split and the hashes of all documents that any part of it was trained on
(checkpoints/split_record.py). A run that builds on others inherits the rule, and keeps what they were trained
on out of its own validation. Whatever is scored is compared with those hashes, wherever the text lies now.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import TYPE_CHECKING, Literal

import numpy as np

from nanothink.checkpoints import SplitRecord
from nanothink.config.run import ResolvedConfig
from nanothink.data.corpus import Corpus
from nanothink.data.lines import shown
from nanothink.data.problems import Problems
from nanothink.data.split import NOTHING, HeldOutText, SplitRule, TrainedText
from nanothink.data.tokenizer import Tokenizer
from nanothink.data.tokens import TokenisedCorpus, TokenStream, tokenise
from nanothink.errors import DataError, SeenTextError, UsageError, counted
from nanothink.reporter import SILENT, Reporter

if TYPE_CHECKING:
    from nanothink.runs.loading import LoadedModel

_NAMED_DOCUMENTS = 3
_FRACTIONS = ("val_split", "test_split")


@dataclass(frozen=True)
class InheritedSplit:
    """The split that a run takes over from the models it builds on, or from its own checkpoint."""

    rule: SplitRule
    trained_by: Mapping[str, TrainedText]
    """By the path of each model: the documents that any part of it was trained on."""
    held_out: HeldOutText = field(default_factory=HeldOutText)
    """Documents that models of this very rule held out, and which so stay on their sides."""
    store: TrainedText = field(default_factory=TrainedText)
    """Documents in the vector store that the run is to use."""

    @classmethod
    def of(cls, parts: Mapping[str, SplitRecord], resolved: ResolvedConfig) -> InheritedSplit:
        """The rule of a run that builds on ``parts``, and the text that they were trained on.

        A fraction that was set by hand holds; else it is the smallest of the parts'. The sides of different
        fractions are nested, so that all of them held out what the smallest one holds out.

        Raises:
            UsageError: fractions set by hand and inherited ones leave nothing to train on.
        """
        fractions = {name: getattr(resolved.config.data, name) for name in _FRACTIONS}
        rules = binding_rules(parts.values()) if any(part.domains for part in parts.values()) else []
        for name in _FRACTIONS if rules else ():
            source = resolved.sources[f"data.{name}"]
            if source in ("default", "checkpoint") or source.startswith("preset "):
                fractions[name] = min(getattr(rule, name) for rule in rules)
        try:
            rule = SplitRule(**fractions)
        except ValueError:
            asked = " and ".join(f"data.{name}={value}" for name, value in fractions.items())
            raise UsageError(
                f"{asked} leave nothing to train on: together they must be below 1. What is not set by hand "
                f"comes from {', '.join(parts)}."
            ) from None
        return cls(
            rule,
            {name: part.trained for name, part in parts.items()},
            _all_held_out(part for part in parts.values() if part.rule == rule),
        )

    @property
    def trained(self) -> TrainedText:
        """The documents that any part was trained on."""
        return reduce(TrainedText.__or__, self.trained_by.values(), NOTHING)

    def record(self, tokens: TokenisedCorpus) -> SplitRecord:
        """The split of a model that is trained on these tokens as well."""
        trained = self.trained | tokens.trained_text
        return SplitRecord(self.rule, tuple(sorted(tokens.train)), trained, tokens.held_out)

    def tokenise(
        self,
        corpus: Corpus,
        tokenizer: Tokenizer,
        *,
        skip_bad_records: bool,
        reporter: Reporter = SILENT,
    ) -> TokenisedCorpus:
        """The corpus, with what was trained on, or is in the vector store, on the training side.

        Raises:
            SeenTextError: that leaves nothing to validate on.
            DataError: all of a domain is held out.
        """
        tokens = tokenise(
            corpus,
            tokenizer,
            split=self.rule,
            trained=self.trained | self.store,
            held_out=self.held_out,
            skip_bad_records=skip_bad_records,
            reporter=reporter,
        )
        if not any(stream.n_tokens for stream in tokens.val.values()):
            raise SeenTextError(
                f"No document of {corpus.root} is left to validate on: {self._trained_on(tokens.train)}. "
                "Add text that they were not trained on."
            )
        if bare := [domain for domain, stream in tokens.train.items() if not stream.n_tokens]:
            raise DataError(
                f"Domain '{bare[0]}' of {corpus.root} has nothing to train on: all its documents are held "
                f"out, as {' and '.join(self.trained_by)} held them out. Add text to it, or leave it out: "
                "--domains."
            )
        if n := tokens.kept_in_training:
            stay = "stays in training: it was" if n == 1 else "stay in training: they were"
            reporter.note(
                f"{counted(n, 'document')} that {spelled(self.rule)} would hold out {stay} trained on before "
                f"({', '.join(self._named())})."
            )
        for domain, stream in tokens.val.items():
            if not stream.n_tokens:
                why = self._trained_on({domain: tokens.train[domain]})
                reporter.note(f"Domain '{domain}' is not validated on: {why}.")
        return tokens

    def _named(self) -> dict[str, TrainedText]:
        return {**self.trained_by, **({"the vector store": self.store} if len(self.store.keys) else {})}

    def _trained_on(self, streams: Mapping[str, TokenStream]) -> str:
        return described_as_seen(streams, self._named())


Side = Literal["train", "val", "test", "all"]


@dataclass(frozen=True)
class ScoredText:
    """The text that models are scored on, by domain, in the tokens of one of them."""

    streams: dict[str, TokenStream]
    n_seen: tuple[int, ...]
    """Documents of it that each model was trained on, or has in its vector store; none unless allowed."""
    left_out: Problems
    """Bad lines that were passed over."""


class TextToScore:
    """A corpus, as far as some models may be scored on it.

    Under ``val`` and ``test`` it is what the rules of all of them hold out, without the text that one of them
    was trained on, or has in its vector store. Under ``train`` and ``all`` such text is refused.

    Args:
        max_tokens: at most so many of each domain will be scored.
        allow_seen: neither leave out nor refuse text that was trained on.
        retry: the command that scores them, without --split, for messages.
    """

    def __init__(
        self,
        corpus: Corpus,
        models: Sequence[LoadedModel],
        side: Side,
        *,
        max_tokens: int | None = None,
        allow_seen: bool = False,
        skip_bad_records: bool = False,
        retry: str = "nanothink eval",
        reporter: Reporter = SILENT,
    ) -> None:
        self._corpus, self._models, self._side, self._allow_seen = corpus, models, side, allow_seen
        self._max_tokens = max_tokens
        self._skip_bad_records = skip_bad_records or any(m.config.data.skip_bad_records for m in models)
        self._retry, self._reporter = retry, reporter
        self._found: dict[str, ScoredText] = {}

    def in_tokens_of(self, tokenizer: Tokenizer) -> ScoredText:
        """The text, cut up by this tokenizer.

        Raises:
            SeenTextError: a model was trained on some of it, or on all that could be held out.
            DataError: there is none.
        """
        if tokenizer.fingerprint not in self._found:
            self._found[tokenizer.fingerprint] = self._read(tokenizer)
        return self._found[tokenizer.fingerprint]

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
                f"validation: {self._retry} --split val"
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
                    "--data-dir DIR. Or score it all the same, and have it marked: --allow-seen"
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
            held_out=_all_held_out(model.split for model in self._models),
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
            ways.append(f"Score what is held out: {self._retry} --split val.")
        if not any(seen_documents(streams, model.split.trained) for model in self._models):
            ways.append("Leave the vector store out: --no-vector-store.")
        ways.append("Score it all the same, and have it marked: --allow-seen")
        return SeenTextError(
            f"{self._seen_by(streams)}. Figures on them say nothing about other text. {' '.join(ways)}"
        )

    def _seen_by(self, streams: Mapping[str, TokenStream]) -> str:
        trained_by = {name: text for model in self._models for name, text in model.seen_by().items()}
        return described_as_seen(streams, trained_by)


def described_as_seen(streams: Mapping[str, TokenStream], trained_by: Mapping[str, TrainedText]) -> str:
    """How many documents of some text were trained on by which model, and where the first of them are."""
    n_documents = sum(stream.n_documents for stream in streams.values())
    parts = []
    for name, trained in trained_by.items():
        if n := seen_documents(streams, trained):
            verb = "in" if name.startswith("the vector store") else "trained on by"
            parts.append(
                f"{n:,} of {counted(n_documents, 'document')} {'was' if n == 1 else 'were'} {verb} {name}"
            )
    everything = reduce(TrainedText.__or__, trained_by.values(), NOTHING)
    return f"{'; '.join(parts)} ({first_seen(streams, everything)})"


def held_out(
    corpus: Corpus,
    models: Sequence[LoadedModel],
    tokenizer: Tokenizer,
    *,
    skip_bad_records: bool = False,
    reporter: Reporter = SILENT,
) -> TokenisedCorpus:
    """A corpus whose validation and test sides are text that none of the models was trained on.

    On their own data that is just what their runs held out. A domain may have no such text.
    """
    return tokenise(
        corpus,
        tokenizer,
        split=smallest(binding_rules(model.split for model in models)),
        trained=reduce(TrainedText.__or__, (model.trained_text for model in models)),
        held_out=_all_held_out(model.split for model in models),
        skip_bad_records=skip_bad_records,
        reporter=reporter,
    )


def _all_held_out(records: Iterable[SplitRecord]) -> HeldOutText:
    return reduce(HeldOutText.__or__, (record.held_out for record in records), HeldOutText())


def binding_rules(records: Iterable[SplitRecord]) -> list[SplitRule]:
    """The rules of those that were trained on a corpus; of published models alone, the default."""
    all_records = list(records)
    return [record.rule for record in all_records if record.domains] or [all_records[0].rule]


def smallest(rules: Sequence[SplitRule]) -> SplitRule:
    """The rule whose sides are held out by all of them: fractions are nested."""
    return SplitRule(*(min(getattr(rule, name) for rule in rules) for name in _FRACTIONS))


def _largest(rules: Sequence[SplitRule]) -> SplitRule:
    """The rule whose training side is on that of all of them."""
    fractions = [max(getattr(rule, name) for rule in rules) for name in _FRACTIONS]
    try:
        return SplitRule(*fractions)
    except ValueError:
        raise UsageError(
            "There is no text that all of these checkpoints were trained on by the rules of their splits "
            f"({'; '.join(map(spelled, rules))}). Score one at a time."
        ) from None


def seen_documents(streams: Mapping[str, TokenStream], trained: TrainedText) -> int:
    """Number of documents of some text that were trained on."""
    return sum(int(trained.holds(stream.documents().keys).sum()) for stream in streams.values())


def first_seen(streams: Mapping[str, TokenStream], trained: TrainedText) -> str:
    """File and line of the first documents that were trained on, and how many more there are."""
    named: list[str] = []
    total = 0
    for stream in streams.values():
        documents = stream.documents()
        seen = np.flatnonzero(trained.holds(documents.keys))
        total += len(seen)
        named += [
            f"{shown(documents.paths[documents.files[i]])}:{documents.lines[i]}"
            for i in seen[: _NAMED_DOCUMENTS - len(named)]
        ]
    return ", ".join(named) + (f" and {total - len(named):,} more" if total > len(named) else "")


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


def spelled(rule: SplitRule) -> str:
    """The fractions of a rule, as settings."""
    fractions = ((name, getattr(rule, name)) for name in _FRACTIONS)
    return " and ".join(f"data.{name}={value}" for name, value in fractions if value)
