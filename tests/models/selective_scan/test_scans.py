"""Every way to run the scan against the definition in float64: outputs, gradients, odd inputs; the rule."""

from __future__ import annotations

import math
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from forking_shell import ForkingShell
from torch import Tensor

from nanothink.errors import UsageError
from nanothink.models.selective_scan import choose_scan, compiled, plain, reference, selective_scan

NAMES = ("u", "delta", "A", "B", "C", "D", "state")
SHAPES = [  # batch, T, D, N
    (2, 75, 40, 16),  # no chunk divides it
    (1, 1, 5, 3),
    (3, 64, 24, 16),
    (1, 33, 131, 1),  # more channels than one unit of work, and no vector divides them
    (2, 16, 128, 5),
    (4, 130, 16, 16),
]

needs_compiler = pytest.mark.skipif(bool(compiled.unavailable()), reason=compiled.unavailable() or "-")
SCANS = [
    pytest.param(plain.scan, id="plain"),
    pytest.param(compiled.scan, id="compiled", marks=needs_compiler),
]
Scan = Callable[..., tuple[Tensor, Tensor]]


def inputs(
    batch: int, length: int, width: int, n_states: int, seed: int = 0, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """u, delta, A, B, C, D, state as a trained layer would have them."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    delta = torch.nn.functional.softplus(normal(batch, length, width) - 2)
    A = -torch.arange(1.0, n_states + 1).repeat(width, 1) * (0.3 * normal(width, n_states)).exp()
    B, C = normal(batch, length, n_states), normal(batch, length, n_states)
    made = [normal(batch, length, width), delta, A, B, C, normal(width), normal(batch, n_states, width)]
    return [z.to(dtype) for z in made]


def outputs_and_gradients(scan: Scan, values: list[Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """y, last, and the gradients of a random weighting of both by every input."""
    leaves = [z.detach().to(dtype).requires_grad_() for z in values]
    y, last = scan(*leaves)
    g = torch.Generator().manual_seed(99)
    weights = [torch.randn(z.shape, generator=g).to(z.dtype) for z in (y, last)]
    torch.autograd.backward([y, last], weights)
    gradients = {f"gradient of {n}": z.grad for n, z in zip(NAMES, leaves, strict=True) if z.grad is not None}
    return {"y": y.detach(), "last": last.detach(), **gradients}


def assert_as_reference(scan: Scan, values: list[Tensor], tolerance: float = 1e-5) -> None:
    found = outputs_and_gradients(scan, values, torch.float32)
    expected = outputs_and_gradients(reference.scan, values, torch.float64)
    assert found.keys() == expected.keys()
    assert len(found) == 9
    for name, value in expected.items():
        error = float((found[name].double() - value).norm() / value.norm().clamp_min(1e-30))
        assert error < tolerance, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_outputs_and_all_gradients_equal_the_definition(scan: Scan, shape: tuple[int, int, int, int]) -> None:
    assert_as_reference(scan, inputs(*shape))


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize(
    ("delta", "rate"), [(0.0, 1.0), (1e-6, 1e-3), (50.0, 1.0), (1e-3, 1e4), (20.0, 1e4), (1e3, 1e-6)]
)
def test_extreme_steps_and_rates(scan: Scan, delta: float, rate: float) -> None:
    """From a memory that never fades to one that is gone at once, also where exp leaves float32's range."""
    u, steps, A, *rest = inputs(2, 50, 24, 16)
    assert_as_reference(scan, [u, torch.full_like(steps, delta), A * rate, *rest])
    mixed = torch.where(torch.arange(50)[:, None] % 3 == 0, delta, steps)
    assert_as_reference(scan, [u, mixed, A * rate, *rest])


# The largest rate: times log2 e, as the scans keep it, it is still a float32.
SIZES = (0.0, 1e-38, 1e-20, 1e-6, 1.0, 1e6, 1e20, 2e38)


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("delta", SIZES)
@pytest.mark.parametrize("rate", SIZES)
def test_at_any_size_the_result_is_right_or_visibly_wrong(scan: Scan, delta: float, rate: float) -> None:
    """Steps and rates from nothing to the end of float32's range: never a finite number that is not so."""
    u, steps, A, *rest = inputs(1, 40, 16, 4)
    values = [u, torch.full_like(steps, delta), A.sign() * rate, *rest]
    found = outputs_and_gradients(scan, values, torch.float32)
    expected = outputs_and_gradients(reference.scan, values, torch.float64)
    largest = torch.finfo(torch.float32).max
    for name in ("y", "last"):
        for value, true in zip(
            found[name].flatten().tolist(), expected[name].flatten().tolist(), strict=True
        ):
            assert not math.isfinite(value) or value == pytest.approx(true, rel=1e-3, abs=1e-4), name
    if all(bool((value.abs() < largest / 1e6).all()) for value in expected.values()):
        for name, value in expected.items():  # nothing near the end of the range, so nothing may be lost
            if math.isfinite(delta * rate) and delta * rate < 1e30:
                error = float((found[name].double() - value).norm() / value.norm().clamp_min(1e-30))
                assert error < 1e-4, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("scan", SCANS)
def test_a_rate_above_zero_overflows_as_the_definition_does(scan: Scan) -> None:
    u, delta, A, *rest = inputs(1, 8, 16, 4)
    y, _ = scan(u, delta * 0 + 30, A * 0 + 10, *rest)
    expected, _ = reference.scan(u, delta * 0 + 30, A * 0 + 10, *rest)
    assert torch.equal(y.isfinite(), expected.isfinite())
    assert not y.isfinite().all()


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize(
    ("name", "value"), [(n, v) for n in NAMES for v in (float("nan"), float("inf"), -float("inf"))]
)
def test_what_is_not_finite_comes_out_not_finite(scan: Scan, name: str, value: float) -> None:
    """A number gone wrong must reach the loss, where the loop sees it, and never be clamped away."""
    values = dict(zip(NAMES, inputs(1, 40, 24, 16), strict=True))
    if name == "A":
        values["delta"][:, 5] = 0.0  # a rate of minus infinity is only wrong where the step is zero
    values[name].view(-1)[3] = value
    y, last = scan(*values.values())
    assert not (y.isfinite().all() and last.isfinite().all())


@pytest.mark.parametrize("scan", SCANS)
def test_strides_do_not_matter(scan: Scan) -> None:
    values = inputs(2, 37, 24, 16)
    expected, expected_last = scan(*values)

    def strided(z: Tensor) -> Tensor:
        wide = torch.stack([z, z + 1], -1).transpose(0, -2) if z.ndim > 1 else torch.stack([z, z + 1], -1)
        odd = wide[..., 0].transpose(0, -1) if z.ndim > 1 else wide[..., 0]
        assert torch.equal(odd, z)
        assert not odd.is_contiguous()
        return odd

    y, last = scan(*map(strided, values))
    assert torch.equal(y, expected)
    assert torch.equal(last, expected_last)
    expanded = values[1][:, :1].expand(-1, 37, -1)  # strides of zero
    assert torch.equal(
        scan(values[0], expanded, *values[2:])[0], scan(values[0], expanded.clone(), *values[2:])[0]
    )


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_are_computed_with_in_float32(scan: Scan, dtype: torch.dtype) -> None:
    """As autocast produces them: some inputs narrow, some not; also with autocast on while it runs."""
    u, delta, A, B, C, D, state = inputs(2, 50, 24, 16)
    u, B, C = (z.to(dtype).requires_grad_() for z in (u, B, C))
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y, last = scan(u, delta, A, B, C, D, state)
            y.float().sum().backward()
        assert y.dtype == dtype
        assert last.dtype == torch.float32
        expected, expected_last = reference.scan(*(z.double() for z in (u, delta, A, B, C, D, state)))
        torch.testing.assert_close(last.double(), expected_last, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(y.double(), expected, rtol=1e-2, atol=1e-2)
        assert u.grad is not None
        assert u.grad.dtype == dtype


@pytest.mark.parametrize("scan", SCANS)
def test_pieces_give_what_the_whole_gives_gradients_included(scan: Scan) -> None:
    values = inputs(2, 70, 24, 16)

    def in_pieces(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor):
        ys = []
        for part in (slice(0, 1), slice(1, 34), slice(34, 70)):
            y, state = scan(u[:, part], delta[:, part], A, B[:, part], C[:, part], D, state)
            ys.append(y)
        return torch.cat(ys, 1), state

    assert_as_reference(in_pieces, values)


@pytest.mark.parametrize("scan", SCANS)
def test_no_state_is_a_state_of_zeros(scan: Scan) -> None:
    *values, state = inputs(2, 20, 24, 16)
    y, last = scan(*values)
    expected, expected_last = scan(*values, torch.zeros_like(state))
    assert torch.equal(y, expected)
    assert torch.equal(last, expected_last)


@pytest.mark.parametrize("scan", SCANS)
def test_later_steps_change_nothing_before_them(scan: Scan) -> None:
    values = inputs(2, 70, 24, 16)
    other = inputs(2, 70, 24, 16, seed=1)
    y, _ = scan(*values)
    for t in (0, 15, 31, 32, 68):
        changed = [z.clone() for z in values]
        for i in (0, 1, 3, 4):
            changed[i][:, t + 1 :] = other[i][:, t + 1 :]
        found, _ = scan(*changed)
        assert torch.equal(found[:, : t + 1], y[:, : t + 1])
        assert not torch.equal(found[:, t + 1 :], y[:, t + 1 :])


@pytest.mark.parametrize("scan", SCANS)
def test_the_number_of_threads_does_not_change_a_bit(scan: Scan) -> None:
    values = inputs(3, 200, 300, 16)
    before = torch.get_num_threads()
    found = []
    try:
        for n_threads in (1, 2, 5):
            torch.set_num_threads(n_threads)
            found.append(outputs_and_gradients(scan, values, torch.float32))
    finally:
        torch.set_num_threads(before)
    for name, value in found[0].items():
        if scan is compiled.scan or not name.startswith("gradient"):
            assert torch.equal(value, found[1][name]), name
            assert torch.equal(value, found[2][name]), name


def test_the_plain_scan_in_float64_passes_the_numerical_check() -> None:
    values = [z.double().requires_grad_() for z in inputs(2, 35, 3, 2)]
    assert torch.autograd.gradcheck(plain.scan, values, fast_mode=True)


@needs_compiler
def test_float64_goes_to_the_plain_scan() -> None:
    values = inputs(1, 20, 8, 4, dtype=torch.float64)
    y, last = compiled.scan(*values)
    assert y.dtype == last.dtype == torch.float64
    assert torch.equal(y, plain.scan(*values)[0])


@needs_compiler
def test_without_gradients_nothing_is_kept() -> None:
    values = inputs(1, 20, 8, 4)
    y, _ = compiled.scan(*values)
    assert y.grad_fn is None
    with torch.no_grad():
        y, _ = compiled.scan(*(z.requires_grad_() for z in values))
    assert y.grad_fn is None


@needs_compiler
def test_another_device_is_refused_before_its_memory_is_touched() -> None:
    values = [z.to("meta") for z in inputs(1, 4, 8, 4)]
    with pytest.raises(ValueError, match="runs on a CPU, but u is on meta"):
        compiled.scan(*values)


# ---------------------------------------------------------------------------------------------------
# The rule, and the library behind the compiled scan


def test_the_rule() -> None:
    choice = choose_scan("cpu")
    assert choice.name == ("plain" if compiled.unavailable() else "compiled")
    assert choice.reason
    assert choose_scan("mps").name == "plain"
    assert choose_scan("cpu", "plain").name == "plain"
    with pytest.raises(
        UsageError, match=r"state_space\.scan=compiled .* for CPUs.* --set state_space\.scan=auto"
    ):
        choose_scan("cuda", "compiled")
    with pytest.raises(UsageError, match="for CUDA"):
        choose_scan("cpu", "triton")


def test_by_name_or_by_the_rule_it_is_the_same_scan() -> None:
    values = inputs(2, 20, 24, 16)
    chosen = choose_scan("cpu").name
    assert torch.equal(selective_scan(*values)[0], selective_scan(*values, name=chosen)[0])
    assert torch.equal(selective_scan(*values, name="plain")[0], plain.scan(*values)[0])


Ask = Callable[..., str]


@pytest.fixture
def ask(tmp_path: Path, shell: ForkingShell) -> Ask:
    """Run code in a process and with a cache folder of its own, and give what it prints."""

    def call(code: str, **environment: str) -> str:
        beginning = "from nanothink.models.selective_scan import choose_scan, compiled\n"
        done = shell.python(beginning + code, tmp_path, XDG_CACHE_HOME=str(tmp_path), **environment)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return call


LIBRARY = "nanothink/compiled/scan-*.so"


@needs_compiler
def test_the_library_is_built_once_and_again_when_damaged(ask: Ask, tmp_path: Path) -> None:
    assert ask("print(choose_scan('cpu').name)") == "compiled"
    (library,) = tmp_path.glob(LIBRARY)
    assert [p.name for p in library.parent.iterdir() if p.name != library.name] == []
    built = library.stat().st_mtime_ns
    assert ask("print(choose_scan('cpu').name)") == "compiled"
    assert library.stat().st_mtime_ns == built
    library.write_bytes(library.read_bytes()[:100])
    assert ask("print(choose_scan('cpu').name)") == "compiled"
    assert library.stat().st_size > 1000


@needs_compiler
def test_a_folder_that_others_can_write_to_is_not_used(ask: Ask, tmp_path: Path) -> None:
    folder = tmp_path / "nanothink" / "compiled"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    ask("print(choose_scan('cpu').name)", TMPDIR=str(tmp_path / "nowhere"))
    assert list(folder.iterdir()) == []
    assert stat.S_IMODE(folder.stat().st_mode) == 0o777


def test_without_a_compiler_the_plain_scan_runs_and_says_why(ask: Ask, tmp_path: Path) -> None:
    said = ask("print(*vars(choose_scan('cpu')).values(), sep=': ')", PATH=str(tmp_path))
    assert said == "plain: no compiled scan: no C++ compiler found (g++, c++ or clang++)"


def test_a_compiler_that_fails_is_quoted(ask: Ask, tmp_path: Path) -> None:
    broken = tmp_path / "g++"
    broken.write_text(
        "#!/bin/sh\ncat > /dev/null\n[ $1 = --version ] || { echo 'no room at all' >&2; exit 1; }\n"
    )
    broken.chmod(0o755)
    said = ask("print(choose_scan('cpu').reason)", PATH=f"{tmp_path}:/bin:/usr/bin")
    assert said == f"no compiled scan: {broken} could not build it: no room at all"


def test_a_library_that_computes_something_else_is_refused(ask: Ask, tmp_path: Path) -> None:
    wrong = tmp_path / "g++"
    real = shutil.which("g++")
    if real is None:
        pytest.skip("no g++ here")
    wrong.write_text(
        f"#!/bin/sh\nif [ $1 = --version ]; then exit 0; fi\nsed 's/skip \\* ut/ut/' | {real} \"$@\"\n"
    )
    wrong.chmod(0o755)
    said = ask("print(choose_scan('cpu').reason)", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert said.startswith("no compiled scan: its results are wrong here")


def test_choosing_leaves_the_random_numbers_of_a_run_alone(ask: Ask, tmp_path: Path) -> None:
    code = (
        "import torch; before = torch.get_rng_state(); choose_scan('cpu');"
        "print(torch.equal(before, torch.get_rng_state()))"
    )
    assert ask(code) == "True"
