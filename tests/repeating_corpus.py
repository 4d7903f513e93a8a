"""A small corpus in which a document cache and a vector store have something to find."""

from __future__ import annotations

import json
import random
from pathlib import Path


def repeating_corpus(root: Path, n_texts: int) -> Path:
    """Write two domains of texts that each say the same four times; return ``root``."""
    chance = random.Random(0)
    for domain in ("letters", "tales"):
        (root / domain).mkdir()
        texts = []
        for _ in range(n_texts):
            words = ["".join(chance.choices("aeioubdgklmnrst", k=5)) for _ in range(8)]
            texts.append(" ".join(words * 4))
        lines = [json.dumps({"text": text}) + "\n" for text in texts]
        (root / domain / "texts.jsonl").write_text("".join(lines))
    return root
