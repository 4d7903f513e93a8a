"""Choice of the device, and of the floating-point type that matrix products run in.

Weights, optimizer moments and losses stay float32 throughout; only matrix products run in a 16-bit type,
under autocast. A run chooses the type once: as configured, else by the device, and on a CPU by a measurement
(training/matmul_types.py, docs/decisions/0007).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from nanothink.errors import UsageError

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Precision:
    """The type that matrix products run in, and why."""

    device: torch.device
    dtype: torch.dtype
    reason: str
    muon: torch.dtype = torch.float32
    """The type of Muon's Newton-Schulz steps."""

    @property
    def name(self) -> str:
        return _name(self.dtype)

    @property
    def settled(self) -> dict[str, str]:
        """The settings of training that fix these types."""
        return {"amp_dtype": _name(self.dtype), "muon_dtype": _name(self.muon)}

    @property
    def needs_scaler(self) -> bool:
        """Half precision has five exponent bits: small gradients vanish unless the loss is scaled up."""
        return self.dtype is torch.float16

    def autocast(self) -> AbstractContextManager[Any]:
        if self.dtype is torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


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


def matmul_dtype(x: torch.Tensor) -> torch.dtype:
    """The type in which matrix products on ``x`` run just now."""
    device = x.device.type
    if x.dtype is torch.float64 or not torch.is_autocast_enabled(device):
        return x.dtype
    dtype: torch.dtype = torch.get_autocast_dtype(device)
    return dtype
