"""Continuing a prompt with a combined model, with the weights of its components at every token."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from nanothink.inference.generate import Decoder, StreamDecoder, generate
from nanothink.inference.sampling import SamplingConfig
from nanothink.models.contract import State
from nanothink.models.decoding_states import JointState
from nanothink.models.document_cache import CachedModel, CachedState
from nanothink.models.nanothink import NanoThink


@dataclass(frozen=True)
class RoutedPiece:
    """A token that a combined model has drawn."""

    text: str
    """Text that became final with it; empty while a character is unfinished."""
    token: int
    weights: Mapping[str, float]
    """Weight of each expert, and of "vector_store", in the prediction of this token."""

    @property
    def trusted(self) -> str:
        """Name of the component with the largest weight."""
        return max(self.weights, key=self.weights.__getitem__)


def generate_routed(
    model: NanoThink | CachedModel,
    prompt: Sequence[int],
    config: SamplingConfig,
    *,
    tokenizer: Decoder,
    eos_id: int,
    on_piece: Callable[[RoutedPiece], None] | None = None,
) -> list[RoutedPiece]:
    """``generate`` for one prompt: each token with the weights of its prediction.

    Args:
        on_piece: called with each piece as soon as it is drawn.
    """
    text = StreamDecoder(tokenizer)
    states: list[JointState | CachedState] = []
    pieces: list[RoutedPiece] = []

    def start(seeds: Sequence[int]) -> State:
        states[:] = [model.start(len(seeds))]
        return states[0]

    def say(piece: str, token: int) -> None:
        weights = states[0].weights
        assert weights is not None
        trust = dict(zip(model.components, weights[0].tolist(), strict=True))
        pieces.append(RoutedPiece(piece, token, trust))
        if on_piece is not None:
            on_piece(pieces[-1])

    generate(
        model,  # type: ignore[arg-type]
        [prompt],
        config,
        eos_id=eos_id,
        on_token=lambda _, token: say(text.push(token), token),
        start=start,
    )
    if rest := text.flush():  # an unfinished character belongs to its last token
        last = pieces.pop()
        pieces.append(replace(last, text=last.text + rest))
        if on_piece is not None:
            on_piece(replace(last, text=rest))
    return pieces
