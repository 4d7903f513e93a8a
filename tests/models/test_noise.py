"""Schedule, conversions and DDIM against ``diffusers``; draws as functions of seed and position."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from nanothink.models.noise import (
    Draws,
    clean_from_velocity,
    cosine_alpha_bars,
    ddim_levels,
    ddim_step,
    diffuse,
    noise_from_clean,
    velocity,
)

N_LEVELS = 100


def scheduler(prediction: str = "sample", **settings: Any) -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        num_train_timesteps=settings.pop("n_levels", N_LEVELS),
        beta_schedule="squaredcos_cap_v2",
        clip_sample=False,
        prediction_type=prediction,
        timestep_spacing="trailing",
        **settings,
    )


def pair(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    clean, noise = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    return clean, noise


@pytest.mark.parametrize("n_levels", [2, 10, 100, 1000])
def test_the_schedule_is_that_of_diffusers(n_levels: int) -> None:
    found = cosine_alpha_bars(n_levels)
    assert found.shape == (n_levels + 1,)
    assert found[0] == 1
    # diffusers has no level 0, counts from 0 and computes in float32
    torch.testing.assert_close(
        found[1:].float(), scheduler(n_levels=n_levels).alphas_cumprod, rtol=2e-4, atol=1e-9
    )


def test_the_schedule_falls_from_clean_to_almost_nothing() -> None:
    alpha_bars = cosine_alpha_bars(N_LEVELS)
    assert (alpha_bars.diff() < 0).all()
    assert 0 < alpha_bars[-1] < 1e-5
    # in between it is the closed form of Nichol & Dhariwal 2021, equation 17
    angles = (torch.arange(N_LEVELS, dtype=torch.float64) / N_LEVELS + 0.008) / 1.008 * math.pi / 2
    torch.testing.assert_close(alpha_bars[:-1], (angles.cos() / angles[0].cos()) ** 2)


def test_noising_and_its_velocity_are_those_of_diffusers() -> None:
    reference, alpha_bars = scheduler(), cosine_alpha_bars(N_LEVELS)
    clean, noise = pair(7, 5)
    levels = torch.tensor([1, 2, 30, 50, 80, 99, 100])
    at = alpha_bars[levels].unsqueeze(-1)
    torch.testing.assert_close(
        diffuse(clean, noise, at), reference.add_noise(clean, noise, levels - 1), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(
        velocity(clean, noise, at), reference.get_velocity(clean, noise, levels - 1), rtol=1e-5, atol=1e-5
    )


def test_the_forward_process_has_the_stated_mean_and_variance() -> None:
    clean = torch.tensor([-2.0, 0.0, 0.5, 3.0], dtype=torch.float64)
    n_draws = 200_000
    noise = torch.randn(n_draws, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for level in (1, 20, 50, 90, 100):
        alpha_bar = cosine_alpha_bars(N_LEVELS)[level]
        noisy = diffuse(clean, noise, alpha_bar)
        error = 5 * float(((1 - alpha_bar) / n_draws).sqrt())  # five standard errors of the mean
        torch.testing.assert_close(noisy.mean(0), alpha_bar.sqrt() * clean, rtol=0, atol=error)
        variance = (1 - alpha_bar).expand(4)
        torch.testing.assert_close(noisy.var(0), variance, rtol=5 * (2 / n_draws) ** 0.5, atol=0)


@pytest.mark.parametrize("level", [1, 25, 50, 75, 99])
def test_conversions_undo_one_another(level: int) -> None:
    clean, noise = pair(9, 6)
    alpha_bar = cosine_alpha_bars(N_LEVELS)[level]
    noisy, v = diffuse(clean, noise, alpha_bar), velocity(clean, noise, alpha_bar)
    torch.testing.assert_close(noise_from_clean(noisy, clean, alpha_bar), noise)
    torch.testing.assert_close(clean_from_velocity(noisy, v, alpha_bar), clean)


def to_epsilon(noisy: Tensor, clean: Tensor, alpha_bar: Tensor) -> Tensor:
    return noise_from_clean(noisy, clean, alpha_bar)


def to_velocity(noisy: Tensor, clean: Tensor, alpha_bar: Tensor) -> Tensor:
    return velocity(clean, noise_from_clean(noisy, clean, alpha_bar), alpha_bar)


@pytest.mark.parametrize(
    ("prediction", "output"),
    [("sample", lambda _n, clean, _a: clean), ("epsilon", to_epsilon), ("v_prediction", to_velocity)],
)
@pytest.mark.parametrize("n_steps", [1, 2, 5, 10, 50])
def test_a_ddim_step_is_that_of_diffusers_whatever_is_predicted(
    prediction: str, output: Callable[[Tensor, Tensor, Tensor], Tensor], n_steps: int
) -> None:
    reference = scheduler(prediction, set_alpha_to_one=True)
    reference.set_timesteps(n_steps)
    alpha_bars = torch.cat([torch.ones(1), reference.alphas_cumprod]).double()
    levels = ddim_levels(N_LEVELS, n_steps)
    assert [level - 1 for level in levels] == reference.timesteps.tolist()
    clean, noise = pair(4, 6)
    for level, following in zip(levels, [*levels[1:], 0], strict=True):
        if prediction == "epsilon" and level == N_LEVELS:
            continue  # the clean vector cannot be had from the noise where ᾱ is 1e-7
        alpha_bar, next_alpha_bar = alpha_bars[level], alpha_bars[following]
        noisy = diffuse(clean, noise, alpha_bar)
        guess = 0.7 * clean + 0.1
        found = ddim_step(noisy, guess, alpha_bar, next_alpha_bar)
        expected = reference.step(output(noisy, guess, alpha_bar), level - 1, noisy).prev_sample
        torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("n_steps", [1, 2, 5, 10, 50, 100])
def test_a_perfect_denoiser_is_recovered_exactly(n_steps: int) -> None:
    """Whatever the noise: the last step leads to the guess itself, and those before keep the noise."""
    clean, noise = pair(3, 8)
    alpha_bars = cosine_alpha_bars(N_LEVELS)
    levels = ddim_levels(N_LEVELS, n_steps)
    noisy = diffuse(clean, noise, alpha_bars[levels[0]])
    for level, following in zip(levels, [*levels[1:], 0], strict=True):
        torch.testing.assert_close(noisy, diffuse(clean, noise, alpha_bars[level]))
        noisy = ddim_step(noisy, clean, alpha_bars[level], alpha_bars[following])
    assert torch.equal(noisy, clean)


@pytest.mark.parametrize(("n_levels", "n_steps"), [(100, 1), (100, 7), (100, 100), (33, 10), (5, 3)])
def test_sampling_begins_at_pure_noise_and_visits_falling_levels(n_levels: int, n_steps: int) -> None:
    levels = ddim_levels(n_levels, n_steps)
    assert levels[0] == n_levels
    assert len(levels) == n_steps
    assert all(a > b for a, b in zip(levels, [*levels[1:], 0], strict=True))


def draw(positions: list[int], seed: int = 3, null: float = 0.5, guided: float = 0.5) -> Draws:
    return Draws.make(
        seed,
        positions,
        6,
        4,
        n_levels=N_LEVELS,
        null_fraction=null,
        guided_fraction=guided,
        device=torch.device("cpu"),
    )


FIELDS = ("levels", "noise", "pure", "guided", "split", "offset")


def test_a_block_draws_the_same_in_any_batch() -> None:
    together = draw([10, 11, 12, 13])
    for row, position in enumerate((10, 11, 12, 13)):
        alone = draw([position])
        for name in FIELDS:
            assert torch.equal(getattr(together, name)[row], getattr(alone, name)[0]), name


def test_blocks_and_seeds_draw_differently_and_the_global_generator_has_no_part() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = draw([10])
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(draw([10]).noise, first.noise)
    for other in (draw([11]), draw([10], seed=4)):
        assert not torch.equal(other.noise, first.noise)
        assert not torch.equal(other.levels, first.levels)


def test_no_setting_shifts_the_draws_of_another() -> None:
    usual = draw([10, 11])
    for changed in (draw([10, 11], null=1.0), draw([10, 11], guided=0.0)):
        for name in ("levels", "noise", "split", "offset"):
            assert torch.equal(getattr(changed, name), getattr(usual, name)), name


def test_what_is_drawn_has_the_stated_distribution() -> None:
    draws = draw(list(range(3000)), null=0.25, guided=0.7)
    levels = draws.levels.flatten()
    assert levels.min() == 1
    assert levels.max() == N_LEVELS
    assert float(levels.float().mean()) == pytest.approx(50.5, abs=1.0)
    assert float(draws.noise.mean()) == pytest.approx(0, abs=0.02)
    assert float(draws.noise.std()) == pytest.approx(1, abs=0.02)
    null = (draws.pure == 0).flatten(1).all(1)
    assert float(null.float().mean()) == pytest.approx(0.25, abs=0.04)
    assert float(draws.pure[~null].std()) == pytest.approx(1, abs=0.02)
    assert not torch.allclose(draws.pure[~null], draws.noise[~null])
    assert float(draws.guided.float().mean()) == pytest.approx(0.7, abs=0.04)
    assert float(draws.split.float().mean()) == pytest.approx(0.5, abs=0.04)
    assert set(draws.offset.tolist()) == set(range(6))
