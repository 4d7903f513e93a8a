"""Parameter groups with rates of their own, Muon beside AdamW, and the schedule.

One learning rate, ``lr``, scales everything; each group has a multiplier. Hidden matrices go to Muon
(Jordan et al. 2024): momentum, orthogonalised by a few Newton-Schulz steps, scaled so that the update
has AdamW's root mean square (Liu et al. 2025, "Muon is scalable for LLM training", section 2.2), which
lets one ``lr`` keep its meaning for both. Embeddings, head, norms and the rest go to AdamW.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer

from nanothink.config import TrainConfig, TrainExpertConfig
from nanothink.errors import CheckpointDamagedError
from nanothink.models.precision import DTYPES

if TYPE_CHECKING:
    from nanothink.training.muon_rows import MatrixOwners
    from nanothink.training.sharding import Placement

GroupedParameters = Mapping[str, Sequence[tuple[str, nn.Parameter]]]

ReadMoments = Callable[[Mapping[tuple[str, str, str], torch.Tensor]], None]
"""Fills moments by optimizer, parameter and name of the moment."""


class GroupedOptimizer:
    """Several torch optimizers that step as one.

    Args:
        groups: named parameters by role: "matrices", "embeddings", "head", "adapters", "other".
        config: rates, multipliers, decay.
        placement: whose ``groups`` these are, where several processes share them out.
    """

    def __init__(
        self, groups: GroupedParameters, config: TrainConfig, placement: Placement | None = None
    ) -> None:
        self._placement = placement
        multipliers = {
            "matrices": config.lr_matrices,
            "embeddings": config.lr_embeddings,
            "head": config.lr_head,
            "other": config.lr_other,
        }
        if isinstance(config, TrainExpertConfig):
            multipliers["adapters"] = config.lr_adapters
        unknown = {role for role, named in groups.items() if named} - set(multipliers)
        if unknown:
            raise ValueError(f"unknown parameter groups: {sorted(unknown)}")
        adamw_groups: list[dict[str, Any]] = []
        muon_groups: list[dict[str, Any]] = []
        for role, named in groups.items():
            if not named:
                continue
            use_muon = role == "matrices" and config.optimizer == "muon"
            peak_lr = config.lr * multipliers[role]
            group = {
                "params": [parameter for _, parameter in named],
                "names": [name for name, _ in named],
                "role": role,
                "peak_lr": peak_lr,
                "lr": peak_lr,
                "weight_decay": _decay(role, config),
            }
            (muon_groups if use_muon else adamw_groups).append(group)
        self.optimizers: dict[str, Optimizer] = {}
        if adamw_groups:
            # fused: one pass over each tensor instead of a dozen; the same arithmetic
            fused = all(p.device.type in {"cpu", "cuda"} for g in adamw_groups for p in g["params"])
            self.optimizers["adamw"] = EagerAdamW(adamw_groups, betas=config.betas, eps=1e-8, fused=fused)
        if muon_groups:
            # a run has settled the type (matmul_types.py); float32 is the exact one
            dtype = DTYPES.get(config.muon_dtype, torch.float32)
            self.optimizers["muon"] = FastMuon(
                muon_groups,
                momentum=config.momentum,
                adjust_lr_fn="match_rms_adamw",
                dtype=dtype,
                owners=placement.owners if placement is not None else None,
            )

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for o in self.optimizers.values() for group in o.param_groups for p in group["params"]]

    def release(self) -> None:
        """Give the memory of gradients and moments back: training is over."""
        self.zero_grad()
        for optimizer in self.optimizers.values():
            optimizer.state.clear()

    def set_fraction(self, fraction: float) -> None:
        """Set every group's rate to ``fraction`` of its peak."""
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * fraction

    @property
    def rates(self) -> dict[str, float]:
        """Learning rate of each group of parameters, as the next step uses it."""
        groups = [group for optimizer in self.optimizers.values() for group in optimizer.param_groups]
        return {group["role"]: group["lr"] for group in groups}

    def step(self, scaler: torch.amp.GradScaler | None = None) -> None:
        for optimizer in self.optimizers.values():
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)

    def unscale(self, scaler: torch.amp.GradScaler) -> None:
        for optimizer in self.optimizers.values():
            scaler.unscale_(optimizer)

    def zero_grad(self) -> None:
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)

    def is_finite(self) -> bool:
        """True if every parameter and every moment is finite, of those in this process."""
        tensors = [
            value
            for optimizer in self.optimizers.values()
            for moments in optimizer.state.values()
            for value in moments.values()
            if isinstance(value, torch.Tensor)
        ]
        found = [torch.isfinite(t).all().cpu() for t in (*self.parameters, *tensors)]
        return bool(torch.stack(found).all())

    def state_dict(self) -> dict[str, Any]:
        """The state of each optimizer; a moment that several processes hold is one tensor of all of them."""
        states = {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}
        if self._placement is not None:
            for state in states.values():
                for index, name in _names_by_index(state).items():
                    state["state"][index] = {
                        key: value if key == "step" else self._together(name, value)
                        for key, value in state["state"].get(index, {}).items()
                    }
        return states

    def load_state_dict(self, state: Mapping[str, Any], read: ReadMoments | None = None) -> list[str]:
        """Load the moments of ``state``; rates stay as this run's config has them.

        Parameters are matched by name, so a state survives added and removed parameters. Returns the
        names whose moments were not found or had another shape, and so start at zero. ``read`` fills
        moments of which ``state`` has shape and type alone.

        Raises CheckpointDamagedError when ``state`` isn't what ``state_dict`` gives.
        """
        try:
            return self._load(state, read)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointDamagedError(
                f"the optimizer's state in this checkpoint is damaged ({error}). Use another checkpoint"
            ) from error

    def _load(self, state: Mapping[str, Any], read: ReadMoments | None) -> list[str]:
        fresh: list[str] = []
        wanted: dict[tuple[str, str, str], torch.Tensor] = {}
        loaded = []
        for name, optimizer in self.optimizers.items():
            saved = state.get(name, {"state": {}, "param_groups": []})
            by_name: dict[str, Any] = {}
            for group in saved["param_groups"]:
                for parameter_name, index in zip(group["names"], group["params"], strict=True):
                    if index in saved["state"]:
                        by_name[parameter_name] = saved["state"][index]
            own = optimizer.state_dict()
            own["state"] = {}
            for group, live in zip(own["param_groups"], optimizer.param_groups, strict=True):
                for parameter_name, index, parameter in zip(
                    group["names"], group["params"], live["params"], strict=True
                ):
                    moments = by_name.get(parameter_name, {})
                    if _fits(moments, self._shape(parameter_name, parameter), _MOMENTS[name]):
                        # Copies: these may lie in a mapped file.
                        own["state"][index] = {
                            key: torch.zeros_like(parameter, dtype=value.dtype)
                            if value.is_meta
                            else self._rows(parameter_name, value).clone()
                            for key, value in moments.items()
                        }
                        wanted |= {
                            (name, parameter_name, key): self._together(
                                parameter_name, own["state"][index][key]
                            )
                            for key, value in moments.items()
                            if value.is_meta
                        }
                    else:
                        fresh.append(parameter_name)
            loaded.append((optimizer, own))
        if wanted and read is not None:
            read(wanted)
        for optimizer, own in loaded:
            optimizer.load_state_dict(own)
        return fresh

    def _together(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        return rows if self._placement is None else self._placement.distributed(name, rows)

    def _shape(self, name: str, parameter: nn.Parameter) -> torch.Size:
        return parameter.shape if self._placement is None else self._placement.shape(name)

    def _rows(self, name: str, value: torch.Tensor) -> torch.Tensor:
        return value if self._placement is None or not value.ndim else self._placement.rows(name, value)


def _decay(role: str, config: TrainConfig) -> float:
    """Weight decay of a group per unit of its own rate; the tables' is set per unit of the matrices' rate."""
    if role in ("matrices", "adapters"):
        return config.weight_decay
    own_rate = {"embeddings": config.lr_embeddings, "head": config.lr_head}.get(role, 0.0)
    return config.weight_decay_tables * config.lr_matrices / own_rate if own_rate else 0.0


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

            def orthogonalise(matrix: torch.Tensor, group: dict[str, Any] = group) -> torch.Tensor:
                settings = group["ns_coefficients"], group["ns_steps"], group["eps"]
                return orthogonalised(matrix, *settings, self.dtype)

            if self.owners is None:
                for parameter in moving:
                    update = orthogonalise(self._look_ahead(parameter, group["momentum"]))
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


NS_COEFFICIENTS, NS_STEPS = (3.4445, -4.7750, 2.0315), 5  # torch's, which are those of Jordan et al.


_STEPS_IN_16_BITS = 3
"""Steps on one Gram matrix in a 16-bit type; more of them multiply its rounding (docs/log.md)."""


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


_MOMENTS = {"adamw": {"step", "exp_avg", "exp_avg_sq"}, "muon": {"momentum_buffer"}}
"""State that each optimizer keeps for a parameter: a count, else tensors of its shape."""


def _names_by_index(state: Mapping[str, Any]) -> dict[int, str]:
    """Names of the parameters by their number in a torch optimizer's state."""
    return {
        index: name
        for group in state["param_groups"]
        for name, index in zip(group["names"], group["params"], strict=True)
    }


def _fits(moments: Any, shape: torch.Size, names: set[str]) -> bool:
    return (
        isinstance(moments, Mapping)
        and set(moments) == names
        and all(
            isinstance(value, torch.Tensor)
            and value.is_floating_point()
            and value.shape == (() if name == "step" else shape)
            for name, value in moments.items()
        )
    )


def effective_warmup(config: TrainConfig, total_steps: int) -> int:
    """Warm-up in optimizer steps: as configured, but a tenth of the run where the run is short."""
    if total_steps < 10 * config.warmup_steps:
        return total_steps // 10
    return config.warmup_steps


def learning_rate_fraction(step: int, total_steps: int, config: TrainConfig) -> float:
    """Rate of optimizer step ``step`` (counted from 0), as a fraction of the peak. A pure function.

    Linear warm-up that reaches 1 on its last step, then cosine to ``lr_min_fraction`` at ``total_steps``
    (Loshchilov & Hutter 2017), or flat until the last 40 % and linear from there.
    """
    warmup = effective_warmup(config, total_steps)
    if step < warmup:
        return (step + 1) / warmup
    floor = config.lr_min_fraction
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    if config.schedule == "cosine":
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
    decay = 0.4
    return 1.0 if progress <= 1 - decay else floor + (1 - floor) * (1 - progress) / decay
