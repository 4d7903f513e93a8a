"""A tiny NanoThink that counts how often its experts compute, and a place for their states."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from reports import Told
from torch import Tensor

from nanothink.config.run import resolve_config
from nanothink.models import COMBINED, EXPERTS, ExpertDescription, build_model
from nanothink.models.nanothink import NanoThink
from nanothink.training.expert_states import ExpertStates, Shape, open_states

VOCABULARY, LENGTH, WIDTH, N_BLOCKS = 50, 24, 16, 6
SHAPE: Shape = (N_BLOCKS, 3, LENGTH, WIDTH)
IDENTITY = {"experts": "these"}


class Counted(NanoThink):
    """Remembers how many blocks its experts have read."""

    n_read = 0

    def expert_states(self, tokens: Tensor) -> list[Tensor]:
        self.n_read += len(tokens)
        return super().expert_states(tokens)


def build() -> NanoThink:
    torch.manual_seed(0)
    sets = {
        "model.d_model": WIDTH,
        "model.max_seq_len": LENGTH,
        "transformer.n_heads": 2,
        "mla.n_heads": 2,
        "mla.n_layers": 1,
        "state_space.scan": "plain",
        **{f"{kind}.n_layers": 1 for kind in EXPERTS},
    }
    config = resolve_config(assignments=[f"{name}={value}" for name, value in sets.items()]).config
    model = build_model(
        COMBINED, config, VOCABULARY, [ExpertDescription(kind, kind, config) for kind in EXPERTS]
    )
    model.__class__ = Counted
    assert isinstance(model, Counted)
    with torch.no_grad():
        for parameter in model.parameters():  # nothing is left at a start that hides it
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.train()


def block(number: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (LENGTH,), generator=torch.Generator().manual_seed(number % N_BLOCKS))


def batch(*numbers: int) -> Tensor:
    return torch.stack([block(number) for number in numbers])


class Place:
    """Opens states in a folder and keeps what was said."""

    def __init__(self, root: Path) -> None:
        self.root, self.said = root, ""

    def open(self, **changed: Any) -> ExpertStates | None:
        notes: list[str] = []
        options: dict[str, Any] = {
            "identity": IDENTITY,
            "shape": SHAPE,
            "budget_bytes": 10**8,
            "begin": True,
            "number": lambda position: position % N_BLOCKS,
        } | changed
        states = open_states(self.root, reporter=Told(notes.append), **options)
        self.notes = notes
        self.said = " ".join(notes)
        return states

    def opened(self, **changed: Any) -> ExpertStates:
        states = self.open(**changed)
        assert states is not None, self.said
        return states


def assert_right(states: ExpertStates, model: Counted, numbers: Sequence[int], n_read: int) -> None:
    """The states of these blocks are the experts', and this many blocks were computed for it."""
    before = model.n_read
    found = states.of(model, batch(*numbers), numbers)
    assert model.n_read - before == n_read
    expected = model.expert_states(batch(*numbers))
    assert len(found) == len(expected) == 3
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
        assert not ours.requires_grad


def filled(place: Place, model: Counted, *numbers: int) -> Path:
    states = place.opened()
    states.of(model, batch(*numbers), numbers)
    states.close()
    return states.folder
