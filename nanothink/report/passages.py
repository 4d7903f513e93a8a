"""Data of a page: records of runs, and held-out passages as their models route or rebuild them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nanothink.training.records import RunRecords


@dataclass(frozen=True)
class RoutedToken:
    text: str
    weights: Sequence[float]
    """(E,): weight of each expert in predicting this token."""

    @property
    def trusted(self) -> int:
        """The expert with the most weight."""
        return max(range(len(self.weights)), key=self.weights.__getitem__)


@dataclass(frozen=True)
class RoutedPassage:
    """Held-out text with a combined model's weights."""

    domain: str
    experts: tuple[str, ...]
    tokens: tuple[RoutedToken, ...]

    def shares(self) -> list[float]:
        """Share of the tokens for which each expert had the most weight."""
        counts = [0] * len(self.experts)
        for token in self.tokens:
            counts[token.trusted] += 1
        return [count / max(1, len(self.tokens)) for count in counts]


@dataclass(frozen=True)
class Rebuilding:
    """A passage rebuilt from noise of one level."""

    level: int
    right: float
    """Share of the tokens that were recovered."""
    tokens: tuple[tuple[str, bool], ...]
    """Text of each token, and True if it was recovered."""


@dataclass(frozen=True)
class RebuiltPassage:
    """Held-out text as a diffuser rebuilds it from several levels of noise."""

    domain: str
    text: str
    n_levels: int
    levels: tuple[Rebuilding, ...]


@dataclass(frozen=True)
class Missing:
    """Reason that a run has no passages."""

    reason: str


@dataclass(frozen=True)
class ReportedRun:
    label: str
    """Unique on the page."""
    records: RunRecords
    passages: tuple[RoutedPassage, ...] | tuple[RebuiltPassage, ...] | Missing = ()
    """Passages by its best checkpoint; empty for a transformer or state-space model."""
    notes: tuple[str, ...] = ()

    @property
    def is_rebuilt(self) -> bool:
        """True if its passages are those of a diffuser."""
        return not isinstance(self.passages, Missing) and any(
            isinstance(passage, RebuiltPassage) for passage in self.passages
        )
