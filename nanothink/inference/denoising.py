"""The diffuser as a diffusion model: squared error by noise level, and passages rebuilt from noise.

Shapes: B batch, T time, D width, N noise levels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from nanothink.data.batches import validation_batches
from nanothink.data.tokens import IGNORE, TokenStream
from nanothink.errors import UsageError
from nanothink.inference.evaluate import EvaluationStopped
from nanothink.inference.generate import evaluating
from nanothink.models.contract import LanguageModel
from nanothink.models.diffuser import Diffuser
from nanothink.models.noise import block_generator, diffuse
from nanothink.models.precision import Precision
from nanothink.reporter import SILENT, Reporter
from nanothink.wording import counted

MEASURED_FRACTIONS = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
"""Noise levels at which the error is measured, as fractions of N."""

MEASURED_TOKENS = 4096
"""Tokens over which it is measured, shared by all domains."""

_BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Reconstruction:
    """A passage whose tokens were each noised and predicted again, given the tokens before them."""

    level: int
    """0 to N; each target was scaled by √ᾱ of that level."""
    tokens: list[int]
    """The likeliest token at each position but the first, which has no context."""
    right: float
    """Share of the tokens that are those of the passage."""


def measured_levels(n_levels: int) -> list[int]:
    """The levels at which a diffuser's error is measured; the last is N."""
    return sorted({max(1, round(fraction * n_levels)) for fraction in MEASURED_FRACTIONS})


def denoising_errors(
    model: Diffuser,
    streams: Mapping[str, TokenStream],
    *,
    length: int,
    precision: Precision,
    transformer: LanguageModel | None = None,
    n_tokens: int = MEASURED_TOKENS,
    should_stop: Callable[[], bool] | None = None,
    reporter: Reporter = SILENT,
) -> dict[int, float]:
    """Mean squared error of the guess at the clean target, by noise level, in one evaluation each.

    The clean targets have a variance of about 1, so predicting their mean has an error of 1. Each level gets
    the same noise in every call, and no earlier guess.

    Args:
        streams: text, by domain; a sample of each is used.
        length: tokens a block.
        transformer: needed where the targets are its hidden states.
        n_tokens: about how many tokens to measure on, in all; whole documents.
        should_stop: called before each batch; EvaluationStopped is raised when it returns True.
    """
    levels = measured_levels(model.shape.training_steps)
    sums, n_values, n_done = dict.fromkeys(levels, 0.0), 0, 0
    share = max(1, n_tokens // max(1, len(streams)))
    batches = [
        batch
        for stream in streams.values()
        if stream.n_tokens
        for batch in validation_batches(stream.sample(share), length, max(1, _BATCH_TOKENS // length))
    ]
    with evaluating(model), torch.inference_mode():
        for number, (inputs, targets) in enumerate(batches):
            if should_stop is not None and should_stop():
                raise EvaluationStopped
            inputs, targets = inputs.to(precision.device), targets.to(precision.device)
            valid = (targets != IGNORE).unsqueeze(-1)
            with precision.autocast():
                condition = model.condition(model.encoder(inputs))
                clean = model.clean_targets(targets, transformer).float()
                for level in levels:
                    generator = block_generator(number, "measured noise", level, inputs.device)
                    noise = torch.randn(clean.shape, generator=generator, device=inputs.device)
                    noisy = diffuse(clean, noise, model.alpha_bars[level])
                    guess, _ = model.denoise(condition, noisy, level)
                    sums[level] += float(((guess - clean).square() * valid).sum())
                    n_done += 1
                    reporter.progress("errors by noise level", n_done, len(batches) * len(levels))
            n_values += int(valid.sum()) * model.d_model
    return {level: total / max(1, n_values) for level, total in sums.items()}


def reconstruct(
    model: Diffuser,
    passage: Sequence[int],
    levels: Sequence[int],
    *,
    seed: int = 0,
    n_steps: int = 1,
) -> list[Reconstruction]:
    """Add noise to the target of every token of a passage, level by level, and predict the tokens from it.

    Each position is denoised given the true tokens before it. At level N nothing is left of the target, so
    the result is a next-token prediction.

    Args:
        passage: token ids, 2 to context_length + 1 of them.
        levels: 1 to N.
        seed: of the noise.
        n_steps: evaluations on the way down from each level.

    Raises:
        UsageError: a passage or level out of bounds, or targets that need the transformer.
    """
    n_levels = model.shape.training_steps
    if not 2 <= len(passage) <= model.context_length + 1:
        raise UsageError(
            f"The passage has {counted(len(passage), 'token')}; 2 to {model.context_length + 1} can be "
            "denoised at once."
        )
    if bad := [level for level in levels if not 1 <= level <= n_levels]:
        raise UsageError(f"Noise level {bad[0]}: this diffuser has levels 1 to {n_levels}.")
    device = model.head_weight.device
    tokens = torch.tensor([list(passage)], dtype=torch.int64, device=device)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    found = []
    with evaluating(model), torch.inference_mode():
        condition = model.condition(model.encoder(inputs))
        clean = model.clean_targets(targets)
        generator = block_generator(seed, "reconstruction", 0, device)
        noise = torch.randn(clean.shape, generator=generator, device=device)
        for level in levels:
            noisy = diffuse(clean, noise, model.alpha_bars[level])
            _, hidden = model.denoise_by_ddim(condition, noisy, level, n_steps)
            likeliest = F.linear(hidden, model.head_weight).argmax(-1)
            right = float((likeliest == targets).float().mean())
            found.append(Reconstruction(level, likeliest[0].tolist(), right))
    return found
