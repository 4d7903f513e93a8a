"""Causal attention of a whole text on a CPU, as matrix products over blocks of queries.

A block's scores are one product with the keys up to its end, so half of the matrix is never computed, and
their softmax is one pass (``passes``). PyTorch's own kernel takes 1.3 to 2 times as long, and is the
reference. The backward pass computes the weights again from the scores and a number per query, as
FlashAttention does (Dao et al. 2022, section 3.1).

Shapes: B batch, H heads, N = B H, T time, K width of a head, Q queries of a block, S keys that they see.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanothink.models import passes

_QUERIES = 128


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, H, T, K) each, or fewer heads of keys and values -> (B, H, T, K)."""
    if q.shape == k.shape == v.shape and torch.is_grad_enabled():
        parts = [x.contiguous() for x in (q, k, v)]
        if q.dtype == k.dtype == v.dtype and passes.serve(*parts):
            y: Tensor = _CausalAttention.apply(*parts)  # type: ignore[no-untyped-call]
            return y
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            (batch, n_heads, length, width), scale = q.shape, q.shape[-1] ** -0.5
            q, k, v = (x.flatten(0, 1) for x in (q, k, v))  # (N, T, K)
            y, logs = q.new_empty(batch, length, n_heads, width), []  # as the next layer reads it
            for first in range(0, length, _QUERIES):
                end = min(first + _QUERIES, length)
                weights = q[:, first:end] @ k[:, :end].mT  # (N, Q, S)
                logs.append(passes.causal_softmax_(weights, first, scale))
                y[:, first:end] = (weights @ v[:, :end]).view(batch, n_heads, -1, width).transpose(1, 2)
            y = y.transpose(1, 2)
            ctx.save_for_backward(q, k, v, y, *logs)
            return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast("cpu", enabled=False):
            q, k, v, y, *logs = ctx.saved_tensors
            shape, scale = grad.shape, q.shape[-1] ** -0.5
            inner = (grad.float() * y).sum(-1).flatten(0, 1)  # (N, T)
            grad = grad.flatten(0, 1)  # (N, T, K)
            grad_q, grad_k, grad_v = torch.empty_like(q), *torch.zeros(2, *k.shape)
            for first, of_block in zip(range(0, q.shape[1], _QUERIES), logs, strict=True):
                end = min(first + _QUERIES, q.shape[1])
                part, queries, keys = grad[:, first:end], q[:, first:end], k[:, :end]
                weights, grads = queries @ keys.mT, part @ v[:, :end].mT  # (N, Q, S)
                here = inner[:, first:end].contiguous()
                passes.causal_softmax_backward_(weights, first, scale, grads, of_block, here)
                passes.add_(grad_v[:, :end], weights.mT @ part)
                grad_q[:, first:end] = grads @ keys
                passes.add_(grad_k[:, :end], grads.mT @ queries)
            return grad_q.view(shape), grad_k.view(shape).to(k.dtype), grad_v.view(shape).to(v.dtype)
