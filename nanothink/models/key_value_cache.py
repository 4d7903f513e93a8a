"""Keys and values of the tokens read so far, for rows of equal or different lengths.

Shapes: B batch, T new tokens, S keys (cached and new), H heads of keys, K width of a head.
"""

from __future__ import annotations

from typing import Protocol, TypeVar

import torch
from torch import Tensor

from nanothink.errors import UsageError
from nanothink.models.contract import State

_FIRST_CAPACITY = 256  # tokens a new cache has room for; it doubles when full

P = TypeVar("P", covariant=True)


class Positions(Protocol[P]):
    """Gives something for each position: a rotation, or an embedding."""

    def __call__(self, start: int, length: int) -> P:
        """Rows for positions ``start`` to ``start + length - 1``."""

    def at(self, positions: Tensor) -> P:
        """Rows for (B, T) positions."""


class KeyValueCache(State):
    """Keys and values of the tokens read so far, for each layer, in buffers that double when full.

    Each row begins in the first column. Where rows are of different lengths, columns past the end of a row
    hold nothing that counts, and a mask hides them; they are zero at first, as 0 times NaN is NaN.

    Args:
        n_layers: how many layers write to it.
        batch_size: B.
        max_length: the most tokens it may hold.
    """

    def __init__(self, n_layers: int, batch_size: int, max_length: int) -> None:
        self.batch_size = batch_size
        self.max_length = max_length
        self.length = 0
        """Tokens in the longest row."""
        self._lengths: list[int] | None = None  # of each row, where they differ
        self._positions: Tensor | None = None  # (B, T) of the new tokens, where the lengths differ
        self._seen: Tensor | None = None  # (B, 1, T, S), the mask where the lengths differ
        self._keys: list[Tensor | None] = [None] * n_layers
        self._values: list[Tensor | None] = [None] * n_layers

    @property
    def rewind_every(self) -> int:  # type: ignore[override]
        """See ``State.rewind_every``."""
        return self.max_length

    def rewind(self, n_tokens: int) -> None:
        """See ``State.rewind``."""
        self.advance(-n_tokens)

    @property
    def lengths(self) -> list[int]:
        """Tokens in each row."""
        return self._lengths or [self.length] * self.batch_size

    def begin(self, places: Positions[P], tokens: Tensor) -> P:
        """Prepare for (B, T) new tokens; returns what ``places`` has for their positions.

        Raises:
            UsageError: they do not fit.
        """
        self.check_room(tokens)
        n_new, device = tokens.shape[1], tokens.device
        if self._lengths is None:
            return places(self.length, n_new)
        lengths = torch.tensor(self._lengths, device=device)
        self._positions = lengths.unsqueeze(1) + torch.arange(n_new, device=device)  # (B, T)
        columns = torch.arange(self.length + n_new, device=device)
        self._seen = (columns <= self._positions.unsqueeze(2)).unsqueeze(1)
        return places.at(self._positions)

    def mask(self, n_new: int, device: torch.device) -> Tensor | None:
        """Mask of the keys that each new token may attend to: (T, S) or (B, 1, T, S) bool; None for all."""
        if self._lengths is not None:
            return self._seen
        if n_new == 1:
            return None
        ones = torch.ones(n_new, self.length + n_new, dtype=torch.bool, device=device)
        return ones.tril(self.length)

    def join(self, other: State) -> None:
        """See ``State.join``."""
        assert isinstance(other, KeyValueCache)
        self.step = None
        lengths = [*self.lengths, *other.lengths]
        for buffers, others in ((self._keys, other._keys), (self._values, other._values)):
            for layer, theirs in enumerate(others):
                if theirs is not None:
                    buffers[layer] = self._with_rows(buffers[layer], theirs[: other.batch_size])
        self.batch_size = len(lengths)
        self._set_lengths(lengths)

    def drop(self, row: int) -> None:
        """See ``State.drop``."""
        lengths, last = self.lengths, self.batch_size - 1
        for buffer in (*self._keys, *self._values):
            if buffer is not None and row != last:
                buffer[row, :, : lengths[last]] = buffer[last, :, : lengths[last]]
        lengths[row] = lengths[last]
        self.batch_size = last
        self._set_lengths(lengths[:last])

    def _set_lengths(self, lengths: list[int]) -> None:
        self.length = max(lengths, default=0)
        self._lengths = None if len(set(lengths)) <= 1 else lengths

    def _with_rows(self, buffer: Tensor | None, theirs: Tensor) -> Tensor:
        """A layer's buffer with rows (b, H, s, K) after its B rows, in a larger one if there is no room."""
        n_rows, n_columns = self.batch_size + theirs.shape[0], theirs.shape[2]
        if buffer is None or buffer.shape[0] < n_rows or buffer.shape[2] < n_columns:
            before = (0, 0) if buffer is None else (buffer.shape[0], buffer.shape[2])
            rows = n_rows if n_rows <= before[0] else max(n_rows, 2 * before[0])
            larger = theirs.new_zeros(rows, theirs.shape[1], max(before[1], n_columns), theirs.shape[3])
            if buffer is not None:
                larger[: self.batch_size, :, : self.length] = buffer[: self.batch_size, :, : self.length]
            buffer = larger
        buffer[self.batch_size : n_rows, :, :n_columns] = theirs
        return buffer

    def check_room(self, tokens: Tensor) -> None:
        """Raise UsageError for (B, T) tokens that do not fit."""
        batch_size, n_tokens = tokens.shape
        if batch_size != self.batch_size:
            raise UsageError(
                f"this decoding state is for {self.batch_size} sequences, but {batch_size} were given"
            )
        if self.length + n_tokens > self.max_length:
            raise UsageError(
                f"the decoding state holds {self.length} tokens and {n_tokens} more were given, but the "
                f"context is {self.max_length} tokens; start a new state from the last tokens of the text"
            )

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append (B, H, T, K) to a layer. Returns all its keys and values, (B, H, S, K) views.

        Rows of different lengths need ``begin`` before.

        ``length`` changes in ``advance`` alone, after every layer has been extended.
        """
        self._keys[layer] = self._append(self._keys[layer], keys)
        self._values[layer] = self._append(self._values[layer], values)
        stop = self.length + keys.shape[2]
        all_keys, all_values = self._keys[layer], self._values[layer]
        assert all_keys is not None
        assert all_values is not None
        n = self.batch_size
        return all_keys[:n, :, :stop], all_values[:n, :, :stop]

    def room(
        self, layer: int, n_new: int, n_heads: int, key_width: int, value_width: int
    ) -> tuple[Tensor, Tensor]:
        """Buffers of a layer, (B, n_heads, S, width) float32 each, with room for ``n_new`` more tokens."""
        found = []
        for buffers, width in ((self._keys, key_width), (self._values, value_width)):
            buffer = self._with_room(buffers[layer], torch.empty(self.batch_size, n_heads, n_new, width))
            buffers[layer] = buffer
            found.append(buffer)
        return found[0], found[1]

    def has_room(self, n_new: int) -> bool:
        """See ``State.has_room``."""
        stop = self.length + n_new
        return not self._keys or (self._keys[0] is not None and stop <= self._keys[0].shape[2])

    def advance(self, n_tokens: int) -> None:
        self.length += n_tokens
        if self._lengths is not None:
            self._lengths = [length + n_tokens for length in self._lengths]

    def _append(self, buffer: Tensor | None, new: Tensor) -> Tensor:
        buffer = self._with_room(buffer, new)
        if self._lengths is None:
            buffer[: self.batch_size, :, self.length : self.length + new.shape[2]] = new
        else:
            rows_of = torch.arange(self.batch_size, device=new.device).unsqueeze(1)
            buffer[rows_of, :, self._positions] = new.transpose(1, 2)  # (B, T, H, K)
        return buffer

    def _with_room(self, buffer: Tensor | None, new: Tensor) -> Tensor:
        stop = self.length + new.shape[2]
        if buffer is not None and buffer.shape[2] >= stop:
            return buffer
        doubled = _FIRST_CAPACITY if buffer is None else 2 * buffer.shape[2]
        capacity = min(max(doubled, stop), self.max_length)
        rows = new.shape[0] if buffer is None else buffer.shape[0]
        larger = new.new_zeros(rows, new.shape[1], capacity, new.shape[3])
        if buffer is not None:
            larger[:, :, : self.length] = buffer[:, :, : self.length]
        self.step = None
        return larger
