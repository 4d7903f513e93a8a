"""Each rule of sampling on a vocabulary small enough to work out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from nanothink.errors import NanoThinkError
from nanothink.inference.sampling import SamplingConfig, arrival_times, filter_probabilities, next_tokens

PLAIN = {"temperature": 1.0, "top_k": None, "top_p": None}
LOGITS = torch.tensor([[2.0, 0.0, 1.0, -1.0, 0.5]])


def draw(logits: Tensor, config: SamplingConfig, n: int, previous: tuple[int, ...] = ()) -> Tensor:
    """Draw with n seeds for one row: (n,)."""
    return next_tokens(logits.expand(n, -1), [previous] * n, config, range(n))


def frequencies(tokens: Tensor, vocab_size: int = 5) -> Tensor:
    return torch.bincount(tokens, minlength=vocab_size).double() / len(tokens)


def chi_square(tokens: Tensor, expected: Tensor) -> float:
    n, possible = len(tokens), expected > 0
    seen = torch.bincount(tokens, minlength=len(expected)).double()
    assert not seen[~possible].any()
    return float(((seen - n * expected)[possible] ** 2 / (n * expected)[possible]).sum())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_draws_follow_the_tempered_softmax(temperature: float) -> None:
    config = SamplingConfig(**PLAIN | {"temperature": temperature})
    expected = (LOGITS[0].double() / temperature).softmax(0)
    tokens = draw(LOGITS, config, 4000)
    assert chi_square(tokens, expected) < 18.5  # 4 degrees of freedom, one in a thousand
    assert chi_square(tokens, torch.full((5,), 0.2, dtype=torch.float64)) > 18.5  # the test can tell


@pytest.mark.parametrize(
    ("k", "kept"), [(1, {0}), (2, {0, 2}), (4, {0, 1, 2, 4}), (5, {0, 1, 2, 3, 4}), (99, None)]
)
def test_top_k_keeps_the_k_likeliest(k: int, kept: set[int] | None) -> None:
    config = SamplingConfig(**PLAIN | {"top_k": k})
    probabilities = filter_probabilities(LOGITS.double(), config)[0]
    kept = {0, 1, 2, 3, 4} if kept is None else kept
    assert set(probabilities.nonzero().flatten().tolist()) == kept
    weights = LOGITS[0].double().exp()
    expected = torch.stack([weights[i] if i in kept else torch.zeros(()).double() for i in range(5)])
    torch.testing.assert_close(probabilities, expected / expected.sum())
    assert set(draw(LOGITS, config, 2000).tolist()) == kept


def test_top_k_keeps_exactly_k_of_equals() -> None:
    config = SamplingConfig(**PLAIN | {"top_k": 3})
    assert int((filter_probabilities(torch.zeros(1, 9).double(), config) > 0).sum()) == 3


@pytest.mark.parametrize(
    ("p", "kept"),
    [
        (0.001, {1}),
        (0.49, {1}),
        (0.5, {1}),
        (0.51, {1, 3}),
        (0.74, {1, 3}),
        (0.76, {0, 1, 3}),
        (1.0, {0, 1, 2, 3}),
    ],
)
def test_top_p_keeps_the_fewest_that_reach_p(p: float, kept: set[int]) -> None:
    probabilities = torch.tensor([[0.15, 0.5, 0.1, 0.25]], dtype=torch.float64)
    found = filter_probabilities(probabilities.log(), SamplingConfig(**PLAIN | {"top_p": p}))[0]
    assert set(found.nonzero().flatten().tolist()) == kept
    assert float(found.sum()) == pytest.approx(1)


def test_top_p_counts_the_mass_left_by_temperature_and_top_k() -> None:
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]], dtype=torch.float64).log()
    # top-k 2 leaves 4/7 and 3/7: 0.5 is reached by the first alone, which has 0.4 of the whole
    found = filter_probabilities(logits, SamplingConfig(**PLAIN | {"top_k": 2, "top_p": 0.5}))
    assert found.tolist() == [[1, 0, 0, 0]]
    # temperature 0.5 makes them 16:9:4:1, so the first has 0.53
    found = filter_probabilities(logits, SamplingConfig(**PLAIN | {"temperature": 0.5, "top_p": 0.5}))
    assert found.tolist() == [[1, 0, 0, 0]]


def test_temperature_zero_is_greedy() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [9.0, -9.0, 0.0]])
    for seed in range(20):
        assert next_tokens(logits, [[], []], SamplingConfig(temperature=0), [seed, seed]).tolist() == [1, 0]


def test_a_tiny_temperature_is_nearly_greedy_and_does_not_overflow() -> None:
    config = SamplingConfig(**PLAIN | {"temperature": 1e-12})
    assert set(draw(LOGITS * 1e4, config, 50).tolist()) == {0}


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits() -> None:
    config = SamplingConfig(**PLAIN | {"repetition_penalty": 2.0})
    tokens = draw(LOGITS, config, 4000, previous=(0, 3, 0))  # once each, however often seen
    expected = torch.tensor([1.0, 0.0, 1.0, -2.0, 0.5], dtype=torch.float64).softmax(0)
    assert chi_square(tokens, expected) < 18.5
    assert chi_square(tokens, LOGITS[0].double().softmax(0)) > 18.5


def test_repetition_penalty_comes_before_temperature_zero_and_forgets_beyond_its_window() -> None:
    config = SamplingConfig(temperature=0, repetition_penalty=10.0, repetition_window=2)
    assert next_tokens(LOGITS, [[0, 1]], config, [0]).tolist() == [2]
    assert next_tokens(LOGITS, [[0, 1, 3]], config, [0]).tolist() == [0]


def test_a_row_does_not_depend_on_its_companions() -> None:
    config = SamplingConfig(top_k=20, top_p=0.9, repetition_penalty=1.3)
    logits = torch.randn(6, 40, generator=torch.Generator().manual_seed(3))
    previous = [[row, row + 1] for row in range(6)]
    together = next_tokens(logits, previous, config, range(6))
    for row in range(6):
        alone = next_tokens(logits[row : row + 1], previous[row : row + 1], config, [row])
        assert alone.item() == together[row].item()


def test_logits_are_left_alone_and_any_type_will_do() -> None:
    logits = LOGITS.to(torch.bfloat16)
    before = logits.clone()
    config = SamplingConfig(repetition_penalty=2.0)
    assert draw(logits, config, 3, previous=(0,)).dtype == torch.int64
    assert torch.equal(logits, before)
    double = LOGITS.double()
    draw(double, config, 3, previous=(0,))
    assert torch.equal(double, LOGITS.double())


def test_impossible_tokens_are_never_drawn() -> None:
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0, -math.inf]])
    assert set(draw(logits, SamplingConfig(**PLAIN), 500).tolist()) == {1, 3}


def test_arrival_times_are_exponential_and_independent_in_seed_position_and_token() -> None:
    """Neighbouring numbers too: quantiles, and correlations within five standard errors."""
    seeds, positions = np.meshgrid(np.arange(40), np.arange(1000, 1040), indexing="ij")
    found = arrival_times(seeds.ravel().tolist(), positions.ravel().tolist(), np.arange(50)[None]).reshape(
        40, 40, 50
    )
    n = found.size
    for q in (0.001, 0.1, 0.5, 0.9, 0.999):
        share = (found < -np.log1p(-q)).mean()
        assert abs(share - q) < 5 * (q * (1 - q) / n) ** 0.5
    for axis in range(3):
        pairs = np.take(found, range(found.shape[axis] - 1), axis).ravel() - 1, np.diff(found, axis=axis)
        assert abs((pairs[0] * (pairs[0] + pairs[1].ravel())).mean()) < 5 / n**0.5
    assert (found > 0).all()


def test_a_draw_depends_on_the_seed_and_the_position_alone() -> None:
    config, logits = SamplingConfig(**PLAIN), torch.zeros(1, 50)
    found = {next_tokens(logits, [[7] * at], config, [seed]).item() for at in range(9) for seed in range(9)}
    assert len(found) > 30
    large = [(1 << 63) - 1, 1 << 62]
    assert next_tokens(logits.expand(2, -1), [[3], [4]], config, large).equal(
        next_tokens(logits.expand(2, -1), [[5], [6]], config, large)
    )


def test_rounding_of_the_logits_changes_next_to_no_draw() -> None:
    """As it is of another batch: 2 of 10,000 draws from 200 tokens may change by noise of 1e-6."""
    config = SamplingConfig(**PLAIN)
    chance = torch.Generator().manual_seed(0)
    logits = torch.randn(10_000, 200, generator=chance)
    noisy = logits + 1e-6 * torch.randn(logits.shape, generator=chance)
    first, second = (next_tokens(x, [[]] * 10_000, config, range(10_000)) for x in (logits, noisy))
    assert int((first != second).sum()) <= 2


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_an_error(bad: float, temperature: float) -> None:
    logits = torch.tensor([[0.0, bad, 1.0]])
    with pytest.raises(NanoThinkError, match="not finite"):
        next_tokens(logits, [[]], SamplingConfig(temperature=temperature), [0])
    with pytest.raises(NanoThinkError, match="not finite"):
        next_tokens(torch.full((1, 3), -math.inf), [[]], SamplingConfig(), [0])


@pytest.mark.parametrize(
    "setting",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"repetition_penalty": 0.0},
        {"repetition_window": 0},
        {"max_new_tokens": 0},
        {"seed": -1},
        {"temprature": 1.0},
    ],
)
def test_settings_out_of_bounds_are_refused(setting: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match=next(iter(setting))):
        SamplingConfig.model_validate(setting)


@pytest.mark.parametrize(
    "settings", [{"top_k": 7}, {"top_k": 7, "top_p": 0.6}, {"top_k": 40}, {"top_p": 0.5}]
)
def test_drawing_among_the_candidates_is_drawing_from_the_whole_distribution(
    settings: dict[str, float],
) -> None:
    """Only the k likeliest are converted and summed up; the same times give the same tokens."""
    config = SamplingConfig(**PLAIN | {"temperature": 0.7} | settings)
    logits = torch.randn(300, 40, generator=torch.Generator().manual_seed(0)).round(decimals=1)  # with ties
    found = next_tokens(logits, [[]] * 300, config, range(300))
    times = arrival_times(range(300), [0] * 300, np.arange(40)[None])
    expected = (filter_probabilities(logits.double(), config) / torch.from_numpy(times)).argmax(1)
    assert found.equal(expected)
