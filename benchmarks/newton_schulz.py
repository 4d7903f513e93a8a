"""Muon's Newton-Schulz steps: matrices of a shape one after another, and several in one product.

    python benchmarks/newton_schulz.py
    python benchmarks/newton_schulz.py --threads 2 --dtype bfloat16

Median of the rounds in turns; processor time of one thread, seconds of several. The tables of docs/log.md, by
which nanothink/training/muon.py chooses.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from nanothink.training.kept_memory import kept_memory
from nanothink.training.muon import NS_COEFFICIENTS, NS_STEPS, all_orthogonalised, orthogonalised

SHAPES = (
    (16, 32, 32),
    (12, 64, 64),
    (24, 128, 128),
    (18, 128, 512),
    (24, 256, 256),
    (18, 256, 1024),
    (24, 384, 384),
    (18, 384, 1536),
)
"""Number, rows, columns."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.threads == 1 else time.perf_counter
    torch.manual_seed(0)
    settings = NS_COEFFICIENTS, NS_STEPS, 1e-7, getattr(torch, options.dtype)
    print("| matrices | one by one, ms | together, ms | ratio | largest difference |")
    print("|---|---:|---:|---:|---:|")
    for number, *shape in SHAPES:
        matrices = torch.randn(number, *shape).unbind()
        seconds: tuple[list[float], list[float]] = ([], [])
        with kept_memory():
            for _ in range(options.rounds):
                began = clock()
                alone = [orthogonalised(matrix, *settings) for matrix in matrices]
                between = clock()
                together = all_orthogonalised(matrices, *settings)
                seconds[0].append(between - began)
                seconds[1].append(clock() - between)
        one, many = (1e3 * statistics.median(each) for each in seconds)
        difference = float((torch.stack(alone) - torch.stack(list(together))).abs().max())
        name = f"{number} of {shape[0]} x {shape[1]}"
        print(f"| {name} | {one:.2f} | {many:.2f} | {one / many:.2f} | {difference:.1e} |", flush=True)


if __name__ == "__main__":
    main()
