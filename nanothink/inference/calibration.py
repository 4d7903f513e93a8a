"""Calibration: a factor on a model's logits, fitted on held-out text.

Temperature scaling (Guo et al. 2017, "On calibration of modern neural networks", section 4.2): a model that
has fitted a small text is mostly too sure on other text. Dividing its logits by one temperature fixes that
and leaves the order of the tokens. Here the number is the inverse of theirs, s: p(v) = softmax(s z)_v.

The log-likelihood is concave in s, so that Newton's steps on it find the best one:

    L'(s) = Σ z_y - E_s[z]      L''(s) = -Σ Var_s[z]

Fitted on N tokens, one number flatters the score of the same tokens by about 1 / 2N nats a token: 6e-5 here,
below what an evaluation shows.

Shapes: N tokens, D width of the head, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from nanothink.data.batches import validation_batches
from nanothink.data.tokens import IGNORE, TokenStream
from nanothink.inference.evaluate import EvaluationStopped
from nanothink.inference.generate import evaluating
from nanothink.models.contract import LanguageModel
from nanothink.models.loss import CHUNK_ROWS
from nanothink.models.precision import Precision

FIT_TOKENS = 8192
"""Tokens that the number is fitted on: its standard error then costs about 1e-4 nats a token."""

SMALLEST, LARGEST = 0.1, 4.0
_STEPS = 8
_CLOSE = 1e-4  # a step this small changes no figure


def fit_logit_scale(
    model: LanguageModel,
    streams: Mapping[str, TokenStream],
    *,
    length: int,
    precision: Precision,
    should_stop: Callable[[], bool] | None = None,
) -> float:
    """The s that gives the text the greatest likelihood; 1 where the logits do not differ or are not finite.

    Args:
        streams: held-out text by domain; whole documents are drawn from it, by each domain's share of it.
        length: tokens of a block.
        should_stop: called before each batch; EvaluationStopped is raised when it says so.
    """
    with evaluating(model), torch.inference_mode():
        states, targets = _states(model, streams, length, precision, should_stop)
        with precision.autocast():
            return _fit(states, targets, model.head_weight)


def _states(
    model: LanguageModel,
    streams: Mapping[str, TokenStream],
    length: int,
    precision: Precision,
    should_stop: Callable[[], bool] | None,
) -> tuple[Tensor, Tensor]:
    """Final states (N, D) and targets (N,) of the tokens to fit on."""
    total = sum(stream.n_tokens for stream in streams.values())
    states, targets = [], []
    for stream in streams.values():
        wanted = -(-FIT_TOKENS * stream.n_tokens // total)
        if not wanted:
            continue
        for inputs, following in validation_batches(stream.sample(wanted), length, 8):
            if should_stop is not None and should_stop():
                raise EvaluationStopped
            with precision.autocast():
                hidden = model.hidden(inputs.to(precision.device))
            real = (following != IGNORE).flatten()
            states.append(hidden.flatten(0, 1)[real.to(hidden.device)][:wanted])
            targets.append(following.flatten()[real][:wanted].to(hidden.device))
            wanted -= len(targets[-1])
            if wanted <= 0:
                break
    return torch.cat(states), torch.cat(targets)


def _fit(states: Tensor, targets: Tensor, head: Tensor) -> float:
    scale = 1.0
    for _ in range(_STEPS):
        slope, curvature = torch.zeros(2, dtype=torch.float64, device=states.device)
        for h, y in zip(torch.split(states, CHUNK_ROWS), torch.split(targets, CHUNK_ROWS), strict=True):
            logits = F.linear(h, head).float()  # (R, V)
            p = (scale * logits).softmax(-1)
            mean = (p * logits).sum(-1, keepdim=True)
            slope += (logits.gather(1, y[:, None]) - mean).sum(dtype=torch.float64)
            curvature += (p * (logits - mean).square()).sum(dtype=torch.float64)
        step = float(slope / curvature)
        if not math.isfinite(step):
            return 1.0
        # Far from the optimum the quadratic overshoots: halve or double at most.
        previous, scale = scale, min(max(scale + step, scale / 2, SMALLEST), 2 * scale, LARGEST)
        if abs(scale - previous) < _CLOSE:
            break
    return scale
