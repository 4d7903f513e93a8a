"""Calibration: a factor on a model's logits, fitted on held-out text.

Temperature scaling (Guo et al. 2017, "On calibration of modern neural networks", section 4.2): a model that
has fitted a small text is mostly too sure on other text. Dividing its logits by one temperature fixes that
and leaves the order of the tokens. Here the number is the inverse of theirs, s: p(v) = softmax(s z)_v.

The log-likelihood is concave in s, so that Newton's steps on it find the best one:

    L'(s) = Σ z_y - E_s[z]      L''(s) = -Σ Var_s[z]

A step that lowers it is taken back and shortened (Levenberg 1944): the logits of several experts are alike.

Fitted on N tokens, one number flatters the score of the same tokens by about 1 / 2N nats a token: 6e-5 here,
below what an evaluation shows.

Shapes: N tokens, D width of the head, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nanothink.data.batches import validation_batches
from nanothink.data.tokens import IGNORE, TokenStream
from nanothink.inference.evaluate import EvaluationStopped
from nanothink.inference.generate import evaluating
from nanothink.models.contract import LanguageModel
from nanothink.models.loss import CHUNK_ROWS
from nanothink.models.nanothink import NanoThink
from nanothink.models.precision import Precision
from nanothink.reporter import SILENT, Reporter

FIT_TOKENS = 8192
"""Tokens that the number is fitted on: its standard error then costs about 1e-4 nats a token."""

SMALLEST, LARGEST = 0.1, 4.0
_HARDLY_ANY = 0.005  # least scale of one expert of several: it can be left out, but its logits stay known
_STEPS = 12
_CLOSE = 1e-4  # a step this small changes no figure
_NO_SPREAD = 1e-9
_FITTING = "calibrating: fitting"


def fit_logit_scale(
    model: LanguageModel,
    streams: Mapping[str, TokenStream],
    *,
    length: int,
    precision: Precision,
    should_stop: Callable[[], bool] | None = None,
    reporter: Reporter = SILENT,
) -> float:
    """The s that gives the text the greatest likelihood; 1 where the logits do not differ or are not finite.

    Args:
        streams: held-out text by domain; whole documents are drawn from it, by each domain's share of it.
        length: tokens of a block.
        should_stop: called before each batch; EvaluationStopped is raised when it says so.
    """
    with evaluating(model), torch.inference_mode():
        states, targets = _states(streams, length, precision, should_stop, FIT_TOKENS, model.hidden, reporter)
        with precision.autocast():
            return fit_scales([states], targets, [model.head_weight], [1.0], reporter)[0]


def expert_fit_text(
    model: NanoThink,
    streams: Mapping[str, TokenStream],
    *,
    length: int,
    precision: Precision,
    reporter: Reporter = SILENT,
) -> tuple[list[Tensor], Tensor]:
    """Final states of each expert, (N, D_e), over some text, and its targets (N,)."""
    total = sum(stream.n_tokens for stream in streams.values())

    def states_of(tokens: Tensor) -> Tensor:
        return torch.cat(model.expert_states(tokens), -1)

    together, targets = _states(streams, length, precision, None, total, states_of, reporter)
    return list(torch.split(together, model.expert_widths, -1)), targets


def _states(
    streams: Mapping[str, TokenStream],
    length: int,
    precision: Precision,
    should_stop: Callable[[], bool] | None,
    n_tokens: int,
    hidden_of: Callable[[Tensor], Tensor],
    reporter: Reporter,
) -> tuple[Tensor, Tensor]:
    """Final states (N, D) and targets (N,) of about ``n_tokens`` tokens to fit on."""
    total = sum(stream.n_tokens for stream in streams.values())
    shares = {name: -(-n_tokens * stream.n_tokens // max(1, total)) for name, stream in streams.items()}
    advance = reporter.counter("calibrating: reading", sum(shares.values()))
    states, targets = [], []
    for name, stream in streams.items():
        wanted = shares[name]
        if not wanted:
            continue
        for inputs, following in validation_batches(stream.sample(wanted), length, 8):
            if should_stop is not None and should_stop():
                raise EvaluationStopped
            with precision.autocast():
                hidden = hidden_of(inputs.to(precision.device))
            real = (following != IGNORE).flatten()
            states.append(hidden.flatten(0, 1)[real.to(hidden.device)][:wanted])
            targets.append(following.flatten()[real][:wanted].to(hidden.device))
            wanted -= len(targets[-1])
            advance(len(targets[-1]))
            if wanted <= 0:
                break
        advance(max(0, wanted))  # questions of conversations, which are no targets
    return torch.cat(states), torch.cat(targets)


def fit_scales(
    states: Sequence[Tensor],
    targets: Tensor,
    heads: Sequence[Tensor],
    start: Sequence[float],
    reporter: Reporter = SILENT,
) -> list[float]:
    """The a_e that give ``softmax(Σ a_e z_e)`` the greatest likelihood, with z_e = heads[e] states[e].

    One for each expert of a product; concave in all of them together.

    Args:
        states: (N, D_e) each.
        targets: (N,).
        heads: (V, D_e) each.
        start: where to begin; what is returned where the logits are not finite or do not differ.
    """
    scales = best = torch.tensor(start, dtype=torch.float64)
    n, damping, highest = len(heads), 1e-6, -math.inf
    least = SMALLEST if n == 1 else _HARDLY_ANY
    expected = 1 + _steps_from(0.5)
    for step in range(_STEPS):
        reporter.progress(_FITTING, step, max(expected, step + 1))
        found = _moments(states, targets, heads, scales)
        if not math.isfinite(found.likelihood):
            break
        if found.likelihood > highest:
            best, highest, at_best = scales, found.likelihood, found
            damping = max(damping / 10, 1e-6)
        else:  # the step was too long: back, and a shorter one
            damping = max(damping * 100, 1e-3)
        spread = at_best.curvature.diagonal()
        if float(spread.min()) < _NO_SPREAD:
            break
        damped = at_best.curvature + torch.diag(damping * spread)
        # What is at its bound and would go on stays out of the step (Bertsekas 1982, projected Newton).
        free = ((best > least) | (at_best.slope > 0)).nonzero()[:, 0]
        moved = best.clone()
        moved[free] += torch.linalg.solve(damped[free][:, free], at_best.slope[free])
        # Far from the optimum the quadratic overshoots: halve or double at most.
        scales = moved.clamp(best / 2, best * 2).clamp(least, LARGEST)
        change = float((scales - best).abs().max())
        if change < _CLOSE:
            break
        expected = step + 2 + _steps_from(change)
    reporter.progress(_FITTING, _STEPS, _STEPS)
    return best.tolist()


def _steps_from(change: float) -> int:
    """Steps after the next one, about: near the optimum each of Newton's squares the error."""
    return max(0, math.ceil(math.log2(math.log(_CLOSE) / math.log(min(change, 0.7)))))


@dataclass(frozen=True)
class _Moments:
    likelihood: float
    slope: Tensor
    """(E,)."""
    curvature: Tensor
    """(E, E), of the negative likelihood."""


def _moments(states: Sequence[Tensor], targets: Tensor, heads: Sequence[Tensor], scales: Tensor) -> _Moments:
    """Log-likelihood of the targets under softmax(Σ a_e z_e) with its derivatives in a."""
    likelihood = 0.0
    slope = torch.zeros(len(heads), dtype=torch.float64)
    curvature = torch.zeros(len(heads), len(heads), dtype=torch.float64)
    for first in range(0, len(targets), CHUNK_ROWS):
        rows = slice(first, first + CHUNK_ROWS)
        z = torch.stack([F.linear(h[rows], w).float() for h, w in zip(states, heads, strict=True)])
        log_p = torch.einsum("e,erv->rv", scales.to(z), z).log_softmax(-1)  # (R, V)
        y = targets[rows, None]
        likelihood += float(log_p.gather(-1, y).sum(dtype=torch.float64))
        p = log_p.exp()
        z -= (p * z).sum(-1, keepdim=True)  # (E, R, V), centred
        slope += z.gather(-1, y.expand(len(z), -1, -1)).sum((1, 2), dtype=torch.float64).cpu()
        spread = (z * p.sqrt()).flatten(1)
        curvature += (spread @ spread.T).double().cpu()
    return _Moments(likelihood, slope, curvature)
