"""What a step minimises. The loop knows only this shape, so one loop serves every phase."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch

from nanothink.models.contract import LanguageModel

Objective: TypeAlias = Callable[[LanguageModel, torch.Tensor, torch.Tensor, float], torch.Tensor]
"""(model, inputs (B, T), targets (B, T), scale) -> scalar: ``scale`` times the sum over valid targets."""


def next_token(
    model: LanguageModel, inputs: torch.Tensor, targets: torch.Tensor, scale: float
) -> torch.Tensor:
    """Cross-entropy of the next token, in nats."""
    return model.loss(inputs, targets, scale=scale)
