"""The selective scan, forward and backward, against mambapy's parallel scan, on one core.

Both sides start from u, Δ, A, B, C, D and end at their gradients. mambapy's side is what its ``MambaBlock``
does with ``pscan`` (mambapy 1.2). The naive loop of ``transformers`` is timed too, at one shape: its backward
is quadratic in length, so anything beats it and nothing is claimed from it.

    python benchmarks/selective_scan.py            # pip install -e '.[bench]' brings mambapy
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from side_by_side import machine, rows, take_turns
from torch import Tensor

from nanothink.models.selective_scan import compiled, plain, reference

SHAPES = {  # batch, T, channels, N
    "the default preset": (4, 512, 768, 16),
    "one long text": (1, 2048, 768, 16),
    "the large preset": (1, 1024, 1536, 16),
    "the tiny preset": (8, 256, 256, 16),
}
NAIVE = "the default preset"


def inputs(batch: int, length: int, width: int, n_states: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    u = torch.randn(batch, length, width, generator=g)
    delta = torch.nn.functional.softplus(torch.randn(batch, length, width, generator=g) - 3)
    A = -torch.arange(1.0, n_states + 1).repeat(width, 1)
    B, C = (torch.randn(batch, length, n_states, generator=g) for _ in range(2))
    return [z.requires_grad_() for z in (u, delta, A, B, C, torch.ones(width))]


def mambapy_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    from mambapy.pscan import pscan

    decay = torch.exp(delta.unsqueeze(-1) * A)
    states = pscan(decay, delta.unsqueeze(-1) * B.unsqueeze(2) * u.unsqueeze(-1))
    return (states @ C.unsqueeze(-1)).squeeze(3) + D * u


def transformers_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan

    y = mamba_selective_scan(*(z.mT for z in (u, delta)), A, B.mT, C.mT, D)
    return y.mT


def ours(scan: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Tensor]:
    return lambda *values: scan(*values)[0]


def there_and_back(scan: Callable[..., Tensor], values: list[Tensor], grad: Tensor) -> Callable[[], None]:
    def call() -> None:
        for value in values:
            value.grad = None
        scan(*values).backward(grad)

    return call


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--length", type=int, help="T of every shape, instead of its own")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(machine())
    for title, (batch, length, width, n_states) in SHAPES.items():
        shape = (batch, options.length or length, width, n_states)
        values = inputs(*shape)
        grad = torch.randn(shape[:3], generator=torch.Generator().manual_seed(1))
        scans = {"mambapy": mambapy_scan, "plain": ours(plain.scan)}
        if compiled.unavailable():
            print(f"no compiled scan: {compiled.unavailable()}")
        else:
            scans["compiled"] = ours(compiled.scan)
        with torch.no_grad():
            expected, _ = reference.scan(*(z.double() for z in values))
            for name, scan in scans.items():
                error = float((scan(*values) - expected).norm() / expected.norm())
                assert error < 1e-5, f"{name} computes something else: {error}"
        seconds = take_turns({n: there_and_back(s, values, grad) for n, s in scans.items()}, options.rounds)
        if title == NAIVE:
            naive = there_and_back(transformers_scan, values, grad)
            seconds["transformers, naive"] = take_turns({"naive": naive}, 1)["naive"] * options.rounds
        print(f"\n{title}: batch {shape[0]}, T = {shape[1]}, {shape[2]} channels, N = {shape[3]}\n")
        print("| scan | seconds (median) | min | max | speed against mambapy | min to max |")
        print("|---|---:|---:|---:|---:|---|")
        print(rows(seconds, "mambapy"))


if __name__ == "__main__":
    main()
