"""What the benchmarks share: sides that take turns, and the peak memory of a fresh process.

The sides take turns within one process, so that a slow moment of the machine hits all of them, and what is
quoted is the median of the ratios, round by round.
"""

from __future__ import annotations

import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping

import torch

Seconds = dict[str, list[float]]


def machine() -> str:
    """A line that a table of seconds needs beside it."""
    return f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def take_turns(
    sides: Mapping[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> Seconds:
    """Seconds a call, by side; one round more to warm up, which does not count."""
    seconds: Seconds = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, call in sides.items():
            start = clock()
            call()
            if number:
                seconds[name].append(clock() - start)
    return seconds


def ratios(seconds: Seconds, name: str, against: str) -> list[float]:
    """How many times as fast ``name`` was, round by round."""
    return [theirs / ours for ours, theirs in zip(seconds[name], seconds[against], strict=True)]


def rows(seconds: Seconds, against: str, *, tokens: int | None = None) -> str:
    """Rows of a markdown table: side, seconds (median, min, max), tokens/s, ratio (median, min, max)."""
    lines = []
    for name, values in seconds.items():
        median = statistics.median(values)
        cells = [name, f"{median:.4g}", f"{min(values):.4g}", f"{max(values):.4g}"]
        if tokens is not None:
            cells.append(f"{tokens / median:,.0f}")
        if name == against:
            cells += ["1", ""]
        else:
            found = ratios(seconds, name, against)
            cells += [f"**{statistics.median(found):.2f}**", f"{min(found):.2f} to {max(found):.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def last_number(*arguments: str) -> float:
    """What a fresh Python process prints last, such as the bytes of ``print_peak()``."""
    done = subprocess.run([sys.executable, *arguments], check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def print_peak() -> None:
    """The largest resident size of this process so far, in bytes."""
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
