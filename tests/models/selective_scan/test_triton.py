"""The Triton scan against the sequential reference in float64, and the rule that picks a scan on CUDA.

Without a CUDA device the kernels run in Triton's interpreter. Whether a function is interpreted is settled
when it is decorated, for Triton's own when Triton is imported; so the variable that asks for it is set here,
around that import, which must be the first in the process, and around each of these tests.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nanothink.errors import UsageError
from nanothink.models.selective_scan import ScanChoice, choose_scan, plain, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("u", "delta", "A", "B", "C", "D", "state")
TOLERANCE = 1e-4  # relative error in float32


def load() -> Any:
    """The module under test, or None without Triton."""
    if importlib.util.find_spec("triton") is None:
        return None
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE == "cpu":
            patch.setenv("TRITON_INTERPRET", "1")
        module = importlib.import_module("nanothink.models.selective_scan.triton")
    if DEVICE == "cpu":
        kinds = {type(f).__name__ for f in (module._forward_kernel, module.tl.sum)}
        assert kinds == {"InterpretedFunction"}, "triton was imported before, without its interpreter"
    return module


triton_scan = load()
needs_triton = pytest.mark.skipif(triton_scan is None, reason="the package triton is not installed")


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")


def inputs(batch: int, length: int, width: int, n_states: int, *, seed: int = 0) -> list[Tensor]:
    """u, delta, A, B, C, D, state as a model makes them, in float32."""
    torch.manual_seed(seed)
    u, steps = torch.randn(batch, length, width), torch.randn(batch, length, width)
    B, C = torch.randn(batch, length, n_states), torch.randn(batch, length, n_states)
    A = -torch.randn(width, n_states).exp()
    state = torch.randn(batch, n_states, width)
    return [u, torch.nn.functional.softplus(steps), A, B, C, torch.randn(width), state]


def results(
    scan: Callable[..., tuple[Tensor, Tensor]],
    tensors: list[Tensor],
    *,
    through_y: bool = True,
    through_last: bool = True,
) -> dict[str, Tensor]:
    """Outputs and the gradient of every input, for fixed gradients of y and of the last state."""
    leaves = [z.detach().requires_grad_() for z in tensors]
    y, last = scan(*leaves)
    generator = torch.Generator().manual_seed(1)
    grad_y, grad_last = (torch.randn(z.shape, generator=generator) for z in (y, last))
    loss = torch.zeros((), dtype=torch.float64, device=y.device)
    if through_y:
        loss = loss + (y.double() * grad_y.to(y.device).to(y.dtype)).sum()
    if through_last:
        loss = loss + (last.double() * grad_last.to(y.device)).sum()
    grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return {"y": y.detach(), "last": last.detach()} | dict(zip(NAMES, grads, strict=True))


def on_device(tensors: list[Tensor]) -> list[Tensor]:
    return [z.to(DEVICE) for z in tensors]


def error(got: Tensor, expected: Tensor) -> float:
    got, expected = got.double().cpu(), expected.double().cpu()
    assert got.isfinite().all()
    return float((got - expected).norm() / expected.norm().clamp_min(1e-30))


def assert_equal(
    got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float | dict[str, float] = TOLERANCE
) -> None:
    errors = {name: error(got[name], expected[name]) for name in got}
    limits = tolerance if isinstance(tolerance, dict) else dict.fromkeys(got, tolerance)
    assert all(errors[name] <= limits[name] for name in got), errors


def doubled(tensors: list[Tensor]) -> list[Tensor]:
    return [z.double().cpu() for z in tensors]


@needs_triton
@pytest.mark.parametrize(
    ("batch", "length", "width", "n_states"),
    [
        *[(1, 1, 1, 1), (1, 1, 3, 16), (2, 3, 19, 16), (1, 9, 37, 1), (2, 5, 33, 3)],
        *[(1, 67, 3, 2), (1, 64, 2, 5), (1, 4, 3, 70)],
    ],
)
def test_outputs_and_every_gradient(batch: int, length: int, width: int, n_states: int) -> None:
    tensors = inputs(batch, length, width, n_states)
    got = results(triton_scan.scan, on_device(tensors))
    assert got["y"].dtype == got["last"].dtype == torch.float32
    assert_equal(got, results(reference.scan, doubled(tensors)))


@needs_triton
def test_the_sizes_above_meet_every_edge() -> None:
    """T = 67 is more than a chunk and not whole groups; D = 37 and 19 are more than one block."""
    assert triton_scan.CHUNK < 67 < 2 * triton_scan.CHUNK
    assert 67 % triton_scan.GROUP != 0
    assert triton_scan.CHUNK % triton_scan.GROUP == 0
    for width, n_states in ((19, 16), (37, 1), (33, 3)):
        (n_programs,), options = triton_scan._launch(torch.empty(1, 1, width), torch.empty(n_states, width))
        assert n_programs == 2
        assert width % options["BLOCK_D"] != 0


@needs_triton
def test_without_a_state_it_starts_from_zero() -> None:
    *tensors, state = inputs(2, 3, 3, 2)
    y, last = triton_scan.scan(*on_device(tensors))
    expected = reference.scan(*doubled([*tensors, torch.zeros_like(state)]))
    assert error(y, expected[0]) < TOLERANCE
    assert error(last, expected[1]) < TOLERANCE


@needs_triton
def test_any_strides() -> None:
    tensors = inputs(2, 6, 5, 3)
    u, delta, A, B, C, D, state = tensors
    both = torch.cat([B, C], 2)  # as one projection makes them
    odd = [
        u.transpose(1, 2).contiguous().transpose(1, 2),
        delta.transpose(0, 1).contiguous().transpose(0, 1),
        A.t().contiguous().t(),
        both[..., :3],
        both[..., 3:],
        D.repeat_interleave(2)[::2],
        state.transpose(1, 2).contiguous().transpose(1, 2),
    ]
    assert not any(z.is_contiguous() for z in odd)
    assert_equal(results(triton_scan.scan, on_device(odd)), results(reference.scan, doubled(tensors)))


@needs_triton
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_inputs_of_16_bits(kind: torch.dtype) -> None:
    """Only what is stored in 16 bits is rounded: y and the gradients of 16-bit inputs; the state is not."""
    tensors = inputs(2, 9, 17, 16)
    half = [
        z.to(kind) if name in {"u", "delta", "B", "C"} else z for name, z in zip(NAMES, tensors, strict=True)
    ]
    got, expected = results(triton_scan.scan, on_device(half)), results(reference.scan, doubled(half))
    assert [got[name].dtype for name in ("y", "last", "u", "delta", "A", "B")] == [
        *(kind, torch.float32, kind, kind, torch.float32, kind)
    ]
    rounding = torch.finfo(kind).eps
    # The gradient that reaches the scan is rounded too, and A, D and the state receive theirs from it.
    assert error(got["last"], expected["last"]) < TOLERANCE
    assert_equal(got, expected, dict.fromkeys(got, rounding))


@needs_triton
def test_under_autocast_it_computes_in_float32() -> None:
    tensors = inputs(1, 6, 3, 3)
    with torch.autocast(DEVICE, torch.bfloat16):
        got = results(triton_scan.scan, on_device(tensors))
    assert_equal(got, results(reference.scan, doubled(tensors)))


@needs_triton
@pytest.mark.parametrize(
    ("step", "rate"), [(0.0, -1.0), (1e-6, -1.0), (50.0, -1e-3), (50.0, -1e3), (1e-6, -1e3)]
)
def test_extreme_steps_and_rates(step: float, rate: float) -> None:
    u, delta, A, B, C, D, state = inputs(1, 7, 3, 4)
    tensors = [u, torch.full_like(delta, step), torch.full_like(A, rate), B, C, D, state]
    tensors[1][:, 2] = 0.3  # an ordinary step among them
    got, expected = results(triton_scan.scan, on_device(tensors)), results(reference.scan, doubled(tensors))
    assert_equal(got, expected)


@needs_triton
def test_pieces_give_the_whole() -> None:
    tensors = inputs(2, 11, 3, 4)

    def in_pieces(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor) -> Any:
        ys = []
        for time in (slice(0, 1), slice(1, 6), slice(6, 11)):
            y, state = triton_scan.scan(u[:, time], delta[:, time], A, B[:, time], C[:, time], D, state)
            ys.append(y)
        return torch.cat(ys, 1), state

    got = results(in_pieces, on_device(tensors))
    assert_equal(got, results(triton_scan.scan, on_device(tensors)))
    assert_equal(got, results(reference.scan, doubled(tensors)))


@needs_triton
@pytest.mark.parametrize("output", ["y", "last"])
def test_gradients_through_one_output_alone(output: str) -> None:
    tensors = inputs(2, 5, 3, 2)
    way = {"through_y": output == "y", "through_last": output == "last"}
    got = results(triton_scan.scan, on_device(tensors), **way)
    assert_equal(got, results(reference.scan, doubled(tensors), **way))


@needs_triton
def test_equal_inputs_give_equal_bits() -> None:
    tensors = on_device(inputs(2, 5, 18, 16))
    first, second = (results(triton_scan.scan, tensors) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@needs_triton
def test_nothing_is_written_beside_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every buffer gets a fence before and behind it; T, D and N fill neither group nor block nor tile."""
    width_of_fence, mark = 4096, -7.0
    buffers: list[Tensor] = []
    full, new_empty = torch.full, torch.Tensor.new_empty

    def fenced(*shape: Any, dtype: torch.dtype | None = None, device: Any = None) -> Tensor:
        size = torch.Size(shape[0] if isinstance(shape[0], (tuple, torch.Size)) else shape)
        buffer = full((size.numel() + 2 * width_of_fence,), mark, dtype=dtype or torch.float32, device=DEVICE)
        buffers.append(buffer)
        return buffer[width_of_fence:-width_of_fence].view(size)

    def new_fenced(z: Tensor, *shape: Any, **options: Any) -> Tensor:
        return (
            new_empty(z, *shape, **options) if options else fenced(*shape, dtype=z.dtype)
        )  # the interpreter's

    tensors = on_device(inputs(2, 5, 19, 3))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", fenced)
        patch.setattr(torch, "empty_like", lambda z: fenced(z.shape, dtype=z.dtype))
        patch.setattr(torch.Tensor, "new_empty", new_fenced)
        y, last = triton_scan.scan(*(z.requires_grad_() for z in tensors))
        node = y.grad_fn
        triton_scan._TritonScan.backward(node, torch.ones_like(y), torch.ones_like(last))
    assert len(buffers) == 3 + 8  # y, last, starts; all but the states of the backward pass
    for buffer in buffers:
        assert (buffer[:width_of_fence] == mark).all()
        assert (buffer[-width_of_fence:] == mark).all()


_COMPILE = """
import itertools, subprocess, sys, torch, triton
from nanothink.models.selective_scan import triton as scan

path, *cases = sys.argv[1:]
options = scan._launch(torch.empty(1, 1, 64), torch.empty(16, 64))[1]
build = {name: options.pop(name) for name in ("num_warps", "enable_fp_fusion")}
for case, kernel in itertools.product(cases, (scan._forward_kernel, scan._backward_kernel)):
    inputs, sizes = case.split()
    constants = {k: v for k, v in (options | {"KEEP": True}).items() if k in kernel.arg_names}
    first_size = kernel.arg_names.index("batch")
    types, hints = {}, {}
    for i, name in enumerate(kernel.arg_names):
        wide = name in {"rates", "skip", "state", "last", "starts", "inner", "grad_last", "grad_state"}
        wide = wide or name in {"grad_A", "grad_B", "grad_C", "grad_D"}
        kind = "i32" if i >= first_size else "*fp32" if wide else "*" + inputs
        types[name] = "constexpr" if name in constants else kind
        if sizes == "ones" and i >= first_size and name not in [*kernel.do_not_specialize, *constants]:
            types[name], constants[name] = "constexpr", 1  # as a launch with that argument 1 does
        elif name not in constants and name not in kernel.do_not_specialize:
            hints[(i,)] = [["tt.divisibility", 16]]
    source = triton.compiler.ASTSource(kernel, types, constexprs=constants, attrs=hints)
    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    built = triton.compile(source, target=target, options=build)
    with open(path, "wb") as file:
        file.write(built.asm["cubin"])
    dump = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", path]
    print(subprocess.run(dump, capture_output=True, text=True, check=True).stdout)
"""


@needs_triton
def test_the_kernels_compile_for_a_card_and_spill_nothing(tmp_path: Path) -> None:
    """Needs no card, and sees what the interpreter lets pass, such as a method of a constant."""
    child = os.environ | {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", _COMPILE, str(tmp_path / "kernel.cubin"), "fp32 ones", "bf16 any"]
    run = subprocess.run(command, env=child, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert re.findall(r"STACK:(\d+)", run.stdout) == ["0"] * 4, run.stdout


@needs_triton
def test_float64_takes_the_plain_path() -> None:
    tensors = doubled(inputs(1, 3, 2, 2))
    got, expected = results(triton_scan.scan, tensors), results(plain.scan, tensors)
    assert all(torch.equal(got[name], expected[name]) for name in got)
    assert got["last"].dtype == torch.float64


@needs_triton
def test_only_a_run_that_trains_keeps_states(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = on_device(inputs(1, 3, 2, 2))
    leaves = [z.requires_grad_() for z in tensors]
    y, _ = triton_scan.scan(*leaves)
    starts = y.grad_fn.saved_tensors[-1]
    assert starts.shape == (1, 1, 2, 2)  # one chunk
    shapes, new_empty = [], torch.Tensor.new_empty

    def noted(z: Tensor, *shape: Any, **options: Any) -> Tensor:
        shapes.append(shape)
        return new_empty(z, *shape, **options)

    monkeypatch.setattr(torch.Tensor, "new_empty", noted)
    with torch.no_grad():
        triton_scan.scan(*leaves)
    assert shapes[0] == (1, 0, 2, 2)


# ---------------------------------------------------------------------------------------------------
# The rule


@needs_triton
def test_on_cuda_it_is_triton() -> None:
    assert choose_scan("cuda") == ScanChoice("triton", "the fastest on cuda")


def test_without_triton_cuda_gets_the_plain_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    choose_scan.cache_clear()
    try:
        choice = ScanChoice("plain", "no triton scan: the package triton is not installed")
        assert choose_scan("cuda") == choice
        with pytest.raises(UsageError, match="not available here: the package triton"):
            choose_scan("cuda", "triton")
    finally:
        choose_scan.cache_clear()


def test_triton_is_refused_on_a_cpu() -> None:
    assert choose_scan("cpu").name in {"compiled", "plain"}
    with pytest.raises(UsageError, match="it is for CUDA, and this runs on cpu"):
        choose_scan("cpu", "triton")
