"""The models, and the one place where a kind's name becomes a model. Light to import: torch comes later."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nanothink.config import Config
from nanothink.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from nanothink.models.contract import LanguageModel

MODEL_KINDS: tuple[str, ...] = ("transformer", "state_space", "diffuser")


def build_model(kind: str, config: Config, vocab_size: int) -> LanguageModel:
    """A freshly initialised model, on the CPU, in training mode. Its weights follow torch's global seed.

    Raises:
        UsageError: no model is called ``kind``.
    """
    kind = known_kind(kind)
    if kind == "state_space":
        from nanothink.models.state_space import StateSpace

        return StateSpace(vocab_size, config.model, config.state_space)
    if kind == "diffuser":
        from nanothink.models.diffuser import Diffuser

        return Diffuser(vocab_size, config.model, config.transformer, config.diffuser)
    from nanothink.models.transformer import Transformer

    return Transformer(vocab_size, config.model, config.transformer)


def known_kind(kind: str) -> str:
    """The name of a kind as everything else spells it; ``state-space`` and ``state_space`` are the same.

    Raises:
        UsageError: no model is called ``kind``.
    """
    name = kind.replace("-", "_")
    if name not in MODEL_KINDS:
        raise UsageError(
            f"There is no model called '{kind}'. The kinds are {', '.join(MODEL_KINDS)}."
            f"{did_you_mean(name, MODEL_KINDS)}"
        )
    return name
