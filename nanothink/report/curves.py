"""Curves of a page: few points, all of them from the records.

A curve of n rows is cut into buckets of neighbouring rows, and each bucket keeps its lowest and its highest
(min-max decimation): a spike of one step stays visible however long the run was.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from nanothink.training.records import Curve

MAX_POINTS = 800
"""Points of a curve on the page: about as many as a plot has columns of pixels."""

SMOOTHING_FRACTION = 0.02
"""Span of the moving average, as a fraction of the curve's points."""


@dataclass(frozen=True)
class Line:
    """A curve in a plot."""

    label: str
    color: int
    """Index of the colour in the palette."""
    steps: Sequence[float]
    values: Sequence[float]
    faint: bool = False
    """Drawn behind without a legend: the data of a smoothed line."""
    n_points: int = field(default=0)
    """Number of points before thinning."""


def line(label: str, color: int, curve: Curve, *, faint: bool = False) -> Line:
    """Thin a curve and make it a line."""
    kept = thinned(curve)
    return Line(label, color, kept.steps, kept.values, faint, len(curve))


def thinned(curve: Curve, max_points: int = MAX_POINTS) -> Curve:
    """Keep at most ``max_points``: the lowest and highest of each bucket, the first and the last."""
    n, n_buckets = len(curve), max_points // 2 - 1
    if n <= max_points:
        return curve
    kept = {0, n - 1}
    values = np.frombuffer(curve.values)
    for bucket in range(n_buckets):
        first, end = bucket * n // n_buckets, (bucket + 1) * n // n_buckets
        kept |= {first + int(values[first:end].argmin()), first + int(values[first:end].argmax())}
    result = Curve()
    for row in sorted(kept):
        result.append(curve.steps[row], curve.values[row])
    return result


def smoothed(curve: Curve) -> Curve:
    """Exponential moving average, with its start corrected for bias towards zero."""
    keep = math.exp(-1 / max(1.0, SMOOTHING_FRACTION * len(curve)))
    result, total, weight = Curve(), 0.0, 0.0
    for step, value in zip(curve.steps, curve.values, strict=True):
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        result.append(step, total / weight)
    return result
