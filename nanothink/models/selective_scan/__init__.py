"""The selective scan of S6 (Gu & Dao 2023, "Mamba", sections 3.2 and 3.3): one signature, several ways.

    hₜ = exp(Δₜ A) hₜ₋₁ + Δₜ uₜ Bₜ        a state of N numbers for each of D channels
    yₜ = Cₜ · hₜ + D uₜ

reference.py   as the definition reads; slow, the measure for the others
plain.py       chunked PyTorch: any device, no compiler
compiled.py    C++ for the processor at hand (scan.cpp), built at first use
triton.py      CUDA, without anything that torch for CUDA does not bring along
mamba_ssm.py   CUDA, by the package of that name where somebody installed it

Letters are the paper's: Δ and B here are its Δ and B before discretisation; A is discretised exactly
(zero-order hold), B by Euler's rule (Δ B), as in the authors' own code. The state is float32 whatever type
the inputs have and whatever autocast says.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias, cast

import torch
from torch import Tensor

from nanothink.errors import UsageError

ScanName: TypeAlias = Literal["plain", "compiled", "triton", "mamba_ssm"]

Scan: TypeAlias = Callable[
    [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, "Tensor | None"], tuple[Tensor, Tensor]
]


@dataclass(frozen=True)
class ScanChoice:
    """Which implementation runs, and why."""

    name: ScanName
    reason: str


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    state: Tensor | None = None,
    *,
    name: ScanName | Literal["auto"] = "auto",
) -> tuple[Tensor, Tensor]:
    """Run the scan over T steps, T >= 1, with gradients for every input.

    Args:
        u: (batch, T, D) input.
        delta: (batch, T, D) step sizes, at least 0 (after softplus).
        A: (D, N) rates of decay, at most 0.
        B: (batch, T, N) how the input enters the state.
        C: (batch, T, N) how the state is read.
        D: (D,) weight of the input in the output.
        state: (batch, N, D) the state that earlier steps left behind; zero when None.
        name: which implementation; "auto" follows ``choose_scan``.

    Returns:
        y (batch, T, D) in the type of ``u``, and the last state (batch, N, D) in float32 (float64 for float64
        inputs). A sequence scanned in pieces, the state handed on, gives what it gives as a whole.
    """
    if name == "auto":
        name = choose_scan(u.device.type).name
    return implementation(name)(u, delta, A, B, C, D, state)


RULE = (
    "The rule: compiled on a CPU; on CUDA triton, or mamba_ssm where installed and measured to be faster; "
    "plain where those cannot be had."
)


@functools.cache
def choose_scan(device: str, asked: str = "auto") -> ScanChoice:
    """The one rule: on a CPU compiled, on CUDA triton or mamba_ssm, where they are to be had; else plain.

    The first call on a CPU may build the compiled scan, which takes a second or two. On CUDA with mamba_ssm
    installed, the first call measures which is faster; the answer can differ between two runs, so a run
    that must not change keeps the name.

    Args:
        device: "cpu", "cuda", "mps".
        asked: a name, or "auto".

    Raises:
        UsageError: what was asked for by name cannot be had here.
    """
    if asked == "auto" and device == "cuda":
        from nanothink.models.selective_scan import mamba_ssm

        why_not = {"triton": unavailable("triton", device), "mamba_ssm": unavailable("mamba_ssm", device)}
        if not why_not["mamba_ssm"] and torch.are_deterministic_algorithms_enabled():
            why_not["mamba_ssm"] = "its gradients are not deterministic"
        return choose_on_cuda(why_not, mamba_ssm.race)
    names = {"cpu": "compiled"}
    best = names.get(device, "plain")
    wanted = cast(ScanName, best if asked == "auto" else asked)
    reason = unavailable(wanted, device)
    if reason and asked != "auto":
        raise UsageError(
            f"state_space.scan={asked} cannot be had here: {reason}. Use --set state_space.scan=auto."
        )
    if reason:
        return ScanChoice("plain", f"no {wanted} scan: {reason}")
    return ScanChoice(wanted, "as configured" if asked != "auto" else f"the fastest on {device}")


def choose_on_cuda(why_not: Mapping[str, str], race: Callable[[], Mapping[ScanName, float]]) -> ScanChoice:
    """The rule for CUDA: triton, unless mamba_ssm is there too and at least a twentieth faster.

    Less than that is noise, and too little for what mamba_ssm costs: gradients equal to the bit.

    Args:
        why_not: for "triton" and "mamba_ssm" why it cannot be had; empty where it can.
        race: measures seconds of both; called only where both can be had.
    """
    if why_not["triton"]:
        reason = f"no triton scan: {why_not['triton']}"
        return ScanChoice("plain" if why_not["mamba_ssm"] else "mamba_ssm", reason)
    if why_not["mamba_ssm"]:
        return ScanChoice("triton", "the fastest on cuda")
    try:
        seconds = race()
    except RuntimeError as error:  # such as a kernel that was not built for this card
        return ScanChoice(
            "triton", f"mamba_ssm does not run here: {str(error).strip().partition(chr(10))[0]}"
        )
    times = ", ".join(f"{name} {1000 * seconds[name]:.2f} ms" for name in ("triton", "mamba_ssm"))
    if seconds["mamba_ssm"] < 0.95 * seconds["triton"]:
        caution = "a resumed run will not be equal to the bit; state_space.scan=triton keeps it so"
        return ScanChoice("mamba_ssm", f"measured forward and backward: {times}; {caution}")
    return ScanChoice("triton", f"measured forward and backward: {times}")


@functools.cache
def implementation(name: ScanName) -> Scan:
    """The function behind a name."""
    module = importlib.import_module(f"nanothink.models.selective_scan.{name}")
    return cast(Scan, module.scan)


def unavailable(name: ScanName, device: str) -> str:
    """Why an implementation cannot run on a device; empty where it can."""
    if name == "compiled":
        from nanothink.models.selective_scan import compiled

        return compiled.unavailable() if device == "cpu" else f"it is for CPUs, and this runs on {device}"
    if name in ("triton", "mamba_ssm") and device != "cuda":
        return f"it is for CUDA, and this runs on {device}"
    if name == "triton":
        return "" if importlib.util.find_spec("triton") else "the package triton is not installed"
    if name == "mamba_ssm":
        from nanothink.models.selective_scan import mamba_ssm

        return mamba_ssm.unavailable()
    return ""
