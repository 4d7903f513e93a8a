"""The selective scan of S6 (Gu & Dao 2023, "Mamba", sections 3.2 and 3.3): one signature, several ways.

    hₜ = exp(Δₜ A) hₜ₋₁ + Δₜ uₜ Bₜ        a state of N numbers for each of D channels
    yₜ = Cₜ · hₜ + D uₜ

reference.py   the definition, step by step; slow, the reference of the others
plain.py       chunked PyTorch: any device, no compiler
compiled.py    C++ for the processor at hand (scan.cpp), built at first use
triton.py      CUDA, without anything that torch for CUDA does not bring along

Letters are the paper's: Δ and B here are its Δ and B before discretisation; A is discretised exactly
(zero-order hold), B by Euler's rule (Δ B), as in the authors' own code. The state is float32 whatever type
the inputs have and whatever autocast says.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias, cast

from torch import Tensor

from nanothink.errors import UsageError

ScanName: TypeAlias = Literal["plain", "compiled", "triton"]

Scan: TypeAlias = Callable[
    [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, "Tensor | None"], tuple[Tensor, Tensor]
]


@dataclass(frozen=True)
class ScanChoice:
    """The implementation that runs, and the reason."""

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
        B: (batch, T, N) weights of the input in the state.
        C: (batch, T, N) weights of the state in the output.
        D: (D,) weight of the input in the output.
        state: (batch, N, D) the state after earlier steps; zero when None.
        name: which implementation; "auto" follows ``choose_scan``.

    Returns:
        y (batch, T, D) in the type of ``u``, and the last state (batch, N, D) in float32 (float64 for float64
        inputs). Scanning a sequence in pieces, with the state passed on, gives the same as scanning it whole.
    """
    if name == "auto":
        name = choose_scan(u.device.type).name
    return implementation(name)(u, delta, A, B, C, D, state)


RULE = "The rule: compiled on a CPU, triton on CUDA; plain elsewhere, and where those are not available."


@functools.cache
def choose_scan(device: str, asked: str = "auto") -> ScanChoice:
    """The one rule: compiled on a CPU, triton on CUDA, where they are available; else plain.

    The first call on a CPU may build the compiled scan, which takes a second or two.

    Args:
        device: "cpu", "cuda", "mps".
        asked: a name, or "auto".

    Raises:
        UsageError: the scan asked for by name is not available here.
    """
    best = {"cpu": "compiled", "cuda": "triton"}.get(device, "plain")
    wanted = cast(ScanName, best if asked == "auto" else asked)
    reason = unavailable(wanted, device)
    if reason and asked != "auto":
        raise UsageError(
            f"state_space.scan={asked} is not available here: {reason}. Use --set state_space.scan=auto."
        )
    if reason:
        return ScanChoice("plain", f"no {wanted} scan: {reason}")
    return ScanChoice(wanted, "as configured" if asked != "auto" else f"the fastest on {device}")


@functools.cache
def implementation(name: ScanName) -> Scan:
    """The function behind a name."""
    module = importlib.import_module(f"nanothink.models.selective_scan.{name}")
    return cast(Scan, module.scan)


def unavailable(name: ScanName, device: str) -> str:
    """Reason that an implementation cannot run on a device; empty where it can."""
    if name == "compiled":
        from nanothink.models.selective_scan import compiled

        return compiled.unavailable() if device == "cpu" else f"it is for CPUs, and this runs on {device}"
    if name == "triton":
        if device != "cuda":
            return f"it is for CUDA, and this runs on {device}"
        return "" if importlib.util.find_spec("triton") else "the package triton is not installed"
    return ""
