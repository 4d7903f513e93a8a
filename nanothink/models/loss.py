"""Cross-entropy of a linear head without ever holding the logits.

At a vocabulary of 50,257 the logits of 8 x 512 tokens take 823 MB in float32, and their gradient as
much again. Here the rows are worked off a chunk at a time: a matrix product gives the chunk's logits,
an epilogue in place turns them into their own gradient, two more products turn that into the
gradients of hidden states and weight, and the buffer is used again for the next chunk.

``linear_cross_entropy`` does all of it in the forward pass, so backward only multiplies by a number
(the idea of Liger Kernel, Hsu et al. 2024, section 3.2). ``linear_log_likelihood`` gives every token's
own log-likelihood, whose incoming gradient is not known in the forward pass, so it computes the
logits again in backward.

Precision: the products run in the autocast type where autocast is on, else in the type of the hidden
states; softmax, log-sum-exp and both accumulated gradients are float32.

Shapes: N rows (batch x time), D model width, V vocabulary, R rows of one chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanothink.data.tokens import IGNORE
from nanothink.models import passes
from nanothink.models.precision import matmul_dtype

_CACHE_BYTES = 3 << 20  # logits the epilogue walks through at a time on a CPU, so that they stay in L2


_PRODUCT_BLOCK = 64

CHUNK_ROWS = 512
"""Rows of logits that exist at a time: large enough for fast products, small beside the model."""


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, scale: float = 1.0, chunk_rows: int = CHUNK_ROWS
) -> Tensor:
    """Summed cross-entropy of ``softmax(hidden @ weight.T)`` against ``targets``.

    Args:
        hidden: (N, D) floating point.
        weight: (V, D) floating point.
        targets: (N,) integers in [0, V), or IGNORE for rows that count for nothing.
        scale: factor on the result, such as 1 / number of targets for a mean.
        chunk_rows: R, how many rows of logits exist at a time.

    Returns:
        Scalar: ``scale`` times the sum of nats over the targets that are not IGNORE. float32 (float64 for
        float64 hidden states). Gradients are already computed when this returns, and are given
        out once: a second backward through the same result is an error.
    """
    need_hidden, need_weight = needs_gradients(hidden, weight)
    check_shapes(hidden, weight, targets, chunk_rows)
    result: Tensor = _CrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, weight, targets, scale, chunk_rows, matmul_dtype(hidden), need_hidden, need_weight
    )
    return result


def linear_log_likelihood(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, chunk_rows: int = CHUNK_ROWS
) -> Tensor:
    """Log-likelihood of each target under ``softmax(hidden @ weight.T)``, with gradients.

    Args:
        hidden: (N, D) floating point.
        weight: (V, D) floating point.
        targets: (N,) integers in [0, V), or IGNORE.
        chunk_rows: R, how many rows of logits exist at a time.

    Returns:
        (N,) nats, at most 0; exactly 0, with no gradient, where the target is IGNORE. float32 (float64 for
        float64 hidden states).
    """
    return likelihood_and_peak(hidden, weight, targets, chunk_rows=chunk_rows)[0]


def likelihood_and_peak(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, chunk_rows: int = CHUNK_ROWS
) -> tuple[Tensor, Tensor]:
    """``linear_log_likelihood``, and the logarithm of the greatest probability in each row.

    The second is (N,) like the first, without gradients, and costs nothing: the sum that normalises a row
    is taken relative to its greatest logit.
    """
    need_hidden, need_weight = needs_gradients(hidden, weight)
    check_shapes(hidden, weight, targets, chunk_rows)
    result: tuple[Tensor, Tensor] = _LogLikelihood.apply(  # type: ignore[no-untyped-call]
        hidden, weight, targets, chunk_rows, matmul_dtype(hidden), need_hidden, need_weight
    )
    return result


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        scale: float,
        chunk_rows: int,
        dtype: torch.dtype,
        need_hidden: bool,
        need_weight: bool,
    ) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            head = ChunkedHead(hidden, weight, targets, chunk_rows, dtype)
            ctx.gradients = None
            if need_hidden or need_weight:
                nats, *ctx.gradients = head.gradients(head.valid, need_hidden, need_weight)
            else:
                nats = head.nats()
            ctx.scale = scale
            ctx.dtypes = hidden.dtype, weight.dtype
            return nats.sum() * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "linear_cross_entropy gives its gradients out once; to go back again, compute the loss again"
            )
        (grad_hidden, grad_weight), ctx.gradients = ctx.gradients, None
        factor = grad * ctx.scale  # stays on the device: no look at its value, so no synchronisation
        if grad_hidden is not None:
            grad_hidden = grad_hidden.mul_(factor).to(ctx.dtypes[0])
        if grad_weight is not None:
            grad_weight = grad_weight.mul_(factor).to(ctx.dtypes[1])
        return grad_hidden, grad_weight, None, None, None, None, None, None


class _LogLikelihood(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        chunk_rows: int,
        dtype: torch.dtype,
        need_hidden: bool,
        need_weight: bool,
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(hidden.device.type, enabled=False):
            head = ChunkedHead(hidden, weight, targets, chunk_rows, dtype)
            ctx.save_for_backward(hidden, weight, targets)
            ctx.options = chunk_rows, dtype, need_hidden, need_weight
            nats, peaks = head.nats_and_peaks()
            peak = head.expand(peaks)
            ctx.mark_non_differentiable(peak)
            return head.expand(nats.neg_()), peak

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _of_peak: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets = ctx.saved_tensors
        chunk_rows, dtype, need_hidden, need_weight = ctx.options
        with torch.autocast(hidden.device.type, enabled=False):
            head = ChunkedHead(hidden, weight, targets, chunk_rows, dtype)
            # Incoming gradients are brought to at most 1, so that neither tiny ones (a mean over many
            # tokens) nor huge ones (a gradient scaler) leave the range of a 16-bit product.
            incoming = head.select(grad.to(head.wide))
            largest = (
                incoming.abs().amax().clamp_min(torch.finfo(head.wide).tiny) if len(incoming) else grad.sum()
            )
            factor = -(incoming / largest) * head.valid
            _, grad_hidden, grad_weight = head.gradients(factor, need_hidden, need_weight)
            if grad_hidden is not None:
                grad_hidden = grad_hidden.mul_(largest).to(hidden.dtype)
            if grad_weight is not None:
                grad_weight = grad_weight.mul_(largest).to(weight.dtype)
        return grad_hidden, grad_weight, None, None, None, None, None


class ChunkedHead:
    """The loop over chunks that all these functions share. Call it with autocast off.

    On a CPU the ignored rows are left out up front. On a device that would cost a synchronisation, so
    they stay in, with hidden state, factor and gradient set to zero.
    """

    def __init__(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, chunk_rows: int, dtype: torch.dtype
    ) -> None:
        self.n_rows = len(targets)
        self.kept: Tensor | None = None
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32
        valid = targets != IGNORE
        if not _can_drop_rows(targets):
            targets = targets.masked_fill(~valid, 0)
            hidden = hidden.masked_fill(~valid[:, None], 0.0)
        elif not bool(valid.all()):
            self.kept = valid.nonzero().squeeze(1)
            hidden, targets, valid = hidden[self.kept], targets[self.kept], valid[self.kept]
        self.hidden = hidden.to(dtype)
        self.weight = weight.to(dtype)
        self.targets = targets.to(torch.int64)[:, None]
        self.valid = valid.to(self.wide)
        n = len(targets)
        self.narrow = dtype != self.wide
        self.in_one_pass = passes.serve(self.hidden, self.weight)
        if self.in_one_pass and self.narrow:
            chunk_rows *= 2  # without logits in float32 these take less memory; products are faster
        n_chunks = -(-n // chunk_rows)
        self.rows = -(-n // max(n_chunks, 1))  # even chunks: no small, slow one at the end
        self._wide_buffer: Tensor | None = None

    def select(self, values: Tensor) -> Tensor:
        """(N, ...) -> (n, ...): the rows that are worked on."""
        return values if self.kept is None else values[self.kept]

    def expand(self, values: Tensor) -> Tensor:
        """(n, ...) -> (N, ...): back in place, zero for the rows that were left out."""
        if self.kept is None:
            return values
        return values.new_zeros(self.n_rows, *values.shape[1:]).index_copy_(0, self.kept, values)

    def nats(self) -> Tensor:
        """(n,) negative log-likelihoods, 0 for ignored rows."""
        return self.nats_and_peaks()[0]

    def nats_and_peaks(self) -> tuple[Tensor, Tensor]:
        """``nats()``, and (n,) logarithms of each row's greatest probability, 0 for ignored rows."""
        nats, peaks = self.valid.new_empty(2, len(self.hidden))
        for chunk, product in self.chunks():
            nats[chunk], peaks[chunk] = self._softmax_gradient_(product, self.targets[chunk], None)
        return nats.mul_(self.valid), peaks.mul_(self.valid)

    def gradients(
        self, factor: Tensor, need_hidden: bool, need_weight: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """``nats()``, and the gradients of ``sum(factor * nats)``: (N, D) and (V, D), None if not needed."""
        nats = self.valid.new_empty(len(self.hidden))

        def softmax_gradient(chunk: slice, product: Tensor) -> None:
            nats[chunk], _ = self._softmax_gradient_(product, self.targets[chunk], factor[chunk, None])

        gradients = self.backward(softmax_gradient, need_hidden, need_weight)
        return nats.mul_(self.valid), *gradients

    def backward(
        self, into_gradient: Callable[[slice, Tensor], None], need_hidden: bool, need_weight: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of hidden states (N, D) and weight (V, D), None if not needed.

        Args:
            into_gradient: turns the (R, V) logits of a chunk of rows into their gradient, in place, in the
                type of the products.
        """
        n, width = self.hidden.shape
        grad_hidden = self.valid.new_empty(n, width) if need_hidden else None
        grad_weight: Tensor | None = None
        for chunk, product in self.chunks():
            into_gradient(chunk, product)
            if grad_hidden is not None:
                grad_hidden[chunk] = product @ self.weight
            if not need_weight:
                continue
            if grad_weight is not None and not self.narrow:
                grad_weight.addmm_(product.t(), self.hidden[chunk])
                continue
            added = _transposed_product(product, self.hidden[chunk])
            if grad_weight is None:
                grad_weight = added.to(self.wide)
            elif self.in_one_pass:
                passes.add_(grad_weight, added)
            else:
                grad_weight += added
        if need_weight and grad_weight is None:
            grad_weight = self.valid.new_zeros(self.weight.shape)
        return None if grad_hidden is None else self.expand(grad_hidden), grad_weight

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """Rows, and their (R, V) logits in the type of the products; the buffer is used again each time."""
        buffer = self.hidden.new_empty(self.rows, len(self.weight))
        for start in range(0, len(self.hidden), max(self.rows, 1)):
            chunk = slice(start, min(start + self.rows, len(self.hidden)))
            yield chunk, torch.mm(self.hidden[chunk], self.weight.t(), out=buffer[: chunk.stop - start])

    def widened(self, product: Tensor) -> Tensor:
        """Logits in the wide type: themselves, or in another buffer that is used again."""
        if not self.narrow:
            return product
        if self._wide_buffer is None:
            self._wide_buffer = self.valid.new_empty(self.rows, len(self.weight))
        return self._wide_buffer[: len(product)].copy_(product)

    def _softmax_gradient_(
        self, product: Tensor, targets: Tensor, factor: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """See the function; in the type of the products."""
        if self.in_one_pass:
            return passes.softmax_gradient_(product, targets, factor)
        logits = self.widened(product)
        found = _softmax_gradient_(logits, targets, factor)
        if self.narrow and factor is not None:
            product.copy_(logits)
        return found


def _transposed_product(x: Tensor, y: Tensor) -> Tensor:
    """``x.t() @ y`` of (R, V) and (R, D), in two parts where CPUs compute it a fifth faster so.

    oneDNN slows down on all of it where V, such as GPT-2's 50,257, is no multiple of its blocks.
    """
    whole = x.shape[1] // _PRODUCT_BLOCK * _PRODUCT_BLOCK
    if x.device.type != "cpu" or x.dtype == torch.float32 or whole in (0, x.shape[1]):
        return x.t() @ y
    product = y.new_empty(x.shape[1], y.shape[1])
    for some in (slice(0, whole), slice(whole, None)):
        torch.mm(x[:, some].t(), y, out=product[some])
    return product


def _softmax_gradient_(logits: Tensor, targets: Tensor, factor: Tensor | None) -> tuple[Tensor, Tensor]:
    """Negative log-likelihoods, and logarithms of the greatest probabilities, (R,) each.

    ``logits`` (R, V) becomes ``factor * (softmax - one_hot)`` in place.
    Without a factor (R, 1) the logits are left as scratch.
    """
    nats, peaks = logits.new_empty(2, len(logits))
    for some in rows_at_a_time(logits):
        part, own = logits[some], targets[some]
        top = part.amax(1, keepdim=True)
        target_logit = part.gather(1, own)
        total = part.sub_(top).exp_().sum(1, keepdim=True)
        log_total = total.log()
        nats[some] = (log_total + (top - target_logit)).squeeze(1)
        peaks[some] = -log_total.squeeze(1)
        if factor is not None:
            weight = factor[some]
            part.mul_(weight / total).scatter_add_(1, own, -weight)
    return nats, peaks


def rows_at_a_time(logits: Tensor) -> Iterator[slice]:
    """Rows of (R, V) logits that an epilogue works on at a time: on a CPU as many as stay in L2."""
    rows, vocab = logits.shape
    step = max(1, _CACHE_BYTES // (vocab * logits.element_size())) if logits.device.type == "cpu" else rows
    for start in range(0, rows, step):
        yield slice(start, start + step)


def _can_drop_rows(targets: Tensor) -> bool:
    # a compiled graph has no look at values, so there the rows stay in
    return targets.device.type == "cpu" and not torch.compiler.is_compiling()


def needs_gradients(hidden: Tensor, weight: Tensor) -> tuple[bool, bool]:
    # Inside a Function grad mode is always off, and needs_input_grad ignores no_grad(): ask here.
    enabled = torch.is_grad_enabled()
    return enabled and hidden.requires_grad, enabled and weight.requires_grad


def check_shapes(hidden: Tensor, weight: Tensor, targets: Tensor, chunk_rows: int) -> None:
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden (N, D) and weight (V, D) do not fit: got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"targets must be ({len(hidden)},), one per row of hidden; got {tuple(targets.shape)}"
        )
    if chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1, got {chunk_rows}")
