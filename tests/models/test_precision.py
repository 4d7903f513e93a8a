from __future__ import annotations

import pytest
import torch

from nanothink.errors import UsageError
from nanothink.models.precision import Precision, choose_device, matmul_dtype

CPU = torch.device("cpu")


def test_products_have_the_type_of_autocast() -> None:
    matrix = torch.ones(2, 2)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            assert matmul_dtype(matrix) is (matrix @ matrix).dtype is dtype
            assert matmul_dtype(matrix.double()) is torch.float64
    assert matmul_dtype(matrix) is torch.float32


def test_only_half_precision_scales_its_loss() -> None:
    assert not Precision(CPU, torch.bfloat16, "").needs_scaler
    assert Precision(CPU, torch.float16, "").needs_scaler


def test_autocast_covers_matrix_products() -> None:
    matrix = torch.ones(2, 2)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        with Precision(CPU, dtype, "").autocast():
            assert (matrix @ matrix).dtype is dtype


@pytest.mark.parametrize("name", ["gpu", "xla", "cuda:99"])
def test_a_device_that_is_not_here_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="--device"):
        choose_device(name)


def test_auto_takes_what_is_here() -> None:
    assert choose_device(None).type in {"cpu", "cuda", "mps"}
    assert choose_device("cpu") == CPU
