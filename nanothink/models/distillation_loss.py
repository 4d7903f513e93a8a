"""Divergence of a linear head's predictions from a teacher's, beside cross-entropy; no logits are held.

The teacher's distribution p at a position is known by its K likeliest tokens; all others are one outcome, the
tail (Hinton, Vinyals and Dean 2015, "Distilling the knowledge in a neural network", whose temperature is 1
here). With q the student's distribution and S the K tokens,

    KL = Σ_{k in S} p_k log(p_k / q_k) + p_tail log(p_tail / q_tail)        q_tail = 1 - Σ_{k in S} q_k
    loss = w KL + (1 - w) cross-entropy

Within the tail the student is free, so the gradient with respect to its logits is q - w p - (1 - w) one-hot,
where p shares its tail among the tokens outside S as the student does. It is computed chunk by chunk as in
loss.py.

Shapes: N rows (batch x time), D model width, V vocabulary, K likeliest tokens, R rows of one chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanothink.models.loss import (
    CHUNK_ROWS,
    ChunkedHead,
    check_shapes,
    needs_gradients,
    rows_at_a_time,
)
from nanothink.models.precision import matmul_dtype


@dataclass(frozen=True)
class SoftTargets:
    """A teacher's predictions."""

    tokens: Tensor
    """(..., K) int64, all different: the likeliest tokens."""
    probabilities: Tensor
    """(..., K) float32 with a sum of at most 1; the rest is the tail."""

    def flatten(self) -> SoftTargets:
        """(B, T, K) -> (B*T, K)."""
        return SoftTargets(self.tokens.flatten(0, -2), self.probabilities.flatten(0, -2))

    def to(self, device: torch.device) -> SoftTargets:
        return SoftTargets(self.tokens.to(device), self.probabilities.to(device))


def linear_distillation(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    teacher: SoftTargets,
    *,
    share: float,
    scale: float = 1.0,
    chunk_rows: int = CHUNK_ROWS,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of the head of this file for ``softmax(hidden @ weight.T)``, and its two parts.

    Args:
        hidden: (N, D) floating point.
        weight: (V, D) floating point.
        targets: (N,) integers in [0, V), or IGNORE for rows that count for nothing.
        teacher: (N, K).
        share: w, that of the divergence in the loss.
        scale: factor on the results, such as 1 / number of targets for means.
        chunk_rows: R, how many rows of logits exist at a time.

    Returns:
        Scalars: the loss; cross-entropy and divergence in nats, without gradients. Each is ``scale`` times a
        sum over the targets that are not IGNORE. Gradients are given out once.
    """
    needed = needs_gradients(hidden, weight)
    check_shapes(hidden, weight, targets, chunk_rows)
    result: tuple[Tensor, Tensor, Tensor] = _Distillation.apply(  # type: ignore[no-untyped-call]
        hidden, weight, targets, teacher, share, scale, chunk_rows, matmul_dtype(hidden), needed
    )
    return result


class _Distillation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        teacher: SoftTargets,
        share: float,
        scale: float,
        chunk_rows: int,
        dtype: torch.dtype,
        needed: tuple[bool, bool],
    ) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast(hidden.device.type, enabled=False):
            head = ChunkedHead(hidden, weight, targets, chunk_rows, dtype)
            known = SoftTargets(head.select(teacher.tokens), head.select(teacher.probabilities))
            nats, divergences = head.valid.new_empty(2, len(head.hidden))

            def into_gradient(chunk: slice, product: Tensor) -> None:
                own = SoftTargets(known.tokens[chunk], known.probabilities[chunk])
                valid, logits = head.valid[chunk, None], head.widened(product)
                nats[chunk], divergences[chunk] = _gradient_(logits, head.targets[chunk], own, share, valid)
                if head.narrow:
                    product.copy_(logits)

            ctx.gradients = head.backward(into_gradient, *needed)
            ctx.scale, ctx.dtypes = scale, (hidden.dtype, weight.dtype)
            of_text, of_teacher = ((part * head.valid).sum() * scale for part in (nats, divergences))
            ctx.mark_non_differentiable(of_text, of_teacher)
            return (1 - share) * of_text + share * of_teacher, of_text, of_teacher

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _of_text: Tensor, _of_teacher: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("linear_distillation gives its gradients out once; compute the loss again")
        gradients, ctx.gradients = ctx.gradients, None
        factor = grad * ctx.scale
        of_each = (
            None if gradient is None else gradient.mul_(factor).to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        )
        return *of_each, None, None, None, None, None, None, None


def _gradient_(
    logits: Tensor, targets: Tensor, teacher: SoftTargets, share: float, factor: Tensor
) -> tuple[Tensor, Tensor]:
    """Cross-entropy and divergence of each row, (R,) both.

    ``logits`` (R, V) becomes ``factor`` (R, 1) times the gradient of the loss in place.
    """
    nats, divergences = logits.new_empty(2, len(logits))
    tiny = torch.finfo(logits.dtype).tiny
    for some in rows_at_a_time(logits):
        part, own, likeliest = logits[some], targets[some], teacher.tokens[some]
        p = teacher.probabilities[some].to(part.dtype)
        p = p / p.sum(1, keepdim=True).clamp_min(1.0)  # stored in 16 bits, they may exceed 1 together
        p_tail = (1 - p.sum(1, keepdim=True)).clamp_min(0.0)
        top = part.amax(1, keepdim=True)
        target_logit = part.gather(1, own) - top
        log_e = part.gather(1, likeliest) - top  # of the K tokens, as those of e and total below
        part.sub_(top).exp_().scatter_(1, likeliest, 0.0)
        tail = part.sum(1, keepdim=True)  # summed without the K: a difference would lose a small tail
        e = log_e.exp()
        total = tail + e.sum(1, keepdim=True)
        log_total = total.log()
        nats[some] = (log_total - target_logit).squeeze(1)
        kept = torch.xlogy(p, p) - p * (log_e - log_total)
        of_tail = torch.xlogy(p_tail, p_tail) - p_tail * (tail.clamp_min(tiny).log() - log_total)
        divergences[some] = kept.sum(1) + of_tail.squeeze(1)
        weight = factor[some]
        part.mul_(weight * (1 / total - share * p_tail / tail.clamp_min(tiny)))
        part.scatter_(1, likeliest, weight * (e / total - share * p))
        part.scatter_add_(1, own, weight * (share - 1))
    return nats, divergences
