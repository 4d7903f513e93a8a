"""Speed of 16-bit matrix products on this CPU, as a multiple of float32's: measured once, then kept.

No flag of a processor predicts it: of two with AVX512-BF16 and without AMX, one multiplied bfloat16 at 0.75
times the speed of float32, the other at 4 to 15 times (docs/decisions/0007). So both types take turns at the
products of a model's width, and the median of the ratios is kept in the user's cache folder:

    <user's cache>/nanothink/matmul/<hash>.json

under a name that covers everything the answer depends on: processor, torch, the shapes, and the variables
by which a user restricts the libraries below torch. It takes about half a second, once. Any of these files
can be deleted, and the next run measures again, as it does where one is damaged or no folder can be written
to.

The clock is the processor time of one thread, from which other programs take nothing away. The seconds of
several threads, which wait for one another, gave 0.6 on a busy machine where this gave 2.2.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanothink.config import ModelConfig, TrainConfig
from nanothink.disk import private_folder, write_whole
from nanothink.errors import StorageError
from nanothink.models.loss import linear_cross_entropy
from nanothink.models.native import processor
from nanothink.training.muon import NS_COEFFICIENTS, NS_STEPS, all_orthogonalised

_FORMAT = 2  # of the files, and of what is measured
_SECONDS, _FEWEST_ROUNDS, _MOST_ROUNDS = 0.25, 3, 15
_HOPELESS = 0.5  # a ratio after which one round is enough
_WIDEST, _WIDEST_IN_MUON, _MOST_ROWS = 512, 384, 512  # larger ones take long, and 16 bits only gain by them
_VOCABULARY, _LAYERS = 1024, 4

_RESTRICTIONS = ("ATEN_", "DNNL_", "MKL_", "ONEDNN_", "OPENBLAS_")
"""Beginnings of the variables that choose instructions in the libraries below torch."""


@dataclass(frozen=True)
class Speed:
    times: float
    """Speed as a multiple of float32's."""
    kept: Path | None
    """The file that keeps it; None where no folder can be written to."""


@dataclass(frozen=True)
class MatmulSpeed:
    """Speeds at the shapes of one model."""

    width: int
    rows: int
    """Tokens of a forward pass."""

    @classmethod
    def of(cls, train: TrainConfig, model: ModelConfig) -> MatmulSpeed:
        return cls(model.d_model, train.batch_size * model.max_seq_len)

    def of_step(self, dtype: torch.dtype) -> Speed:
        """Speed of linear layers forward and backward, and of the chunked loss.

        Raises RuntimeError when torch cannot multiply in this type.
        """
        width, rows = min(self.width, _WIDEST), 1 << (min(self.rows, _MOST_ROWS).bit_length() - 1)
        return _kept_or_measured("step", dtype, {"width": width, "rows": rows}, lambda: _step(width, rows))

    def of_muon(self, dtype: torch.dtype) -> Speed:
        """Speed of Muon's Newton-Schulz steps.

        Raises RuntimeError when torch cannot multiply in this type.
        """
        width = min(self.width, _WIDEST_IN_MUON)
        return _kept_or_measured("muon", dtype, {"width": width}, lambda: _muon(width))


Work = Callable[[torch.dtype], object]
"""Function that computes some products in one type."""


def ratio(work: Work, dtype: torch.dtype, clock: Callable[[], float] = time.thread_time) -> float:
    """Time of ``work`` in float32 over that in ``dtype``: the median of rounds in which they take turns."""
    for each in (torch.float32, dtype):
        work(each)  # the first product of a shape sets up its kernel
    found: list[float] = []
    begin = clock()
    while len(found) < _MOST_ROUNDS:
        times = [clock()]
        for each in (torch.float32, dtype):
            work(each)
            times.append(clock())
        found.append((times[1] - times[0]) / max(times[2] - times[1], 1e-9))
        enough = len(found) >= _FEWEST_ROUNDS or max(found) < _HOPELESS
        if enough and times[2] - begin >= _SECONDS:
            break
    return statistics.median(found)


def _step(width: int, rows: int) -> Work:
    leaves = [
        _waves(*shape) for shape in ((rows, width), (width, width), (width, width), (_VOCABULARY, width))
    ]
    x, first, second, head = (leaf.requires_grad_() for leaf in leaves)
    targets = torch.arange(rows) % _VOCABULARY

    def work(dtype: torch.dtype) -> None:
        with torch.enable_grad(), torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
            hidden = F.linear(F.linear(x, first), second).float()
            loss = linear_cross_entropy(hidden, head, targets, scale=1 / rows)
            torch.autograd.grad(loss, leaves)

    return work


def _muon(width: int) -> Work:
    matrices = _waves(width, width), _waves(width, 4 * width)

    def work(dtype: torch.dtype) -> None:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            for matrix in matrices:
                all_orthogonalised([matrix] * _LAYERS, NS_COEFFICIENTS, NS_STEPS, 1e-7, dtype)

    return work


def _waves(*shape: int) -> Tensor:
    """Numbers of size 1 / sqrt(last of the shape), not drawn: a run's random generators must not move."""
    numbers = torch.arange(1.0, 1 + math.prod(shape)).mul_(0.7).sin_()
    return numbers.div_(math.sqrt(shape[-1])).view(shape)


def _kept_or_measured(
    products: str, dtype: torch.dtype, shapes: dict[str, int], make: Callable[[], Work]
) -> Speed:
    key = {"format": _FORMAT, "products": products, "dtype": str(dtype), **shapes, **_surroundings()}
    digest = hashlib.blake2b(json.dumps(key, sort_keys=True).encode(), digest_size=12).hexdigest()
    if digest not in _KNOWN:
        folder = private_folder("nanothink", "matmul")
        path = folder / f"{digest}.json" if folder else None
        times = _read(path, key) if path else None
        if times is None:
            with _one_thread():
                times = ratio(make(), dtype)
            if path and not _keep(path, key, times):
                path = None
        _KNOWN[digest] = Speed(times, path)
    return _KNOWN[digest]


_KNOWN: dict[str, Speed] = {}
"""Speeds by digest: a process measures once, even if it cannot write the file."""


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _surroundings() -> dict[str, Any]:
    """Everything but the shapes that a speed depends on."""
    return {
        "processor": processor(),
        "torch": torch.__version__,
        "float32 products": torch.get_float32_matmul_precision(),
        "oneDNN": bool(torch.backends.mkldnn.enabled),
        "variables": {name: v for name, v in sorted(os.environ.items()) if name.startswith(_RESTRICTIONS)},
    }


def _read(path: Path, key: dict[str, Any]) -> float | None:
    with contextlib.suppress(OSError, ValueError, RecursionError):
        kept = json.loads(path.read_text("utf-8"))
        times = kept.get("times") if isinstance(kept, dict) and kept.get("key") == key else None
        if isinstance(times, float) and 0 < times < math.inf:
            return times
    return None


def _keep(path: Path, key: dict[str, Any], times: float) -> bool:
    with contextlib.suppress(StorageError):
        write_whole(path, json.dumps({"times": times, "key": key}, indent=1).encode())
        return True
    return False
