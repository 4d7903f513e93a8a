"""Contents of a checkpoint, and their checks.

A payload is one dict of tensors and plain Python values, so that ``torch.load(weights_only=True)`` opens
it. It is checked when it is written (a file that would not load again is not written) and when it is read.
This module imports torch on first use: a listing needs none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypedDict, TypeGuard

if TYPE_CHECKING:
    from torch import Tensor

FORMAT_VERSION = 3
"""2: with the split and the hashes of the documents that were trained on."""


class ModelPayload(TypedDict):
    """A model without its training state."""

    kind: str
    """Kind of model, a name in ``models.EXPERTS``, or ``models.COMBINED``."""

    model_state: dict[str, Tensor]
    """Parameters and persistent buffers, without wrapper prefixes. Tied ones appear under each name."""

    config: dict[str, Any]
    """The resolved config as plain JSON values."""

    tokenizer: dict[str, str]
    """``Tokenizer.to_state()``."""

    split: dict[str, Any]
    """``SplitRecord.to_state()``: the rule of the split, and the hashes of all text that was trained on."""

    run: dict[str, Any]
    """Plain values about the run: its name, the ``TrainState``, ``logit_scale``, what a diffuser learnt from,
    the names, kinds and settings of the experts inside a combined model."""


class CheckpointPayload(ModelPayload):
    """Everything that changes the next step. Tensors and plain Python values only."""

    format_version: int
    """``FORMAT_VERSION`` of the NanoThink that wrote it."""

    optimizer_state: dict[str, Any]
    """Nested dicts and lists of tensors and scalars."""

    step: int
    """Optimizer steps done."""

    epoch: int
    """Epochs completed."""

    position: int
    """Blocks consumed since the start of the run, over all processes."""

    amp_scaler: dict[str, Any] | None
    """State of the GradScaler, when there is one."""

    rng: dict[str, Any]
    """Random states, as ``restore.pack_rng`` gives them."""

    early_stopping: dict[str, Any]
    """``best_loss`` (float or None, nats per token) and ``evals_without_improvement`` (int)."""

    best_loss: float | None
    """Lowest validation loss so far, in nats per token."""

    data_fingerprint: str
    """Fingerprint of the tokenised corpus that the positions refer to."""


_REQUIRED: dict[str, tuple[type, ...]] = {
    "format_version": (int,),
    "kind": (str,),
    "model_state": (dict,),
    "optimizer_state": (dict,),
    "step": (int,),
    "epoch": (int,),
    "position": (int,),
    "amp_scaler": (dict, type(None)),
    "rng": (dict,),
    "early_stopping": (dict,),
    "best_loss": (float, int, type(None)),
    "config": (dict,),
    "tokenizer": (dict,),
    "data_fingerprint": (str,),
    "split": (dict,),
    "run": (dict,),
}


_SUMMARY = ("format_version", "kind", "step", "epoch", "position", "best_loss")
"""Entries that a summary repeats; it has ``name`` and ``n_parameters`` besides."""


def wrong_entry(payload: Mapping[Any, Any]) -> str | None:
    """Describe the first required entry that is missing or of another type; None if there is none."""
    if wrong := _wrong_type(payload, _REQUIRED):
        return wrong
    for name, tensor in payload["model_state"].items():
        if not isinstance(name, str) or not _is_tensor(tensor):
            return f"its entry 'model_state' holds {name!r}, which is no tensor"
    for key in ("tokenizer", "run", "config", "split"):
        if not all(isinstance(name, str) for name in payload[key]):
            return f"its entry '{key}' has keys that are not strings"
    if not all(isinstance(value, str) for value in payload["tokenizer"].values()):
        return "its entry 'tokenizer' holds something that is no text"
    if not all(isinstance(section, dict) for section in payload["config"].values()):
        return "its entry 'config' is not made of sections"
    return None


def wrong_in_summary(summary: Mapping[str, Any]) -> str | None:
    """``wrong_entry`` of what ``summary_of`` gives."""
    if not isinstance(summary.get("name"), (str, type(None))) or type(summary.get("n_parameters")) is not int:
        return "its name or number of parameters is missing"
    if surplus := summary.keys() - {*_SUMMARY, "name", "n_parameters"}:
        return f"it has a surplus entry '{min(surplus)}'"
    return _wrong_type(summary, _SUMMARY)


def _wrong_type(values: Mapping[Any, Any], keys: Iterable[str]) -> str | None:
    for key in keys:
        if key not in values:
            return f"its entry '{key}' is missing"
        value, types = values[key], _REQUIRED[key]
        if type(value) not in types and not (dict in types and isinstance(value, dict)):
            return f"its entry '{key}' is a {type(value).__name__}"
    for key, least in (("format_version", 1), ("step", 0), ("epoch", 0), ("position", 0)):
        if values[key] < least:
            return f"its entry '{key}' is {values[key]}"
    return None


def summary_of(payload: Mapping[str, Any]) -> dict[str, Any]:
    """The values that a listing shows: plain ones, tied parameters counted once."""
    name = payload["run"].get("name")
    sizes = {
        (tensor.data_ptr(), tensor.shape, tensor.stride()): tensor.numel()
        for tensor in payload["model_state"].values()
    }
    return {
        **{key: payload[key] for key in _SUMMARY},
        "name": name if isinstance(name, str) else None,
        "n_parameters": sum(sizes.values()),
    }


def _is_tensor(value: Any) -> TypeGuard[Tensor]:
    import torch

    return isinstance(value, torch.Tensor)


def plain(value: Any, where: str) -> Any:
    """Copy of ``value`` with plain containers, plain scalars, and tensors of their own data only.

    Tensors keep sharing their storage, so that tied parameters are stored once.
    """
    import torch

    if value is None or isinstance(value, bool):
        return value
    for scalar in (int, float, str):  # numpy.float64 is a float, and would be pickled as numpy's
        if isinstance(value, scalar):
            return scalar(value)
    if isinstance(value, dict):
        for key in value:
            if type(key) not in (str, int):
                raise TypeError(f"{where} has the key {key!r} of type {type(key).__name__}; use str or int")
        return {key: plain(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
        return tuple(items) if isinstance(value, tuple) else items
    if not isinstance(value, torch.Tensor):
        what = f"{where} is a {type(value).__name__}"
        raise TypeError(f"{what}; a checkpoint holds tensors and plain values only")
    if value.layout != torch.strided or value.device.type == "meta" or value.is_quantized:
        raise TypeError(f"{where} is a tensor that can't be saved ({value.layout}, {value.device})")
    tensor = value.detach()
    if type(tensor) is not torch.Tensor:
        raise TypeError(f"{where} is a {type(value).__name__}, not a plain tensor")
    if tensor.numel() * tensor.element_size() != tensor.untyped_storage().nbytes():
        return tensor.clone(memory_format=torch.contiguous_format)  # a view: leave the rest behind
    return tensor


def tensor_bytes(value: Any) -> int:
    """Bytes of all tensors in ``value``, shared storages once."""
    storages: dict[int, int] = {}

    def visit(node: Any) -> None:
        if _is_tensor(node):
            storage = node.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(node, (dict, list, tuple)):
            for item in node.values() if isinstance(node, dict) else node:
                visit(item)

    visit(value)
    return sum(storages.values())
