"""A tokenizer as NanoThink uses it: text to ids and back, byte for byte, and nothing else.

No truncation, padding, dropout or special tokens come between text and ids, whatever the tokenizer's file
says, and text that spells a special token is text. Documents are ended by ``eos_id`` alone, so no document
can fake a boundary. Documents are encoded by ``encode_batch``, which raises for a text that does not come
back; only a prompt, which nothing is measured on, may lose something.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import orjson
import tokenizers
from numpy.typing import NDArray

from nanothink.data.byte_level import ByteLevelEncoder, is_byte_level, rounds
from nanothink.data.round_trip import difference, is_lossless
from nanothink.data.tokenizer_json import check_tokenizer_json, failures_told
from nanothink.errors import TokenizerError

EOS = "<|endoftext|>"
_MAX_EOS_CHARS = 1000
_PROBE = "Hello world"


class TextLostError(TokenizerError):
    """A tokenizer does not give a text back."""

    def __init__(self, tokenizer: str, loss: str, index: int, place: str = "") -> None:
        where = f"{place}: " if place else ""
        super().__init__(
            f"{where}tokenizer '{tokenizer}' loses text: {loss}. Nothing could be learnt from what is lost, "
            "or measured on it. Use a tokenizer that spells every text, such as the default, or one of your "
            "own (nanothink tokenizer train), or leave that text out."
        )
        self.tokenizer, self.loss, self.index = tokenizer, loss, index

    def at(self, place: str) -> TextLostError:
        """The same, with the file and line of the text."""
        return TextLostError(self.tokenizer, self.loss, self.index, place)


class Tokenizer:
    """Token ids of a text. Equal fingerprints mean equal ids for every text.

    Parameters
    ----------
    backend: copied, and freed of everything that is not text to ids.
    name: what the user calls it; no part of its identity.
    eos_token: ends every document; added to the vocabulary when it is not there (or None: ``<|endoftext|>``).

    Raises TokenizerError for one that cannot give "Hello world" back, or that takes a text spelling
    its EOS for the end of a document.
    """

    name: str
    vocab_size: int
    """One more than the largest id: rows of an embedding that fits."""
    eos_id: int
    fingerprint: str
    """SHA-256, in hex, of the vocabulary, rules and EOS."""
    lossless: bool
    """Every text comes back by construction, so that none has to be tried."""

    def __init__(self, backend: tokenizers.Tokenizer, name: str, eos_token: str | None = None) -> None:
        where = f"tokenizer '{name:.100}'"
        eos = eos_token or EOS
        if len(eos) > _MAX_EOS_CHARS or not eos.isprintable():
            raise TokenizerError(
                f"The EOS token of {where} is too long or holds odd characters: {eos!r:.60}."
            )
        self.name, self._eos = name, eos
        with failures_told(where):
            self._backend, canonical = _purified(backend, eos)
            self._json = canonical.decode()
            vocabulary = self._backend.get_vocab(with_added_tokens=True)
            self.vocab_size = max(vocabulary.values()) + 1
            self.eos_id = vocabulary[eos]
            self.fingerprint = hashlib.sha256(canonical + b"\0" + eos.encode()).hexdigest()
            rules = orjson.loads(canonical)
            self.lossless = is_lossless(rules, eos)
            self._words = ByteLevelEncoder(self._encode_whole) if is_byte_level(rules) else None
            self._check()

    def encode(self, text: str) -> list[int]:
        """Ids of one text, without EOS; ``loss`` says what is not in them.

        Raises TokenizerError for a lone surrogate.
        """
        with _encodable(text):
            return list(self._backend.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """Ids of each text; the same as ``encode`` gives one by one, several times faster.

        Raises TextLostError for the first text that they do not give back.
        """
        with _encodable(*texts):
            if self._words is not None:
                encoded = self._words(texts)
                if not self.lossless:
                    self._check_losses(texts, [ids.tolist() for ids in encoded], 0)
                return encoded
            encoded = []
            for group in rounds(texts):
                ids_of_group = self._encode_whole(group)
                if not self.lossless:
                    self._check_losses(group, ids_of_group, len(encoded))
                encoded += [np.array(ids, dtype=np.uint32) for ids in ids_of_group]
            return encoded

    def loss(self, text: str) -> str | None:
        """What the ids of a text do not give back, in words; None if they give all of it."""
        if self.lossless:
            return None
        ids = self.encode(text)
        return self._loss(text, ids, self.decode(ids))

    def encode_exactly(self, text: str) -> list[int]:
        """``encode``, for a text that something is measured on. Raises TextLostError."""
        ids = self.encode(text)
        if not self.lossless:
            self._check_losses([text], [ids], 0)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids. Bytes that are no UTF-8 become U+FFFD; EOS is written as it is spelled."""
        try:
            return self._backend.decode([int(i) for i in ids], skip_special_tokens=False)
        except OverflowError as error:
            raise TokenizerError(f"Token ids lie between 0 and {self.vocab_size - 1}.") from error

    def to_state(self) -> dict[str, str]:
        """Everything there is to it, in strings only, for a checkpoint."""
        return {"name": self.name, "eos_token": self._eos, "tokenizer_json": self._json}

    @classmethod
    def from_state(cls, state: dict[str, str]) -> Tokenizer:
        """The tokenizer that ``to_state`` described; same fingerprint."""
        try:
            name, eos, text = (state[key] for key in ("name", "eos_token", "tokenizer_json"))
        except (KeyError, TypeError) as error:
            raise TokenizerError(f"A saved tokenizer lacks {error}.") from error
        return cls(parse_tokenizer(text, f"saved tokenizer '{name}'"), name, eos)

    def __repr__(self) -> str:
        return f"Tokenizer({self.name!r}, vocab_size={self.vocab_size}, fingerprint={self.fingerprint[:16]})"

    def _encode_whole(self, texts: Sequence[str]) -> list[list[int]]:
        return [e.ids for e in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def _check_losses(self, texts: Sequence[str], ids: Sequence[list[int]], first: int) -> None:
        decoded = self._backend.decode_batch(list(ids), skip_special_tokens=False)
        for index, (text, own, back) in enumerate(zip(texts, ids, decoded, strict=True), first):
            if loss := self._loss(text, own, back):
                raise TextLostError(self.name, loss, index)

    def _loss(self, text: str, ids: list[int], back: str) -> str | None:
        if back != text:
            return difference(text, back)
        if self.eos_id in ids:
            return f"text that spells {self._eos!r} becomes the end of a document"
        return None

    def _check(self) -> None:
        back = self.decode(self.encode(_PROBE))
        if back != _PROBE:
            raise TokenizerError(
                f"Tokenizer '{self.name}' gives {back!r} back for {_PROBE!r}: it loses text, or its files "
                "are incomplete. Nothing could be measured with it; use another."
            )
        if self.eos_id in self.encode(f"a{self._eos}b") + self.encode(self._eos):
            raise TokenizerError(
                f"Tokenizer '{self.name}' cannot tell a text that spells '{self._eos}' from the end of a "
                "document; use another."
            )


def _purified(backend: tokenizers.Tokenizer, eos: str) -> tuple[tokenizers.Tokenizer, bytes]:
    """A copy that maps text to ids and nothing else, with its JSON in one canonical order."""
    state: dict[str, Any] = orjson.loads(backend.to_str())
    state.update(truncation=None, padding=None, post_processor=None)
    if "dropout" in state["model"]:
        state["model"]["dropout"] = None
    for token in state["added_tokens"]:
        token["special"] = token["special"] or token["content"] == eos
    pure = tokenizers.Tokenizer.from_str(orjson.dumps(state).decode())
    if all(token["content"] != eos for token in state["added_tokens"]):
        pure.add_special_tokens([tokenizers.AddedToken(eos, special=True, normalized=False)])
    pure.encode_special_tokens = True
    return pure, orjson.dumps(orjson.loads(pure.to_str()), option=orjson.OPT_SORT_KEYS)


@contextlib.contextmanager
def _encodable(*texts: str) -> Iterator[None]:
    try:
        yield
    except TypeError as error:
        for text in texts:
            try:
                text.encode()
            except UnicodeEncodeError as wrong:
                raise TokenizerError(
                    f"Character {wrong.start + 1} of the text is half of a surrogate pair, which is no "
                    "valid Unicode; remove it."
                ) from error
        raise


def parse_tokenizer(text: str, where: str) -> tokenizers.Tokenizer:
    """The library's tokenizer from its JSON. Raises TokenizerError, which begins with ``where``."""
    check_tokenizer_json(text, where)
    with failures_told(where):
        return tokenizers.Tokenizer.from_str(text)
