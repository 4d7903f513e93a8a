"""Which types a run computes in, with speeds that are given."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from nanothink.config import ModelConfig, TrainExpertConfig
from nanothink.errors import UsageError
from nanothink.models.precision import Precision
from nanothink.training.matmul_speed import Speed
from nanothink.training.matmul_types import AS_TRAINED, choose_precision, precision_of_use

CPU = torch.device("cpu")
NARROW, WIDE, HALF = torch.bfloat16, torch.float32, torch.float16


@dataclass
class Measured:
    """Speeds of some processor; None where nothing may be measured."""

    step: float | None = None
    muon: float | None = None

    def of_step(self, _dtype: torch.dtype) -> Speed:
        assert self.step is not None, "measured for no purpose"
        return Speed(self.step, None)

    def of_muon(self, _dtype: torch.dtype) -> Speed:
        assert self.muon is not None, "measured for no purpose"
        return Speed(self.muon, None)


def chosen(speeds: Measured, **settings: object) -> Precision:
    train = TrainExpertConfig.model_validate(settings)
    return choose_precision(train, ModelConfig(), CPU, speeds)


@pytest.mark.parametrize(
    ("speeds", "step", "muon", "figures"),
    [
        (Measured(9.2, 4.2), NARROW, NARROW, ["9.20"]),  # AVX512-BF16 that pays, or AMX
        (
            Measured(14.7, 0.85),
            NARROW,
            WIDE,
            ["15", "0.85"],
        ),  # AMX, a narrow model: Muon's matrices are small
        (Measured(1.2, 1.2), NARROW, NARROW, ["1.20"]),
        (Measured(1.19), WIDE, WIDE, ["1.19"]),
        (Measured(0.75), WIDE, WIDE, ["0.75"]),  # AVX512-BF16 that does not pay
        (Measured(0.04), WIDE, WIDE, ["0.04"]),
    ],
)
def test_what_is_measured_decides_and_is_said(
    speeds: Measured, step: torch.dtype, muon: torch.dtype, figures: list[str]
) -> None:
    found = chosen(speeds)
    assert (found.dtype, found.muon) == (step, muon)
    assert all(figure in found.reason for figure in figures)
    assert "AMX" not in found.reason


@pytest.mark.parametrize("times", [0.04, 0.75, 9.2])
@pytest.mark.parametrize("dtype", [NARROW, HALF, WIDE])
def test_an_explicit_type_is_obeyed(times: float, dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    speeds = Measured() if dtype is WIDE else Measured(times, times)
    found = chosen(speeds, amp_dtype=name)
    assert found.dtype is dtype
    assert found.muon is (dtype if times >= 1.2 else WIDE)
    assert found.reason.startswith("as configured")
    for muon in ("bfloat16", "float16", "float32"):
        only_step = Measured() if dtype is WIDE else Measured(times)
        assert chosen(only_step, amp_dtype=name, muon_dtype=muon).settled == {
            "amp_dtype": name,
            "muon_dtype": muon,
        }


def test_without_amp_everything_is_float32_and_nothing_is_measured() -> None:
    found = chosen(Measured(), use_amp=False, amp_dtype="bfloat16")
    assert (found.dtype, found.muon) == (WIDE, WIDE)
    assert chosen(Measured(9.0), optimizer="adamw").dtype is NARROW  # no Muon, no measurement of it


@pytest.mark.parametrize("speeds", [Measured(9.2, 4.2), Measured(9.2, 0.5), Measured(0.75)])
def test_a_resumed_run_computes_as_it_began_on_any_processor(speeds: Measured) -> None:
    began = chosen(speeds)
    for other in (Measured(0.1, 0.1), Measured(5.0, 5.0)):
        resumed = chosen(other, **began.settled)
        assert (resumed.dtype, resumed.muon) == (began.dtype, began.muon)


@pytest.mark.parametrize(
    ("trained", "times", "used"),
    [
        ("bfloat16", 9.2, NARROW),
        ("bfloat16", 1.0, NARROW),  # figures repeat where that costs little
        ("bfloat16", 0.9, NARROW),
        ("bfloat16", 0.75, WIDE),
        ("float16", 0.05, WIDE),
        ("float32", None, WIDE),
        ("auto", None, WIDE),
    ],
)
def test_evaluation_is_in_the_type_of_training_unless_that_is_slow(
    trained: str, times: float | None, used: torch.dtype
) -> None:
    train = TrainExpertConfig.model_validate({"amp_dtype": trained})
    found = precision_of_use(train, ModelConfig(), CPU, Measured(times))
    assert found.dtype is used
    if str(used) == f"torch.{trained}":
        assert found.reason == AS_TRAINED
    elif times is not None:
        assert trained in found.reason
        assert f"{times:.2f}" in found.reason


def test_a_type_that_the_device_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused where it was asked for, passed over where it was not."""

    def refused(*_: object, **__: object) -> None:
        raise RuntimeError("not implemented for 'BFloat16'\nC++ stack")

    monkeypatch.setattr(torch, "autocast", refused)
    with pytest.raises(UsageError, match=r"train_expert\.amp_dtype=bfloat16.*BFloat16'\. Use"):
        chosen(Measured(), amp_dtype="bfloat16")
    assert "does not run here: not implemented" in chosen(Measured()).reason
    narrow = TrainExpertConfig(amp_dtype="bfloat16")
    assert precision_of_use(narrow, ModelConfig(), CPU, Measured()).dtype is WIDE
