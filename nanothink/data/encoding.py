"""The tokenizer: text to ids and back, byte for byte.

Truncation, padding and dropout are removed, whatever the tokenizer's file says; text that
spells a special token is encoded as text. ``eos_id`` alone ends a document, so no document can fake a
boundary. A document begins with BOS if the tokenizer's post-processor puts one before a text; that much of it
is kept. ``encode_batch``, for documents, raises for a text that is not decoded to the same bytes; only a
prompt, on which nothing is measured, may lose something.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import orjson
import tokenizers
from numpy.typing import NDArray

from nanothink.data.byte_level import ByteLevelEncoder, is_byte_level, rounds
from nanothink.data.chat import ChatFormat
from nanothink.data.round_trip import difference, is_lossless
from nanothink.data.tokenizer_json import check_tokenizer_json, failures_told
from nanothink.errors import TokenizerError
from nanothink.suggestions import suggest

EOS = "<|endoftext|>"
_MAX_EOS_CHARS = 1000
_PROBE = "Hello world"


class TextLostError(TokenizerError):
    """A text is not decoded to what was encoded."""

    def __init__(self, tokenizer: str, loss: str, index: int, place: str = "") -> None:
        where = f"{place}: " if place else ""
        super().__init__(
            f"{where}tokenizer '{tokenizer}' loses text: {loss}. A model cannot learn lost text, and cannot "
            "be measured on it. Use a tokenizer that can encode every text, such as the default or your own "
            f"({suggest('tokenizer train')}), or leave that text out."
        )
        self.tokenizer, self.loss, self.index = tokenizer, loss, index

    def at(self, place: str) -> TextLostError:
        """The same, with the file and line of the text."""
        return TextLostError(self.tokenizer, self.loss, self.index, place)


class Tokenizer:
    """A tokenizer. Equal fingerprints mean equal ids for every text.

    Parameters
    ----------
    backend: copied; everything but text to ids is removed from the copy.
    name: the user's name for it; not part of its identity.
    eos_token: ends every document; ``<|endoftext|>`` if None; added to the vocabulary if missing.
    chat: its chat template, if it has one; not part of its identity.

    Raises TokenizerError for a tokenizer that does not decode "Hello world" to itself, or that encodes text
    spelling its EOS as the end of a document.
    """

    name: str
    vocab_size: int
    """One more than the largest id: rows of an embedding that fits."""
    eos_id: int
    eos_token: str
    """Its text."""
    bos_id: int | None
    """Begins every text, in training and before a prompt; None if the tokenizer puts nothing there."""
    bos_token: str | None
    """Its text."""
    fingerprint: str
    """SHA-256, in hex, of the vocabulary, rules, EOS and BOS."""
    chat: ChatFormat | None
    """How conversations are written, if it says so."""
    lossless: bool
    """Proven to decode every text to itself, so that no text is checked."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        name: str,
        eos_token: str | None = None,
        chat: ChatFormat | None = None,
    ) -> None:
        where = f"tokenizer '{name:.100}'"
        eos = eos_token or EOS
        if len(eos) > _MAX_EOS_CHARS or not eos.isprintable():
            raise TokenizerError(
                f"The EOS token of {where} is too long or holds odd characters: {eos!r:.60}."
            )
        self.name, self.eos_token, self.chat = name, eos, chat
        with failures_told(where):
            self._backend, canonical = _purified(backend, eos)
            self._json = canonical.decode()
            vocabulary = self._backend.get_vocab(with_added_tokens=True)
            self.vocab_size = max(vocabulary.values()) + 1
            self.eos_id = vocabulary[eos]
            self.bos_token = _bos_of(orjson.loads(canonical))
            self.bos_id = None if self.bos_token is None else vocabulary[self.bos_token]
            self.fingerprint = hashlib.sha256(canonical + b"\0" + eos.encode()).hexdigest()
            rules = orjson.loads(canonical)
            self.lossless = is_lossless(rules, eos)
            self._words = ByteLevelEncoder(self._encode_whole) if is_byte_level(rules) else None
            self._check()

    def encode(self, text: str) -> list[int]:
        """Encode one text, without BOS and EOS; ``loss`` describes what the ids lose.

        Raises TokenizerError for a lone surrogate.
        """
        with _encodable(text):
            return list(self._backend.encode(text, add_special_tokens=False).ids)

    def encode_prompt(self, text: str) -> list[int]:
        """Encode the beginning of a document: ``encode`` behind BOS, if texts begin with one."""
        return [*([] if self.bos_id is None else [self.bos_id]), *self.encode(text)]

    @property
    def start_id(self) -> int:
        """The token before the first of a text: BOS, or else the EOS of the document before."""
        return self.eos_id if self.bos_id is None else self.bos_id

    def encode_template(self, text: str) -> list[int]:
        """Encode text that a chat template wrote: in it, what spells a special token is that token."""
        with _encodable(text):
            return list(self._templated.encode(text, add_special_tokens=False).ids)

    @cached_property
    def special_ids(self) -> Mapping[str, int]:
        """Id of each special token, by its text."""
        added = self._backend.get_added_tokens_decoder()
        return {token.content: number for number, token in added.items() if token.special}

    @cached_property
    def _templated(self) -> tokenizers.Tokenizer:
        return tokenizers.Tokenizer.from_str(self._json)

    def with_chat(self, chat: ChatFormat | None) -> Tokenizer:
        """The same tokenizer with another chat template."""
        other = copy.copy(self)
        other.chat = chat
        return other

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """Encode texts: the same ids as ``encode``, several times faster.

        Raises TextLostError for the first text that is not decoded to itself.
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
        """Describe what decoding the ids of a text loses; None if nothing."""
        if self.lossless:
            return None
        ids = self.encode(text)
        return self._loss(text, ids, self.decode(ids))

    def encode_exactly(self, text: str) -> list[int]:
        """``encode`` for a text on which something is measured. Raises TextLostError."""
        ids = self.encode(text)
        if not self.lossless:
            self._check_losses([text], [ids], 0)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Decode ids. Bytes that are not UTF-8 become U+FFFD; EOS is spelled out."""
        try:
            return self._backend.decode([int(i) for i in ids], skip_special_tokens=False)
        except OverflowError as error:
            raise TokenizerError(f"Token ids lie between 0 and {self.vocab_size - 1}.") from error

    def to_state(self) -> dict[str, str]:
        """The whole tokenizer as strings, for a checkpoint."""
        own = {"name": self.name, "eos_token": self.eos_token, "tokenizer_json": self._json}
        return {**own, **(self.chat.to_state() if self.chat else {})}

    @classmethod
    def from_state(cls, state: dict[str, str]) -> Tokenizer:
        """Inverse of ``to_state``; the fingerprint is the same."""
        try:
            name, eos, text = (state[key] for key in ("name", "eos_token", "tokenizer_json"))
        except (KeyError, TypeError) as error:
            raise TokenizerError(f"A saved tokenizer lacks {error}.") from error
        chat = ChatFormat.from_state(state)
        return cls(parse_tokenizer(text, f"saved tokenizer '{name}'"), name, eos, chat)

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
            return f"text that spells {self.eos_token!r} becomes the end of a document"
        return None

    def _check(self) -> None:
        back = self.decode(self.encode(_PROBE))
        if back != _PROBE:
            raise TokenizerError(
                f"Tokenizer '{self.name}' gives {back!r} back for {_PROBE!r}: it loses text, or its files "
                "are incomplete. Nothing could be measured with it; use another."
            )
        for control, number, place in (
            (self.eos_token, self.eos_id, "end"),
            (self.bos_token, self.bos_id, "beginning"),
        ):
            if control is not None and number in self.encode(f"a{control}b") + self.encode(control):
                raise TokenizerError(
                    f"Tokenizer '{self.name}' cannot tell a text that spells '{control}' from the {place} of "
                    "a document; use another."
                )


def _purified(backend: tokenizers.Tokenizer, eos: str) -> tuple[tokenizers.Tokenizer, bytes]:
    """Copy a tokenizer without truncation, padding, dropout and all post-processing but BOS; return it and
    its JSON, sorted."""
    state: dict[str, Any] = orjson.loads(backend.to_str())
    bos = _bos_of(state)
    state.update(truncation=None, padding=None, post_processor=None)
    if "dropout" in state["model"]:
        state["model"]["dropout"] = None
    for token in state["added_tokens"]:
        token["special"] = token["special"] or token["content"] in (eos, bos)
    pure = tokenizers.Tokenizer.from_str(orjson.dumps(state).decode())
    if bos in (eos, None) or pure.token_to_id(bos) is None:  # texts stand behind an EOS anyway
        bos = None
    for control in filter(None, (eos, bos)):
        if all(token["content"] != control for token in state["added_tokens"]):
            pure.add_special_tokens([tokenizers.AddedToken(control, special=True, normalized=False)])
    if bos is not None:
        number = pure.token_to_id(bos)
        pure.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, number)]
        )
    pure.encode_special_tokens = True
    return pure, orjson.dumps(orjson.loads(pure.to_str()), option=orjson.OPT_SORT_KEYS)


def _bos_of(rules: Mapping[str, Any]) -> str | None:
    """The token that the post-processor in a tokenizer's JSON puts before every text."""
    processor = rules.get("post_processor") or {}
    for step in processor.get("processors", [processor]):
        first = (step.get("single") or [{}])[0].get("SpecialToken")
        if first is not None:
            tokens = step["special_tokens"][first["id"]]["tokens"]
            return str(tokens[0]) if len(tokens) == 1 else None
    return None


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
    """Build the library's tokenizer from JSON. Raises TokenizerError, whose message begins with ``where``."""
    check_tokenizer_json(text, where)
    with failures_told(where):
        return tokenizers.Tokenizer.from_str(text)
