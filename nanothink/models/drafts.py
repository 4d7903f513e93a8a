"""Speculative decoding: a cheap model drafts tokens, one pass of the whole model predicts after all of them.

Leviathan, Kalman and Matias 2023, "Fast inference from transformers via speculative decoding". They accept a
drafted token at random, so that the text has the right distribution. Here a draw is a pure function of (seed,
position, logits), by noise that draft and whole share (inference/sampling.py): the text itself draws from the
whole's predictions alone, as it does without drafts, and a draft serves if it is the token that was drawn. So
drafts change the time of a text and nothing else in it.

Notation as in the paper: gamma drafted tokens, alpha the share that serves, c the cost of one more of them
against a plain step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

MOST_DRAFTS = 6
"""Most drafted tokens of a pass."""

_HIGHEST_COST = 0.6  # at which four right drafts of five would save a tenth of the time
_PROBE_EVERY = 24  # plain steps after which one draft says whether drafts would serve by now
_MEMORY = 0.97  # weight that what was seen keeps at each newer draft

_enabled = True


@contextmanager
def no_drafts() -> Iterator[None]:
    """Within the block every step is a plain one: for tests and measurements."""
    global _enabled
    before, _enabled = _enabled, False
    try:
        yield
    finally:
        _enabled = before


P = TypeVar("P")
P_co = TypeVar("P_co", covariant=True)


class Drafting(Protocol[P_co]):
    """A decoding state and its models, of one sequence."""

    def draft(self, token: int, n_tokens: int) -> list[int]:
        """Tokens that could follow this one, which is not read yet; at most so many, and as there is room."""
        ...

    def predict(self, tokens: Sequence[int]) -> Sequence[P_co]:
        """Read tokens, the first drafted after; the prediction after each."""
        ...

    def rewind(self, n_tokens: int) -> None:
        """Forget the last tokens, so many, of those that ``predict`` read."""
        ...


@dataclass
class Drafts(Generic[P]):
    """Drafted tokens that a decoding state has read ahead of the text, and the predictions after them."""

    tokens: list[int] = field(default_factory=list)
    predictions: Sequence[P] = ()
    """After the token before the drafts, and after each of them."""
    used: int = 0
    """Drafted tokens that the text has reached."""
    cost: float | None = None
    """c; None until the first draft."""
    pace: Pace = field(default_factory=lambda: Pace())

    @property
    def may_serve(self) -> bool:
        """False where drafts cost too much, however many of them are right."""
        return _enabled and self.cost is not None and self.cost < _HIGHEST_COST

    def next(self, token: int, of: Drafting[P]) -> P:
        """The prediction after this token of the text."""
        if self.used < len(self.tokens) and self.tokens[self.used] == token:
            self.used += 1
            self.pace.saw(served=True)
        else:
            if self.used < len(self.tokens):
                self.pace.saw(served=False)
            self.settle(of.rewind)
            self.tokens = of.draft(token, self.pace.length(self.cost or 0.0))
            self.predictions = of.predict([token, *self.tokens])
        return self.predictions[self.used]

    def settle(self, rewind: Callable[[int], None]) -> None:
        """Forget what lies ahead of the text."""
        if ahead := len(self.tokens) - self.used:
            rewind(ahead)
        self.tokens, self.predictions, self.used = [], (), 0


@dataclass
class Pace:
    """The number of tokens that are drafted, by the share that served lately."""

    served: float = 2.0
    failed: float = 1.0
    _plain: int = 0  # steps without a draft, since the last one

    def saw(self, *, served: bool) -> None:
        """A draft was reached by the text, or the text went on with another token."""
        self.served = _MEMORY * self.served + served
        self.failed = _MEMORY * self.failed + (not served)

    def length(self, cost: float) -> int:
        """The gamma with most tokens for the time of a pass (theorem 3.8 of the paper).

        Tokens are 1 + alpha + ... + alpha^gamma, the time is that of 1 + c gamma plain steps.
        """
        alpha = self.served / (self.served + self.failed)
        best, gamma, tokens = 1.0, 0, 1.0
        for n in range(1, MOST_DRAFTS + 1):
            tokens += alpha**n
            if tokens / (1 + cost * n) > best:
                best, gamma = tokens / (1 + cost * n), n
        if gamma:
            self._plain = 0
            return gamma
        self._plain += 1
        if self._plain < _PROBE_EVERY:
            return 0
        self._plain = 0
        return 1
