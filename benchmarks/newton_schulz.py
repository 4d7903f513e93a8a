"""Muon's Newton-Schulz steps: matrices of a shape one after another, and all of them in batched products.

    python benchmarks/newton_schulz.py

Float32, one thread, processor time, median of the rounds in turns. What several processes do with the
matrices that one of them owns (nanothink/training/muon_rows.py); the table of docs/log.md.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from nanothink.training.muon import NS_COEFFICIENTS, NS_STEPS, orthogonalised

SHAPES = ((16, 32, 32), (12, 64, 64), (12, 128, 128), (12, 128, 512), (8, 384, 384), (6, 384, 1024))
"""Number, rows, columns."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    torch.manual_seed(0)
    settings = NS_COEFFICIENTS, NS_STEPS, 1e-7, torch.float32
    print("| matrices | one by one, ms | together, ms | ratio | largest difference |")
    print("|---|---:|---:|---:|---:|")
    for number, *shape in SHAPES:
        matrices = torch.randn(number, *shape)
        seconds: tuple[list[float], list[float]] = ([], [])
        for _ in range(rounds):
            began = time.process_time()
            alone = torch.stack([orthogonalised(matrix, *settings) for matrix in matrices])
            between = time.process_time()
            together = orthogonalised(matrices, *settings)
            seconds[0].append(between - began)
            seconds[1].append(time.process_time() - between)
        one, many = (1e3 * statistics.median(each) for each in seconds)
        difference = float((alone - together).abs().max())
        name = f"{number} of {shape[0]} x {shape[1]}"
        print(f"| {name} | {one:.2f} | {many:.2f} | {one / many:.2f} | {difference:.1e} |", flush=True)


if __name__ == "__main__":
    main()
