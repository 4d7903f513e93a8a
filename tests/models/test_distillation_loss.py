"""The distillation loss against its definition, in values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nanothink.data.tokens import IGNORE
from nanothink.models.distillation_loss import SoftTargets, linear_distillation

N, WIDTH, VOCABULARY = 13, 6, 20


def defined(
    hidden: Tensor, weight: Tensor, targets: Tensor, teacher: SoftTargets, share: float
) -> tuple[Tensor, Tensor, Tensor]:
    log_q = (hidden @ weight.t()).log_softmax(-1)
    totals = [hidden.new_zeros(()), hidden.new_zeros(())]
    for row, target in enumerate(targets.tolist()):
        if target == IGNORE:
            continue
        p, own = teacher.probabilities[row], log_q[row, teacher.tokens[row]]
        outside = torch.ones(VOCABULARY, dtype=torch.bool)
        outside[teacher.tokens[row]] = False
        divergence = (p * (p.log() - own)).sum()
        if outside.any():
            divergence = divergence + (1 - p.sum()) * ((1 - p.sum()).log() - log_q[row, outside].logsumexp(0))
        totals[0] = totals[0] - log_q[row, target]
        totals[1] = totals[1] + divergence
    return (1 - share) * totals[0] + share * totals[1], totals[0], totals[1]


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("k", [1, 5, VOCABULARY])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_loss_and_gradients_are_those_of_the_definition(share: float, k: int, dtype: torch.dtype) -> None:
    torch.manual_seed(k)
    hidden = torch.randn(N, WIDTH, dtype=dtype, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH, dtype=dtype, requires_grad=True)
    targets = torch.randint(VOCABULARY, (N,))
    targets[[2, 5]] = IGNORE
    likeliest = (2 * torch.randn(N, VOCABULARY, dtype=dtype)).softmax(-1).topk(k)
    teacher = SoftTargets(likeliest.indices, likeliest.values)
    expected = defined(hidden, weight, targets, teacher, share)
    loss, *parts = linear_distillation(hidden, weight, targets, teacher, share=share, scale=0.5, chunk_rows=4)
    for own, known in zip((loss, *parts), expected, strict=True):
        assert torch.allclose(2 * own, known, rtol=1e-4 if dtype == torch.float32 else 1e-9)
    of_definition = torch.autograd.grad(expected[0], (hidden, weight))
    (3 * loss).backward()
    for given, known in zip((hidden.grad, weight.grad), of_definition, strict=True):
        assert given is not None
        assert torch.allclose(given, 1.5 * known, atol=1e-5 if dtype == torch.float32 else 1e-12)


def test_a_student_that_agrees_has_no_gradient_whatever_it_does_in_the_tail() -> None:
    torch.manual_seed(0)
    logits = torch.randn(1, VOCABULARY, dtype=torch.float64)
    likeliest = logits.softmax(-1).topk(4)
    teacher = SoftTargets(likeliest.indices, likeliest.values)
    outside = [v for v in range(VOCABULARY) if v not in likeliest.indices[0].tolist()]
    logits[0, outside] = logits[0, outside].flip(0)
    weight = torch.eye(VOCABULARY, dtype=torch.float64)
    hidden = logits.requires_grad_()
    loss, _, divergence = linear_distillation(
        hidden, weight, torch.zeros(1, dtype=torch.int64), teacher, share=1
    )
    loss.backward()
    assert abs(float(divergence)) < 1e-12
    assert hidden.grad is not None
    assert hidden.grad.abs().max() < 1e-12


def test_a_certain_student_has_finite_gradients() -> None:
    """The tail of a student that is certain rounds to 0, and so does that of a teacher in 16 bits."""
    hidden = (1e4 * torch.eye(1, VOCABULARY)).requires_grad_()
    for probability in (1.0005, 1.0, 0.9):
        teacher = SoftTargets(torch.tensor([[0]]), torch.tensor([[probability]]))
        loss, _, divergence = linear_distillation(
            hidden, torch.eye(VOCABULARY), torch.tensor([3]), teacher, share=0.5
        )
        loss.backward()
        assert torch.isfinite(divergence)
        assert hidden.grad is not None
        assert torch.isfinite(hidden.grad).all()
