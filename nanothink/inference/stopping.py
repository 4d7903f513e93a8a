"""Ending a text at a stop string, without showing any of it."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence

from nanothink.inference.engine import Engine, Row
from nanothink.inference.generate import Decoder, StreamDecoder
from nanothink.inference.sampling import SamplingConfig
from nanothink.models.contract import LanguageModel, State


class StoppingDecoder:
    """Decode tokens one by one to text that ends where a stop string begins.

    Text that may be the beginning of a stop string is held back until the next tokens decide.

    Args:
        tokenizer: anything that decodes a list of token ids.
        stop: strings, none of them empty; the one that is found first counts.
    """

    def __init__(self, tokenizer: Decoder, stop: Sequence[str] = ()) -> None:
        self._decoder = StreamDecoder(tokenizer)
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False
        """A stop string was found. There is no more text."""

    def push(self, token: int) -> str:
        """Text that became final with this token."""
        return self._released(self._decoder.push(token))

    def flush(self) -> str:
        """The rest at the end of the text."""
        text = self._released(self._decoder.flush()) + self._held
        self._held = ""
        return text

    def _released(self, new: str) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        places = [place for word in self._stop if (place := text.find(word)) >= 0]
        if places:
            self.stopped, self._held = True, ""
            return text[: min(places)]
        n_held = max((_overlap(text, word) for word in self._stop), default=0)
        shown = len(text) - n_held
        self._held = text[shown:]
        return text[:shown]


def _overlap(text: str, word: str) -> int:
    """Characters at the end of ``text`` that begin ``word``."""
    longest = min(len(text), len(word) - 1)
    return next((n for n in range(longest, 0, -1) if word.startswith(text[-n:])), 0)


def generate_until(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    config: SamplingConfig,
    stop: Sequence[str],
    *,
    tokenizer: Decoder,
    eos_id: int,
    on_text: Callable[[int, str], None] = lambda row, text: None,
    start: Callable[[Sequence[int]], State] | None = None,
    end_ids: frozenset[int] = frozenset(),
) -> list[str]:
    """``generate``, where each text also ends before the first stop string, which costs no more tokens.

    Args:
        end_ids: tokens that end a text as ``eos_id`` does.
        on_text: called with (row, piece of text) as text becomes final.

    Returns:
        The text behind each prompt.
    """
    engine, seed = Engine(model, eos_id=eos_id, start=start), config.seed
    seed = secrets.randbits(62) if seed is None else seed
    numbers: dict[Row, int] = {}
    decoders = [StoppingDecoder(tokenizer, stop) for _ in prompts]
    texts = [""] * len(prompts)
    for number, prompt in enumerate(prompts):
        own = config.model_copy(update={"seed": (seed + number) % (1 << 63)})
        row = Row(prompt, own, end_ids=end_ids)
        numbers[row] = number
        engine.add(row)
    while engine.rows:
        for drawn in engine.step():
            number = numbers[drawn.row]
            piece = "" if drawn.token is None else decoders[number].push(drawn.token)
            if decoders[number].stopped:
                engine.remove(drawn.row)
            elif drawn.finished:
                piece += decoders[number].flush()
            if piece:
                texts[number] += piece
                on_text(number, piece)
    return texts
