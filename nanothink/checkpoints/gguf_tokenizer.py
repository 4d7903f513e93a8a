"""The tokenizer of a GGUF file, built anew for the tokenizers library.

A file has a byte-level BPE with its merges (``tokenizer.ggml.model`` is ``gpt2``), or what SentencePiece
calls a BPE (``llama``): pieces with scores, of which the pair that makes the best piece is merged first.
Merges in the order of the scores do the same, unless two pieces have the same score: which of two pairs is
merged first is then a matter of their place, which a list of merges cannot say.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanothink.checkpoints.gguf_layout import PRE_TOKENIZERS, Fields
from nanothink.data.chat import ChatFormat
from nanothink.data.encoding import parse_tokenizer
from nanothink.data.tokenizer import Tokenizer
from nanothink.errors import CheckpointMismatchError
from nanothink.wording import counted

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
"""Types of tokens."""

_BLANK = "\u2581"
"""Stands for a blank in SentencePiece's pieces."""


def read_tokenizer(fields: Fields, path: Path) -> Tokenizer:
    """The tokenizer of a file.

    Raises:
        CheckpointMismatchError: a kind that is not read, or pieces that merges cannot represent.
    """
    kind, cut = fields["tokenizer.ggml.model"], fields.get("tokenizer.ggml.pre", "default")
    pieces = kind == "llama"
    if not pieces and (kind != "gpt2" or cut not in PRE_TOKENIZERS):
        raise _refused(path, f"is of a kind that is not read from GGUF files ({kind}, {cut})")
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    vocabulary = {token: number for number, token in enumerate(tokens) if types[number] != _UNUSED}
    if len(vocabulary) + types.count(_UNUSED) < len(tokens):
        raise ValueError(f"{counted(len(tokens), 'token')}, some of them twice")
    special = {_UNKNOWN, _CONTROL} if pieces else {_CONTROL}
    added = [
        {
            "id": number,
            "content": token,
            "special": types[number] in special,
            **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
        }
        for number, token in enumerate(tokens)
        if types[number] in special | {_USER_DEFINED}
    ]
    rules = _sentencepiece(fields, tokens, types, path) if pieces else _byte_level(fields, cut)
    rules["model"] |= {"type": "BPE", "fuse_unk": False, "vocab": vocabulary}
    state = {"version": "1.0", "added_tokens": added, **rules}
    # What llama.cpp takes for granted where a file is silent.
    default = {"bos": 1, "eos": 2, "unknown": 0} if pieces else {}
    named = {
        name: fields.get(f"tokenizer.ggml.{key}_token_id", default.get(key))
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    }
    bos = named["bos"]
    if fields.get("tokenizer.ggml.add_bos_token", pieces or cut == "llama-bpe") and bos is not None:
        state["post_processor"] = _putting_before(tokens[bos], bos)
    backend = parse_tokenizer(json.dumps(_with_offsets(state)), str(path))
    names = {f"{name}_token": tokens[number] for name, number in named.items() if number is not None}
    chat = ChatFormat.of(fields.get("tokenizer.chat_template"), names)
    return Tokenizer(backend, path.name, names["eos_token"], chat)


def _byte_level(fields: Fields, cut: str) -> dict[str, Any]:
    """Rules of a byte-level BPE that cuts text as llama.cpp's ``cut``."""
    return {
        "pre_tokenizer": PRE_TOKENIZERS[cut],
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "byte_fallback": False,
            "ignore_merges": cut == "llama-bpe",
            "merges": [merge.split(" ", 1) for merge in fields["tokenizer.ggml.merges"]],
        },
    }


def _sentencepiece(fields: Fields, tokens: Sequence[str], types: Sequence[int], path: Path) -> dict[str, Any]:
    """Rules of SentencePiece's BPE: a blank is a letter, and unknown characters are their bytes."""
    blanks: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": " "}, "content": _BLANK}]
    spoken = [
        {"type": "Replace", "pattern": {"String": _BLANK}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if fields.get("tokenizer.ggml.add_space_prefix", True):
        blanks.insert(0, {"type": "Prepend", "prepend": _BLANK})
        spoken.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "normalizer": {"type": "Sequence", "normalizers": blanks},
        "decoder": {"type": "Sequence", "decoders": spoken},
        "model": {"byte_fallback": True, "merges": _merges(fields, tokens, types, path)},
    }


def _merges(fields: Fields, tokens: Sequence[str], types: Sequence[int], path: Path) -> list[list[str]]:
    """The pairs of pieces that make a piece, best first.

    Control tokens, bytes and user-defined tokens are no pieces: no text becomes them by merging. llama.cpp
    would merge "<" and "s>" to the control token "<s>"; SentencePiece does not.
    """
    scores = fields.get("tokenizer.ggml.scores") or [0.0] * len(tokens)
    pieces = {
        token: score
        for token, kind, score in zip(tokens, types, scores, strict=True)
        if kind == _NORMAL or (kind == _USER_DEFINED and _BLANK in token)
    }

    def splits(token: str) -> list[list[str]]:
        """Both parts of each way to make a token by merging; a longer left part first."""
        places = range(len(token) - 1, 0, -1)
        return [[token[:n], token[n:]] for n in places if token[:n] in pieces and token[n:] in pieces]

    found = {token: pairs for token in pieces if (pairs := splits(token))}
    lacking = {f"<0x{byte:02X}>" for byte in range(256)} - {
        token for token, kind in zip(tokens, types, strict=True) if kind == _BYTE
    }
    if lacking:
        raise _refused(path, f"has no token for {counted(len(lacking), 'byte')}, such as {min(lacking)}")
    for token, kind in zip(tokens, types, strict=True):
        if kind == _UNUSED and (len(token) == 1 or splits(token)):
            raise _refused(path, f"has the unused piece {token!r}, which text would be cut into again")
    for token in pieces:
        if len(token) > 1 and (odd := [letter for letter in token if letter not in pieces]):
            raise _refused(path, f"merges {token!r} from {odd[0]!r}, which is no token by itself")
    ((score, times),) = Counter(pieces[token] for token in found).most_common(1) or [(0.0, 0)]
    if times > 1:
        same = [token for token in found if pieces[token] == score][:2]
        raise _refused(path, f"gives {times:,} pieces the same score, such as {same[0]!r} and {same[1]!r}")
    best_first = sorted(found, key=lambda token: -pieces[token])
    return [pair for token in best_first for pair in found[token]]


def _refused(path: Path, what: str) -> CheckpointMismatchError:
    return CheckpointMismatchError(
        f"{path}: its tokenizer {what}. Import the model's folder in transformers' format."
    )


def _putting_before(token: str, number: int) -> dict[str, Any]:
    """A post-processor that puts a token before every text."""
    steps = [{"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    special = {token: {"id": token, "ids": [number], "tokens": [token]}}
    return {"type": "TemplateProcessing", "single": steps, "pair": steps, "special_tokens": special}


def _with_offsets(rules: Any) -> Any:
    """Rules with ``trim_offsets`` where the library asks for it."""
    if isinstance(rules, dict):
        inner = {key: _with_offsets(value) for key, value in rules.items()}
        return {"trim_offsets": True, **inner} if rules.get("type") == "ByteLevel" else inner
    return [_with_offsets(rule) for rule in rules] if isinstance(rules, list) else rules
