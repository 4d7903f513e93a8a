"""Watches how a combined model's experts are trusted, epoch by epoch, and says when one is alone or idle."""

from __future__ import annotations

from nanothink.models.store_gate import VECTOR_STORE
from nanothink.training.events import Evaluated, Event, Note, Observer
from nanothink.training.objectives import WEIGHT_PART

ALONE, IDLE = 0.95, 0.02
"""Mean weights over an epoch beyond which an expert is worth a warning."""


class RoutingWatch:
    """An observer.

    Args:
        tell: hears a ``Note`` for each expert that stood out over an epoch.
    """

    def __init__(self, tell: Observer) -> None:
        self._tell = tell

    def __call__(self, event: Event) -> None:
        if not isinstance(event, Evaluated):
            return
        means = {
            part.removeprefix(WEIGHT_PART): mean
            for part, mean in event.epoch_parts.items()
            if part.startswith(WEIGHT_PART) and part != WEIGHT_PART + VECTOR_STORE
        }
        of_experts = sum(means.values())  # a vector store has the rest
        if len(means) > 1:  # a single expert has all there is
            for name, mean in means.items():
                self._say(name, mean / of_experts, event.epoch)

    def _say(self, name: str, mean: float, epoch: int) -> None:
        held = f"Warning: expert '{name}' held {100 * mean:.1f} % of the weight over epoch {epoch}"
        if mean > ALONE:
            advice = "the others hardly count. Raise train_mla.entropy_reg, or lower train_mla.lr_other."
            self._tell(Note(f"{held}: {advice}"))
        elif mean < IDLE:
            advice = "it hardly counts. Leave it out, or raise train_mla.entropy_reg."
            self._tell(Note(f"{held}: {advice}"))
