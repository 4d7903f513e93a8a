"""Memory of each process of a training run, computed as by --dry-run: three models on 1, 8, 64 GPUs.

    python benchmarks/process_memory.py

Nothing is trained or allocated: models are built on the device "meta". The table of docs/distributed.md.
"""

from __future__ import annotations

import argparse

import torch

from nanothink.config.run import resolve_config
from nanothink.models import build_model, training_of
from nanothink.runs.memory import ModelSizes, with_recomputation

SHAPES = {
    "125 M": {"model.d_model": 768, "transformer.n_layers": 12, "transformer.n_heads": 12},
    "1 B": {"model.d_model": 2048, "transformer.n_layers": 18, "transformer.n_heads": 16},
    "7 B": {"model.d_model": 4096, "transformer.n_layers": 32, "transformer.n_heads": 32},
}
"""Transformers with a feed-forward of 8/3 of the width."""
VOCABULARY, LENGTH, BLOCKS = 32_000, 2048, 4  # blocks of text that a process computes at a time, in bfloat16
GPUS = (1, 8, 64)
_RAW = argparse.RawDescriptionHelpFormatter


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=_RAW).parse_args()
    print("| model | parameters | shard | " + " | ".join(f"{n} GPU{'s' * (n > 1)}" for n in GPUS) + " |")
    print("|---|---:|---|" + "---:|" * len(GPUS))
    for name, shape in SHAPES.items():
        settings = {**shape, "model.max_seq_len": LENGTH, "transformer.ffn_mult": 8 / 3}
        config = resolve_config(assignments=[f"{key}={value}" for key, value in settings.items()]).config
        with torch.device("meta"):
            model = build_model("transformer", config, VOCABULARY)
        sizes = ModelSizes.of(model, training_of("transformer", config))
        kept = with_recomputation(model, model.activation_bytes(BLOCKS, LENGTH, 2), BLOCKS * LENGTH)
        for shard in ("none", "full"):
            row = [sum(sizes.memory(n, shard, 1, kept).values()) / 2**30 for n in GPUS]
            cells = " | ".join(f"{gib:.1f}" for gib in row)
            print(f"| {name} | {sizes.trained / 1e9:.2f} B | `{shard}` | {cells} |")


if __name__ == "__main__":
    main()
