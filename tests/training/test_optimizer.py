from __future__ import annotations

import copy
import functools
import itertools
import math
from typing import Any

import pytest
import torch
from torch import nn

from nanothink.config import TrainExpertConfig
from nanothink.training import muon
from nanothink.training.muon import NS_COEFFICIENTS, NS_STEPS, FastMuon, newton_schulz, orthogonalised
from nanothink.training.optimizer import GroupedOptimizer, effective_warmup, learning_rate_fraction


def _groups() -> dict[str, list[tuple[str, nn.Parameter]]]:
    torch.manual_seed(0)
    return {
        "matrices": [("a", nn.Parameter(torch.randn(8, 4))), ("b", nn.Parameter(torch.randn(4, 8)))],
        "embeddings": [("e", nn.Parameter(torch.randn(16, 4)))],
        "head": [("h", nn.Parameter(torch.randn(16, 4)))],
        "other": [("n", nn.Parameter(torch.ones(4)))],
    }


def _step(optimizer: GroupedOptimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in optimizer.parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()
    optimizer.zero_grad()


def test_every_parameter_is_in_exactly_one_group() -> None:
    groups = _groups()
    optimizer = GroupedOptimizer(groups, TrainExpertConfig())
    expected = {id(p) for named in groups.values() for _, p in named}
    assert {id(p) for p in optimizer.parameters} == expected
    assert len(optimizer.parameters) == len(expected)


def test_matrices_go_to_muon_and_the_rest_to_adamw() -> None:
    optimizer = GroupedOptimizer(_groups(), TrainExpertConfig())
    assert {g["role"] for g in optimizer.optimizers["muon"].param_groups} == {"matrices"}
    assert {g["role"] for g in optimizer.optimizers["adamw"].param_groups} == {"embeddings", "head", "other"}
    plain = GroupedOptimizer(_groups(), TrainExpertConfig(optimizer="adamw"))
    assert set(plain.optimizers) == {"adamw"}


def test_released_it_holds_no_moments_and_no_gradients() -> None:
    optimizer = GroupedOptimizer(_groups(), TrainExpertConfig())
    _step(optimizer, 0)
    assert any(tensor.numel() > 1 for tensor in _moments(optimizer))
    for parameter in optimizer.parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.release()
    assert not _moments(optimizer)
    assert all(parameter.grad is None for parameter in optimizer.parameters)


def _moments(optimizer: GroupedOptimizer) -> list[torch.Tensor]:
    kept = [state for o in optimizer.optimizers.values() for state in o.state.values()]
    return [value for state in kept for value in state.values() if isinstance(value, torch.Tensor)]


def test_rates_are_lr_times_multiplier_times_schedule() -> None:
    config = TrainExpertConfig(lr=1e-3, lr_matrices=2, lr_embeddings=3, lr_head=4, lr_other=5)
    optimizer = GroupedOptimizer(_groups(), config)
    optimizer.set_fraction(0.5)
    rates = {g["role"]: g["lr"] for o in optimizer.optimizers.values() for g in o.param_groups}
    assert rates == pytest.approx({"matrices": 1e-3, "embeddings": 1.5e-3, "head": 2e-3, "other": 2.5e-3})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_our_muon_is_torchs_muon_in_another_type(dtype: torch.dtype) -> None:
    """To the bit where both compute in bfloat16, within its rounding where ours computes in another type."""
    torch.manual_seed(0)
    start = [torch.randn(24, 40), torch.randn(40, 24), torch.randn(16, 16), torch.randn(4, 4)]
    made = []
    for cls in (functools.partial(FastMuon, dtype=dtype), torch.optim.Muon):
        parameters = [nn.Parameter(p.clone()) for p in start]
        muon = cls(parameters, lr=0.02, momentum=0.9, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
        for step in range(4):
            generator = torch.Generator().manual_seed(step)
            for p in parameters[:-1]:  # the last has no gradient, and must stay
                p.grad = torch.randn(p.shape, generator=generator)
            muon.step()
        made.append((parameters, muon.state_dict()))
    (ours, our_state), (theirs, their_state) = made
    for one, other, before in zip(ours, theirs, start, strict=True):
        if dtype is torch.bfloat16:
            assert torch.equal(one, other)
        else:
            moved = float((other - before).detach().norm())
            assert float((one - other).detach().norm()) <= 0.02 * moved
    assert torch.equal(ours[-1], start[-1])
    assert our_state["param_groups"] == their_state["param_groups"]
    for index, entry in their_state["state"].items():
        assert torch.equal(our_state["state"][index]["momentum_buffer"], entry["momentum_buffer"])


def test_orthogonalised_brings_every_singular_value_near_one() -> None:
    torch.manual_seed(0)
    for shape in ((30, 12), (12, 30)):
        matrix = torch.randn(shape)
        before = matrix.clone()
        values = torch.linalg.svdvals(orthogonalised(matrix, NS_COEFFICIENTS, NS_STEPS, 1e-7, torch.float32))
        assert torch.equal(matrix, before)
        assert float(values.min()) > 0.6
        assert float(values.max()) < 1.3


@pytest.mark.parametrize("shape", [(16, 48), (24, 96), (96, 24), (20, 20)])
@pytest.mark.parametrize(
    ("dtype", "rank", "tolerance"),
    [
        (torch.bfloat16, 24, 0.1),
        (torch.float16, 24, 0.02),
        (torch.float32, 24, 1e-3),
        (torch.float32, 2, 1e-3),
    ],
)
def test_orthogonalised_is_newton_schulz_as_the_definition_reads(
    shape: tuple[int, int], dtype: torch.dtype, rank: int, tolerance: float
) -> None:
    """A long matrix is multiplied in another order; rank 2 leaves most directions almost empty."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(n, rank, generator=generator) for n in shape)
    matrix = left @ right.t() + 1e-4 * torch.randn(shape, generator=generator)
    x = matrix.double() if shape[0] <= shape[1] else matrix.double().t()
    expected = newton_schulz(x / x.norm(), NS_COEFFICIENTS, NS_STEPS)
    found = orthogonalised(matrix, NS_COEFFICIENTS, NS_STEPS, 1e-7, dtype).double()
    found = found if shape[0] <= shape[1] else found.t()
    assert float((found - expected).norm() / expected.norm()) < tolerance


def test_few_steps_on_a_gram_matrix_keep_small_singular_values_in_16_bits() -> None:
    """Small singular values vanish from a product of too many Gram matrices."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, 64, generator=generator)).Q for n in (64, 256))
    matrix = left @ torch.diag(1 / torch.arange(1.0, 65)) @ right.t()
    x = matrix / matrix.norm()
    exact = newton_schulz(x.double(), NS_COEFFICIENTS, NS_STEPS)
    found = orthogonalised(matrix, NS_COEFFICIENTS, NS_STEPS, 1e-7, torch.bfloat16)
    assert float((found - exact).norm() / exact.norm()) < 0.1  # 0.26 if all steps are on one


@pytest.mark.parametrize("shape", [(5, 16, 48), (3, 96, 24), (2, 20, 20), (1, 7, 8)])
def test_several_matrices_are_orthogonalised_as_each_alone(shape: tuple[int, int, int]) -> None:
    several = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    settings = NS_COEFFICIENTS, NS_STEPS, 1e-7, torch.float32
    together = orthogonalised(several, *settings)
    alone = torch.stack([orthogonalised(matrix, *settings) for matrix in several])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_a_muon_update_has_the_size_of_an_adamw_update() -> None:
    """Lr keeps its meaning: the root mean square of one update is about 0.2 times the rate."""
    matrix = nn.Parameter(torch.zeros(64, 32))
    config = TrainExpertConfig(lr=1e-2, lr_matrices=1, weight_decay=0)
    optimizer = GroupedOptimizer({"matrices": [("m", matrix)]}, config)
    matrix.grad = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)) * 100
    optimizer.step()
    rms = float(matrix.detach().square().mean().sqrt())
    assert 0.1e-2 < rms < 0.3e-2


def test_only_matrices_decay_by_default() -> None:
    optimizer = GroupedOptimizer(_groups(), TrainExpertConfig(weight_decay=0.5))
    decays = {g["role"]: g["weight_decay"] for o in optimizer.optimizers.values() for g in o.param_groups}
    assert decays == {"matrices": 0.5, "embeddings": 0, "head": 0, "other": 0}


def test_matrices_of_a_shape_share_products_as_far_as_the_cache_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = NS_COEFFICIENTS, NS_STEPS, 1e-7, torch.float32
    matrices, sizes = torch.randn(7, 24, 40).unbind(), list[int]()

    def noted(x: torch.Tensor, *args: Any) -> torch.Tensor:
        sizes.append(len(x) if x.ndim == 3 else 1)
        return orthogonalised(x, *args)

    monkeypatch.setattr(muon, "orthogonalised", noted)
    monkeypatch.setattr(muon, "_BYTES_TOGETHER", 3 * 4 * 24 * 40 + 1)
    found = muon.all_orthogonalised(matrices, *settings)
    assert sizes == [3, 3, 1]
    for one, matrix in zip(found, matrices, strict=True):
        torch.testing.assert_close(one, orthogonalised(matrix, *settings))
    assert muon.all_orthogonalised([], *settings) == []


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_equal_decays_shrink_tables_and_matrices_alike(optimizer: str) -> None:
    config = TrainExpertConfig(optimizer=optimizer, weight_decay=0.5, weight_decay_tables=0.5)
    made = GroupedOptimizer(_groups(), config)
    before = {name: p.detach().clone() for group in _groups_of(made).values() for name, p in group.items()}
    for parameter in made.parameters:
        parameter.grad = torch.zeros_like(parameter)
    made.step()
    for role, group in _groups_of(made).items():
        expected = 1.0 if role == "other" else 1 - 0.5 * config.lr * config.lr_matrices
        for name, parameter in group.items():
            torch.testing.assert_close(parameter.detach(), before[name] * expected, msg=role)


def _groups_of(optimizer: GroupedOptimizer) -> dict[str, dict[str, nn.Parameter]]:
    groups = [g for o in optimizer.optimizers.values() for g in o.param_groups]
    return {g["role"]: dict(zip(g["names"], g["params"], strict=True)) for g in groups}


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_moments_survive_saving(kind: str) -> None:
    config = TrainExpertConfig(optimizer=kind)
    one = GroupedOptimizer(_groups(), config)
    for seed in range(3):
        _step(one, seed)
    other_groups = _groups()
    for named, copied in zip(one.parameters, GroupedOptimizer(other_groups, config).parameters, strict=True):
        copied.data.copy_(named.data)
    other = GroupedOptimizer(other_groups, config)
    assert other.load_state_dict(copy.deepcopy(one.state_dict())) == []
    _step(one, 9)
    _step(other, 9)
    for left, right in zip(one.parameters, other.parameters, strict=True):
        assert torch.equal(left, right)


def test_moments_are_matched_by_name_and_shape() -> None:
    one = GroupedOptimizer(_groups(), TrainExpertConfig())
    _step(one, 0)
    changed = _groups()
    changed["matrices"] = [("new", nn.Parameter(torch.randn(4, 4))), ("a", nn.Parameter(torch.randn(8, 4)))]
    changed["head"] = [("h", nn.Parameter(torch.randn(17, 4)))]
    other = GroupedOptimizer(changed, TrainExpertConfig())
    assert sorted(other.load_state_dict(one.state_dict())) == ["h", "new"]
    muon = other.optimizers["muon"]
    momentum = one.optimizers["muon"].state[one.optimizers["muon"].param_groups[0]["params"][0]]
    own = muon.state[muon.param_groups[0]["params"][1]]
    assert torch.equal(own["momentum_buffer"], momentum["momentum_buffer"])


def test_rates_come_from_this_runs_settings_not_from_the_saved_state() -> None:
    one = GroupedOptimizer(_groups(), TrainExpertConfig(lr=1.0))
    _step(one, 0)
    other = GroupedOptimizer(_groups(), TrainExpertConfig(lr=1e-5, lr_head=1))
    other.load_state_dict(one.state_dict())
    other.set_fraction(1.0)
    rates = {g["role"]: g["lr"] for o in other.optimizers.values() for g in o.param_groups}
    assert rates["head"] == pytest.approx(1e-5)


class TestSchedule:
    config = TrainExpertConfig(warmup_steps=10, lr_min_fraction=0.1)

    def test_warm_up_is_linear_and_reaches_the_peak(self) -> None:
        rates = [learning_rate_fraction(s, 1000, self.config) for s in range(10)]
        assert rates == pytest.approx([0.1 * (i + 1) for i in range(10)])

    def test_cosine_ends_at_its_floor(self) -> None:
        assert learning_rate_fraction(10, 1000, self.config) == pytest.approx(1)
        middle = learning_rate_fraction(505, 1000, self.config)
        assert middle == pytest.approx(0.55, abs=1e-3)
        assert learning_rate_fraction(1000, 1000, self.config) == pytest.approx(0.1)
        assert learning_rate_fraction(5000, 1000, self.config) == pytest.approx(0.1)

    def test_trapezoid_is_flat_and_then_linear(self) -> None:
        config = self.config.model_copy(update={"schedule": "trapezoid"})
        assert learning_rate_fraction(600, 1000, config) == 1
        assert learning_rate_fraction(802, 1000, config) == pytest.approx(0.55, abs=1e-3)
        assert learning_rate_fraction(1000, 1000, config) == pytest.approx(0.1)

    @pytest.mark.parametrize("schedule", ["cosine", "trapezoid"])
    def test_it_never_jumps(self, schedule: str) -> None:
        config = self.config.model_copy(update={"schedule": schedule})
        rates = [learning_rate_fraction(s, 500, config) for s in range(501)]
        assert max(abs(a - b) for a, b in itertools.pairwise(rates)) <= 0.11
        assert all(0 < rate <= 1 and math.isfinite(rate) for rate in rates)

    def test_a_short_run_warms_up_over_a_tenth_of_itself(self) -> None:
        assert effective_warmup(TrainExpertConfig(warmup_steps=100), 200) == 20
        assert effective_warmup(TrainExpertConfig(warmup_steps=100), 1000) == 100
        assert effective_warmup(TrainExpertConfig(warmup_steps=0), 5) == 0
        assert learning_rate_fraction(0, 5, TrainExpertConfig(warmup_steps=100)) == pytest.approx(1)
