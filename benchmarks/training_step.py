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
import os
from collections.abc import Callable

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from side_by_side import last_number, machine, print_peak, rows, take_turns

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
        print_peak()
        return

    seconds = take_turns({name: make(options.batch, dtype) for name, make in SIDES.items()}, options.rounds)
    print(f"a step of {options.batch} x {LENGTH} tokens, {options.dtype}, {machine()}\n")
    print("| side | seconds (median) | min | max | tokens/s | tokens/s against gpt2 | min to max |")
    print("|---|---:|---:|---:|---:|---:|---|")
    print(rows(seconds, "gpt2", tokens=options.batch * LENGTH))
    if options.memory_batch:
        child = (__file__, "--memory-batch", str(options.memory_batch), "--dtype", options.dtype, "--child")
        peaks = {name: last_number(*child, name) for name in SIDES}
        print(f"\n| step of {options.memory_batch} x {LENGTH} tokens | peak memory |\n|---|---:|")
        for name, peak in peaks.items():
            print(f"| {name} | {peak / 1e9:.2f} GB |")
        print(f"\npeak memory against gpt2: {peaks['nanothink'] / peaks['gpt2']:.2f}")


if __name__ == "__main__":
    main()
