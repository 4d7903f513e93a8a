"""Memory that a training step gives back stays with the process for the next step, under glibc.

malloc returns a block of 32 MB or more to the system at once, and the next step gets it back in pages of 4 KB
that the system has to clear: gradients, logits and activations, 0.5 GB and 7 % of a step of the default
transformer.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # malloc.h
_USUAL = {_MMAP_MAX: 65536, _MMAP_THRESHOLD: 32 << 20, _TRIM_THRESHOLD: 64 << 20}
"""Where glibc's own thresholds come to rest in a process with large blocks."""


@contextmanager
def kept_memory() -> Iterator[None]:
    """Within the block freed memory is kept; after it, it is given back. Nothing happens where malloc is told
    otherwise by the environment, or is not glibc's."""
    libc = ctypes.CDLL(None) if os.name == "posix" else None
    told = any(name.startswith("MALLOC_") for name in os.environ) or "GLIBC_TUNABLES" in os.environ
    if told or not hasattr(libc, "mallopt") or not hasattr(libc, "malloc_trim"):
        yield
        return
    assert libc is not None
    libc.mallopt(_MMAP_MAX, 0)
    libc.mallopt(_TRIM_THRESHOLD, (1 << 31) - 1)
    try:
        yield
    finally:
        for name, value in _USUAL.items():
            libc.mallopt(name, value)
        libc.malloc_trim(0)
