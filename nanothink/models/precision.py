"""Which device computes, and in which floating-point type.

Weights, optimizer moments and losses stay float32 throughout; only matrix products run in a 16-bit type,
and only where that is the faster one. On a CPU it often is not: one with AVX512-BF16 but without AMX
multiplied bfloat16 matrices at 0.75 times the speed of float32 (docs/log.md). There products stay in
float32 even under an autocast that asks for bfloat16.

That is decided from what the processor reports and not from a stopwatch: a choice that can fall
differently in two runs would make them differ in bits, and a resumed run must not.
"""

from __future__ import annotations

import functools
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from nanothink.config import TrainConfig
from nanothink.errors import UsageError

_CPU_REASON = "16-bit products are no faster on a CPU without AMX"

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Precision:
    """The type that matrix products run in, and why."""

    device: torch.device
    dtype: torch.dtype
    reason: str

    @property
    def name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def needs_scaler(self) -> bool:
        """Half precision has five exponent bits: small gradients vanish unless the loss is scaled up."""
        return self.dtype is torch.float16

    def autocast(self) -> AbstractContextManager[Any]:
        if self.dtype is torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)


def choose_device(name: str | None = None) -> torch.device:
    """The device asked for, else the first of CUDA, MPS and CPU that is there.

    Raises:
        UsageError: the name is not a device, or this machine does not have it.
    """
    if name is None or name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        if torch.backends.mps.is_available():
            return torch.device("mps")
        return torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device {name}: not a device. Use auto, cpu, cuda, cuda:N or mps.") from None
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if not torch.cuda.is_available() or (device.index or 0) >= count:
            raise UsageError(
                f"--device {name}: this machine shows {count} CUDA devices. Leave --device out to use "
                "what is there."
            )
    elif device.type == "mps":
        if not torch.backends.mps.is_available():
            raise UsageError("--device mps: this machine has none. Leave --device out to use what is there.")
    elif device.type != "cpu":
        raise UsageError(f"--device {name}: NanoThink runs on cpu, cuda and mps.")
    return device


def choose_precision(config: TrainConfig, device: torch.device) -> Precision:
    """Pick the type for matrix products: as configured, else by what the device is fast at."""
    if not config.use_amp:
        return Precision(device, torch.float32, "use_amp is off")
    if config.amp_dtype != "auto":
        dtype = DTYPES[config.amp_dtype]
        if device.type == "cpu" and dtype not in fast_cpu_types():
            return Precision(
                device, torch.float32, f"{config.amp_dtype} is slower on this CPU: {_CPU_REASON}"
            )
        return Precision(device, dtype, "as configured")
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if (major, minor) >= (8, 0):
            return Precision(
                device, torch.bfloat16, f"compute capability {major}.{minor} has bfloat16 tensor cores"
            )
        return Precision(
            device,
            torch.float16,
            f"compute capability {major}.{minor} is fast at float16 only; loss is scaled",
        )
    if device.type == "mps":
        return Precision(device, torch.float32, "float32 is the exact choice on MPS")
    if torch.bfloat16 in fast_cpu_types():
        return Precision(device, torch.bfloat16, "this CPU has AMX tiles for bfloat16")
    return Precision(device, torch.float32, _CPU_REASON)


@functools.cache
def fast_cpu_types() -> frozenset[torch.dtype]:
    """Types in which this CPU multiplies matrices faster than, or as fast as, in float32."""
    capabilities = torch.cpu.get_capabilities()
    tiles = {torch.bfloat16: "amx_bf16", torch.float16: "amx_fp16"}
    return frozenset({torch.float32, *(dtype for dtype, name in tiles.items() if capabilities.get(name))})


def product_dtype(x: torch.Tensor) -> torch.dtype:
    """The type in which matrix products on ``x`` are to run just now."""
    device = x.device.type
    if x.dtype is torch.float64 or not torch.is_autocast_enabled(device):
        return x.dtype
    dtype: torch.dtype = torch.get_autocast_dtype(device)
    return torch.float32 if device == "cpu" and dtype not in fast_cpu_types() else dtype


def products(device: str) -> AbstractContextManager[Any]:
    """A context in which autocast is off where its type would slow this device down."""
    slow = (
        device == "cpu"
        and torch.is_autocast_enabled(device)
        and torch.get_autocast_dtype(device) not in fast_cpu_types()
    )
    return torch.autocast(device, enabled=False) if slow else nullcontext()


def bfloat16_gain(rows: int = 1024, width: int = 384, columns: int = 1536, repeats: int = 9) -> float:
    """Speed of a bfloat16 matrix product on this CPU over that of a float32 one. Takes about 50 ms.

    The best of several runs on each side, interleaved, so that a busy moment does not decide.
    """
    best = {}
    operands = {}
    for dtype in (torch.float32, torch.bfloat16):
        left, right = torch.ones(rows, width, dtype=dtype), torch.ones(columns, width, dtype=dtype)
        torch.mm(left, right.t())  # the first product of a shape also sets up its kernel
        operands[dtype], best[dtype] = (left, right), float("inf")
    for _ in range(repeats):
        for dtype, (left, right) in operands.items():
            start = time.perf_counter()
            torch.mm(left, right.t())
            best[dtype] = min(best[dtype], time.perf_counter() - start)
    return best[torch.float32] / best[torch.bfloat16]
