"""A model of counted experts, and a place for their states."""

from __future__ import annotations

from pathlib import Path

import pytest
from counted_experts import (
    Counted,
    Place,
    build,
)

from nanothink.models.nanothink import NanoThink


@pytest.fixture(scope="module")
def whole() -> NanoThink:
    return build()


@pytest.fixture
def model(whole: NanoThink) -> Counted:
    assert isinstance(whole, Counted)
    whole.n_read = 0
    return whole


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)
