"""The sweep behind the learning rates of the presets: AdamW against Muon at two budgets.

Trains a model of the ``tiny`` preset on a corpus, one setting after the other, on the same blocks
in the same order, and prints validation bits per byte as a table for docs/log.md.

    python benchmarks/optimizers.py --data-dir DATA --tokenizer TOKENIZER --steps 150 300 --only muon
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from nanothink.config.run import resolve_config
from nanothink.data.batches import TrainingBatches
from nanothink.data.corpus import find_corpus
from nanothink.data.split import SplitRule
from nanothink.data.tokenizer import load_tokenizer
from nanothink.data.tokens import TokenisedCorpus, tokenise
from nanothink.inference.evaluate import evaluate_model
from nanothink.models import EXPERTS, build_model
from nanothink.models.precision import Precision
from nanothink.training.optimizer import GroupedOptimizer, learning_rate_fraction

PEAK = 1e-3  # rates below are written as multiples of this, so that they read like learning rates


def settings(only: str) -> Iterator[dict[str, Any]]:
    """What is compared: one-rate AdamW, AdamW with a rate per group, Muon with rates, and schedules."""
    if only in {"adamw", "all"}:
        for lr in (1, 3, 10):  # one rate for all groups
            yield {"optimizer": "adamw", "matrices": lr, "embeddings": lr, "head": lr, "other": lr}
        for matrices, embeddings, head in ((3, 100, 4), (3, 30, 4), (6, 100, 4)):
            yield {
                "optimizer": "adamw",
                "matrices": matrices,
                "embeddings": embeddings,
                "head": head,
                "other": 4,
            }
    if only in {"muon", "all"}:
        for matrices in (3, 6, 12):
            yield {"optimizer": "muon", "matrices": matrices, "embeddings": 100, "head": 4, "other": 4}
        for embeddings, head in itertools.product((30, 200), (2, 8)):
            yield {"optimizer": "muon", "matrices": 6, "embeddings": embeddings, "head": head, "other": 4}


def one(
    arguments: dict[str, Any],
    tokens: TokenisedCorpus,
    vocabulary: int,
    steps: int,
    schedule: str,
    seed: int,
    more: list[str],
    preset: str,
    kind: str,
) -> float:
    """Validation bits per byte after ``steps`` steps."""
    names = {"matrices": "lr_matrices", "embeddings": "lr_embeddings", "head": "lr_head", "other": "lr_other"}
    config = resolve_config(
        preset=preset,
        assignments=[
            f"train_expert.lr={PEAK}",
            f"train_expert.optimizer={arguments['optimizer']}",
            f"train_expert.schedule={schedule}",
            *(f"train_expert.{name}={arguments[key]}" for key, name in names.items()),
            *more,
        ],
    ).config
    torch.manual_seed(seed)
    model = build_model(kind, config, vocabulary)
    optimizer = GroupedOptimizer(model.parameter_groups(), config.train_expert)
    batches = TrainingBatches(tokens.train, config.model.max_seq_len, seed)
    size = config.train_expert.batch_size
    for step in range(steps):
        optimizer.set_fraction(learning_rate_fraction(step, steps, config.train_expert))
        inputs, targets = batches.read(step * size, size)
        loss = model.loss(inputs, targets, scale=1 / targets.numel())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(optimizer.parameters, 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad()
        if not math.isfinite(float(loss.detach())):
            return math.nan
    evaluation = evaluate_model(
        model,
        tokens.val,
        length=config.model.max_seq_len,
        batch_size=32,
        precision=Precision(torch.device("cpu"), torch.float32, "sweep"),
        max_tokens=20_000,
    )
    return evaluation.overall.bits_per_byte


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kind", default="transformer", choices=EXPERTS)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--steps", type=int, nargs="+", default=[150, 300])
    parser.add_argument("--only", choices=("adamw", "muon", "all"), default="all")
    parser.add_argument("--schedule", nargs="+", default=["cosine"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--settings", help="JSON list of settings to compare instead of the built-in ones")
    parser.add_argument("--preset", default="tiny")
    parser.add_argument(
        "--set", action="append", default=[], help="section.key=value, as for nanothink itself"
    )
    parser.add_argument("--threads", type=int, default=None)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    tokenizer = load_tokenizer(options.tokenizer)
    tokens = tokenise(find_corpus(Path(options.data_dir)), tokenizer, split=SplitRule(0.1))
    compared = json.loads(options.settings) if options.settings else list(settings(options.only))
    budgets = " | ".join(f"{n} steps" for n in options.steps)
    print(f"| optimizer | matrices | embeddings | head | other | schedule | {budgets} | s/step |")
    print("|---|---:|---:|---:|---:|---|" + "---:|" * (len(options.steps) + 1))
    for arguments, schedule in itertools.product(compared, options.schedule):
        start = time.perf_counter()
        scores = [
            one(
                arguments,
                tokens,
                tokenizer.vocab_size,
                n,
                schedule,
                options.seed,
                options.set,
                options.preset,
                options.kind,
            )
            for n in options.steps
        ]
        seconds = (time.perf_counter() - start) / sum(options.steps)
        rates = " | ".join(
            f"{arguments[key] * PEAK:g}" for key in ("matrices", "embeddings", "head", "other")
        )
        cells = " | ".join(f"{score:.3f}" for score in scores)
        print(f"| {arguments['optimizer']} | {rates} | {schedule} | {cells} | {seconds:.2f} |", flush=True)


if __name__ == "__main__":
    main()
