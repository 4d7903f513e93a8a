"""Counts, durations and lists as messages say them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import TypeAdapter


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


def fault(of: TypeAdapter[Any], value: object) -> str | None:
    """Describe the first entry of a value that is missing or not of its type; None if there is none."""
    from pydantic import ValidationError

    try:
        of.validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        return (f"its entry '{where}'" if where else "it") + f" makes no sense ({first['msg']})"
    return None
