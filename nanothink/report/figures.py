"""Plots of the page: one for each run, or all runs in one. Few points, all of them from the records.

A curve of n rows is cut into buckets of neighbouring rows, and each bucket keeps its lowest and its highest
(min-max decimation): a spike of one step stays visible however long the run was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nanothink.report.passages import ReportedRun
from nanothink.training.objectives import WEIGHT_PART
from nanothink.training.records import Curve, finite

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


@dataclass(frozen=True)
class Figure:
    title: str
    note: str
    y: str
    """Quantity drawn, with its unit."""
    lines: tuple[Line, ...]
    x: str = "step"
    logarithmic: bool = False
    from_zero: bool = False
    """Begin the vertical axis at zero, for shares that are compared by eye."""

    @property
    def named(self) -> list[Line]:
        """Lines with a legend."""
        return [line for line in self.lines if not line.faint]

    def summaries(self) -> list[dict[str, Any]]:
        """Numbers of each line, for screen readers."""
        return [
            {
                "label": each.label,
                "color": each.color,
                "first": each.values[0],
                "lowest": min(each.values),
                "lowest_at": each.steps[min(range(len(each.values)), key=each.values.__getitem__)],
                "highest": max(each.values),
                "last": each.values[-1],
                "last_at": each.steps[-1],
                "points": each.n_points,
                "shown": len(each.values),
            }
            for each in self.named
        ]

    def data(self) -> dict[str, Any]:
        """Data that the page's script draws."""
        return {
            "x": self.x,
            "logarithmic": self.logarithmic,
            "fromZero": self.from_zero,
            "lines": [
                {
                    "label": each.label,
                    "color": each.color,
                    "faint": each.faint,
                    "x": [_short(v) for v in each.steps],
                    "y": [_short(v) for v in each.values],
                }
                for each in self.lines
            ],
        }


def progress_figures(runs: Sequence[ReportedRun]) -> list[Figure]:
    """Figures of validation scores."""
    losses = []
    for color, run in enumerate(runs):
        # Where a loss has parts, the one that all models have in common is next-token cross-entropy.
        curve = run.records.training.get("cross_entropy") or run.records.training.get("loss")
        if curve:
            losses += [
                line(run.label, color, curve, faint=True),
                line(run.label, color, smoothed(curve)),
            ]
    return _drawn(
        Figure(
            "Bits per byte",
            "On the held-out text, all domains together; lower is better. Independent of the tokenizer.",
            "bits per byte",
            _of_validations(runs, lambda row: row.get("bits_per_byte")),
        ),
        Figure(
            "Validation loss",
            "Next-token cross-entropy on the held-out text. Comparable between runs with the same tokenizer.",
            "nats per token",
            _of_validations(runs, lambda row: row.get("loss")),
        ),
        Figure(
            "Training loss",
            "Next-token cross-entropy on the batches: each logged step behind, its moving average before it.",
            "nats per token",
            tuple(losses),
        ),
    )


def course_figures(runs: Sequence[ReportedRun]) -> list[Figure]:
    """Figures of the training steps."""
    norms = _of(runs, "gradient_norm")
    return _drawn(
        Figure("Learning rate", "Scales that of every parameter group.", "rate", _of(runs, "learning_rate")),
        Figure(
            "Gradient norm",
            "Over all parameters, before clipping.",
            "norm",
            norms,
            logarithmic=all(min(each.values) > 0 for each in norms),  # zero has no logarithm
        ),
        Figure(
            "Throughput",
            "Of the logged steps.",
            "tokens per second",
            _of(runs, "tokens_per_second"),
            from_zero=True,
        ),
        *(_parts(run) for run in runs),
    )


def domain_figures(runs: Sequence[ReportedRun], domains: Sequence[str]) -> list[Figure]:
    """Bits per byte: a plot for each domain."""

    def of(domain: str) -> Callable[[Mapping[str, Any]], Any]:
        return lambda row: row.get("domains", {}).get(domain, {}).get("bits_per_byte")

    return _drawn(
        *(Figure(domain, "", "bits per byte", _of_validations(runs, of(domain))) for domain in domains)
    )


def denoising_figures(runs: Sequence[ReportedRun]) -> list[Figure]:
    """Error of a diffuser by noise level, and of each level over the run."""
    lines = []
    for color, run in enumerate(runs):
        best = run.records.best
        if best is not None and (errors := _by_level(best)):
            curve = Curve()
            for level, error in errors:
                curve.append(level, error)
            lines.append(line(run.label, color, curve))
    figures = [
        Figure(
            "Squared error by noise level",
            "Of the predicted clean target, at the best validation. About 1 is the error of "
            "predicting the mean; at the last level no trace of the target is left.",
            "mean squared error",
            tuple(lines),
            x="noise level",
        )
    ]
    for run in runs:
        levels: dict[int, Curve] = {}
        for row in run.records.validations:
            for level, error in _by_level(row):
                levels.setdefault(level, Curve()).append(row["step"], error)
        figures.append(
            Figure(
                f"Squared error over time: {run.label}",
                "A line for each noise level.",
                "mean squared error",
                tuple(line(f"level {level}", i, levels[level]) for i, level in enumerate(sorted(levels))),
            )
        )
    return _drawn(*figures)


def routing_figures(run: ReportedRun, colors: Sequence[int]) -> list[Figure]:
    """A combined model's weights over time: in training, and by domain on held-out text.

    ``colors`` are those of ``experts_of(run)``.
    """
    experts = experts_of(run)
    by_step = [
        line(name, color, smoothed(curve))
        for color, name in zip(colors, experts, strict=True)
        if (curve := run.records.training.get(WEIGHT_PART + name))
    ]
    figures = [
        Figure(
            "In training",
            "Mean weight of each expert over the batches, as a moving average.",
            "weight",
            tuple(by_step),
            from_zero=True,
        )
    ]
    for domain in sorted({d for row in run.records.validations for d in row.get("routing", {})}):
        curves: dict[str, Curve] = {}
        for row in run.records.validations:
            for name, weight in row.get("routing", {}).get(domain, {}).get("weights", {}).items():
                if (value := finite(weight)) is not None:
                    curves.setdefault(name, Curve()).append(row["step"], value)
        own = (
            line(name, color, curves[name])
            for color, name in zip(colors, experts, strict=True)
            if name in curves
        )
        figures.append(Figure(domain, "On held-out text.", "weight", tuple(own), from_zero=True))
    return _drawn(*figures)


def experts_of(run: ReportedRun) -> list[str]:
    """Experts that a run combines, in the order of its records; none for another kind."""
    for row in reversed(run.records.validations):
        for routing in row.get("routing", {}).values():
            return list(routing.get("weights", {}))
    return sorted(
        name.removeprefix(WEIGHT_PART) for name in run.records.training if name.startswith(WEIGHT_PART)
    )


def expert_colors(run: ReportedRun, runs: Sequence[ReportedRun]) -> list[int]:
    """Colours of the experts' own runs if all of them are on the page, else the first colours in order."""
    experts, labels = experts_of(run), [other.label for other in runs]
    own = [f"{name}_expert" for name in experts]
    if all(label in labels for label in own):
        return [labels.index(label) for label in own]
    return list(range(len(experts)))


def _parts(run: ReportedRun) -> Figure:
    """Parts of the training loss, where the records have them."""
    names = [
        name
        for name in run.records.training
        if name not in {"learning_rate", "gradient_norm", "tokens", "tokens_per_second"}
        and not name.startswith(WEIGHT_PART)
    ]
    names = ["loss", *sorted(set(names) - {"loss"})] if len(names) > 1 and "loss" in names else []
    lines = (
        line(name.replace("_", " "), i, smoothed(run.records.training[name])) for i, name in enumerate(names)
    )
    return Figure(
        f"Parts of the loss: {run.label}",
        "The training loss and its parts, as moving averages.",
        "per token",
        tuple(lines),
    )


def _drawn(*figures: Figure) -> list[Figure]:
    return [figure for figure in figures if figure.lines]


def _of(runs: Sequence[ReportedRun], name: str) -> tuple[Line, ...]:
    return tuple(
        line(run.label, color, run.records.training[name])
        for color, run in enumerate(runs)
        if name in run.records.training
    )


def _of_validations(
    runs: Sequence[ReportedRun], number: Callable[[Mapping[str, Any]], Any]
) -> tuple[Line, ...]:
    def curve(run: ReportedRun) -> Curve:
        found = Curve()
        for row in run.records.validations:
            if (value := finite(number(row))) is not None:
                found.append(row["step"], value)
        return found

    curves = [(color, run.label, curve(run)) for color, run in enumerate(runs)]
    return tuple(line(label, color, found) for color, label, found in curves if found)


def _by_level(row: Mapping[str, Any]) -> list[tuple[int, float]]:
    errors = row.get("denoising_mse", {})
    found = ((int(level), finite(error)) for level, error in errors.items())
    return sorted((level, error) for level, error in found if error is not None)


def _short(value: float) -> float:
    """Round to five digits: more than a plot can show, and a smaller page."""
    rounded = float(f"{value:.5g}") if abs(value) < 1e5 else round(value)
    return int(rounded) if rounded == int(rounded) else rounded


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
