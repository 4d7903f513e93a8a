"""The models, and the registry of the kinds of expert. Light to import: torch comes with the first model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nanothink.errors import UsageError
from nanothink.suggestions import did_you_mean, suggest

if TYPE_CHECKING:
    from nanothink.config import Config, TrainConfig
    from nanothink.models.contract import Expert, LanguageModel


def _transformer() -> type[Expert]:
    from nanothink.models.transformer import Transformer

    return Transformer


def _state_space() -> type[Expert]:
    from nanothink.models.state_space import StateSpace

    return StateSpace


def _diffuser() -> type[Expert]:
    from nanothink.models.diffuser import Diffuser

    return Diffuser


@dataclass(frozen=True)
class ExpertKind:
    """A kind of expert. All else that there is to know of it, its model says: see ``contract.Expert``."""

    model: Callable[[], type[Expert]]
    """Imports the class."""
    sections: tuple[str, ...]
    """Sections of ``Config`` that describe its shape, beside ``model``; its own first."""
    training: str = "train_expert"
    """Section of ``Config`` that says how it is trained."""


EXPERTS: dict[str, ExpertKind] = {
    "transformer": ExpertKind(_transformer, ("transformer",)),
    "state_space": ExpertKind(_state_space, ("state_space",)),
    "diffuser": ExpertKind(_diffuser, ("diffuser", "transformer"), "train_diffuser"),
}
"""The kinds of expert by name, in the order in which NanoThink combines them."""

COMBINED = "nanothink_mla"
"""The kind of a model that combines experts."""


@dataclass(frozen=True)
class ExpertDescription:
    """All that is needed to build an expert inside a combined model, but for its weights."""

    name: str
    kind: str
    config: Config


def build_model(
    kind: str, config: Config, vocab_size: int, experts: Sequence[ExpertDescription] = ()
) -> LanguageModel:
    """A freshly initialised model, on the CPU, in training mode. Its weights follow torch's global seed.

    Args:
        experts: those of a combined model, built here too.

    Raises:
        UsageError: no model is called ``kind``.
    """
    if kind != COMBINED:
        return EXPERTS[known_kind(kind)].model().build(config, vocab_size)
    from nanothink.models.nanothink import NanoThink

    parts = {e.name: build_model(e.kind, e.config, vocab_size) for e in experts}
    return NanoThink(vocab_size, config.model, config.mla, parts, config.vector_store)


def known_kind(kind: str) -> str:
    """The name of a kind of expert as everything else spells it; ``state-space`` is ``state_space`` too.

    Raises:
        UsageError: no expert is called ``kind``.
    """
    name = kind.replace("-", "_")
    if name == COMBINED:
        raise UsageError(f"NanoThink itself is trained over finished experts: {suggest('train-mla')}")
    if name not in EXPERTS:
        raise UsageError(
            f"There is no model called '{kind}'. The kinds are {', '.join(EXPERTS)}."
            f"{did_you_mean(name, EXPERTS)}"
        )
    return name


def shape_sections(kind: str) -> tuple[str, ...]:
    """The sections of ``Config`` that describe the shape of a model, beside ``model``."""
    return ("mla",) if kind == COMBINED else EXPERTS[kind].sections


def training_section(kind: str) -> str:
    """The section of ``Config`` that says how models of this kind are trained."""
    return "train_mla" if kind == COMBINED else EXPERTS[kind].training


def training_of(kind: str, config: Config) -> TrainConfig:
    """Training of models of this kind."""
    settings: TrainConfig = getattr(config, training_section(kind))
    return settings
