"""Warnings about a combined model whose weights over an epoch leave one expert alone, or one idle."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from nanothink.models.store_gate import VECTOR_STORE
from nanothink.training.objectives import WEIGHT_PART

ALONE, IDLE = 0.95, 0.02
"""Mean weights over an epoch beyond which an expert is worth a warning."""


def unbalanced_experts(epoch_parts: Mapping[str, float], epoch: int) -> Iterator[str]:
    """Yield a warning for each expert whose mean weight over the epoch is above ALONE or below IDLE.

    Args:
        epoch_parts: mean of each part of the loss over the epoch, as ``Evaluated`` has them.
    """
    means = {
        part.removeprefix(WEIGHT_PART): mean
        for part, mean in epoch_parts.items()
        if part.startswith(WEIGHT_PART) and part != WEIGHT_PART + VECTOR_STORE
    }
    of_experts = sum(means.values())  # a vector store has the rest
    for name, mean in means.items() if len(means) > 1 else ():  # a single expert has all there is
        share = mean / of_experts
        held = f"Warning: expert '{name}' held {100 * share:.1f} % of the weight over epoch {epoch}"
        if share > ALONE:
            yield (
                f"{held}: the others hardly count. Raise train_mla.entropy_reg, or lower train_mla.lr_other."
            )
        elif share < IDLE:
            yield f"{held}: it hardly counts. Leave it out, or raise train_mla.entropy_reg."
