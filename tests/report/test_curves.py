"""Thinned curves: few points, all of them measured, no extreme lost."""

from __future__ import annotations

import itertools
import random

import pytest

from nanothink.report.figures import MAX_POINTS, line, smoothed, thinned
from nanothink.training.records import Curve


def curve_of(values: list[float]) -> Curve:
    curve = Curve()
    for step, value in enumerate(values, 1):
        curve.append(step, value)
    return curve


@pytest.mark.parametrize("n", [0, 1, 2, MAX_POINTS - 1, MAX_POINTS, MAX_POINTS + 1, 5000])
def test_a_thinned_curve_is_short_and_made_of_its_own_points(n: int) -> None:
    rng = random.Random(n)
    curve = curve_of([rng.random() for _ in range(n)])
    kept = thinned(curve)
    assert len(kept) <= MAX_POINTS
    assert list(kept.steps) == sorted(set(kept.steps))
    assert set(zip(kept.steps, kept.values, strict=True)) <= set(zip(curve.steps, curve.values, strict=True))
    if n:
        assert (kept.steps[0], kept.steps[-1]) == (1, n)
        assert (min(kept.values), max(kept.values)) == (min(curve.values), max(curve.values))


@pytest.mark.parametrize("at", [1, 12_345, 49_999])
def test_a_spike_of_one_step_in_a_long_run_stays(at: int) -> None:
    values = [1.0 + (step % 7) / 10 for step in range(50_000)]
    values[at] = 99.0
    assert 99.0 in thinned(curve_of(values)).values
    drawn = line("run", 0, curve_of(values))
    assert drawn.n_points == 50_000
    assert max(drawn.values) == 99.0


def test_a_moving_average_starts_at_the_first_value_and_keeps_a_constant() -> None:
    assert smoothed(curve_of([3.0] * 500)).values[-1] == pytest.approx(3.0)
    average = smoothed(curve_of([5.0] + [1.0] * 999)).values
    assert average[0] == pytest.approx(5.0)
    assert average[-1] == pytest.approx(1.0, abs=1e-6)
    assert all(high >= low for high, low in itertools.pairwise(average))
