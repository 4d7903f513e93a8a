from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from nanothink.checkpoints import read_checkpoint, write_checkpoint
from nanothink.checkpoints.restore import model_state, pack_rng, restore_model, unpack_rng
from nanothink.config import Config, ModelConfig, TransformerConfig
from nanothink.errors import CheckpointDamagedError, CheckpointMismatchError
from nanothink.models import build_model

PATH = Path("checkpoints/a.pt")


class Tiny(nn.Module):
    def __init__(self, width: int = 8, *, tied: bool = False, extra: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, width)
        self.layer = nn.Linear(width, 8)
        self.head = nn.Linear(width, 20, bias=False)
        self.register_buffer("scale", torch.tensor(1.5))
        if tied:
            self.head.weight = self.embedding.weight
        if extra:
            self.extra = nn.Linear(2, 3)


def equal(a: nn.Module, b: nn.Module) -> bool:
    one, other = a.state_dict(), b.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def through_a_file(tmp_path, payload):
    write_checkpoint(tmp_path / "a.pt", payload)
    return read_checkpoint(tmp_path / "a.pt")


@pytest.mark.parametrize("tied", [False, True])
def test_round_trip(tmp_path, make_payload, tied):
    saved, fresh = Tiny(tied=tied), Tiny(tied=tied)
    payload = through_a_file(tmp_path, make_payload(model_state=model_state(saved)))
    assert not equal(saved, fresh)
    report = restore_model(fresh, payload, expect_kind="transformer", path=PATH)
    assert equal(saved, fresh)
    assert report.exact
    assert report.lines() == []
    assert report.n_fitting == report.n_total == 160 * (1 if tied else 2) + 72 + 1
    if tied:
        assert fresh.head.weight is fresh.embedding.weight


def test_restored_parameters_are_the_model_s_own(make_payload):
    """The optimizer holds references to them: they are filled, not replaced."""
    model = Tiny()
    before = list(model.parameters())
    payload = make_payload(model_state=model_state(Tiny()))
    restore_model(model, payload, expect_kind="transformer", path=PATH)
    assert all(one is other for one, other in zip(before, model.parameters(), strict=True))
    with torch.no_grad():
        payload["model_state"]["layer.bias"].add_(1)
    assert not torch.equal(model.layer.bias, payload["model_state"]["layer.bias"])


def test_model_state_is_contiguous_plain_and_without_prefixes():
    model = Tiny()
    model.layer.weight.data = torch.randn(8, 8).t()
    wrapped: Any = nn.DataParallel(torch.compile(model))
    state = model_state(wrapped)
    assert set(state) == set(model.state_dict())
    assert all(type(t) is torch.Tensor and t.is_contiguous() and not t.requires_grad for t in state.values())
    assert torch.equal(state["layer.weight"], model.layer.weight)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_accepted_on_either_side(make_payload, prefix):
    saved, fresh = Tiny(), Tiny()
    payload = make_payload(model_state={prefix + name: t for name, t in saved.state_dict().items()})
    assert restore_model(fresh, payload, expect_kind="transformer", path=PATH).exact
    assert equal(saved, fresh)
    wrapped: Any = nn.DataParallel(torch.compile(Tiny()))
    assert restore_model(wrapped, payload, expect_kind="transformer", path=PATH).exact
    assert torch.equal(wrapped.module.layer.weight, saved.layer.weight)


def test_the_same_name_under_two_prefixes_is_refused(make_payload):
    state = Tiny().state_dict()
    payload = make_payload(model_state={**state, "module.layer.bias": torch.zeros(8)})
    with pytest.raises(CheckpointDamagedError, match=r"'layer\.bias' twice"):
        restore_model(Tiny(), payload, expect_kind="transformer", path=PATH)


def test_what_does_not_fit_is_kept_and_listed(make_payload):
    saved, fresh = Tiny(), Tiny(extra=True)
    state = model_state(saved)
    state["old.weight"] = torch.zeros(3)
    state["layer.bias"] = torch.zeros(5)
    state["scale"] = torch.tensor(2)
    kept = {name: fresh.state_dict()[name].clone() for name in ("extra.weight", "layer.bias", "scale")}
    report = restore_model(fresh, make_payload(model_state=state), expect_kind="transformer", path=PATH)
    assert report.missing == ("extra.weight", "extra.bias")
    assert report.surplus == ("old.weight",)
    assert report.reshaped == (
        "scale (int64 in the checkpoint, float32 here)",
        "layer.bias (5 in the checkpoint, 8 here)",
    )
    assert (report.n_fitting, report.n_total) == (160 + 64 + 160, 160 + 64 + 8 + 160 + 1 + 9)
    assert not report.exact
    text = "\n".join(report.lines())
    for part in ("extra.weight", "old.weight", "5 in the checkpoint, 8 here", "384 of 402"):
        assert part in text
    assert all(torch.equal(fresh.state_dict()[name], value) for name, value in kept.items())
    assert torch.equal(fresh.layer.weight, saved.layer.weight)


def test_another_precision_is_converted_and_said(make_payload):
    saved, fresh = Tiny().bfloat16(), Tiny()
    report = restore_model(
        fresh, make_payload(model_state=model_state(saved)), expect_kind="transformer", path=PATH
    )
    assert torch.equal(fresh.layer.weight, saved.layer.weight.float())
    assert not report.exact
    assert "layer.bias (bfloat16 → float32)" in report.converted
    assert report.n_fitting == report.n_total


def test_untied_weights_into_a_tied_model_are_not_mixed_in_silence(make_payload):
    saved, fresh = Tiny(), Tiny(tied=True)
    report = restore_model(
        fresh, make_payload(model_state=model_state(saved)), expect_kind="transformer", path=PATH
    )
    assert torch.equal(fresh.embedding.weight, saved.embedding.weight)
    assert report.reshaped == ("head.weight (tied here, of its own in the checkpoint)",)


def test_one_name_of_a_tied_pair_is_enough(make_payload):
    saved, fresh = Tiny(tied=True), Tiny(tied=True)
    state = model_state(saved)
    del state["embedding.weight"]
    report = restore_model(fresh, make_payload(model_state=state), expect_kind="transformer", path=PATH)
    assert report.exact
    assert equal(saved, fresh)


def test_the_scale_of_the_logits_comes_along(make_payload):
    config = Config(
        model=ModelConfig(d_model=16, max_seq_len=8), transformer=TransformerConfig(n_layers=1, n_heads=2)
    )
    model = build_model("transformer", config, 20)
    payload = make_payload(model_state=model_state(model), run={"logit_scale": 0.8})
    restore_model(model, payload, expect_kind=payload["kind"], path=PATH)
    assert model.logit_scale == 0.8
    payload["run"] = {}  # from before there was one
    restore_model(model, payload, expect_kind=payload["kind"], path=PATH)
    assert model.logit_scale == 1.0
    for wrong in (0.0, -1.0, float("nan"), float("inf"), "1", 1):
        payload["run"] = {"logit_scale": wrong}
        with pytest.raises(CheckpointDamagedError, match="scale of its logits"):
            restore_model(model, payload, expect_kind=payload["kind"], path=PATH)


@pytest.mark.parametrize("kind", ["state_space", "nanothink_mla"])
def test_another_kind_is_refused_by_name(make_payload, kind):
    fresh = Tiny()
    before = model_state(Tiny())
    restore_model(fresh, make_payload(model_state=before), expect_kind="transformer", path=PATH)
    with pytest.raises(CheckpointMismatchError) as caught:
        restore_model(
            fresh,
            make_payload(kind=kind, model_state=model_state(Tiny())),
            expect_kind="transformer",
            path=PATH,
        )
    for part in (str(PATH), f"'{kind}'", "'transformer'", f"`nanothink resume {PATH}`"):
        assert part in str(caught.value)
    assert all(torch.equal(before[name], value) for name, value in fresh.state_dict().items())


def test_hardly_anything_fits_is_refused_and_changes_nothing(make_payload):
    fresh = Tiny(width=16)
    before = {name: value.clone() for name, value in fresh.state_dict().items()}
    payload = make_payload(model_state=model_state(Tiny()))
    with pytest.raises(CheckpointMismatchError) as caught:
        restore_model(fresh, payload, expect_kind="transformer", path=PATH)
    for part in (
        "hardly anything",
        "9 of 777",
        "embedding.weight (20×8 in the checkpoint, 20×16 here)",
        str(PATH),
    ):
        assert part in str(caught.value)
    assert all(torch.equal(before[name], value) for name, value in fresh.state_dict().items())


# --- random generators --------------------------------------------------------------------------------


def draw() -> list[float]:
    return [
        float(torch.rand(())),
        random.random(),
        random.gauss(0, 1),
        float(np.random.rand()),
        float(np.random.randn()),
    ]


def test_rng_round_trip_through_a_file(tmp_path, make_payload):
    draw()  # leaves half a Gaussian pair in python's and numpy's state
    payload = make_payload(rng=pack_rng())
    expected = [draw() for _ in range(3)]
    draw()
    assert unpack_rng(through_a_file(tmp_path, payload)["rng"]) == []
    assert [draw() for _ in range(3)] == expected


def test_packing_draws_nothing():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    pack_rng()
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="concerns machines without a GPU")
def test_a_gpu_that_is_gone_is_said():
    state = {**pack_rng(), "cuda": [torch.zeros(16, dtype=torch.uint8)]}
    assert unpack_rng(state) == ["saved with 1 GPU, resumed with 0: random numbers on GPUs will differ"]


@pytest.mark.parametrize(
    "broken", [{}, {"torch": 1}, {"python": [1]}, {"numpy": ["MT19937", [1], 0, 0, 0.0]}]
)
def test_broken_rng_states_are_refused(broken):
    state = {**pack_rng(), **broken} if broken else {}
    with pytest.raises(CheckpointDamagedError, match="random generators"):
        unpack_rng(state)
