"""Tiny experts, and the settings of a NanoThink over them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny
from tiny import settings

from nanothink.cli.app import run

STEM = "nanothink_mla"
KINDS = ("transformer", "state_space", "diffuser")
SHAPE = {
    **tiny.SHAPE,
    "diffuser.n_layers": 1,
    "diffuser.training_steps": 20,
    **{f"train_{phase}.batch_size": 4 for phase in ("expert", "diffuser")},
    **{f"train_{phase}.sample_tokens": 0 for phase in ("expert", "diffuser")},
    **{f"train_{phase}.amp_dtype": "float32" for phase in ("expert", "diffuser")},
    **{f"train_{phase}.eval_max_tokens": 500 for phase in ("expert", "diffuser")},
    "document_cache.fit_steps": 5,
}
PHASE = {
    "mla.n_heads": 2,
    "train_mla.fit": "full",
    "train_mla.batch_size": 4,
    "train_mla.grad_accum_steps": 2,
    "train_mla.warmup_steps": 3,
    "train_mla.sample_tokens": 4,
    "train_mla.amp_dtype": "float32",
    "train_mla.log_every_steps": 1,
    "train_mla.eval_every_steps": 10,
    "train_mla.eval_max_tokens": 300,
    "train_mla.snapshot_every_epochs": 1,
    "document_cache.fit_steps": 5,
}
N_STEPS = 30


def pretrain(corpus: Path, tokenizer: Path, folder: Path, kind: str, *more: str, **changed: Any) -> None:
    spec = ("--data-dir", corpus, "--checkpoint-dir", folder, "--max-steps", "30")
    own = [] if kind == "diffuser" else ["--tokenizer", str(tokenizer)]
    shape = settings(SHAPE | {name.replace("__", "."): value for name, value in changed.items()})
    assert run(["pretrain", kind, *map(str, spec), *own, *shape, *more]) == 0
