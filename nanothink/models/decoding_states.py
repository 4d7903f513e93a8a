"""Decoding states of the models that contain others: the diffuser and NanoThink.

Shapes: B batch, D model width, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from nanothink.models.contract import State, joined_rows, without_row
from nanothink.models.drafts import Drafts
from nanothink.models.key_value_cache import KeyValueCache


@dataclass(frozen=True)
class Ddim:
    """Settings of DDIM sampling: evaluations per token, and a seed for each sequence."""

    n_steps: int
    seeds: Sequence[int]


class DiffuserState(KeyValueCache):
    """The encoder's keys and values, and the settings of DDIM."""

    ddim: Ddim | None = None
    """None: the next token is predicted from the null noise."""

    def join(self, other: State) -> None:
        """See ``State.join``."""
        assert isinstance(other, DiffuserState)
        super().join(other)
        if other.ddim is not None:
            own = () if self.ddim is None else self.ddim.seeds
            self.ddim = Ddim(other.ddim.n_steps, (*own, *other.ddim.seeds))

    def drop(self, row: int) -> None:
        """See ``State.drop``."""
        super().drop(row)
        if self.ddim is not None:
            seeds = list(self.ddim.seeds)
            seeds[row] = seeds[-1]
            self.ddim = Ddim(self.ddim.n_steps, tuple(seeds[:-1]))


@dataclass
class JointState(State):
    """Decoding state: the experts' states, the latents of the blocks, and the weights of the last prediction.

    Of the last reading it keeps weights, queries and streams of all tokens; rows that join have none.
    """

    experts: Sequence[State]
    latents: KeyValueCache
    weights: Tensor | None = None  # (B, E), or (B, E + 1) after a search
    read_weights: Tensor | None = None  # (B, T, E)
    queries: Tensor | None = None  # (B, T, D)
    streams: Tensor | None = None  # (B, T, D)
    drafts: Drafts[tuple[Tensor, Tensor]] = field(default_factory=Drafts)  # logits and weights after each
    drafted: Tensor | None = None  # (1, T, D), states of the drafter for the tokens that are read next

    def weights_read(self, rows: slice) -> Tensor:
        """(B, N, E) of some tokens of the last reading."""
        assert self.read_weights is not None
        return self.read_weights[:, rows]

    def settle(self) -> None:
        """Forget what was read ahead of the text."""
        self.drafts.settle(self.rewind)

    def rewind(self, n_tokens: int) -> None:
        """See ``State.rewind``."""
        for own in (*self.experts, self.latents):
            own.rewind(n_tokens)

    def join(self, other: State) -> None:
        """See ``State.join``."""
        assert isinstance(other, JointState)
        self.settle()
        for own, theirs in zip((*self.experts, self.latents), (*other.experts, other.latents), strict=True):
            own.join(theirs)
        self.weights = joined_rows(self.weights, other.weights)

    def drop(self, row: int) -> None:
        """See ``State.drop``."""
        self.settle()
        for own in (*self.experts, self.latents):
            own.drop(row)
        self.weights = without_row(self.weights, row)
