from __future__ import annotations

import pytest
import torch

from nanothink.config import TrainExpertConfig
from nanothink.errors import UsageError
from nanothink.models import precision
from nanothink.models.precision import bfloat16_gain, choose_device, choose_precision

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("gain", "dtype"), [(0.8, torch.float32), (1.1, torch.float32), (2.5, torch.bfloat16)]
)
def test_a_cpu_computes_in_what_it_is_fast_at(
    gain: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "bfloat16_gain", lambda: gain)
    chosen = choose_precision(TrainExpertConfig(), CPU)
    assert chosen.dtype is dtype
    assert f"{gain:.1f}" in chosen.reason


def test_the_gain_is_a_measured_ratio() -> None:
    assert 0.01 < bfloat16_gain(rows=64, width=64, columns=64) < 100


def test_what_is_configured_decides() -> None:
    assert choose_precision(TrainExpertConfig(amp_dtype="bfloat16"), CPU).dtype is torch.bfloat16
    assert (
        choose_precision(TrainExpertConfig(use_amp=False, amp_dtype="bfloat16"), CPU).dtype is torch.float32
    )
    assert choose_precision(TrainExpertConfig(amp_dtype="float16"), CPU).dtype is torch.float32


def test_only_half_precision_scales_its_loss() -> None:
    assert not choose_precision(TrainExpertConfig(amp_dtype="bfloat16"), CPU).needs_scaler
    assert precision.Precision(CPU, torch.float16, "").needs_scaler


def test_autocast_covers_matrix_products() -> None:
    half = choose_precision(TrainExpertConfig(amp_dtype="bfloat16"), CPU)
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
