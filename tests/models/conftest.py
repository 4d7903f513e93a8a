from __future__ import annotations

import pytest
import torch

from nanothink.models import precision


@pytest.fixture
def narrow_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor that is fast at 16-bit products, so that autocast is followed."""
    types = frozenset({torch.float32, torch.bfloat16, torch.float16})
    monkeypatch.setattr(precision, "fast_cpu_types", lambda: types)
