"""Sampling of the next token from logits.

In this order: repetition penalty, temperature, top-k, top-p, draw. All but finding the k likeliest (which no
conversion changes, nor a temperature) happens on the CPU in float64.

A draw is a race (the Gumbel-max trick: Maddison et al. 2014, "A* sampling", section 2, in its exponential
form): every token that can be drawn arrives after an exponential time over its probability, and the first one
is taken. The times are a hash of (seed, position, token). So a row's choice depends on its own logits, seed
and position alone, whatever device the model runs on and whoever else is in the batch, and rounding of the
logits changes it only where the first two arrive within that rounding of each other: about one draw in ten
million. One number looked up in a cumulative distribution has as many borders as tokens to be rounded over.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, ValidationError
from torch import Tensor

from nanothink.config.base import Settings
from nanothink.errors import NanoThinkError, UsageError
from nanothink.suggestions import suggest


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
    seeds: Sequence[int],
) -> Tensor:
    """Choose one token for each row. A pure function.

    Args:
        logits: (B, V), any floating type and device; left as they are.
        previous: the tokens before, row by row: their number is the position, which the draw depends on. Of
            the tokens only the last ``repetition_window`` matter.
        config: see its fields; its seed is not used.
        seeds: one a row.

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
    probabilities = filter_probabilities(scores, config).numpy()
    ids = np.arange(scores.shape[1])[None] if candidates is None else candidates.numpy()
    times = arrival_times(seeds, [len(before) for before in previous], ids)
    chosen = torch.from_numpy(np.divide(probabilities, times, out=times).argmax(1))
    return chosen if candidates is None else candidates.gather(1, chosen.unsqueeze(1)).squeeze(1)


def drafted_token(
    logits: Tensor,
    text: Sequence[int],
    n_new: int,
    config: SamplingConfig,
    seed: int,
    end_ids: Collection[int],
) -> int | None:
    """A draft of the next token: what the text's own draw would be from these logits, (1, V).

    Args:
        text: the tokens so far, with those drafted before.
        n_new: tokens of the text that are not its prompt.
        end_ids: tokens that end the text, where ``stop_at_eos`` is set.

    Returns:
        None if the text would end before that token is read.
    """
    if n_new + 1 >= config.max_new_tokens:
        return None
    token = int(next_tokens(logits, [text], config, [seed]))
    return None if config.stop_at_eos and token in end_ids else token


def _require_finite(greatest: Tensor) -> None:
    """Raise for rows whose greatest logit is NaN or infinite; ``amax`` and ``max`` pass NaN on."""
    if not all(map(math.isfinite, greatest.tolist())):
        raise NanoThinkError(
            "The model's logits are not finite, so there is nothing to draw from: its training diverged, or "
            f"its weights were changed. {suggest('checkpoints verify')} says which of your checkpoints can "
            "be used; if none can, train again with a lower learning rate."
        )


def arrival_times(
    seeds: Sequence[int], positions: Sequence[int], tokens: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Standard exponential variables as a pure function of seed, position and token.

    Args:
        seeds: (B,), below 2**64.
        positions: (B,).
        tokens: (B, K), or (1, K) for the same of every row.

    Returns:
        (B, K), all above 0 and finite.
    """
    rows = _mixed(_mixed(np.array(seeds, np.uint64)) + np.array(positions, np.uint64) * _GOLDEN)
    bits = _mixed(rows[:, None] + tokens.astype(np.uint64) * _GOLDEN)
    bits >>= np.uint64(12)
    times = bits.astype(np.float64)
    times += 0.5  # 52 bits and a half are exact, so never log(1)
    times *= 2.0**-52
    np.log(times, out=times)
    return np.negative(times, out=times)


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mixed(bits: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of SplitMix64 (Steele et al. 2014), in place: each bit then depends on all bits."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        bits ^= bits >> np.uint64(shift)
        bits *= np.uint64(factor)
    bits ^= bits >> np.uint64(31)
    return bits


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
