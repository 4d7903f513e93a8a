from __future__ import annotations

import pytest
import torch

from nanothink.config import TrainExpertConfig
from nanothink.errors import UsageError
from nanothink.models import precision
from nanothink.models.precision import (
    bfloat16_gain,
    choose_device,
    choose_precision,
    product_dtype,
    products,
)

CPU = torch.device("cpu")


@pytest.fixture(params=[False, True], ids=["without AMX", "with AMX"])
def amx(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    types = {torch.float32, torch.bfloat16} if request.param else {torch.float32}
    monkeypatch.setattr(precision, "fast_cpu_types", lambda: frozenset(types))
    return bool(request.param)


def test_a_cpu_computes_in_what_it_is_fast_at(amx: bool) -> None:
    wanted = torch.bfloat16 if amx else torch.float32
    for settings in (TrainExpertConfig(), TrainExpertConfig(amp_dtype="bfloat16")):
        assert choose_precision(settings, CPU).dtype is wanted
    assert "AMX" in choose_precision(TrainExpertConfig(), CPU).reason


def test_autocast_that_would_slow_a_cpu_down_is_switched_off(amx: bool) -> None:
    matrix = torch.ones(2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = torch.bfloat16 if amx else torch.float32
        assert product_dtype(matrix) is wanted
        with products("cpu"):
            assert (matrix @ matrix).dtype is wanted
    assert product_dtype(matrix) is torch.float32
    assert product_dtype(matrix.double()) is torch.float64


def test_the_gain_is_a_measured_ratio() -> None:
    assert 0.01 < bfloat16_gain(rows=64, width=64, columns=64) < 100


def test_what_is_configured_decides() -> None:
    assert (
        choose_precision(TrainExpertConfig(use_amp=False, amp_dtype="bfloat16"), CPU).dtype is torch.float32
    )
    assert choose_precision(TrainExpertConfig(amp_dtype="float16"), CPU).dtype is torch.float32


def test_only_half_precision_scales_its_loss() -> None:
    assert not precision.Precision(CPU, torch.bfloat16, "").needs_scaler
    assert precision.Precision(CPU, torch.float16, "").needs_scaler


def test_autocast_covers_matrix_products() -> None:
    half = precision.Precision(CPU, torch.bfloat16, "")
    full = choose_precision(TrainExpertConfig(use_amp=False), CPU)
    matrix = torch.ones(2, 2)
    with half.autocast():
        assert (matrix @ matrix).dtype is torch.bfloat16
    with full.autocast():
        assert (matrix @ matrix).dtype is torch.float32


@pytest.mark.parametrize("name", ["gpu", "xla", "cuda:99"])
def test_a_device_that_is_not_here_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="--device"):
        choose_device(name)


def test_auto_takes_what_is_here() -> None:
    assert choose_device(None).type in {"cpu", "cuda", "mps"}
    assert choose_device("cpu") == CPU
