"""A whole training step against ``transformers``' GPT-2 and Qwen3 of the same width and depth.

All sides: six layers of width 384, vocabulary 50,257, blocks of 512 tokens, AdamW-family optimizer step
and gradient clipping included, in the type that NanoThink picks for this processor (or in that of --dtype).
Qwen3 is the very same model as NanoThink's transformer, parameter for parameter; GPT-2 is smaller (30.1
against 52.8 million), having a tied head and a feed-forward of two matrices. Speed is measured in one process
with the sides taking turns, so that a slow moment of the machine hits all; memory in a fresh process each, as
the peak resident size of one step, or of the tensors on a GPU. With --apart the sides take turns in fresh
processes, NanoThink's as its training has it: memory that a step gives back is kept for the next one. --keep
gives all sides that. MFU is the share of the operations that the device could do at most, in a side's own
operations per token.

    python benchmarks/training_step.py
    python benchmarks/training_step.py --batch 8 --rounds 5 --dtype float32
    python benchmarks/training_step.py --batch 4 --dtype bfloat16 --processor-time --memory-batch 0
    python benchmarks/training_step.py --batch 4 --dtype bfloat16 --processor-time --memory-batch 0 --apart
    python benchmarks/training_step.py --device cuda --batch 64 --memory-batch 64 --rounds 20
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from side_by_side import (
    flops_per_token,
    last_number,
    machine,
    peak,
    peak_flops,
    ratios,
    take_turns,
    training_in,
    wait_for,
)
from torch import nn

from nanothink.config import ModelConfig, TrainExpertConfig
from nanothink.training.kept_memory import kept_memory
from nanothink.training.matmul_types import choose_precision

VOCABULARY, LENGTH, LAYERS, WIDTH = 50_257, 512, 6, 384
Side = tuple[nn.Module, Callable[[], None]]
"""A model, and what takes one training step with it."""


def gpt2_step(batch: int, dtype: torch.dtype, device: str) -> Side:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    shape = GPT2Config(vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=WIDTH, n_layer=LAYERS, n_head=6)
    return foreign_step(GPT2LMHeadModel(shape), batch, dtype, device)


def qwen3_step(batch: int, dtype: torch.dtype, device: str) -> Side:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from nanothink.config import Config
    from nanothink.models import build_model
    from nanothink.models.transformer import Transformer, to_qwen3_config

    ours = build_model("transformer", Config(), VOCABULARY)
    assert isinstance(ours, Transformer)
    torch.manual_seed(0)
    return foreign_step(Qwen3ForCausalLM(Qwen3Config(**to_qwen3_config(ours))), batch, dtype, device)


def foreign_step(model: Any, batch: int, dtype: torch.dtype, device: str) -> Side:
    """As the documentation of transformers has it: the model computes its own loss; AdamW."""
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    tokens = torch.randint(0, VOCABULARY, (batch, LENGTH)).to(device)

    def step() -> None:
        with torch.autocast(device, dtype, enabled=dtype is not torch.float32):
            loss = model(tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        wait_for(device)

    return model, step


def nanothink_step(batch: int, dtype: torch.dtype, device: str, optimizer_name: str = "muon") -> Side:
    from nanothink.config import Config
    from nanothink.models import build_model
    from nanothink.training.optimizer import GroupedOptimizer

    torch.manual_seed(0)
    model = build_model("transformer", Config(), VOCABULARY).to(device).train()
    training = training_in(dtype, device).model_copy(update={"optimizer": optimizer_name})
    optimizer = GroupedOptimizer(model.parameter_groups(), training)
    tokens = torch.randint(0, VOCABULARY, (batch, LENGTH + 1)).to(device)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step() -> None:
        with torch.autocast(device, dtype, enabled=dtype is not torch.float32):
            loss = model.loss(inputs, targets, scale=1 / targets.numel())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(optimizer.parameters, 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad()
        wait_for(device)

    return model, step


SIDES: dict[str, Callable[..., Side]] = {
    "nanothink": nanothink_step,
    "nanothink-adamw": partial(nanothink_step, optimizer_name="adamw"),
    "gpt2": gpt2_step,
    "qwen3": qwen3_step,
}
OURS = ("nanothink", "nanothink-adamw")
"""The second has the peers' optimizer: a step without Muon's products."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=8, help="blocks per step for speed")
    parser.add_argument(
        "--memory-batch", type=int, default=16, help="blocks per step for peak memory; 0 leaves it out"
    )
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--sides", nargs="+", choices=tuple(SIDES), default=list(SIDES))
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="auto")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--processor-time", action="store_true", help="seconds of one thread of a CPU that others use as well"
    )
    parser.add_argument("--apart", action="store_true", help="each side in processes of its own")
    parser.add_argument("--keep", action="store_true", help="all sides keep memory, if apart")
    parser.add_argument("--child", choices=tuple(SIDES), help=argparse.SUPPRESS)
    parser.add_argument("--seconds", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.dtype == "auto":  # bfloat16 only where it pays, so that no side is held back by it
        device = torch.device(options.device)
        options.dtype = choose_precision(TrainExpertConfig(), ModelConfig(), device).name
    dtype = getattr(torch, options.dtype)
    if options.processor_time:
        torch.set_num_threads(1)
    clock = time.thread_time if options.processor_time else time.perf_counter
    if options.child and options.seconds:
        _, step = SIDES[options.child](options.batch, dtype, options.device)
        with kept_memory() if options.keep or options.child in OURS else nullcontext():
            print(statistics.median(take_turns({"": step}, 3, clock)[""]))
        return
    if options.child:
        _, step = SIDES[options.child](options.memory_batch, dtype, options.device)
        step()
        step()
        print(peak(options.device))
        return

    sides = {name: SIDES[name](options.batch, dtype, options.device) for name in options.sides}
    if options.apart:
        flags = ["--seconds", *["--keep"] * options.keep, *["--processor-time"] * options.processor_time]
        same = ("--batch", str(options.batch), "--dtype", options.dtype, "--device", options.device, *flags)
        rounds = [
            {name: last_number(__file__, *same, "--child", name) for name in sides}
            for _ in range(options.rounds)
        ]
        seconds = {name: [each[name] for each in rounds] for name in sides}
    else:
        seconds = take_turns({name: step for name, (_, step) in sides.items()}, options.rounds, clock)
    most, source = peak_flops(options.device, dtype, clock)
    pairs = [(own, peer) for own in OURS if own in sides for peer in sides if peer not in OURS]
    print(f"a step of {options.batch} x {LENGTH} tokens, {options.dtype}, {machine(options.device)}")
    print(f"MFU against {most / 1e12:.3g} TFLOP/s ({source})\n")
    print("| side | parameters | seconds (median) | min | max | tokens/s | MFU |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name, values in seconds.items():
        model, median = sides[name][0], statistics.median(values)
        n_parameters = sum(p.numel() for p in model.parameters())
        speed = options.batch * LENGTH / median
        mfu = speed * flops_per_token(model, LAYERS, WIDTH, LENGTH) / most
        spread = f"{median:.3g} | {min(values):.3g} | {max(values):.3g}"
        print(f"| {name} | {n_parameters:,} | {spread} | {speed:,.0f} | {mfu:.1%} |")
    for own, peer in pairs:
        found = ratios(seconds, own, peer)
        spread = f"{min(found):.2f} to {max(found):.2f}"
        print(f"\n{own}'s tokens/s against {peer}: median {statistics.median(found):.2f} ({spread})")
    if options.memory_batch:
        shape = ("--memory-batch", str(options.memory_batch), "--dtype", options.dtype)
        child = (__file__, *shape, "--device", options.device, "--child")
        peaks = {name: last_number(*child, name) for name in options.sides}
        print(f"\n| step of {options.memory_batch} x {LENGTH} tokens | peak memory |\n|---|---:|")
        for name, held in peaks.items():
            print(f"| {name} | {held / 1e9:.2f} GB |")
        for own, peer in pairs:
            print(f"\npeak memory of {own} against {peer}: {peaks[own] / peaks[peer]:.2f}")


if __name__ == "__main__":
    main()
