"""What a checkpoint holds, and the checks that keep it plain.

A payload is one dict of tensors and plain Python values, so that ``torch.load(weights_only=True)`` opens
it. It is checked on the way out (a file that would not load again is not written) and on the way in; of a
sketch of one (contents.py), which is made without torch, the same is checked.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, TypeGuard

from nanothink.checkpoints.archive import damaged
from nanothink.checkpoints.contents import TensorSketch

if TYPE_CHECKING:
    from torch import Tensor

FORMAT_VERSION = 3
"""2: with the split and the hashes of the documents that were trained on."""

_MAX_NODES = 2_000_000
"""Values in a payload. Shared containers let a small pickle unfold to more than any memory holds."""


class ModelPayload(TypedDict):
    """What a model is, without what trains it further."""

    kind: str
    """Kind of model, as in ``models.MODEL_KINDS``."""

    model_state: dict[str, Tensor]
    """Parameters and persistent buffers, without wrapper prefixes. Tied ones appear under each name."""

    config: dict[str, Any]
    """The resolved config as plain JSON values."""

    tokenizer: dict[str, str]
    """``Tokenizer.to_state()``."""

    split: dict[str, Any]
    """``SplitRecord.to_state()``: the rule of the split, and the hashes of all text that was trained on."""

    run: dict[str, Any]
    """Plain values about the run: its name, the ``TrainState``, what a diffuser learnt from,
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
    """What ``restore.pack_rng`` gives."""

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


def wrong_entry(payload: dict[Any, Any]) -> str | None:
    """The first required entry that is missing or of another type, in words."""
    for key, types in _REQUIRED.items():
        if key not in payload:
            return f"its entry '{key}' is missing"
        value = payload[key]
        if type(value) not in types and not (dict in types and isinstance(value, dict)):
            return f"its entry '{key}' is a {type(value).__name__}"
    for key, least in (("format_version", 1), ("step", 0), ("epoch", 0), ("position", 0)):
        if payload[key] < least:
            return f"its entry '{key}' is {payload[key]}"
    for name, tensor in payload["model_state"].items():
        if not isinstance(name, str) or not (isinstance(tensor, TensorSketch) or _is_tensor(tensor)):
            return f"its entry 'model_state' holds {name!r}, which is no tensor"
    for key in ("tokenizer", "run", "config", "split"):
        if not all(isinstance(name, str) for name in payload[key]):
            return f"its entry '{key}' has keys that are not strings"
    if not all(isinstance(value, str) for value in payload["tokenizer"].values()):
        return "its entry 'tokenizer' holds something that is no text"
    if not all(isinstance(section, dict) for section in payload["config"].values()):
        return "its entry 'config' is not made of sections"
    return None


def check_values(path: Path, payload: dict[str, Any]) -> None:
    """Refuse values that are no plain ones or tensors, and containers that unfold without end."""
    try:
        for value in _values(payload):
            if _is_tensor(value):
                if not _is_ordinary(value):
                    raise damaged(
                        path, f"it holds a tensor of an unknown sort ({value.layout}, {value.device})"
                    )
                if value.numel() * value.element_size() > value.untyped_storage().nbytes():
                    raise damaged(
                        path, f"it holds a tensor of shape {tuple(value.shape)} but not the data for it"
                    )
            elif not isinstance(value, (str, int, float, dict, list, tuple, type(None), TensorSketch)):
                raise damaged(path, f"it holds a {type(value).__name__}, which no checkpoint does")
    except _Endless:
        raise damaged(path, "its values are nested or repeated without end") from None
    for key in ("config", "run", "early_stopping"):
        if any(isinstance(value, TensorSketch) or _is_tensor(value) for value in _values(payload[key])):
            raise damaged(path, f"its entry '{key}' holds a tensor, which is due elsewhere")


def _is_tensor(value: Any) -> TypeGuard[Tensor]:
    """Whether it is a tensor; without importing torch, since there is none where that was not imported."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _is_ordinary(tensor: Tensor) -> bool:
    import torch

    return tensor.layout == torch.strided and tensor.device.type != "meta" and not tensor.is_quantized


class _Endless(Exception):
    pass


def _values(root: Any) -> Iterator[Any]:
    """``root`` and all that is in it, down to what is no container."""
    # A stack of iterators: a list that holds itself, or one repeated a billion times, grows no list here.
    pending: list[Iterator[Any]] = [iter((root,))]
    n_nodes, end = 0, object()
    while pending:
        value = next(pending[-1], end)
        if value is end:
            pending.pop()
            continue
        n_nodes += 1
        if n_nodes > _MAX_NODES or len(pending) > 100:
            raise _Endless
        yield value
        if isinstance(value, dict):
            pending.append(iter(value.values()))
        elif isinstance(value, (list, tuple)):
            pending.append(iter(value))


def plain(value: Any, where: str) -> Any:
    """``value`` with nothing in it but plain containers, plain scalars and tensors of just their own data.

    Tensors keep sharing their storage, so that tied parameters are stored once.
    """
    if _is_tensor(value):
        import torch

        if not _is_ordinary(value):
            raise TypeError(f"{where} is a tensor that can't be saved ({value.layout}, {value.device})")
        tensor = value.detach()
        if type(tensor) is not torch.Tensor:
            raise TypeError(f"{where} is a {type(value).__name__}, not a plain tensor")
        if tensor.numel() * tensor.element_size() != tensor.untyped_storage().nbytes():
            return tensor.clone(memory_format=torch.contiguous_format)  # a view: leave the rest behind
        return tensor
    if isinstance(value, dict):
        for key in value:
            if type(key) not in (str, int):
                raise TypeError(f"{where} has the key {key!r} of type {type(key).__name__}; use str or int")
        return {key: plain(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
        return tuple(items) if isinstance(value, tuple) else items
    if value is None or isinstance(value, bool):
        return value
    for scalar in (int, float, str):  # numpy.float64 is a float, and would be pickled as numpy's
        if isinstance(value, scalar):
            return scalar(value)
    raise TypeError(f"{where} is a {type(value).__name__}; a checkpoint holds tensors and plain values only")


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
