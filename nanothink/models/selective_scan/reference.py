"""The selective scan by its definition, step by step. Slow; the reference that the others are tested with."""

from __future__ import annotations

import torch
from torch import Tensor


def scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See ``selective_scan``. Differentiated by autograd; computes in the type of ``u``."""
    h = u.new_zeros(u.shape[0], A.shape[1], u.shape[2]) if state is None else state  # (batch, N, D)
    outputs = []
    for t in range(u.shape[1]):
        decay = torch.exp(delta[:, t, None, :] * A.t())  # (batch, N, D)
        h = decay * h + (delta[:, t] * u[:, t])[:, None, :] * B[:, t, :, None]
        outputs.append((C[:, t, :, None] * h).sum(1))  # (batch, D)
    return torch.stack(outputs, 1) + D * u, h
