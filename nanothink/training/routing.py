"""Watches how a combined model's experts are trusted, epoch by epoch, and says when one is alone or idle."""

from __future__ import annotations

from nanothink.models.recall import MEMORY
from nanothink.training.events import Evaluated, Event, Note, Observer, RunStarted, StepDone
from nanothink.training.objectives import WEIGHT_PART

ALONE, IDLE = 0.95, 0.02
"""Mean weights over an epoch beyond which an expert is worth a warning."""


class RoutingWatch:
    """An observer.

    Args:
        tell: hears a ``Note`` for each expert that stood out over an epoch (over what was trained of it since
            the run was resumed).
    """

    def __init__(self, tell: Observer) -> None:
        self._tell = tell
        self._epoch = 0
        self._totals: dict[str, float] = {}

    def __call__(self, event: Event) -> None:
        if isinstance(event, RunStarted):
            self._epoch = event.epoch
        elif isinstance(event, StepDone) and not event.skipped:
            for part, mean in event.parts.items():
                if part.startswith(WEIGHT_PART) and part != WEIGHT_PART + MEMORY:
                    name = part.removeprefix(WEIGHT_PART)
                    self._totals[name] = self._totals.get(name, 0.0) + mean * event.tokens
        elif isinstance(event, Evaluated) and event.epoch > self._epoch:
            self._epoch = event.epoch
            if len(self._totals) > 1:  # a single expert has all there is
                of_all = sum(self._totals.values())  # a memory has the rest
                for name, total in self._totals.items():
                    self._say(name, total / of_all)
            self._totals = {}

    def _say(self, name: str, mean: float) -> None:
        held = f"Warning: expert '{name}' held {100 * mean:.1f} % of the weight over epoch {self._epoch}"
        if mean > ALONE:
            advice = "the others hardly count. Raise train_mla.entropy_reg, or lower train_mla.lr_other."
            self._tell(Note(f"{held}: {advice}"))
        elif mean < IDLE:
            advice = "it hardly counts. Leave it out, or raise train_mla.entropy_reg."
            self._tell(Note(f"{held}: {advice}"))
