"""Events of a training run, as a ``Reporter`` receives them. Frozen: an observer cannot change training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from nanothink.inference.evaluate import Evaluation


@dataclass(frozen=True)
class RunStarted:
    name: str
    step: int
    total_steps: int
    epoch: int
    epochs: int
    """Epochs of the whole run, including an incomplete last one."""
    n_blocks: int
    """Training blocks in an epoch."""
    blocks_per_step: int


@dataclass(frozen=True)
class StepDone:
    """An optimizer step. ``loss`` is the mean over all targets of its accumulation window, as minimised."""

    step: int
    total_steps: int
    epoch: int
    loss: float
    learning_rate: float
    gradient_norm: float
    tokens: int
    seconds: float
    skipped: bool
    logged: bool
    parts: Mapping[str, float] = field(default_factory=dict)
    """Parts of the loss by name, if the objective has several."""
    learning_rates: Mapping[str, float] = field(default_factory=dict)
    """The rate of each group of parameters; ``learning_rate`` scales them all."""


@dataclass(frozen=True)
class Evaluated:
    step: int
    epoch: int
    evaluation: Evaluation
    best: bool
    evals_without_improvement: int
    epoch_parts: Mapping[str, float] = field(default_factory=dict)
    """Mean of each part of the loss over the epoch that ends, including steps before a resume; else empty."""
    fitted: bool = False
    """True: of what was fitted on held-out text after training, on the rest of that text."""


@dataclass(frozen=True)
class Sampled:
    step: int
    epoch: int
    texts: Mapping[str, str]


@dataclass(frozen=True)
class CheckpointSaved:
    step: int
    role: str
    path: Path
    seconds: float


@dataclass(frozen=True)
class RunFinished:
    step: int
    epoch: int
    reason: str
    best_loss: float | None
    seconds: float
