"""What the benchmarks share: sides that take turns, peak memory of a fresh process, and MFU.

The sides take turns within one process, so that a slow moment of the machine hits all of them, and what is
quoted is the median of the ratios, round by round.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nanothink.cli.app import run
from nanothink.config import ModelConfig, TrainExpertConfig
from nanothink.training.matmul_types import choose_precision

Seconds = dict[str, list[float]]


DENSE_PEAKS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L4": 121e12}
"""16-bit operations a second, without sparsity, by a part of the device's name: the makers' data sheets."""


def call(*arguments: str | Path) -> Any:
    """Run a command with ``--json`` and return the object it prints."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        code = run([*map(str, arguments), "--json"])
    if code:
        raise SystemExit(code)
    return json.loads(shown.getvalue())


def plain_environment() -> dict[str, str]:
    """The environment without settings of NanoThink, which are not those of the models measured."""
    return {name: value for name, value in os.environ.items() if not name.startswith("NANOTHINK_")}


def machine(device: str | torch.device = "cpu") -> str:
    """A line that a table of seconds needs beside it."""
    found = torch.device(device)
    if found.type == "cuda":
        return f"{torch.cuda.get_device_name(found)}, torch {torch.__version__}"
    return f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def wait_for(device: str | torch.device) -> None:
    """Until a device has done what it was given; a CPU has."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def training_in(dtype: torch.dtype, device: str | torch.device) -> TrainExpertConfig:
    """Settings of a run of the default preset in ``dtype``, with the type for Muon that it would choose."""
    train = TrainExpertConfig.model_validate({"amp_dtype": str(dtype).removeprefix("torch.")})
    settled = choose_precision(train, ModelConfig(), torch.device(device)).settled
    return train.model_copy(update=settled)


def flops_per_token(model: nn.Module, n_layers: int, width: int, length: int) -> float:
    """Operations that training on one token takes, forward and backward.

    6 N + 12 L D T, with N the parameters in matrix products: Chowdhery et al. 2022 (PaLM), appendix B. A
    table that is only looked up is not among them, one that is the head as well is. Attention counts over
    all T tokens, as there, though half of them are masked.
    """
    counted = {id(p): p.numel() for p in model.parameters() if p.ndim > 1}
    heads = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    for module in model.modules():
        if isinstance(module, nn.Embedding) and id(module.weight) not in heads:
            counted.pop(id(module.weight), None)
    return 6.0 * sum(counted.values()) + 12.0 * n_layers * width * length


def peak_flops(
    device: str | torch.device, dtype: torch.dtype, clock: Callable[[], float] = time.perf_counter
) -> tuple[float, str]:
    """Operations a second that the device could do at most, and where that is from.

    A data sheet's for a 16-bit type on a device that is known; else the best of ten products of two square
    matrices, measured now.
    """
    found = torch.device(device)
    if found.type == "cuda" and dtype is not torch.float32:
        name = torch.cuda.get_device_name(found)
        for part, flops in DENSE_PEAKS.items():
            if part in name:
                return flops, "the data sheet"
    size = 8192 if found.type == "cuda" else 2048
    left, right = (torch.randn(size, size, device=found).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        wait_for(found)
        start = clock()
        torch.mm(left, right)
        wait_for(found)
        best = min(best, clock() - start)
    return 2.0 * size**3 / best, f"a product of {size} x {size} matrices, measured"


def take_turns(
    sides: Mapping[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> Seconds:
    """Seconds a call, by side; one round more to warm up, which does not count."""
    seconds: Seconds = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, call in sides.items():
            start = clock()
            call()
            if number:
                seconds[name].append(clock() - start)
    return seconds


def ratios(seconds: Seconds, name: str, against: str) -> list[float]:
    """How many times as fast ``name`` was, round by round."""
    return [theirs / ours for ours, theirs in zip(seconds[name], seconds[against], strict=True)]


def rows(seconds: Seconds, against: str, *, tokens: int | None = None) -> str:
    """Rows of a markdown table: side, seconds (median, min, max), tokens/s, ratio (median, min, max)."""
    lines = []
    for name, values in seconds.items():
        median = statistics.median(values)
        cells = [name, f"{median:.4g}", f"{min(values):.4g}", f"{max(values):.4g}"]
        if tokens is not None:
            cells.append(f"{tokens / median:,.0f}")
        if name == against:
            cells += ["1", ""]
        else:
            found = ratios(seconds, name, against)
            cells += [f"**{statistics.median(found):.2f}**", f"{min(found):.2f} to {max(found):.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def last_number(*arguments: str) -> float:
    """What a fresh Python process prints last, such as the bytes of ``peak()``."""
    done = subprocess.run([sys.executable, *arguments], check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def peak(device: str | torch.device = "cpu") -> int:
    """The most memory so far, in bytes: of tensors on a GPU, else the resident size of this process."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):  # and not getrusage's, which begins at what the parent held at the fork
            return 1024 * int(line.split()[1])
    raise SystemExit("peak memory is read from /proc/self/status, which this system lacks")
