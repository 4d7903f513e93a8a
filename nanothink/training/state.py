"""State of a run: integers and one float, from which everything else follows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

from pydantic import Field, TypeAdapter

from nanothink.config import TrainConfig
from nanothink.errors import CheckpointDamagedError
from nanothink.wording import fault

_Count = Annotated[int, Field(ge=-1, lt=2**53)]


@dataclass
class TrainState:
    step: _Count = 0
    """Optimizer steps taken. One skipped for a non-finite gradient counts, so the schedule never shifts."""
    epoch: _Count = 0
    """Epochs completed, their evaluation included."""
    position: _Count = 0
    """Training blocks consumed since the start of the run."""
    best_loss: float | None = None
    """Lowest validation loss so far, in nats per token."""
    best_step: _Count = 0
    """The step it was found at."""
    evals_without_improvement: _Count = 0
    """Evaluations in a row without improvement."""
    evaluated_step: _Count = -1
    """The step of the last evaluation, so that none is done twice or left out after a resume."""
    skipped_steps: _Count = 0
    """Steps skipped because loss or gradient were not finite, in all."""
    skipped_in_a_row: _Count = 0
    epoch_blocks: _Count = 0
    """Training blocks in an epoch; 0 before the first plan."""
    epoch_shift: Annotated[int, Field(gt=-(2**53), lt=2**53)] = 0
    """Blocks added to every epoch boundary after the data changed on resume."""
    epoch_targets: _Count = 0
    """Targets trained on since the epoch began, in steps that were not skipped."""
    epoch_parts: dict[str, float] = field(default_factory=dict)
    """Sums over those targets of each part of the loss."""

    def count(self, parts: Mapping[str, float], n_targets: int) -> None:
        """Add a step: means of the parts of its loss over its targets."""
        self.epoch_targets += n_targets
        self.epoch_parts = {
            name: self.epoch_parts.get(name, 0.0) + mean * n_targets for name, mean in parts.items()
        }

    def end_epoch(self) -> dict[str, float]:
        """Mean of each part over the epoch that ends; the sums begin anew."""
        means = {name: total / self.epoch_targets for name, total in self.epoch_parts.items()}
        self.epoch_targets, self.epoch_parts = 0, {}
        return means

    def fit(self, n_blocks: int) -> None:
        """Set the blocks of an epoch. The start of the current epoch stays."""
        if self.epoch_blocks:
            self.epoch_shift += self.epoch * (self.epoch_blocks - n_blocks)
        self.epoch_blocks = n_blocks

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Any) -> TrainState:
        """Inverse of ``to_dict``; a missing entry has its initial value.

        Raises CheckpointDamagedError for a value that ``to_dict`` could not have given.
        """
        states = TypeAdapter(cls)
        if wrong := fault(states, values):
            raise CheckpointDamagedError(
                f"the training state in this checkpoint is damaged: {wrong}. Use another checkpoint"
            )
        return states.validate_python(values)


_EVALUATIONS = 10
"""Evaluations of a run at least, so that early stopping can act and a curve has points."""

_STEPS_BETWEEN = 20
"""Steps between two evaluations at least, unless an epoch ends."""


@dataclass(frozen=True)
class Plan:
    """Length of a run, derived once from config, data and state."""

    n_blocks: int
    """Training blocks in an epoch."""
    blocks_per_step: int
    total_steps: int
    epoch_shift: int = 0
    """See ``TrainState``."""

    @classmethod
    def make(cls, config: TrainConfig, n_blocks: int, state: TrainState) -> Plan:
        """``max_steps`` steps if set; else the steps taken plus those that the remaining blocks need."""
        blocks_per_step = config.batch_size * config.grad_accum_steps
        remaining = max(0, state.epoch_shift + config.max_epochs * n_blocks - state.position)
        total = config.max_steps or state.step + -(-remaining // blocks_per_step)
        return cls(n_blocks, blocks_per_step, total, state.epoch_shift)

    @property
    def epochs(self) -> int:
        """Epochs that the run takes; the blocks by which its last step overshoots do not begin another."""
        consumed = (self.total_steps - 1) * self.blocks_per_step + 1 - self.epoch_shift
        return max(1, -(-consumed // self.n_blocks))

    def epochs_over(self, state: TrainState) -> int:
        """Epochs whose blocks are used up, be they counted as completed yet or not."""
        return (state.position - self.epoch_shift) // self.n_blocks

    def epoch_is_over(self, state: TrainState) -> bool:
        return self.epochs_over(state) > state.epoch

    def evaluates_every(self, asked: int | None) -> int:
        """Steps between two evaluations: as asked, else so that a run has ten. 0: at ends of epochs."""
        if asked is not None:
            return asked
        tenth = -(-self.total_steps // _EVALUATIONS)
        return max(_STEPS_BETWEEN, tenth) if self.epochs < _EVALUATIONS else 0

    def n_evaluations(self, asked: int | None, state: TrainState) -> int:
        """Evaluations that are left, at most: at ends of epochs, between them, and at the end."""
        every = self.evaluates_every(asked)
        blocks = self.total_steps * self.blocks_per_step - self.epoch_shift
        by_epoch = blocks // self.n_blocks - state.epoch
        at_the_end = blocks // self.n_blocks == (blocks - self.blocks_per_step) // self.n_blocks
        by_steps = self.total_steps // every - state.step // every if every else 0
        return max(0, min(self.total_steps - state.step, by_epoch + by_steps + at_the_end))

    def is_over(self, state: TrainState) -> bool:
        return state.step >= self.total_steps
