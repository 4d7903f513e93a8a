"""Log-probabilities of tokens: of those that were drawn, and of those of a given text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nanothink.models.contract import LanguageModel

_PIECE = 512
"""Tokens of a text of any length that are scored at a time."""


@dataclass(frozen=True)
class TokenScore:
    """Log-probability of a token under the model as it is, and the likeliest ones in its place."""

    log_probability: float
    likeliest: tuple[tuple[int, float], ...] = ()
    """(token, log-probability), likeliest first."""


def token_scores(logits: Tensor, tokens: Sequence[int], n_likeliest: int) -> list[TokenScore]:
    """Score of one token in each row of (B, V) logits, and so many of the likeliest."""
    log_probabilities = logits.float().log_softmax(-1)
    index = torch.tensor(list(tokens), device=logits.device).unsqueeze(1)
    own = log_probabilities.gather(1, index).squeeze(1).tolist()
    if not n_likeliest:
        return [TokenScore(value) for value in own]
    best = log_probabilities.topk(min(n_likeliest, logits.shape[1]), dim=1)
    return [
        TokenScore(value, tuple(zip(ids, values, strict=True)))
        for value, ids, values in zip(own, best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def text_scores(model: LanguageModel, tokens: Sequence[int], n_likeliest: int) -> list[TokenScore]:
    """Score of each token of a text but the first, given those before it.

    Args:
        tokens: at most a context of them.
    """
    text = torch.tensor([list(tokens)], device=model.head_weight.device)
    scores: list[TokenScore] = []
    with torch.inference_mode():
        if len(tokens) < 2:
            return []
        if model.context_length is not None or not hasattr(model, "read"):
            return token_scores(model.logits(text[:, :-1])[0], tokens[1:], n_likeliest)
        state = model.start(1)
        for start in range(0, len(tokens) - 1, _PIECE):  # memory does not grow with the length
            stop = min(start + _PIECE, len(tokens) - 1)
            states = model.read(text[:, start:stop], state)
            logits = model.logit_scale * F.linear(states, model.head_weight)[0]
            scores += token_scores(logits, tokens[start + 1 : stop + 1], n_likeliest)
    return scores
