"""Decoding states of the models that contain others: the diffuser and NanoThink.

Shapes: B batch, D model width, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from nanothink.models.contract import State, joined_rows, without_row
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
    """Decoding state: the experts' states, the latents of the blocks, and the last token's weights, query and
    stream."""

    experts: Sequence[State]
    latents: KeyValueCache
    weights: Tensor | None = None  # (B, E), or (B, E + 1) after a search
    read_weights: Tensor | None = None  # (B, T, E), of the last reading; rows that join have none
    query: Tensor | None = None  # (B, D)
    stream: Tensor | None = None  # (B, D)

    def join(self, other: State) -> None:
        """See ``State.join``."""
        assert isinstance(other, JointState)
        for own, theirs in zip((*self.experts, self.latents), (*other.experts, other.latents), strict=True):
            own.join(theirs)
        self.weights = joined_rows(self.weights, other.weights)
        self.query = joined_rows(self.query, other.query)
        self.stream = joined_rows(self.stream, other.stream)

    def drop(self, row: int) -> None:
        """See ``State.drop``."""
        for own in (*self.experts, self.latents):
            own.drop(row)
        self.weights = without_row(self.weights, row)
        self.query = without_row(self.query, row)
        self.stream = without_row(self.stream, row)
