"""The chunked loss against the plain one in float64: values, every gradient, and what it never holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nanothink.data.tokens import IGNORE
from nanothink.models import loss as loss_module
from nanothink.models.loss import linear_cross_entropy, linear_log_likelihood

WIDTH, VOCAB = 24, 101


def problem(n: int, *, ignored: int = 0, size: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = (size * torch.randn(n, WIDTH, generator=generator)).requires_grad_()
    weight = torch.randn(VOCAB, WIDTH, generator=generator).requires_grad_()
    targets = torch.randint(VOCAB, (n,), generator=generator)
    targets[torch.randperm(n, generator=generator)[:ignored]] = IGNORE
    return hidden, weight, targets


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Per-row nats in float64, on copies that can collect gradients."""
    hidden, weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    nats = F.cross_entropy(hidden @ weight.t(), targets, reduction="none", ignore_index=IGNORE)
    return nats, hidden, weight


def assert_close(actual: Tensor | None, expected: Tensor | None, tolerance: float = 2e-5) -> None:
    assert actual is not None
    assert expected is not None
    reach = float(expected.abs().max()) if expected.numel() else 1.0
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance * max(reach, 1e-30))


@pytest.mark.parametrize("n", [1, 7, 64, 65, 127])
@pytest.mark.parametrize("ignored", [0, 1])
@pytest.mark.parametrize("chunk_rows", [1, 64, 512])
def test_cross_entropy_equals_plain_float64(n: int, ignored: int, chunk_rows: int) -> None:
    hidden, weight, targets = problem(n, ignored=ignored)
    nats, reference_hidden, reference_weight = plain(hidden, weight, targets)
    (nats.sum() * 0.37).backward()
    loss = linear_cross_entropy(hidden, weight, targets, scale=0.37, chunk_rows=chunk_rows)
    loss.backward()
    assert loss.dtype == torch.float32
    assert_close(loss.detach(), nats.detach().sum() * 0.37)
    assert_close(hidden.grad, reference_hidden.grad)
    assert_close(weight.grad, reference_weight.grad)


@pytest.mark.parametrize(("n", "ignored"), [(1, 0), (7, 3), (65, 20), (127, 0)])
def test_log_likelihood_equals_plain_float64(n: int, ignored: int) -> None:
    hidden, weight, targets = problem(n, ignored=ignored)
    incoming = torch.randn(n, generator=torch.Generator().manual_seed(1))
    nats, reference_hidden, reference_weight = plain(hidden, weight, targets)
    (-nats * incoming.double()).sum().backward()
    found = linear_log_likelihood(hidden, weight, targets, chunk_rows=16)
    (found * incoming).sum().backward()
    assert found.dtype == torch.float32
    assert found.shape == (n,)
    assert_close(found.detach(), -nats.detach())
    assert not found[targets == IGNORE].any()
    assert_close(hidden.grad, reference_hidden.grad)
    assert_close(weight.grad, reference_weight.grad)


def test_log_likelihood_passes_gradcheck() -> None:
    hidden, weight, targets = problem(5, ignored=1)
    inputs = (hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_())
    assert torch.autograd.gradcheck(
        lambda h, w: linear_log_likelihood(h, w, targets, chunk_rows=2), inputs, fast_mode=True
    )


@pytest.mark.parametrize("rows_at_a_time", [1, 5])
def test_the_epilogue_in_pieces_of_the_cache(rows_at_a_time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large vocabulary leaves room for a few rows at a time; here a small cache does."""
    monkeypatch.setattr(loss_module, "_CACHE_BYTES", rows_at_a_time * VOCAB * 4)
    test_cross_entropy_equals_plain_float64(65, 1, 64)
    test_log_likelihood_equals_plain_float64(65, 20)


@pytest.mark.parametrize("n", [0, 5])
def test_all_ignored_is_zero_with_zero_gradients(n: int) -> None:
    hidden, weight, _ = problem(n)
    targets = torch.full((n,), IGNORE)
    (
        linear_cross_entropy(hidden, weight, targets) + linear_log_likelihood(hidden, weight, targets).sum()
    ).backward()
    loss = linear_cross_entropy(hidden, weight, targets)
    assert loss.item() == 0
    for gradient in (hidden.grad, weight.grad):
        assert gradient is not None
        assert not gradient.any()  # NaN would count as something


@pytest.mark.parametrize("function", [linear_cross_entropy, linear_log_likelihood])
def test_ignored_rows_leave_no_trace(function: Callable[..., Tensor]) -> None:
    hidden, weight, targets = problem(30, ignored=11)
    with torch.no_grad():
        hidden[targets == IGNORE] = torch.nan
    function(hidden, weight, targets).sum().backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    assert not hidden.grad[targets == IGNORE].any()
    assert hidden.grad.isfinite().all()
    assert weight.grad.isfinite().all()


def test_rows_are_masked_where_they_cannot_be_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of a GPU, where looking at the mask would cost a synchronisation, run on the CPU."""
    hidden, weight, targets = problem(30, ignored=11)
    expected = linear_cross_entropy(hidden, weight, targets)
    expected.backward()
    expected_gradients = hidden.grad, weight.grad
    hidden.grad = weight.grad = None
    monkeypatch.setattr(loss_module, "_can_drop_rows", lambda targets: False)
    found = linear_cross_entropy(hidden, weight, targets)
    found.backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close((hidden.grad, weight.grad), expected_gradients)


def test_huge_logits_do_not_overflow() -> None:
    hidden, weight, targets = problem(9, size=1e4)
    nats, reference_hidden, _ = plain(hidden, weight, targets)
    nats.sum().backward()
    loss = linear_cross_entropy(hidden, weight, targets)
    loss.backward()
    assert_close(loss.detach(), nats.detach().sum())
    assert_close(hidden.grad, reference_hidden.grad, 1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast(dtype: torch.dtype) -> None:
    n = 257
    hidden, weight, targets = problem(n, ignored=30)
    nats, reference_hidden, reference_weight = plain(hidden, weight, targets)
    (nats.sum() / n).backward()
    with torch.autocast("cpu", dtype):
        loss = linear_cross_entropy(hidden, weight, targets, scale=1 / n, chunk_rows=64)
    scaler_factor = 2.0**16  # what a gradient scaler starts with
    (loss * scaler_factor).backward()
    tolerance = 0.02
    assert loss.dtype == torch.float32
    assert_close(loss.detach(), nats.detach().sum() / n, tolerance)
    for found, expected in ((hidden, reference_hidden), (weight, reference_weight)):
        assert found.grad is not None
        assert found.grad.dtype == torch.float32
        assert_close(found.grad / scaler_factor, expected.grad, tolerance)
        found.grad = None
    with torch.autocast("cpu", dtype):
        likelihood = linear_log_likelihood(hidden, weight, targets, chunk_rows=64)
    (likelihood.sum() * (-scaler_factor / n)).backward()
    assert_close(likelihood.detach(), -nats.detach(), tolerance)
    for found, expected in ((hidden, reference_hidden), (weight, reference_weight)):
        assert found.grad is not None
        assert_close(found.grad / scaler_factor, expected.grad, tolerance)


@pytest.mark.parametrize("vocabulary", [30, 64, 128, 70, 193])
def test_the_weights_gradient_in_two_products(vocabulary: int) -> None:
    x, y = torch.randn(40, vocabulary).bfloat16(), torch.randn(40, 24).bfloat16()
    found = loss_module._transposed_product(x, y)
    torch.testing.assert_close(found, x.t() @ y)
    assert found.dtype is torch.bfloat16


def test_tiny_incoming_gradients_survive_half_precision() -> None:
    hidden, weight, targets = problem(40)
    nats, reference_hidden, _ = plain(hidden, weight, targets)
    (nats.sum() * 1e-9).backward()
    with torch.autocast("cpu", torch.float16):
        likelihood = linear_log_likelihood(hidden, weight, targets)
    (likelihood.sum() * -1e-9).backward()
    assert_close(hidden.grad, reference_hidden.grad, 0.02)


def test_gradient_scale_multiplies_and_tied_weights_add_up() -> None:
    table = problem(VOCAB)[1].detach().requires_grad_()
    tokens, targets = torch.arange(40), torch.arange(1, 41)
    (3.0 * linear_cross_entropy(table[tokens], table, targets)).backward()
    reference = table.detach().double().requires_grad_()
    (3.0 * F.cross_entropy(reference[tokens] @ reference.t(), targets, reduction="sum")).backward()
    assert_close(table.grad, reference.grad)


@pytest.mark.parametrize("function", [linear_cross_entropy, linear_log_likelihood])
@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_a_frozen_side_gets_no_gradient_and_costs_none(function: Callable[..., Tensor], frozen: str) -> None:
    hidden, weight, targets = problem(33)
    function(hidden, weight, targets).sum().backward()
    expected = {"hidden": weight.grad, "weight": hidden.grad}[frozen]
    hidden.grad = weight.grad = None
    {"hidden": hidden, "weight": weight}[frozen].requires_grad_(False)
    with _Sizes() as sizes:
        function(hidden, weight, targets).sum().backward()
    trained, still = (weight, hidden) if frozen == "hidden" else (hidden, weight)
    torch.testing.assert_close(trained.grad, expected)
    assert still.grad is None
    n_products = 2 if function is linear_cross_entropy else 3  # logits (again in backward), one gradient
    assert sizes.calls["mm"] + sizes.calls["addmm"] == n_products


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_only_the_logits_are_computed(context: Callable[[], Any]) -> None:
    hidden, weight, targets = problem(33)
    expected = linear_cross_entropy(hidden, weight, targets)
    with context(), _Sizes() as sizes:
        found = linear_cross_entropy(hidden, weight, targets)
    assert not found.requires_grad
    torch.testing.assert_close(found, expected.detach())
    assert sizes.calls["mm"] + sizes.calls["addmm"] == 1


@pytest.mark.parametrize("function", [linear_cross_entropy, linear_log_likelihood])
@pytest.mark.parametrize("ignored", [0, 50])
def test_the_logits_are_never_held_whole(function: Callable[..., Tensor], ignored: int) -> None:
    n, chunk_rows = 400, 32
    hidden, weight, targets = problem(n, ignored=ignored)
    with _Sizes() as sizes:
        function(hidden, weight, targets, chunk_rows=chunk_rows).sum().backward()
    assert 0 < sizes.largest <= max(chunk_rows * VOCAB, n * WIDTH, VOCAB * WIDTH)


def test_the_recorder_sees_the_plain_loss_hold_them() -> None:
    hidden, weight, targets = problem(400)
    with _Sizes() as sizes:
        F.cross_entropy(hidden @ weight.t(), targets).backward()
    assert sizes.largest >= 400 * VOCAB


def test_a_second_backward_is_a_clear_error() -> None:
    hidden, weight, targets = problem(3)
    loss = linear_cross_entropy(hidden, weight, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="compute the loss again"):
        loss.backward()


@pytest.mark.parametrize(
    ("hidden", "weight", "targets", "chunk_rows", "message"),
    [
        ((4, 3), (5, 2), (4,), 8, "do not fit"),
        ((4, 3), (5, 3), (3,), 8, "one per row"),
        ((2, 2, 3), (5, 3), (4,), 8, "do not fit"),
        ((4, 3), (5, 3), (4,), 0, "chunk_rows"),
    ],
)
def test_shapes_that_do_not_fit(
    hidden: tuple[int, ...], weight: tuple[int, ...], targets: tuple[int, ...], chunk_rows: int, message: str
) -> None:
    zeros = torch.zeros(targets, dtype=torch.int64)
    for function in (linear_cross_entropy, linear_log_likelihood):
        with pytest.raises(ValueError, match=message):
            function(torch.zeros(hidden), torch.zeros(weight), zeros, chunk_rows=chunk_rows)


class _Sizes(TorchDispatchMode):
    """Counts operations by name and remembers the largest tensor any of them returned, in elements."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.calls = {"mm": 0, "addmm": 0}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__.rstrip("_")
        if name in self.calls:
            self.calls[name] += 1
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result
