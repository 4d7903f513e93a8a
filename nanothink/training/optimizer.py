"""Parameter groups with rates of their own, Muon beside AdamW, and the schedule.

One learning rate, ``lr``, scales everything; each group has a multiplier. Hidden matrices go to Muon
(Jordan et al. 2024): momentum, orthogonalised by a few Newton-Schulz steps, scaled so that the update
has AdamW's root mean square (Liu et al. 2025, "Muon is scalable for LLM training", section 2.2), which
lets one ``lr`` keep its meaning for both. Embeddings, head, norms and the rest go to AdamW.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from nanothink.config import TrainConfig, TrainExpertConfig
from nanothink.errors import CheckpointDamagedError
from nanothink.models.precision import DTYPES
from nanothink.training.muon import EagerAdamW, FastMuon

if TYPE_CHECKING:
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
