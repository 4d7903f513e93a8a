"""Conversion of live objects to the entries of a checkpoint and back."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from nanothink.checkpoints.payload import ModelPayload
from nanothink.config import TrainExpertConfig
from nanothink.errors import CheckpointDamagedError, CheckpointMismatchError
from nanothink.models.contract import LanguageModel
from nanothink.models.joint_gate import GATE_PREFIX, JointGate
from nanothink.models.low_rank import FACTORS, keep_bfloat16, merged
from nanothink.suggestions import suggest
from nanothink.wording import counted, some_of

_LISTED = 8
"""Names shown per line of a report."""


@dataclass(frozen=True, slots=True)
class LoadReport:
    """Differences that ``restore_model`` found; empty tuples if everything is as saved."""

    missing: tuple[str, ...]
    """Names in the model and not in the file: kept as they were."""
    surplus: tuple[str, ...]
    """Names in the file and not in the model: ignored."""
    reshaped: tuple[str, ...]
    """Names in both of different shape or sort, each with the reason: kept as they were."""
    converted: tuple[str, ...]
    """Names loaded into another floating-point type, each with both types."""
    n_fitting: int
    """Numbers of the model that came from the file; tied ones counted once."""
    n_total: int
    """Numbers in the model's state; tied ones counted once."""

    @property
    def complete(self) -> bool:
        """True if every weight of the model and of the file found its place."""
        return not (self.missing or self.surplus or self.reshaped)

    @property
    def exact(self) -> bool:
        """True if the model is bit for bit as it was saved."""
        return self.complete and not self.converted

    def lines(self) -> list[str]:
        """One line for each kind of difference; none if exact."""
        kinds = (
            (self.missing, "not in the checkpoint, kept as initialised"),
            (self.surplus, "in the checkpoint only, ignored"),
            (self.reshaped, "of another shape or sort, kept as initialised"),
            (self.converted, "converted to another type"),
        )
        lines = [f"{len(names)} {what}: {some_of(names, _LISTED)}" for names, what in kinds if names]
        if self.n_fitting < self.n_total:
            lines.append(f"{self.n_fitting:,} of {self.n_total:,} parameters were restored")
        return lines


def model_state(model: nn.Module, *, keep: bool = True) -> dict[str, Tensor]:
    """Parameters and persistent buffers on the CPU, contiguous, under names without wrapper prefixes.

    Not a snapshot: on a CPU the tensors are the live ones, to be written before the next step. Copying them
    would double the memory of the model for nothing. Tied parameters appear under each of their
    names and share their storage, so the file holds them once. ``keep``: see ``gathered``.
    """
    state: dict[str, Tensor] = {}
    copies: dict[tuple[object, ...], Tensor] = {}
    for name, tensor in model.state_dict().items():
        key = _identity(tensor)
        if key not in copies:
            copies[key] = gathered(tensor, keep=keep).detach().to("cpu").contiguous()
        state[_bare(name)] = copies[key]
    if isinstance(model, LanguageModel) and model.joint_gate is not None:
        gate = model.joint_gate.weights.items()
        state |= {f"{GATE_PREFIX}{name}": weight.detach().cpu().contiguous() for name, weight in gate}
    return state


def gathered(tensor: Tensor, *, keep: bool = True) -> Tensor:
    """The whole of a tensor that several processes hold; every one of them must call it.

    Args:
        keep: False in a process that only helps: it gets an empty tensor.
    """
    if not hasattr(tensor, "full_tensor"):
        return tensor
    whole: Tensor = tensor.full_tensor()
    return whole if keep else whole.new_empty(0)


def rows_of(tensor: Tensor) -> Tensor:
    """The rows of a tensor that are in this process."""
    own: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return own


def rows_like(whole: Tensor, target: Tensor) -> Tensor:
    """The part of ``whole`` that lies where this process's rows of ``target`` do; nothing is sent."""
    if not hasattr(target, "to_local"):
        return whole
    from torch.distributed.tensor import DTensor, distribute_tensor

    like = cast(DTensor, target)
    return rows_of(distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None))


Read = Callable[[Mapping[str, Tensor]], None]
"""Fills tensors by name, of distributed ones the rows of this process."""


def restore_model(
    model: nn.Module, payload: ModelPayload, *, expect_kind: str, path: Path, read: Read | None = None
) -> LoadReport:
    """Load the tensors that fit, as ``strict=False`` does, also where shapes differ, and report the rest.

    The scale of the logits and the joint gate come along. Low-rank adapters become a part of the weights
    unless the model has them too, which then is to be trained further. Nothing is changed unless everything
    below holds. ``path`` is for the messages. ``read`` fills the model's tensors where those of the payload
    have shape and type alone.

    Raises CheckpointMismatchError when the file is of another kind, or when less than half of the model's
    numbers fit, since that is another model of the same kind.
    """
    kind = payload["kind"]
    if kind != expect_kind:
        raise CheckpointMismatchError(
            f"{path}: is a checkpoint of kind '{kind}', not '{expect_kind}'. Resume it with "
            f"{suggest('resume', path)}"
        )
    saved: dict[str, Tensor] = {}
    for name, tensor in payload["model_state"].items():
        if _bare(name) in saved:
            raise CheckpointDamagedError(
                f"{path}: holds '{_bare(name)}' twice, under different wrapper prefixes. "
                f"Save it again without them"
            )
        saved[_bare(name)] = tensor
    if read is not None:  # what is no parameter of the model is small, and may be needed in full
        read(
            here := {name: torch.empty_like(t, device="cpu") for name, t in saved.items() if _is_beside(name)}
        )
        saved |= here
    gate = {name: saved.pop(name) for name in list(saved) if name.startswith(GATE_PREFIX)}
    named = {_bare(name) for name in model.state_dict()}
    factors = {name: saved.pop(name) for name in list(saved) if name.endswith(FACTORS) and name not in named}
    if not factors:  # what they add is finer than the digits of a bfloat16
        keep_bfloat16(model, saved)
    own = {_bare(name): tensor for name, tensor in model.state_dict().items()}

    fitting: dict[tuple[object, ...], tuple[Tensor, Tensor]] = {}
    missing, reshaped, converted = [], [], []
    for name, target in own.items():
        source, key = saved.get(name), _identity(target)
        if source is None:
            missing.append((name, key))
        elif difference := _difference(source, target):
            reshaped.append(f"{name} ({difference})")
        elif key in fitting:
            if read is None and not torch.equal(fitting[key][1], source):
                reshaped.append(f"{name} (tied here, of its own in the checkpoint)")
        else:
            fitting[key] = (target, source)
            if source.dtype != target.dtype and f"{name.removesuffix('.weight')}{FACTORS[0]}" not in factors:
                converted.append(f"{name} ({_type(source)} → {_type(target)})")

    sizes = {_identity(target): target.numel() for target in own.values()}
    report = LoadReport(
        # one name of a tied pair is enough
        missing=tuple(name for name, key in missing if key not in fitting),
        surplus=tuple(name for name in saved if name not in own),
        reshaped=tuple(reshaped),
        converted=tuple(converted),
        n_fitting=sum(target.numel() for target, _ in fitting.values()),
        n_total=sum(sizes.values()),
    )
    if report.n_fitting * 2 < report.n_total:
        raise CheckpointMismatchError(
            f"{path}: hardly anything in it fits this model: {report.n_fitting:,} of {report.n_total:,} "
            f"parameters. {'. '.join(report.lines()[:-1])}. Use the settings it was trained with "
            f"({suggest('checkpoints show', path)}; {suggest('resume', path)} takes them from it)"
        )
    scale, joint_gate = _logit_scale(payload, path), _joint_gate(model, gate, path)
    adapters = _adapters(factors, own, payload, path)
    with torch.no_grad():
        if read is not None:
            read(
                {
                    name: target
                    for name, target in own.items()
                    if name in saved and _difference(saved[name], target) is None
                }
            )
        else:
            for target, source in fitting.values():
                rows_of(target).copy_(rows_like(source, target))
        for weight, factor_a, factor_b, adapter_scale in adapters:
            weight.copy_(merged(weight, factor_a, factor_b, adapter_scale))
    if isinstance(model, LanguageModel):
        model.logit_scale, model.joint_gate = scale, joint_gate
    return report


def _is_beside(name: str) -> bool:
    return name.startswith(GATE_PREFIX) or name.endswith(FACTORS)


def _adapters(
    factors: dict[str, Tensor], own: dict[str, Tensor], payload: ModelPayload, path: Path
) -> list[tuple[Tensor, Tensor, Tensor, float]]:
    """Weight, A, B and scale of each adapter in a file."""
    if not factors:
        return []
    settings = payload["config"].get(TrainExpertConfig.section, {})
    shape = {name: settings.get(name) for name in ("lora_rank", "lora_alpha")}
    found = []
    try:
        scale = TrainExpertConfig.model_validate(shape).lora_scale
        for layer in dict.fromkeys(name.rpartition(".")[0] for name in factors):
            weight, (factor_a, factor_b) = (
                own[f"{layer}.weight"],
                (factors[f"{layer}{end}"] for end in FACTORS),
            )
            if (factor_b.shape[0], factor_a.shape[1]) != weight.shape or shape["lora_rank"] != len(factor_a):
                raise ValueError(f"that of {layer} has another shape")
            found.append((weight, factor_a, factor_b, scale))
    except (LookupError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointDamagedError(
            f"{path}: its low-rank adapters do not fit it ({reason}). Use another checkpoint"
        ) from None
    return found


def _joint_gate(model: nn.Module, weights: dict[str, Tensor], path: Path) -> JointGate | None:
    if not weights or not isinstance(model, LanguageModel):
        return None
    named = {name.removeprefix(GATE_PREFIX): weight.float().clone() for name, weight in weights.items()}
    try:
        return JointGate.of_weights(named, len(model.expert_names), model.vocab_size)
    except ValueError as error:
        raise CheckpointDamagedError(f"{path}: {error}") from error


def _logit_scale(payload: ModelPayload, path: Path) -> float:
    """The scale that the model was calibrated to; 1 in an export, which has it in its weights."""
    scale = payload["run"].get("logit_scale", 1.0)
    if type(scale) is not float or not 0 < scale < math.inf:
        raise CheckpointDamagedError(f"{path}: the scale of its logits is {scale!r:.40}")
    return scale


def pack_rng() -> dict[str, Any]:
    """States of the global random generators: torch (CPU, CUDA), python, numpy; tensors and plain values."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "torch": torch.get_rng_state(),
        "cuda": cuda,
        "python": [version, list(internal), gauss],
        "numpy": [str(name), [int(key) for key in keys], int(position), int(has_gauss), float(cached)],
    }


def unpack_rng(state: dict[str, Any]) -> list[str]:
    """Set the global random generators; return a line for each that this machine cannot restore.

    Raises CheckpointDamagedError when ``state`` isn't what ``pack_rng`` gives.
    """
    try:
        version, internal, gauss = state["python"]
        name, keys, position, has_gauss, cached = state["numpy"]
        before = torch.get_rng_state()
        torch.set_rng_state(state["torch"].cpu())
        try:
            random.setstate((version, tuple(internal), gauss))
            np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
        except BaseException:
            torch.set_rng_state(before)
            raise
        saved = [tensor.cpu() for tensor in state["cuda"]]
    except (LookupError, ValueError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
        raise CheckpointDamagedError(
            f"the random generators' states in this checkpoint are damaged ({error}). Use another checkpoint"
        ) from error
    here = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for index, tensor in enumerate(saved[:here]):
        torch.cuda.set_rng_state(tensor, index)
    if len(saved) != here:
        gpus = counted(len(saved), "GPU")
        return [f"saved with {gpus}, resumed with {here}: random numbers on GPUs will differ"]
    return []


def _bare(name: str) -> str:
    """Parameter name without the prefixes of DDP, DataParallel and torch.compile."""
    name = name.replace("_orig_mod.", "")
    while name.startswith("module."):
        name = name.removeprefix("module.")
    return name


def _identity(tensor: Tensor) -> tuple[object, ...]:
    """Equal for two names of one tied parameter, different for any two other tensors with elements."""
    if tensor.numel() == 0:
        return (id(tensor),)
    if hasattr(tensor, "to_local"):  # the rows of this process have a place, the whole has none
        return (id(tensor),)
    return (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())


def _difference(source: Tensor, target: Tensor) -> str | None:
    """Why ``source`` can't go into ``target``."""
    if source.shape != target.shape:
        return f"{_shape(source)} in the checkpoint, {_shape(target)} here"
    if source.dtype != target.dtype and not (source.is_floating_point() and target.is_floating_point()):
        return f"{_type(source)} in the checkpoint, {_type(target)} here"
    return None


def _shape(tensor: Tensor) -> str:
    return "×".join(map(str, tensor.shape)) or "a single number"


def _type(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
