"""Checkpoints of small models with random weights, for tests of what becomes of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from nanothink.checkpoints import write_checkpoint
from nanothink.checkpoints.payload import FORMAT_VERSION
from nanothink.checkpoints.restore import model_state, pack_rng
from nanothink.checkpoints.split_record import SplitRecord
from nanothink.config import Config
from nanothink.config.run import resolve_config
from nanothink.data.split import HeldOutText, SplitRule, TrainedText
from nanothink.data.tokenizer import Tokenizer
from nanothink.models import COMBINED, ExpertDescription, build_model

SMALL: dict[str, Any] = {
    "model": {"d_model": 32, "max_seq_len": 48},
    "transformer": {"n_layers": 2, "n_heads": 2},
    "state_space": {"n_layers": 2, "scan": "plain"},
    "diffuser": {"n_layers": 1, "denoiser_layers": 1, "training_steps": 8, "inference_steps": 4},
    "mla": {"n_heads": 2, "n_layers": 1},
    "data": {"data_dir": "/somebody/s/private/data", "tokenizer": "/somebody/s/tokenizer"},
}


def settings(changes: dict[str, Any]) -> Config:
    nested = {section: dict(values) for section, values in SMALL.items()}
    for name, value in changes.items():
        section, _, key = name.partition(".")
        nested.setdefault(section, {})[key] = value
    return resolve_config(base=nested).config


def randomise(model: nn.Module) -> None:
    """Every weight that starts at zero or one a random value, so that nothing is hidden by it."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("A_log"):
                continue
            noise = torch.randn(parameter.shape, generator=generator) * 0.2
            parameter.add_(noise)


def write_random_checkpoint(path: Path, tokenizer: Tokenizer, kind: str, **changes: Any) -> Path:
    """Write the checkpoint of a model; ``changes`` are settings, with ``__`` between section and key."""
    config = settings({name.replace("__", "."): value for name, value in changes.items()})
    torch.manual_seed(0)
    kinds = ("transformer", "state_space", "diffuser", "transformer") if kind == COMBINED else ()
    experts = [ExpertDescription(f"{k}{i}", k, config) for i, k in enumerate(kinds)]
    model = build_model(kind, config, tokenizer.vocab_size, experts)
    randomise(model)
    entries = [
        {"name": e.name, "kind": e.kind, "config": config.model_dump(mode="json"), "digest": "-"}
        for e in experts
    ]
    write_checkpoint(
        path,
        {
            "format_version": FORMAT_VERSION,
            "kind": kind,
            "model_state": model_state(model),
            "optimizer_state": {"state": {}},
            "step": 12,
            "epoch": 3,
            "position": 48,
            "amp_scaler": None,
            "rng": pack_rng(),
            "early_stopping": {},
            "best_loss": 2.5,
            "config": config.model_dump(mode="json"),
            "tokenizer": tokenizer.to_state(),
            "data_fingerprint": "-",
            "split": SplitRecord(
                SplitRule(0.1), ("a",), TrainedText(np.arange(5, dtype=np.uint64)), HeldOutText()
            ).to_state(),
            "run": {"name": kind, "experts": entries},
        },
    )
    return path
