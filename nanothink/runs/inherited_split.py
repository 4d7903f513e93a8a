"""The split that a run takes over from the models it builds on, or from its own checkpoint.

A checkpoint has the rule of its split and the hashes of all documents that any part of it was trained on
(checkpoints/split_record.py). A run that builds on it inherits the rule, and keeps what it was trained on out
of its own validation text.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import reduce

import numpy as np

from nanothink.checkpoints.split_record import SplitRecord
from nanothink.config.run import ResolvedConfig
from nanothink.data.corpus import Corpus
from nanothink.data.lines import shown
from nanothink.data.split import NOTHING, HeldOutText, SplitRule, TrainedText
from nanothink.data.tokenizer import Tokenizer
from nanothink.data.tokens import TokenisedCorpus, TokenStream, tokenise
from nanothink.errors import DataError, SeenTextError, UsageError
from nanothink.reporter import SILENT, Reporter
from nanothink.wording import counted

_NAMED_DOCUMENTS = 3
FRACTIONS = ("val_split", "test_split")


@dataclass(frozen=True)
class InheritedSplit:
    """The split that a run takes over from the models it builds on, or from its own checkpoint."""

    rule: SplitRule
    trained_by: Mapping[str, TrainedText]
    """Documents that each model, or a part of it, was trained on, by the model's path."""
    held_out: HeldOutText = field(default_factory=HeldOutText)
    """Documents that models with the same rule held out; they stay on their sides."""
    store: TrainedText = field(default_factory=TrainedText)
    """Documents in the vector store that the run will use."""

    @classmethod
    def of(cls, parts: Mapping[str, SplitRecord], resolved: ResolvedConfig) -> InheritedSplit:
        """The rule of a run that builds on ``parts``, and the text that they were trained on.

        A fraction in the settings overrides those of the parts, whose smallest is taken otherwise. Sides of
        different fractions are nested, so all parts held out what the smallest fraction holds out.

        Raises:
            UsageError: the fractions together leave nothing to train on.
        """
        fractions = {name: getattr(resolved.config.data, name) for name in FRACTIONS}
        rules = binding_rules(parts.values()) if any(part.domains for part in parts.values()) else []
        for name in FRACTIONS if rules else ():
            source = resolved.sources[f"data.{name}"]
            if source in ("default", "checkpoint") or source.startswith("preset "):
                fractions[name] = min(getattr(rule, name) for rule in rules)
        try:
            rule = SplitRule(**fractions)
        except ValueError:
            asked = " and ".join(f"data.{name}={value}" for name, value in fractions.items())
            raise UsageError(
                f"{asked} leave nothing to train on: together they must be below 1. A fraction that is not "
                f"set comes from {', '.join(parts)}."
            ) from None
        return cls(
            rule,
            {name: part.trained for name, part in parts.items()},
            all_held_out(part for part in parts.values() if part.rule == rule),
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
        """The corpus. Documents that a part was trained on, or the store holds, are on the training side.

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


def binding_rules(records: Iterable[SplitRecord]) -> list[SplitRule]:
    """The rules of those that were trained on a corpus; of published models alone, the default."""
    all_records = list(records)
    return [record.rule for record in all_records if record.domains] or [all_records[0].rule]


def all_held_out(records: Iterable[SplitRecord]) -> HeldOutText:
    return reduce(HeldOutText.__or__, (record.held_out for record in records), HeldOutText())


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


def described_as_seen(streams: Mapping[str, TokenStream], trained_by: Mapping[str, TrainedText]) -> str:
    """The number of documents that each model was trained on, and the first of them, in words."""
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


def spelled(rule: SplitRule) -> str:
    """The fractions of a rule, as settings."""
    fractions = ((name, getattr(rule, name)) for name in FRACTIONS)
    return " and ".join(f"data.{name}={value}" for name, value in fractions if value)
