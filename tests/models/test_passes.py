"""Passes of a training step against PyTorch: results and every gradient, in float32 and bfloat16."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from nanothink.config import StateSpaceConfig, TransformerConfig
from nanothink.data.tokens import IGNORE
from nanothink.models import native, passes
from nanothink.models.causal_attention import causal_attention
from nanothink.models.feed_forward import SwiGLU
from nanothink.models.layers import Attention, RMSNorm, Rotary
from nanothink.models.loss import linear_cross_entropy, linear_log_likelihood
from nanothink.models.mamba_mixer import Mixer

pytestmark = pytest.mark.skipif(not passes.serve(torch.zeros(1)), reason="no compiler")

WIDTH, HEADS, LENGTH = 30, 3, 131  # no whole vectors, and a block of queries that is not full


def attention(x: Tensor, layer: nn.Module, *, grouped: bool = False) -> Tensor:
    found: Tensor = layer(x, Rotary(WIDTH // HEADS, LENGTH, 1e4)(0, x.shape[1]))
    return found


def loss(x: Tensor, layer: nn.Linear, function: Callable[..., Tensor]) -> Tensor:
    targets = torch.arange(x.shape[0] * LENGTH) % layer.out_features
    targets[5] = IGNORE
    return function(x.flatten(0, 1), layer.weight, targets, chunk_rows=64)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[..., Tensor]]] = {
    "norm": (lambda: RMSNorm(WIDTH), lambda x, layer: layer(x, x.dtype)),
    "attention": (lambda: Attention(WIDTH, TransformerConfig(n_heads=HEADS)), attention),
    "feed forward": (lambda: SwiGLU(WIDTH, 70), lambda x, layer: layer(x)),
    "mixer": (lambda: Mixer(WIDTH, StateSpaceConfig()), lambda x, layer: layer(x)),
    "long filter": (
        lambda: Mixer(WIDTH, StateSpaceConfig(conv_width=7, expand=1)),
        lambda x, layer: layer(x),
    ),
    "cross-entropy": (lambda: nn.Linear(WIDTH, 77), lambda x, layer: loss(x, layer, linear_cross_entropy)),
    "likelihood": (lambda: nn.Linear(WIDTH, 77), lambda x, layer: loss(x, layer, linear_log_likelihood)),
}


def results(case: str, dtype: torch.dtype, by_passes: bool) -> list[Tensor]:
    """Result, and the gradients of the input and of every parameter."""
    build, call = CASES[case]
    torch.manual_seed(0)
    layer = build()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, LENGTH, WIDTH, requires_grad=True)
    with (
        nullcontext() if by_passes else passes.switched_off(),
        torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16),
    ):
        y = call(x.to(dtype), layer)
        (y.float() * torch.randn(y.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    grads = [p.grad for p in (x, *layer.parameters()) if p.grad is not None]
    return [y.detach().float(), *(grad.float() for grad in grads)]


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("case", CASES)
def test_passes_give_results_and_gradients_of_pytorch(case: str) -> None:
    exact = results(case, torch.float32, by_passes=False)
    for found, expected in zip(results(case, torch.float32, by_passes=True), exact, strict=True):
        assert error(found, expected) < 2e-6
    narrow = [results(case, torch.bfloat16, by_passes=by_passes) for by_passes in (True, False)]
    for found, plain, expected in zip(*narrow, exact, strict=True):
        assert error(found, expected) < 1.2 * error(plain, expected) + 1e-3


def test_softplus_and_its_slope_near_zero_and_far_from_it() -> None:
    x = torch.linspace(-20, 30, 2001)[:, None].requires_grad_()
    y = torch.nn.functional.softplus(x.double())
    y.sum().backward()
    found = passes.softplus(x.detach(), torch.zeros(1))
    torch.testing.assert_close(found, y.detach().float(), rtol=4e-6, atol=0)
    slope, _ = passes.softplus_backward(found, torch.ones_like(found), torch.float32)
    torch.testing.assert_close(slope, x.grad, rtol=4e-6, atol=0)


@pytest.fixture
def team(monkeypatch: pytest.MonkeyPatch) -> ctypes.c_void_p:
    """The function of the library that runs another one on each of PyTorch's threads."""
    library, _ = passes._load()
    found = ctypes.c_void_p.in_dll(library, "nanothink_team")
    monkeypatch.setattr(found, "value", found.value)
    return found


@pytest.mark.parametrize("own_threads", [False, True])
def test_threads_change_no_bit(own_threads: bool, team: ctypes.c_void_p) -> None:
    x, grad, before = *torch.randn(2, 5000, WIDTH), torch.get_num_threads()
    if own_threads:
        team.value = None
    found = []
    try:
        for n_threads in (1, 3):
            torch.set_num_threads(n_threads)
            found.append(passes.norm_backward(x, torch.ones(WIDTH), 1e-6, grad))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, three) for one, three in zip(*found, strict=True))


@pytest.mark.skipif(not torch.backends.openmp.is_available(), reason="PyTorch without OpenMP")
def test_the_work_is_given_to_pytorch_s_threads(team: ctypes.c_void_p) -> None:
    """Its idle threads keep the cores busy for a while: others would wait for one."""
    work = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    start = ctypes.CFUNCTYPE(None, work, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    assert team.value is not None
    assert team.value == native._team()
    parallel, before, teams = start(team.value), torch.get_num_threads(), list[int]()

    def counted(function: Callable[[int], None], data: int, n_threads: int, flags: int) -> None:
        teams.append(n_threads)
        parallel(function, data, n_threads, flags)

    counting = start(counted)
    team.value = ctypes.cast(counting, ctypes.c_void_p).value
    try:
        torch.set_num_threads(3)
        x = torch.randn(5000, WIDTH)
        found = passes.norm(x, torch.ones(WIDTH), 1e-6, torch.float32)
        passes.norm(x[:1], torch.ones(WIDTH), 1e-6, torch.float32)  # too little to share
    finally:
        torch.set_num_threads(before)
    assert teams == [3]
    torch.testing.assert_close(found, x * x.square().mean(-1, keepdim=True).add(1e-6).rsqrt())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_hidden(bad: float, dtype: torch.dtype) -> None:
    for at in (0, 18, 36):
        logits = torch.zeros(2, 37, dtype=dtype)
        logits[0, at] = bad
        nats, _ = passes.softmax_gradient_(logits, torch.tensor([3, 3]), torch.ones(2))
        assert nats.isfinite().tolist() == [False, True]
        assert logits.isfinite().all(1).tolist() == [False, True]
        q = torch.randn(1, 1, 40, 8, dtype=dtype, requires_grad=True)
        x = q.detach().clone()
        x[0, 0, at] = bad
        y = causal_attention(x.requires_grad_(), q, q)
        assert y.isfinite().all(-1)[0, 0].tolist() == [t != at for t in range(40)]
