"""The smallest models of the tests, and settings as arguments of a command."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SHAPE: dict[str, Any] = {
    "model.d_model": 32,
    "model.max_seq_len": 32,
    "transformer.n_layers": 1,
    "transformer.n_heads": 2,
    "state_space.n_layers": 1,
    "state_space.scan": "plain",
}


def settings(values: Mapping[str, Any]) -> list[str]:
    return [part for name, value in values.items() for part in ("--set", f"{name}={value}")]
