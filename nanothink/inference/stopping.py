"""Ending a text at a stop string, without showing any of it."""

from __future__ import annotations

from collections.abc import Sequence

from nanothink.inference.generate import Decoder, StreamDecoder


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
