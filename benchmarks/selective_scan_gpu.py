"""The selective scan on a CUDA device: Triton's kernel against plain PyTorch and torch.compile.

Every side is first compared with the sequential reference in float64, outputs and gradients, and then
measured in turns, forward alone and forward with backward: the median of several rounds. A ratio is the
time of a side over that of Triton's kernel on the same line, so above 1 is slower than ours.

torch.compile unrolls the loop over time, one operation a step, and is measured up to --compiled-steps only.

    python benchmarks/selective_scan_gpu.py
    python benchmarks/selective_scan_gpu.py --rounds 50 --sides triton plain

Needs CUDA, and exits with 2 where there is none. ``--device cpu`` runs the kernel in Triton's interpreter,
which shows that all of this works and says nothing about speed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from side_by_side import machine
from torch import Tensor

from nanothink.models.selective_scan import Scan, implementation, plain, reference, unavailable

SIZES = ((32, 512, 768, 16), (8, 2048, 1536, 16), (1, 16384, 1536, 16))  # batch, T, D, N
CHECKED = (2, 150, 40, 16)
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 1e-2}  # relative error; bfloat16 has 8 bits
SIDES = ("triton", "compile", "plain")
WAYS = {"forward": False, "forward + backward": True}


def sides(names: list[str]) -> dict[str, Scan]:
    """Those of the named implementations that run here."""
    found: dict[str, Scan] = {}
    for name in names:
        if name == "compile":
            found[name] = torch.compile(plain.scan)
        elif name == "plain":
            found[name] = plain.scan
        elif why_not := unavailable("triton", "cuda"):
            print(f"{name} is left out: {why_not}", file=sys.stderr)
        else:
            found[name] = implementation("triton")
    return found


def inputs(size: Sequence[int], dtype: torch.dtype, device: str) -> list[Tensor]:
    """u, delta, A, B, C, D; those that depend on time in ``dtype``."""
    batch, length, width, n_states = size
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, generator=generator)

    u, B, C = normal(batch, length, width), normal(batch, length, n_states), normal(batch, length, n_states)
    delta = torch.nn.functional.softplus(normal(batch, length, width) - 4)
    A = -torch.arange(1.0, n_states + 1, device=device).repeat(width, 1)
    tensors = [u.to(dtype), delta.to(dtype), A, B.to(dtype), C.to(dtype), normal(width)]
    return [z.requires_grad_() for z in tensors]


def results(scan: Scan, tensors: list[Tensor]) -> list[Tensor]:
    """y, and the gradients of the inputs for a gradient of y that is not constant."""
    y, _ = scan(*tensors, None)  # type: ignore[call-arg]
    weights = torch.linspace(-1, 1, y.numel(), device=y.device, dtype=torch.float64).view_as(y)
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), tensors)]


def check(found: Mapping[str, Scan], size: Sequence[int], dtype: torch.dtype, device: str) -> None:
    """Compare every side with the reference; print the largest relative error of each."""
    tensors = inputs(size, dtype, device)
    expected = results(reference.scan, [z.detach().double().requires_grad_() for z in tensors])
    for name, scan in found.items():
        pairs = zip(results(scan, tensors), expected, strict=True)
        error = max(float((got.double() - right).norm() / right.norm()) for got, right in pairs)
        print(f"{name}, {dtype}: largest relative error {error:.1e}", file=sys.stderr)
        if not error < LIMITS[dtype]:
            raise SystemExit(f"{name} is wrong: relative error {error:.1e} is above {LIMITS[dtype]:.0e}")


def call(scan: Scan, tensors: list[Tensor], backward: bool) -> Callable[[], None]:
    grad = torch.ones_like(tensors[0])

    def run() -> None:
        with torch.set_grad_enabled(backward):
            y, _ = scan(*tensors, None)  # type: ignore[call-arg]
            if backward:
                torch.autograd.grad(y, tensors, grad)

    return run


def once(call: Callable[[], None], device: str) -> float:
    """Milliseconds of a call, on a GPU by the device's own clock."""
    if device == "cpu":
        begun = time.perf_counter()
        call()
        return 1000 * (time.perf_counter() - begun)
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop))


def milliseconds(calls: Mapping[str, Callable[[], None]], rounds: int, device: str) -> dict[str, float]:
    """Median time of each call, the calls taking turns."""
    for one in calls.values():
        one(), one()  # the first compiles
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, one in calls.items():
            times[name].append(once(one, device))
    return {name: statistics.median(values) for name, values in times.items()}


def cell(times: Mapping[str, float], name: str) -> str:
    if name not in times:
        return "–"
    own = times.get("triton")
    ratio = f" ({times[name] / own:.2f}×)" if own and name != "triton" else ""
    return f"{times[name]:.3f}{ratio}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--compiled-steps", type=int, default=512, help="longest T for torch.compile")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--size", type=int, nargs=4, metavar=("B", "T", "D", "N"), help="one, not all three")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: Triton's interpreter")
    options = parser.parse_args()
    if options.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # Triton looks at it when it is imported, which comes later
    elif not torch.cuda.is_available():
        print("this benchmark needs a CUDA device, and torch finds none here", file=sys.stderr)
        return 2
    found = sides(options.sides)
    checked = [min(pair) for pair in zip(CHECKED, options.size or CHECKED, strict=True)]
    for dtype in LIMITS:
        check(found, checked, dtype, options.device)
    print(f"{machine(options.device)}, median of {options.rounds} rounds, ms")
    print()
    print("| batch, T, D, N | inputs | pass | " + " | ".join(found) + " |")
    print("|---" * (3 + len(found)) + "|")
    for size in [options.size] if options.size else SIZES:
        for dtype in LIMITS:
            tensors = inputs(size, dtype, options.device)
            for way, backward in WAYS.items():
                calls = {
                    name: call(scan, tensors, backward)
                    for name, scan in found.items()
                    if name != "compile" or size[1] <= options.compiled_steps
                }
                times = milliseconds(calls, options.rounds, options.device)
                cells = [cell(times, name) for name in found]
                first = [", ".join(map(str, size)), str(dtype).removeprefix("torch."), way]
                print(f"| {' | '.join([*first, *cells])} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
