"""Whether a tokenizer gives every text back, byte for byte, and what it loses where it does not.

Bits per byte count the bytes of a text and the nats of its tokens. Tokens that stand for less than the text
(unknown characters, collapsed blanks, another normal form) make that figure a lie.
"""

from __future__ import annotations

from typing import Any

import tokenizers

_AROUND = 20
"""Characters shown on either side of the first difference."""

_KEEPING = {"Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous"}
"""What a pre-tokenizer may do with the places where it cuts; the rest is to remove them."""


def is_lossless(state: dict[str, Any], eos: str) -> bool:
    """True if a tokenizer (its parsed JSON) gives every text back by construction, and never as ``eos``.

    Byte-level BPE does: nothing changes the text before it is bytes, each of the 256 bytes is a token, a
    merge is the bytes of its two parts, and the decoder undoes the bytes. False: it is not proven.
    """
    model = state["model"]
    vocabulary, added = model.get("vocab"), state.get("added_tokens") or ()
    if (
        model.get("type") != "BPE"
        or not isinstance(vocabulary, dict)
        or any(model.get(part) for part in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"))
        or state.get("normalizer") is not None
        or not _cuts_into_bytes(state.get("pre_tokenizer") or {})
        or (state.get("decoder") or {}).get("type") != "ByteLevel"
    ):
        return False
    ids = set(vocabulary.values())
    return (
        set(tokenizers.pre_tokenizers.ByteLevel.alphabet()) <= vocabulary.keys()
        and len(ids) == len(vocabulary)
        # Other added tokens are found in the text before it is cut, and may take blanks with them.
        and all(token.get("special") for token in added)
        and all(vocabulary.get(token["content"], token["id"]) == token["id"] for token in added)
        and not any(token["id"] in ids and token["content"] not in vocabulary for token in added)
        and not _spells(model, eos)
    )


def _cuts_into_bytes(cutter: dict[str, Any]) -> bool:
    steps = cutter.get("pretokenizers") if cutter.get("type") == "Sequence" else [cutter]
    *first, last = steps or [{}]
    return (
        last.get("type") == "ByteLevel"
        and last.get("add_prefix_space") is False
        and all(
            step.get("type") == "Digits" or (step.get("type") == "Split" and step.get("behavior") in _KEEPING)
            for step in first
        )
    )


def _spells(model: dict[str, Any], token: str) -> bool:
    """Whether the model itself can make this token of text."""
    if token not in model["vocab"]:
        return False
    made = (pair if isinstance(pair, list) else pair.split(" ") for pair in model.get("merges") or ())
    return len(token) == 1 or bool(model.get("ignore_merges")) or any("".join(pair) == token for pair in made)


def difference(text: str, back: str) -> str:
    """The first place where ``back`` is not ``text``, in words: what stands there and what became of it."""
    differing = (place for place, (a, b) in enumerate(zip(text, back, strict=False)) if a != b)
    place = next(differing, min(len(text), len(back)))
    start, stop = max(place - _AROUND, 0), place + _AROUND
    before = "..." if start else ""
    shown, found = (f"{before}{part[start:stop]}{'...' if part[stop:] else ''}" for part in (text, back))
    return f"{shown!r} becomes {found!r} (character {place + 1:,})"
