"""Round trip of text through a tokenizer: proof that nothing is lost, or a description of the loss.

Bits per byte divide the nats of a text's tokens by its bytes. If the tokens stand for less than the text
(unknown characters, collapsed blanks, another normal form), the figure is wrong.
"""

from __future__ import annotations

from typing import Any

import tokenizers

_AROUND = 20
"""Characters shown on either side of the first difference."""

_KEEPING = {"Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous"}
"""Behaviours of a pre-tokenizer that keep the text at which it splits."""


def is_lossless(state: dict[str, Any], eos: str) -> bool:
    """Return whether a tokenizer (its parsed JSON) provably decodes every text to itself, and encodes none as
    ``eos``.

    Byte-level BPE does: nothing changes the text before it is bytes, each of the 256 bytes is a token, a
    merge is the bytes of its two parts, and the decoder inverts the bytes. False means that it is not proven.
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
    """Return whether the model can encode some text as this token."""
    if token not in model["vocab"]:
        return False
    made = (pair if isinstance(pair, list) else pair.split(" ") for pair in model.get("merges") or ())
    return len(token) == 1 or bool(model.get("ignore_merges")) or any("".join(pair) == token for pair in made)


def difference(text: str, back: str) -> str:
    """Describe the first difference between ``text`` and ``back``, with its surroundings."""
    differing = (place for place, (a, b) in enumerate(zip(text, back, strict=False)) if a != b)
    place = next(differing, min(len(text), len(back)))
    start, stop = max(place - _AROUND, 0), place + _AROUND
    before = "..." if start else ""
    shown, found = (f"{before}{part[start:stop]}{'...' if part[stop:] else ''}" for part in (text, back))
    return f"{shown!r} becomes {found!r} (character {place + 1:,})"
