"""torch's AdamW and Muon without its compiler, and Muon's Newton-Schulz steps (Jordan et al. 2024)."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch.optim import AdamW, Muon, Optimizer

if TYPE_CHECKING:
    from nanothink.training.muon_rows import MatrixOwners

_BYTES_TOGETHER = 2 << 20
"""Matrices of a shape in one product on a CPU: as many as stay in its cache (docs/log.md).

On CUDA one launch serves all of them, whatever their size; that was not measured.
"""

NS_COEFFICIENTS, NS_STEPS = (3.4445, -4.7750, 2.0315), 5  # torch's, which are those of Jordan et al.

_STEPS_IN_16_BITS = 3
"""Steps on one Gram matrix in a 16-bit type; more of them multiply its rounding (docs/log.md)."""


Matrix = TypeVar("Matrix", bound=torch.Tensor)


class _Eager(Optimizer):
    """An optimizer without torch's decorators for its compiler, which take 1.3 s to import it."""

    add_param_group = inspect.unwrap(Optimizer.add_param_group)
    load_state_dict = inspect.unwrap(Optimizer.load_state_dict)
    state_dict = inspect.unwrap(Optimizer.state_dict)
    zero_grad = inspect.unwrap(Optimizer.zero_grad)


class EagerAdamW(_Eager, AdamW):
    """torch's AdamW."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient."""
        inspect.unwrap(AdamW.step)(self)


class FastMuon(_Eager, Muon):
    """torch's Muon, with a choice of the type it orthogonalises in.

    torch does it in bfloat16 everywhere, which took half of a small step on a CPU that is slow at it
    (docs/log.md). Options, state and arithmetic are torch's; only the type differs.
    """

    def __init__(
        self, *args: Any, dtype: torch.dtype, owners: MatrixOwners | None = None, **options: Any
    ) -> None:
        super().__init__(*args, **options)
        self.dtype, self.owners = dtype, owners

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient."""
        for group in self.param_groups:
            moving = [parameter for parameter in group["params"] if parameter.grad is not None]

            def orthogonalise(
                matrices: Sequence[torch.Tensor], group: dict[str, Any] = group
            ) -> Sequence[torch.Tensor]:
                settings = group["ns_coefficients"], group["ns_steps"], group["eps"]
                return all_orthogonalised(matrices, *settings, self.dtype)

            if self.owners is None:
                for parameters in by_shape(moving).values():
                    for some in together(parameters, self.dtype):
                        updates = orthogonalise([self._look_ahead(p, group["momentum"]) for p in some])
                        for parameter, update in zip(some, updates, strict=True):
                            self._move(parameter, update, parameter.shape, group)
                continue

            def ahead(parameter: torch.Tensor, momentum: float = group["momentum"]) -> torch.Tensor:
                return self._look_ahead(parameter, momentum)

            for parameter, update in self.owners.orthogonalised(moving, ahead, orthogonalise, self.dtype):
                self._move(parameter, update, self.owners.shapes[parameter], group)

    def _look_ahead(self, parameter: torch.Tensor, momentum: float) -> torch.Tensor:
        """The gradient mixed with its moving average, which advances (Nesterov)."""
        gradient = parameter.grad
        assert gradient is not None
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        average = state["momentum_buffer"].lerp_(gradient, 1 - momentum)
        return gradient.lerp(average, momentum)

    def _move(
        self, parameter: torch.Tensor, update: torch.Tensor, shape: torch.Size, group: dict[str, Any]
    ) -> None:
        # the root mean square of AdamW's update (Liu et al. 2025, section 2.2)
        rate = group["lr"] * 0.2 * math.sqrt(max(shape))
        parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-rate)


def by_shape(
    parameters: Iterable[torch.nn.Parameter], shapes: Mapping[torch.nn.Parameter, torch.Size] | None = None
) -> dict[torch.Size, list[torch.nn.Parameter]]:
    """Parameters of each shape, in their order; ``shapes``: of the wholes that they are rows of."""
    found: dict[torch.Size, list[torch.nn.Parameter]] = {}
    for parameter in parameters:
        found.setdefault(parameter.shape if shapes is None else shapes[parameter], []).append(parameter)
    return found


def all_orthogonalised(
    matrices: Sequence[torch.Tensor],
    coefficients: tuple[float, float, float],
    n_steps: int,
    eps: float,
    dtype: torch.dtype,
) -> Sequence[torch.Tensor]:
    """Matrices of one shape, each as by ``orthogonalised``, several in one product."""
    found: list[torch.Tensor] = []
    for some in together(matrices, dtype):
        one, *others = some
        several = torch.stack(some) if others else one
        made = orthogonalised(several, coefficients, n_steps, eps, dtype)
        found += made.unbind() if others else [made]
    return found


def together(matrices: Sequence[Matrix], dtype: torch.dtype) -> Iterator[list[Matrix]]:
    """Matrices of one shape, in lists that are worked on in one product."""
    n = len(matrices)
    if n and not matrices[0].is_cuda:
        n = max(1, _BYTES_TOGETHER // (matrices[0].numel() * dtype.itemsize))
    for first in range(0, len(matrices), max(1, n)):
        yield list(matrices[first : first + n])


def orthogonalised(
    matrix: torch.Tensor,
    coefficients: tuple[float, float, float],
    n_steps: int,
    eps: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """(M, N) with its singular values brought near 1 by Newton-Schulz steps (Jordan et al. 2024).

    Of several, (B, M, N), each by itself. In ``dtype``, as is the result.
    """
    x = matrix.to(dtype, copy=True)
    if matrix.shape[-2] > matrix.shape[-1]:
        x = x.mT  # the smaller of the two Gram matrices
    norm = x.norm() if x.ndim == 2 else torch.stack([each.norm() for each in x]).view(-1, 1, 1)
    x = x.div_(norm.clamp(min=eps))
    rows, columns = x.shape[-2:]
    if columns < 3 * rows:  # by count, what the second way saves begins at N = 2 M
        x = newton_schulz(x, coefficients, n_steps)
    else:
        at_once = n_steps if dtype is torch.float32 else _STEPS_IN_16_BITS
        for first in range(0, n_steps, at_once):
            x = _steps_on_gram(x, coefficients, min(at_once, n_steps - first))
    return x.mT if matrix.shape[-2] > matrix.shape[-1] else x


def newton_schulz(x: torch.Tensor, coefficients: tuple[float, float, float], n_steps: int) -> torch.Tensor:
    """Set x to (a I + b G + c G^2) x with G = x x^T, as often as asked. (M, N) or (B, M, N), M <= N."""
    a, b, c = coefficients
    added = torch.addmm if x.ndim == 2 else torch.baddbmm
    for _ in range(n_steps):
        gram = x @ x.mT
        x = added(x, added(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _steps_on_gram(x: torch.Tensor, coefficients: tuple[float, float, float], n_steps: int) -> torch.Tensor:
    """The same, with (M, M) products alone between the first and the last.

    Each step multiplies x by a polynomial q in its own Gram matrix, which then is q G q, since the two
    commute; so x itself is needed only at the end.
    """
    a, b, c = coefficients
    added = torch.addmm if x.ndim == 2 else torch.baddbmm
    factor = gram = x @ x.mT
    for step in range(n_steps):
        q = added(gram, gram, gram, beta=b, alpha=c)
        q.diagonal(dim1=-2, dim2=-1).add_(a)
        factor = q @ factor if step else q
        if step + 1 < n_steps:
            gram = q @ gram @ q
    return factor @ x
