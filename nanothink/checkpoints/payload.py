"""Contents of a checkpoint, and their checks.

A payload is one dict of tensors and plain Python values, so that ``torch.load(weights_only=True)`` opens
it. It is checked when it is written (a file that would not load again is not written) and when it is read.
This module imports torch on first use: a listing needs none.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, with_config
from typing_extensions import TypedDict  # pydantic asks for it before Python 3.12

from nanothink.wording import fault

if TYPE_CHECKING:
    from torch import Tensor

FORMAT_VERSION = 3
"""2: with the split and the hashes of the documents that were trained on."""

_Count = Annotated[int, Field(ge=0)]


@with_config(ConfigDict(strict=True, arbitrary_types_allowed=True))
class ModelPayload(TypedDict):
    """A model without its training state."""

    kind: str
    """Kind of model, a name in ``models.EXPERTS``, or ``models.COMBINED``."""

    model_state: dict[str, Tensor]
    """Parameters and persistent buffers, without wrapper prefixes. Tied ones appear under each name."""

    config: dict[str, dict[str, Any]]
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

    format_version: Annotated[int, Field(ge=1)]
    """``FORMAT_VERSION`` of the NanoThink that wrote it."""

    optimizer_state: dict[str, Any]
    """Nested dicts and lists of tensors and scalars."""

    step: _Count
    """Optimizer steps done."""

    epoch: _Count
    """Epochs completed."""

    position: _Count
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


@with_config(ConfigDict(strict=True, extra="forbid"))
class Summary(TypedDict):
    """The values that a listing shows of a checkpoint."""

    format_version: Annotated[int, Field(ge=1)]
    kind: str
    step: _Count
    epoch: _Count
    position: _Count
    best_loss: float | None
    name: str | None
    """Name of the run."""
    n_parameters: int
    """Numbers in ``model_state``, buffers included, tied ones counted once."""


_SUMMARIES = TypeAdapter(Summary)


@functools.cache
def _payloads() -> TypeAdapter[CheckpointPayload]:
    from torch import Tensor  # noqa: F401  pydantic looks it up here

    return TypeAdapter(CheckpointPayload)


def wrong_entry(payload: Mapping[Any, Any]) -> str | None:
    """Describe the first entry that is missing or of another type; None if there is none."""
    return fault(_payloads(), payload)


def wrong_in_summary(summary: Mapping[str, Any]) -> str | None:
    """``wrong_entry`` of a summary."""
    return fault(_SUMMARIES, summary)


def summary_of(payload: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of ``Summary``."""
    name = payload["run"].get("name")
    sizes = {
        (tensor.data_ptr(), tensor.shape, tensor.stride()): tensor.numel()
        for tensor in payload["model_state"].values()
    }
    own = {"name": name if isinstance(name, str) else None, "n_parameters": sum(sizes.values())}
    return {entry: own[entry] if entry in own else payload[entry] for entry in Summary.__annotations__}


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
    from torch import Tensor

    storages: dict[int, int] = {}

    def visit(node: Any) -> None:
        if isinstance(node, Tensor):
            storage = node.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(node, (dict, list, tuple)):
            for item in node.values() if isinstance(node, dict) else node:
                visit(item)

    visit(value)
    return sum(storages.values())
