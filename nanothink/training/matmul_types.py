"""Choice of the types of a run's matrix products: as configured, else the faster one.

On a CPU the speed is measured (matmul_speed.py). A 16-bit type is chosen if it is at least 1.2 times as fast
as float32, since only products gain by it. A checkpoint holds the types by name, so that a resumed run
computes as it began. Muon's Newton-Schulz steps are smaller products than the model's and are measured apart.

Text is generated in float32 on every device: a step of one sequence waits for its weights, and converting
them takes longer than reading them (docs/decisions/0007).
"""

from __future__ import annotations

from typing import Protocol

import torch

from nanothink.config import ModelConfig, TrainConfig
from nanothink.errors import UsageError
from nanothink.models.precision import DTYPES, Precision
from nanothink.training.matmul_speed import MatmulSpeed, Speed

NEEDED = 1.2
"""Speed, as a multiple of float32's, from which a 16-bit type is chosen; below its inverse it is avoided."""


AS_TRAINED = "as trained"


class Speeds(Protocol):
    """Interface of ``MatmulSpeed``."""

    def of_step(self, dtype: torch.dtype) -> Speed: ...

    def of_muon(self, dtype: torch.dtype) -> Speed: ...


def choose_precision(
    train: TrainConfig, model: ModelConfig, device: torch.device, speeds: Speeds | None = None
) -> Precision:
    """Pick the types of a run: as configured, else what the device is fast at.

    Args:
        speeds: of this CPU; measured when None, where they are asked for.

    Raises:
        UsageError: the device cannot multiply in the type that was asked for.
    """
    _fix_threads(device)
    speeds = speeds or MatmulSpeed.of(train, model)
    dtype, reason = _chosen(train, device, speeds)
    muon, remark = _chosen_for_muon(train, device, dtype, speeds)
    return Precision(device, dtype, reason + remark, muon)


def precision_of_use(
    train: TrainConfig, model: ModelConfig, device: torch.device, speeds: Speeds | None = None
) -> Precision:
    """Pick the type to evaluate a trained model in: that of its training, so that figures repeat.

    float32 where this device lacks it, or would take more than ``NEEDED`` times as long in it.
    """
    _fix_threads(device)
    dtype = DTYPES.get(train.amp_dtype, torch.float32)
    if dtype is torch.float32:
        return Precision(device, dtype, AS_TRAINED)
    name = train.amp_dtype
    if problem := _unsupported(device, dtype):
        return Precision(device, torch.float32, f"trained in {name}, which does not run here: {problem}")
    if device.type == "cpu":
        times = (speeds or MatmulSpeed.of(train, model)).of_step(dtype).times
        if times < 1 / NEEDED:
            return Precision(
                device, torch.float32, f"{name}, as trained, is {times:.2f} times as fast as float32 here"
            )
    return Precision(device, dtype, AS_TRAINED)


def _fix_threads(device: torch.device) -> None:
    """Set the threads as a measurement does, in every run: MKL does not lower a number that was set."""
    if device.type == "cpu":
        torch.set_num_threads(torch.get_num_threads())


def _chosen(train: TrainConfig, device: torch.device, speeds: Speeds) -> tuple[torch.dtype, str]:
    if not train.use_amp:
        return torch.float32, "use_amp is off"
    if train.amp_dtype != "auto":
        dtype = DTYPES[train.amp_dtype]
        if problem := _unsupported(device, dtype):
            raise UsageError(
                f"{train.section}.amp_dtype={train.amp_dtype}: {device} cannot compute in it: {problem}. Use "
                f"--set {train.section}.amp_dtype=float32"
            )
        if device.type != "cpu" or dtype is torch.float32:
            return dtype, "as configured"
        return dtype, f"as configured; {_times(speeds.of_step(dtype))} times as fast as float32 here"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        capability = f"compute capability {major}.{minor}"
        if (major, minor) >= (8, 0):
            return torch.bfloat16, f"{capability} has bfloat16 tensor cores"
        return torch.float16, f"{capability} is fast at float16 only; loss is scaled"
    if device.type == "mps":
        return torch.float32, "float32 is the exact choice on MPS"
    if problem := _unsupported(device, torch.bfloat16):
        return torch.float32, f"bfloat16 does not run here: {problem}"
    speed = speeds.of_step(torch.bfloat16)
    if speed.times >= NEEDED:
        return torch.bfloat16, f"measured at {_times(speed)} times the speed of float32"
    return torch.float32, f"bfloat16 was measured at {_times(speed)} times its speed; {NEEDED} is needed"


def _chosen_for_muon(
    train: TrainConfig, device: torch.device, dtype: torch.dtype, speeds: Speeds
) -> tuple[torch.dtype, str]:
    """Type of Muon's steps, and a remark if it is not that of the other products."""
    if train.optimizer != "muon":
        return torch.float32, ""
    if train.muon_dtype != "auto":
        muon = DTYPES[train.muon_dtype]
        return muon, "" if muon is dtype else f"; Muon's steps in {train.muon_dtype}, as configured"
    if dtype is torch.float32 or device.type != "cpu":
        return dtype, ""
    speed = speeds.of_muon(dtype)
    if speed.times >= NEEDED:
        return dtype, ""
    return torch.float32, f"; in Muon's steps at {_times(speed)} times, so they are in float32"


def _times(speed: Speed) -> str:
    return f"{speed.times:.2f}" if speed.times < 10 else f"{speed.times:.0f}"


def _unsupported(device: torch.device, dtype: torch.dtype) -> str:
    """Reason that products on this device cannot run in a type; empty if they can."""
    if dtype is torch.float32:
        return ""
    try:
        with torch.autocast(device.type, dtype):
            found = torch.ones(2, 2, device=device) @ torch.ones(2, 2, device=device)
    except RuntimeError as error:
        return str(error).strip().partition("\n")[0]
    return "" if found.dtype is dtype else "torch has no autocast for it"
