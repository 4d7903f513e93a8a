"""Memory that a training step gives back: kept within the block, given back after it."""

from __future__ import annotations

import platform
import resource
import subprocess
import sys

import pytest

PROGRAM = """
import resource
SIZE = 36_000_000
from nanothink.training.kept_memory import kept_memory

def faults(times):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        b"x" * SIZE
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

with kept_memory():
    faults(3)
    print(faults(5), resident())
print(faults(5), resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc is not glibc's")
@pytest.mark.parametrize("told", [False, True])
def test_freed_memory_is_kept_for_the_next_step_and_given_back_at_the_end(told: bool) -> None:
    environment = {"MALLOC_ARENA_MAX": "2"} if told else {}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, check=True, env=environment)
    within, held, after, left = map(int, done.stdout.split())
    pages = 36_000_000 // resource.getpagesize()
    assert after > 4 * pages
    if told:
        assert within > 4 * pages
    else:
        assert within < pages
        assert held - left > 30 << 20
