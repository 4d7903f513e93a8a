"""The score of a model on some text, and a diffuser's errors beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from nanothink.data.tokens import TokenStream
from nanothink.inference.denoising import denoising_errors
from nanothink.inference.evaluate import Evaluation, evaluate_model
from nanothink.models.contract import LanguageModel
from nanothink.models.diffuser import Diffuser
from nanothink.models.precision import Precision
from nanothink.reporter import SILENT, Reporter

BATCH_TOKENS = 8192
"""Enough to fill two cores, little enough to answer a signal at once."""


def score(
    model: LanguageModel,
    streams: Mapping[str, TokenStream],
    *,
    length: int,
    precision: Precision,
    max_tokens: int | None,
    base: LanguageModel | None = None,
    reporter: Reporter = SILENT,
    stage: str = "evaluating",
    should_stop: Callable[[], bool] | None = None,
    share: tuple[int, int] = (0, 1),
) -> Evaluation:
    """Evaluate a model in blocks of ``length`` tokens; a diffuser at every noise level too.

    Args:
        base: the transformer of a diffuser whose targets are hidden states, which are left out without it.
        share: as for ``evaluate_model``; so few tokens are denoised that every process denoises them all.
    """
    evaluation = evaluate_model(
        model,
        streams,
        length=length,
        batch_size=max(1, BATCH_TOKENS // length) * share[1],
        precision=precision,
        max_tokens=max_tokens,
        reporter=reporter,
        stage=stage,
        should_stop=should_stop,
        share=share,
    )
    if not isinstance(model, Diffuser) or (base is None and model.shape.target == "hidden_state"):
        return evaluation
    errors = denoising_errors(
        model,
        streams,
        length=length,
        precision=precision,
        transformer=base,
        reporter=reporter,
        should_stop=should_stop,
    )
    return replace(evaluation, denoising=errors)
