"""A small run of the command line, and what it says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nanothink.checkpoints import read_checkpoint

SMALL = [
    *("--set", "model.d_model=32", "--set", "model.max_seq_len=32", "--set", "transformer.n_layers=1"),
    *("--set", "transformer.n_heads=2", "--set", "train_expert.batch_size=4"),
    *("--set", "train_expert.amp_dtype=float32", "--set", "train_expert.sample_tokens=0"),
]

Said = Callable[[], tuple[str, str]]


def best_loss(checkpoint: Path) -> float:
    found = read_checkpoint(checkpoint)["best_loss"]
    assert found is not None
    return found


def as_json(said: Said) -> dict[str, Any]:
    return dict(json.loads(said()[0]))
