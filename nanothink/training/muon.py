"""Muon (Jordan et al. 2024) whose iteration runs in a type that the device is fast at.

``torch.optim.Muon`` orthogonalises in bfloat16 wherever it runs. A CPU without instructions for it emulates
them, twenty times slower than float32 on one such (docs/log.md): most of a training step. There the same
iteration runs in float32, which is the more exact one too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nanothink.models.precision import fast_cpu_types


class Muon(torch.optim.Muon):
    """``torch.optim.Muon`` with Nesterov momentum and its update scaled to AdamW's root mean square.

    Args:
        params: groups of matrices.
        momentum: decay of the momentum.
    """

    def __init__(self, params: list[dict[str, Any]], *, momentum: float) -> None:
        super().__init__(params, momentum=momentum, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every matrix that has a gradient."""
        assert closure is None
        on_cpu = all(p.device.type == "cpu" for group in self.param_groups for p in group["params"])
        if not on_cpu or torch.bfloat16 in fast_cpu_types():
            super().step()  # type: ignore[no-untyped-call]
            return
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                momentum = state["momentum_buffer"].lerp_(parameter.grad, 1 - group["momentum"])
                ahead = parameter.grad.lerp(momentum, group["momentum"])
                update = orthogonalised(ahead, group["ns_coefficients"], group["ns_steps"], group["eps"])
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(parameter.shape)))


def orthogonalised(
    matrix: Tensor, coefficients: tuple[float, float, float], n_steps: int, eps: float
) -> Tensor:
    """A matrix with the singular vectors of ``matrix`` and singular values near 1, by Newton-Schulz."""
    a, b, c = coefficients
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.t() if tall else matrix
    x = x / x.norm().clamp(min=eps)
    for _ in range(n_steps):
        gram = x @ x.t()
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.t() if tall else x
