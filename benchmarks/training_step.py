"""A whole training step against ``transformers``' GPT-2 of the same width and depth.

Both sides: six layers of width 384, vocabulary 50,257, blocks of 512 tokens, AdamW-family optimizer step
and gradient clipping included, bfloat16 autocast (or float32 with --dtype). Speed is measured in one
process with the two sides taking turns, so that a slow moment of the machine hits both; memory in a fresh
process each, as the peak resident size of one step.

    python benchmarks/training_step.py
    python benchmarks/training_step.py --batch 8 --rounds 5 --dtype float32
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch

VOCABULARY, LENGTH = 50_257, 512


def gpt2_step(batch: int, dtype: torch.dtype) -> Callable[[], None]:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=384, n_layer=6, n_head=6)
    ).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    tokens = torch.randint(0, VOCABULARY, (batch, LENGTH))

    def step() -> None:
        with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
            loss = model(tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def nanothink_step(batch: int, dtype: torch.dtype) -> Callable[[], None]:
    from nanothink.config import Config, TrainExpertConfig
    from nanothink.models import build_model
    from nanothink.training.optimizer import GroupedOptimizer

    torch.manual_seed(0)
    model = build_model("transformer", Config(), VOCABULARY).train()
    optimizer = GroupedOptimizer(model.parameter_groups(), TrainExpertConfig())
    tokens = torch.randint(0, VOCABULARY, (batch, LENGTH + 1))
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step() -> None:
        with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
            loss = model.loss(inputs, targets, scale=1 / targets.numel())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(optimizer.parameters, 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad()

    return step


SIDES = {"nanothink": nanothink_step, "gpt2": gpt2_step}


def speed(batch: int, rounds: int, dtype: torch.dtype) -> dict[str, list[float]]:
    """Seconds a step, by side, the sides taking turns."""
    steps = {name: make(batch, dtype) for name, make in SIDES.items()}
    for step in steps.values():
        step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def peak_memory(side: str, batch: int, dtype: torch.dtype) -> float:
    """Peak resident bytes of a process that takes two steps of one side."""
    arguments = ["--child", side, "--memory-batch", str(batch), "--dtype", str(dtype).removeprefix("torch.")]
    done = subprocess.run([sys.executable, __file__, *arguments], check=True, capture_output=True, text=True)
    return float(json.loads(done.stdout.splitlines()[-1])["peak"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=8, help="blocks per step for speed")
    parser.add_argument(
        "--memory-batch", type=int, default=32, help="blocks per step for peak memory; 0 leaves it out"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--child", choices=tuple(SIDES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    if options.child:
        step = SIDES[options.child](options.memory_batch, dtype)
        step()
        step()
        print(json.dumps({"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))
        return

    seconds = speed(options.batch, options.rounds, dtype)
    tokens = options.batch * LENGTH
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = [theirs / ours for ours, theirs in zip(seconds["nanothink"], seconds["gpt2"], strict=True)]
    print(
        f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {options.dtype}"
    )
    print(f"\n| step of {options.batch} x {LENGTH} tokens | seconds (median) | min | max | tokens/s |")
    print("|---|---:|---:|---:|---:|")
    for name, median in medians.items():
        low, high = min(seconds[name]), max(seconds[name])
        print(f"| {name} | {median:.2f} | {low:.2f} | {high:.2f} | {tokens / median:,.0f} |")
    print(
        f"\ntokens/s against gpt2, pair by pair: median {statistics.median(ratios):.2f}, "
        f"min {min(ratios):.2f}, max {max(ratios):.2f}"
    )
    if options.memory_batch:
        peaks = {name: peak_memory(name, options.memory_batch, dtype) for name in SIDES}
        print(f"\n| step of {options.memory_batch} x {LENGTH} tokens | peak memory |\n|---|---:|")
        for name, peak in peaks.items():
            print(f"| {name} | {peak / 1e9:.2f} GB |")
        print(f"\npeak memory against gpt2: {peaks['nanothink'] / peaks['gpt2']:.2f}")


if __name__ == "__main__":
    main()
