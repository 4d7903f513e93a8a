"""Vector stores over made-up states: keys that need no model."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nanothink.config import VectorStoreConfig
from nanothink.data.tokens import IGNORE, TokenisedCorpus
from nanothink.models.store_gate import NO_TOKEN
from nanothink.vector_store.contents import VectorStore
from nanothink.vector_store.index import Float32

WIDTH, LENGTH = 16, 24

EXACT = VectorStoreConfig(enabled=True, n_neighbours=8, exact_below=10_000_000)

PQ = VectorStoreConfig(enabled=True, n_neighbours=8, index="pq", n_probe=8)

LISTS = VectorStoreConfig(enabled=True, n_neighbours=8, index="sq8", n_probe=8)


def states(tokens: torch.Tensor) -> Float32:
    """(B, T) -> (B, T, D) of length 1, by the tokens up to t, the last ones most."""
    table = np.random.default_rng(0).standard_normal((2000, WIDTH)).astype(np.float32)
    embedded = table[tokens.numpy()]
    mixed = embedded.copy()
    for back, weight in ((1, 0.7), (2, 0.5), (3, 0.3)):
        mixed[:, back:] += weight * embedded[:, :-back]
    return mixed / np.linalg.norm(mixed, axis=-1, keepdims=True)


Read = Callable[..., TokenisedCorpus]

Make = Callable[..., VectorStore]


def made_up_texts(seed: int, n_texts: int) -> list[str]:
    words = ["salt", "fire", "snow", "door", "wind", "moon", "house", "question", "river", "garden"]
    rng = random.Random(seed)
    return [" ".join(rng.choice(words) for _ in range(60)) + f" {i}." for i in range(n_texts)]


def write_domain(folder: Path, texts: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "texts.jsonl").write_text("".join(lines))


def training_pairs(tokens: TokenisedCorpus) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Every training token with the state before it, by the plain way: block by block."""
    keys, said = [], []
    for stream in tokens.train.values():
        for block in range(stream.n_blocks(LENGTH)):
            inputs, targets = stream.block(block, LENGTH)
            valid = targets != IGNORE
            keys.append(states(torch.from_numpy(inputs[None]))[0][valid])
            said.append(targets[valid])
    return np.concatenate(keys), np.concatenate(said)


def fingerprint(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file() and p.name != "lock"}


def everything(store: VectorStore, queries: Float32) -> Float32:
    """p_mem over the tokens, by all keys: (Q, V)."""
    n = store.neighbours(*store.index.search(queries, store.index.n_keys))
    scores = n.similarities / 0.02 + (0.0 if n.counts is None else n.counts.log())
    # lists that were not looked into are missing
    weights = scores.masked_fill(n.tokens == NO_TOKEN, -torch.inf).softmax(-1)
    return torch.zeros(len(queries), 400).scatter_add(1, n.tokens.clamp_min(0), weights).numpy()


def all_places(tokens: TokenisedCorpus) -> list[tuple[str, int]]:
    return [(d, b) for d, stream in tokens.train.items() for b in range(stream.n_blocks(LENGTH))]
