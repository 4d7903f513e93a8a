"""Checks of a stranger's tokenizer.json before the tokenizers library loads it.

The library trusts its input: one absurd id makes it allocate gigabytes and abort the process, thirty
replacements of a letter by two make a terabyte of "Hello", and inconsistent parts make it panic. So sizes,
ids and growth are bounded first, and ``failures_told`` turns a panic into an error.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
from collections.abc import Iterator
from typing import Any

import orjson

from nanothink.errors import NanoThinkError, TokenizerError

MAX_JSON_BYTES = 48 * 2**20
"""Most bytes of a tokenizer.json; a vocabulary of 256,000 tokens takes 20 MB."""

_MAX_ID = 2**24
_MAX_GROWTH = 1000
"""Most characters that one may become in the normaliser, and again in the decoder."""
_MAX_STEPS = 64
_MAX_STRING = 1000
"""Most characters of a pattern, a prefix or a special token."""


def check_tokenizer_json(text: str, where: str) -> None:
    """Raise TokenizerError for JSON that no real tokenizer has and that could exhaust the machine."""

    def refuse(reason: str) -> TokenizerError:
        return TokenizerError(f"{where} is not a tokenizer that can be read: {reason}.")

    if len(text) > MAX_JSON_BYTES:
        raise refuse(f"it takes {len(text):,} characters, and {MAX_JSON_BYTES:,} are the most")
    try:
        state = orjson.loads(text)
    except ValueError as error:
        raise refuse(f"it is not JSON ({error})") from None
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
        raise refuse("it has no model")
    added = state.get("added_tokens") or []
    if not isinstance(added, list) or not all(isinstance(token, dict) for token in added):
        raise refuse("its added tokens are no list of objects")
    vocabulary = state["model"].get("vocab")
    ids = [token.get("id") for token in added]
    if isinstance(vocabulary, dict):
        if len(set(map(str, vocabulary.values()))) < len(vocabulary):
            raise refuse("two tokens of its vocabulary have the same id")
        ids += vocabulary.values()
    highest = max((number for number in ids if isinstance(number, int)), default=0)
    n_tokens = len(vocabulary or ()) + len(added)
    if not all(type(number) is int and number >= 0 for number in ids) or highest > _MAX_ID:
        raise refuse(f"the id of a token is no integer from 0 to {_MAX_ID:,}")
    if highest >= 2 * n_tokens + 1000:
        raise refuse(f"it has an id of {highest:,} and only {n_tokens:,} tokens")
    if any(len(str(token.get("content"))) > _MAX_STRING for token in added):
        raise refuse(f"one of its added tokens is longer than {_MAX_STRING:,} characters")
    for part in ("normalizer", "pre_tokenizer", "decoder", "post_processor"):
        steps = list(_steps(state.get(part)))
        if len(steps) > _MAX_STEPS:
            raise refuse(f"its {part} has more than {_MAX_STEPS} steps")
        growth = 1
        for step in steps:
            for name in ("content", "prepend", "prefix", "suffix", "replacement", "pad_token"):
                if len(str(step.get(name, ""))) > _MAX_STRING:
                    raise refuse(f"its {part} has a {name} of more than {_MAX_STRING:,} characters")
            if step.get("type") == "Replace":
                growth *= max(1, len(str(step.get("content", ""))))
            if step.get("type") == "Precompiled":
                _check_charsmap(step.get("precompiled_charsmap"), refuse)
        if growth > _MAX_GROWTH:
            raise refuse(f"its {part} makes text {growth:,} times as long")


def _steps(part: Any) -> Iterator[dict[str, Any]]:
    """Yield the steps of a part of the pipeline, those of sequences one by one."""
    pending = [part]
    for _ in range(4 * _MAX_STEPS):
        if not pending:
            return
        step = pending.pop()
        if isinstance(step, dict):
            yield step
            for name in ("normalizers", "pretokenizers", "decoders", "processors"):
                inner = step.get(name)
                pending += inner[: 4 * _MAX_STEPS] if isinstance(inner, list) else []


def _check_charsmap(charsmap: Any, refuse: Any) -> None:
    """Check the length in the first four bytes: the library allocates that much without looking."""
    try:
        data = base64.b64decode(charsmap)
    except (TypeError, ValueError, binascii.Error):
        raise refuse("its table of characters is no base64") from None
    if len(data) < 4 or int.from_bytes(data[:4], "little") > len(data) - 4:
        raise refuse("its table of characters is shorter than it says")


@contextlib.contextmanager
def failures_told(where: str) -> Iterator[None]:
    """Turn errors and panics of the library (which are no ``Exception``) into TokenizerError."""
    try:
        yield
    except NanoThinkError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise TokenizerError(f"{where} is not a tokenizer that can be read: {error}.") from error
