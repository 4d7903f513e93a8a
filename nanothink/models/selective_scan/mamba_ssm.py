"""The selective scan of ``mamba_ssm`` (Gu & Dao's own CUDA kernel), for those who have it installed.

It is not a dependency. What it does otherwise than ``selective_scan`` says:

- It starts from a state of zero: with one given, another scan runs.
- It has no gradient of the last state and leaves it out in silence; here a backward pass that reaches
  the last state is an error.
- It wants inputs of one type, so mixed ones are widened in memory.
- Its backward pass adds with atomics: equal inputs give gradients that differ in the last bits from run to
  run, and a resumed run is not the uninterrupted one to the bit. It is never chosen under
  ``torch.use_deterministic_algorithms``.
"""

from __future__ import annotations

import functools
import importlib
import math
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanothink.models import selective_scan

Kernel: TypeAlias = Callable[..., tuple[Tensor, Tensor]]
Name = TypeVar("Name", bound=str)

_MOST_STATES = 256  # of its kernel
_RACE = (8, 1024, 1024, 16)  # batch, T, D, N of the comparison
_ROUNDS = 5


def scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See ``selective_scan``. CUDA only; no gradient through the last state unless one is given.

    Raises:
        RuntimeError: there is no mamba_ssm here; ``unavailable()`` says why.
    """
    if state is not None or u.dtype == torch.float64 or A.shape[1] > _MOST_STATES:
        no_triton = selective_scan.unavailable("triton", u.device.type)
        other: selective_scan.ScanName = "plain" if no_triton else "triton"
        return selective_scan.implementation(other)(u, delta, A, B, C, D, state)
    kernel, why_not = _load()
    if kernel is None:
        raise RuntimeError(f"there is no scan of mamba_ssm: {why_not}")
    return scan_with(kernel, u, delta, A, B, C, D)


def scan_with(
    kernel: Kernel, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor
) -> tuple[Tensor, Tensor]:
    """The scan by a function with the signature and layout of ``selective_scan_fn``."""
    wide = functools.reduce(torch.promote_types, (z.dtype for z in (u, delta, B, C)))
    ut, dt, Bt, Ct = (z.transpose(1, 2).to(wide) for z in (u, delta, B, C))  # time last
    y, last = kernel(ut, dt, A.float(), Bt, Ct, D.float(), return_last_state=True)
    # (batch, D, T) -> (batch, T, D), (batch, D, N) -> (batch, N, D)
    end: Tensor = _WithoutGradient.apply(last.transpose(1, 2).float())  # type: ignore[no-untyped-call]
    return y.transpose(1, 2).to(u.dtype), end


def unavailable() -> str:
    """Why mamba_ssm cannot be used here; empty where it can."""
    return _load()[1]


def race() -> dict[selective_scan.ScanName, float]:
    """Seconds for a forward and backward pass on the current CUDA device, Triton's scan and this one.

    Takes a few seconds at the first call, in which Triton compiles its kernels. Draws no random numbers.
    """
    batch, length, width, n_states = _RACE

    def call(one: selective_scan.Scan) -> Callable[[], None]:
        def filled(value: float, *shape: int) -> Tensor:
            return torch.full(shape, value, device="cuda", requires_grad=True)

        u, delta = filled(1, batch, length, width), filled(0.1, batch, length, width)
        B, C = filled(1, batch, length, n_states), filled(1, batch, length, n_states)
        A, D = filled(-1, width, n_states), filled(1, width)

        def step() -> None:
            with torch.enable_grad():
                y, _ = one(u, delta, A, B, C, D, None)
                torch.autograd.grad(y, (u, delta, A, B, C, D), torch.ones_like(y))

        return step

    names: tuple[selective_scan.ScanName, ...] = ("triton", "mamba_ssm")
    calls = {name: call(selective_scan.implementation(name)) for name in names}
    return best_seconds(calls, torch.cuda.synchronize)


def best_seconds(
    calls: Mapping[Name, Callable[[], None]],
    synchronise: Callable[[], None],
    clock: Callable[[], float] = time.perf_counter,
    rounds: int = _ROUNDS,
) -> dict[Name, float]:
    """The shortest time of each call; they take turns, so that a slow moment hits all of them.

    Args:
        calls: what to measure; each is called once before, to compile what it needs.
        synchronise: returns when the device has done all work it was given.
        clock: seconds.
        rounds: how often each is measured.
    """
    for call in calls.values():
        call()
    best = dict.fromkeys(calls, math.inf)
    for _ in range(rounds):
        for name, call in calls.items():
            synchronise()
            start = clock()
            call()
            synchronise()
            best[name] = min(best[name], clock() - start)
    return best


class _WithoutGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, last: Tensor) -> Tensor:
        return last.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise RuntimeError(
            "mamba_ssm's scan has no gradient of the last state. Use --set state_space.scan=triton."
        )


@functools.cache
def _load() -> tuple[Kernel | None, str]:
    try:
        module = importlib.import_module("mamba_ssm.ops.selective_scan_interface")
        return module.selective_scan_fn, ""
    except ModuleNotFoundError as error:
        if error.name == "mamba_ssm":
            return None, "the package mamba_ssm is not installed"
        return None, f"mamba_ssm cannot be imported: {error}"
    except Exception as error:  # its extension is built for one version of torch and CUDA, and says so anyhow
        return None, f"mamba_ssm cannot be imported: {error}"
