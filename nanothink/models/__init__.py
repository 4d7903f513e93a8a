"""The models, and the one place where a kind's name becomes a model. Light to import: torch comes later."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nanothink.config import Config
from nanothink.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from nanothink.models.contract import LanguageModel

EXPERT_KINDS: tuple[str, ...] = ("transformer", "state_space", "diffuser")

COMBINED = "nanothink_mla"
"""The kind of a model that combines experts."""

MODEL_KINDS: tuple[str, ...] = (*EXPERT_KINDS, COMBINED)


@dataclass(frozen=True)
class ExpertDescription:
    """An expert inside a combined model: all that is needed to build it, but for its weights."""

    name: str
    kind: str
    config: Config


def build_model(
    kind: str, config: Config, vocab_size: int, experts: Sequence[ExpertDescription] = ()
) -> LanguageModel:
    """A freshly initialised model, on the CPU, in training mode. Its weights follow torch's global seed.

    Args:
        experts: what a combined model combines, built here too.

    Raises:
        UsageError: no model is called ``kind``.
    """
    if kind == COMBINED:
        from nanothink.models.nanothink import NanoThink

        parts = {e.name: build_model(e.kind, e.config, vocab_size) for e in experts}
        return NanoThink(vocab_size, config.model, config.mla, parts, config.vector_store)
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
    """The name of a kind of expert as everything else spells it; ``state-space`` is ``state_space`` too.

    Raises:
        UsageError: no expert is called ``kind``.
    """
    name = kind.replace("-", "_")
    if name == COMBINED:
        raise UsageError("NanoThink itself is trained over finished experts: nanothink train-mla")
    if name not in EXPERT_KINDS:
        raise UsageError(
            f"There is no model called '{kind}'. The kinds are {', '.join(EXPERT_KINDS)}."
            f"{did_you_mean(name, EXPERT_KINDS)}"
        )
    return name
