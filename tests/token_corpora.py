"""Small corpora as tokens, and what is in them."""

from __future__ import annotations

import json
from pathlib import Path

from nanothink.data.corpus import find_corpus
from nanothink.data.split import SplitRule
from nanothink.data.tokenizer import Tokenizer
from nanothink.data.tokens import TokenisedCorpus, TokenStream, tokenise

EOS = 0


def write_texts(path: Path, texts: list[str], *more_lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [*(json.dumps({"text": text}) for text in texts), *more_lines]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def texts_in(*paths: Path) -> list[str]:
    return [json.loads(line)["text"] for path in paths for line in path.read_text("utf-8").splitlines()]


def some_texts(name: str, n: int) -> list[str]:
    return [f"{name} {i}: it was the best of times, it was {'very ' * (i % 7)}{name}." for i in range(n)]


def tokenised(root: Path, tokenizer: Tokenizer, val_split: float = 0.2, **options: object) -> TokenisedCorpus:
    return tokenise(find_corpus(root), tokenizer, split=SplitRule(val_split), **options)  # type: ignore[arg-type]


def tokens_of(stream: TokenStream) -> list[int]:
    return stream._read(0, stream.n_tokens).tolist()


def documents_of(stream: TokenStream, tokenizer: Tokenizer) -> list[str]:
    """The documents of a stream, decoded."""
    texts: list[str] = []
    document: list[int] = []
    for token in tokens_of(stream):
        if token == tokenizer.eos_id:
            texts.append(tokenizer.decode(document))
            document = []
        else:
            document.append(token)
    assert document == []
    return texts


def sides_by_text(tokens: TokenisedCorpus, tokenizer: Tokenizer) -> dict[str, set[str]]:
    """Every text and the sides it is on."""
    sides: dict[str, set[str]] = {}
    for side, streams in (("train", tokens.train), ("val", tokens.val)):
        for stream in streams.values():
            for text in documents_of(stream, tokenizer):
                sides.setdefault(text, set()).add(side)
    return sides


def cached_files(root: Path) -> dict[str, tuple[int, int]]:
    """Every tokenised file in the cache, with what changes when it is made again."""
    tokens = root / ".nanothink" / "tokens"
    return {
        str(path.relative_to(tokens)): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in tokens.glob("*/*.tokens")
    }
