"""Counts, durations and lists as messages say them."""

from __future__ import annotations

from collections.abc import Sequence


def counted(number: float, noun: str) -> str:
    """Format a count with its noun: ``1 record``, ``2,844 records``."""
    return f"{number:,.0f} {noun}" + ("" if number == 1 else "s")


def rounded_duration(seconds: float) -> str:
    """A duration to one or two digits, as an estimate is said: 40 s, 12 min, 1.5 h, 3 days."""
    whole = max(1, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{round(whole / 60)} min"
    return f"{whole / 3600:.1f} h" if whole < 2 * 86_400 else f"{round(whole / 86_400)} days"


def some_of(names: Sequence[str], at_most: int) -> str:
    """List the first names of many: ``a.pt, b.pt and 8 more``."""
    rest = len(names) - at_most
    return ", ".join(names[:at_most]) + (f" and {rest:,} more" if rest > 0 else "")
