"""From the pieces of texts to the objects of OpenAI's API, at once or as a stream."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nanothink.data.tokenizer import Tokenizer
from nanothink.inference.generate import StreamDecoder
from nanothink.inference.scores import TokenScore
from nanothink.serve.model_thread import Piece

_LEAST = -9999.0
"""Stands for the log-probability of the impossible, as JSON has no infinity."""


@dataclass(frozen=True)
class ScoredToken:
    """A token as a client sees it."""

    token: int
    text: str
    offset: int
    """Characters of the text before it."""
    score: TokenScore | None
    """None for the first token of a prompt, which nothing predicts."""


class TokenTexts:
    """Texts and offsets of tokens, one after another.

    Args:
        offset: characters before the first.
    """

    def __init__(self, tokenizer: Tokenizer, offset: int = 0) -> None:
        self._tokenizer, self._offset = tokenizer, offset
        self._decoder = StreamDecoder(tokenizer)

    def scored(self, token: int, score: TokenScore | None) -> ScoredToken:
        text, before = self._tokenizer.decode([token]), self._offset
        self._offset += len(self._decoder.push(token))
        # The text of earlier tokens may have become final with this one.
        return ScoredToken(token, text, max(before, self._offset - len(text)), score)


def legacy_logprobs(tokens: Sequence[ScoredToken], tokenizer: Tokenizer) -> dict[str, Any]:
    """``logprobs`` of a completion. Where two of the likeliest are spelled alike, the likelier one counts."""

    def likeliest(score: TokenScore | None) -> dict[str, float] | None:
        if score is None:
            return None
        best: dict[str, float] = {}
        for token, value in score.likeliest:
            best.setdefault(tokenizer.decode([token]), max(value, _LEAST))
        return best

    return {
        "tokens": [one.text for one in tokens],
        "token_logprobs": [one.score and max(one.score.log_probability, _LEAST) for one in tokens],
        "top_logprobs": [likeliest(one.score) for one in tokens],
        "text_offset": [one.offset for one in tokens],
    }


def chat_logprobs(tokens: Sequence[ScoredToken], tokenizer: Tokenizer) -> dict[str, Any]:
    """``logprobs`` of a chat's choice."""

    def entry(text: str, value: float) -> dict[str, Any]:
        return {"token": text, "logprob": max(value, _LEAST), "bytes": list(text.encode())}

    content = []
    for one in tokens:
        assert one.score is not None
        best = [entry(tokenizer.decode([token]), value) for token, value in one.score.likeliest]
        content.append({**entry(one.text, one.score.log_probability), "top_logprobs": best})
    return {"content": content, "refusal": None}


class Choice:
    """One text of a request, as it grows.

    Args:
        index: its number in the answer.
        chat: its objects are those of a chat.
        prompt: given back before the text (echo).
        prompt_tokens: scored tokens of the prompt, if they are asked for.
        scored: tokens are to be listed with their log-probabilities.
        weighed: tokens are to be listed with their weights.
    """

    def __init__(
        self,
        index: int,
        tokenizer: Tokenizer,
        *,
        chat: bool = False,
        prompt: str = "",
        prompt_tokens: Sequence[ScoredToken] = (),
        scored: bool = False,
        weighed: bool = False,
    ) -> None:
        self.index, self._tokenizer, self._chat = index, tokenizer, chat
        self._scored, self._weighed = scored, weighed
        self._text = prompt
        self._n_given = 0  # characters that earlier chunks had
        self._tokens = list(prompt_tokens)
        self._texts = TokenTexts(tokenizer, len(prompt))
        self._pieces: list[Piece] = []
        self._finished: str | None = None
        self._by_string = False  # a stop string ended it
        self.n_tokens = 0
        """Tokens written."""

    def add(self, piece: Piece) -> None:
        self._text += piece.text
        self._finished = piece.finished
        self._by_string = piece.finished == "stop" and piece.token is not None
        self._pieces.append(piece)
        self.n_tokens += piece.n_tokens
        if piece.score is not None:
            # The end of the document is no part of the text, but was predicted like a token.
            token = self._tokenizer.eos_id if piece.token is None else piece.token
            self._tokens.append(self._texts.scored(token, piece.score))

    def end(self, reason: str) -> None:
        """End it without another token."""
        self._finished = reason

    def whole(self) -> dict[str, Any]:
        """The finished choice."""
        self._forget_stopped()
        body = self._common()
        if self._chat:
            return body | {"message": {"role": "assistant", "content": self._text, "refusal": None}}
        return body | {"text": self._text}

    def part(self) -> dict[str, Any] | None:
        """What came since the last call, as a chunk of a stream; None if that is nothing."""
        if self._finished:
            self._forget_stopped()
        listed = (self._scored and self._tokens) or (self._weighed and self._pieces)
        if not (self._text or self._finished or listed):
            return None
        body = self._common()
        body |= {"delta": {"content": self._text}} if self._chat else {"text": self._text}
        if not self._tokens:
            body["logprobs"] = None
        self._n_given += len(self._text)
        self._text, self._tokens, self._pieces = "", [], []
        return body

    def opening(self) -> dict[str, Any]:
        """The first chunk of a chat's stream."""
        delta = {"role": "assistant", "content": ""}
        return {"index": self.index, "delta": delta, "logprobs": None, "finish_reason": None}

    def _common(self) -> dict[str, Any]:
        shown = chat_logprobs if self._chat else legacy_logprobs
        logprobs = shown(self._tokens, self._tokenizer) if self._scored else None
        body: dict[str, Any] = {
            "index": self.index,
            "logprobs": logprobs,
            "finish_reason": self._finished,
        }
        if self._weighed:
            own = [piece for piece in self._pieces if piece.token is not None]
            body["nanothink"] = {
                "tokens": [piece.token for piece in own],
                "pieces": [piece.text for piece in own],
                "weights": [piece.weights for piece in own],
            }
        return body

    def _forget_stopped(self) -> None:
        """Leave out the tokens of a stop string, which are no part of the text."""
        if not self._by_string:
            return
        end = self._n_given + len(self._text)
        self._tokens = [one for one in self._tokens if one.offset < end]


@dataclass
class Answer:
    """A whole answer: its choices, and what is said about them."""

    model: str
    choices: Sequence[Choice]
    n_prompt_tokens: int
    chat: bool = False

    def __post_init__(self) -> None:
        self._id = ("chatcmpl-" if self.chat else "cmpl-") + uuid.uuid4().hex
        self._created = int(time.time())

    def add(self, piece: Piece) -> Choice:
        """Give a piece to its choice."""
        choice = self.choices[piece.choice]
        choice.add(piece)
        return choice

    def whole(self) -> dict[str, Any]:
        """The answer to a request that is not streamed."""
        choices = [choice.whole() for choice in self.choices]
        return self._head("") | {"choices": choices, "usage": self.usage()}

    def chunk(self, choices: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """An object of a stream."""
        return self._head(".chunk" if self.chat else "") | {"choices": list(choices)}

    def usage(self) -> dict[str, int]:
        written = sum(choice.n_tokens for choice in self.choices)
        return {
            "prompt_tokens": self.n_prompt_tokens,
            "completion_tokens": written,
            "total_tokens": self.n_prompt_tokens + written,
        }

    def _head(self, suffix: str) -> dict[str, Any]:
        kind = "chat.completion" if self.chat else "text_completion"
        return {"id": self._id, "object": kind + suffix, "created": self._created, "model": self.model}
