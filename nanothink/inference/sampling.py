"""Sampling of the next token from logits.

In this order: repetition penalty, temperature, top-k, top-p, draw. All but finding the k likeliest (which no
conversion changes, nor a temperature) happens on the CPU in float64,
and each row draws one number from a generator of its own, looked up in the cumulative distribution in
order of token id. So a row's choice depends on its own logits and seed alone, whatever device the
model runs on and whoever else is in the batch, and rounding noise in the logits hardly ever changes it.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field, ValidationError
from torch import Tensor

from nanothink.config.base import Settings
from nanothink.errors import NanoThinkError, UsageError


class SamplingConfig(Settings):
    """Settings of sampling from a model."""

    temperature: float = Field(0.8, ge=0, le=100)
    """Logits are divided by this: below 1 sharper, above 1 flatter, 0 always the likeliest token."""

    top_k: int | None = Field(50, ge=0)
    """Draw from the k likeliest tokens only; from all when empty or 0."""

    top_p: float | None = Field(None, gt=0, le=1)
    """Draw from the fewest tokens whose probabilities reach this sum (Holtzman et al. 2020); from all when
    empty."""

    repetition_penalty: float = Field(1.0, gt=0, le=100)
    """Above 1, tokens seen lately become less likely (Keskar et al. 2019, section 4.1); 1 changes nothing."""

    repetition_window: int = Field(64, ge=1)
    """Number of last tokens, prompt included, that count as seen lately."""

    max_new_tokens: int = Field(128, ge=1)
    """Stop after this many tokens."""

    stop_at_eos: bool = True
    """Stop where the model ends the document."""

    seed: int | None = Field(None, ge=0, lt=1 << 63)
    """The same seed gives the same text; fresh chance when empty. Row i of a batch uses seed + i."""


def sampling_config(**values: Any) -> SamplingConfig:
    """A SamplingConfig, or an error that a person can act on.

    Raises:
        UsageError: a value out of bounds, or a name that is not a sampling setting.
    """
    try:
        return SamplingConfig(**values)
    except ValidationError as error:
        problems = [
            f"{problem['loc'][0]}={problem['input']!r}: {problem['msg']}" for problem in error.errors()
        ]
        raise UsageError("; ".join(problems) + ".") from None


def next_tokens(
    logits: Tensor,
    previous: Sequence[Sequence[int]],
    config: SamplingConfig,
    generators: Sequence[torch.Generator],
) -> Tensor:
    """Choose one token for each row. Pure but for the state of the generators.

    Args:
        logits: (B, V), any floating type and device; left as they are.
        previous: the tokens before, row by row; only the last ``repetition_window`` matter.
        config: see its fields.
        generators: one CPU generator per row; each gives one number, or none at temperature 0.

    Returns:
        (B,) int64 on the CPU.

    Raises:
        NanoThinkError: logits with NaN or +infinity, or a row without a finite one.
    """
    scores = logits.detach()
    if config.repetition_penalty != 1:
        scores = scores.to("cpu", torch.float64, copy=True)
        _require_finite(scores.amax(1))
        for row, tokens in zip(scores, previous, strict=True):
            seen = torch.tensor(sorted(set(tokens[-config.repetition_window :])), dtype=torch.int64)
            row[seen] = torch.where(
                row[seen] > 0, row[seen] / config.repetition_penalty, row[seen] * config.repetition_penalty
            )
    if config.temperature == 0:
        greatest, likeliest = scores.max(1)
        _require_finite(greatest)
        return likeliest.cpu()
    # Only those that can be drawn are converted and summed up: fifty of many thousands.
    candidates = None
    if config.top_k and config.top_k < scores.shape[1]:
        best = scores.topk(config.top_k, dim=1)
        candidates, order = best.indices.cpu().sort(dim=1)
        scores = best.values.cpu().gather(1, order)
    scores = scores.to("cpu", torch.float64)
    _require_finite(scores.amax(1))
    probabilities = filter_probabilities(scores, config)
    draws = [torch.rand(1, generator=generator, dtype=torch.float64) for generator in generators]
    chosen = pick(probabilities, draws[0].unsqueeze(0) if len(draws) == 1 else torch.stack(draws))
    return chosen if candidates is None else candidates.gather(1, chosen.unsqueeze(1)).squeeze(1)


def _require_finite(greatest: Tensor) -> None:
    """Raise for rows whose greatest logit is NaN or infinite; ``amax`` and ``max`` pass NaN on."""
    if not all(map(math.isfinite, greatest.tolist())):
        raise NanoThinkError(
            "The model's logits are not finite, so there is nothing to draw from: its training diverged, or "
            "its weights were changed. 'nanothink checkpoints verify' says which of your checkpoints can be "
            "used; if none can, train again with a lower learning rate."
        )


def pick(probabilities: Tensor, draws: Tensor) -> Tensor:
    """Invert the cumulative distribution: (B, V) probabilities and (B, 1) draws in [0, 1] to (B,) tokens."""
    cumulative = probabilities.cumsum(1)
    total = cumulative[:, -1:]
    aim = torch.minimum(draws * total, torch.nextafter(total, torch.zeros_like(total)))  # below the total
    return torch.searchsorted(cumulative, aim, right=True).squeeze(1)


def filter_probabilities(scores: Tensor, config: SamplingConfig) -> Tensor:
    """Temperature, top-k and top-p: (B, V) logits to (B, V) probabilities, zero where filtered out."""
    scores = (scores - scores.amax(1, keepdim=True)) / config.temperature
    if config.top_k and config.top_k < scores.shape[1]:
        best = scores.topk(config.top_k, dim=1)
        scores = torch.full_like(scores, -torch.inf).scatter_(1, best.indices, best.values)
    probabilities = scores.softmax(1)
    if config.top_p is not None and config.top_p < 1:
        ordered, order = probabilities.sort(dim=1, descending=True, stable=True)
        mass_before = ordered.cumsum(1) - ordered
        ordered = ordered.masked_fill(mass_before >= config.top_p, 0.0)  # the first one always stays
        probabilities = torch.zeros_like(probabilities).scatter_(1, order, ordered)
        probabilities /= probabilities.sum(1, keepdim=True)
    return probabilities
