"""Low-rank adapters (Hu et al. 2022, "LoRA", section 4.1): ``W x + s B A x`` with a frozen W.

A begins random and B at zero, so an adapted model begins as the model itself, bit for bit. The product is
computed in two thin steps and W gets no gradient, which saves a third of a training step. ``merged`` is the
weight that one product would take: for checkpoints that are loaded for use, and for steps of one token.

Parameters are named as in ``peft``: ``lora_A`` and ``lora_B`` beside ``weight``. The scale s = alpha / R is
a setting and no part of the state dict.

Shapes: I inputs, O outputs, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ADAPTED = frozenset(f"{part}_proj" for part in ("q", "k", "v", "o", "gate", "up", "down", "in", "x", "out"))
"""Linear layers that get an adapter: all of attention and feed-forward, and those of Mamba's mixer that
``peft`` adapts. Tables, norms, convolutions and step sizes stay as they are."""

FACTORS = (".lora_A", ".lora_B")
"""Ends of the names of an adapter's parameters."""


class AdaptedLinear(nn.Linear):
    """A frozen linear layer with a low-rank adapter.

    Args:
        frozen: the layer; its parameters are shared, not copied, and get no gradient any more.
        rank: R.
        scale: s.
    """

    def __init__(self, frozen: nn.Linear, rank: int, scale: float) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = frozen.in_features, frozen.out_features
        self.weight, self.bias = frozen.weight, frozen.bias
        self.scale = scale
        self.lora_A = nn.Parameter(torch.empty(rank, self.in_features))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # peft's

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        return self.adapted(F.linear(x, weight_for(x, self), self.bias), F.linear(x, self.lora_A))

    def adapted(self, output: Tensor, inside: Tensor) -> Tensor:
        """(..., O), (..., R): the outputs of W and of A -> the layer's."""
        return output + self.scale * F.linear(inside, self.lora_B)

    def merged(self) -> Tensor:
        """(O, I) without gradients: ``W + s B A``."""
        return merged(self.weight, self.lora_A, self.lora_B, self.scale)


@torch.no_grad()
def merged(weight: Tensor, factor_a: Tensor, factor_b: Tensor, scale: float) -> Tensor:
    """``W + s B A``, added in float32 and returned in the type of ``weight``."""
    sum_ = torch.addmm(weight.float(), factor_b.float(), factor_a.float(), alpha=scale)
    return sum_.to(weight.dtype)


def weight_of(layer: nn.Linear) -> Tensor:
    """The weight of a layer as one product takes it; without gradients where it has an adapter."""
    return layer.merged() if isinstance(layer, AdaptedLinear) else layer.weight


def add_adapters(model: nn.Module, rank: int, scale: float) -> None:
    """Freeze ``model`` and give an adapter of this rank to every layer in ``ADAPTED``.

    A follows torch's global seed.
    """
    model.requires_grad_(False)
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if name in ADAPTED and isinstance(layer, nn.Linear):
                setattr(parent, name, AdaptedLinear(layer, rank, scale))


def largest_rank(shapes: Iterable[tuple[str, torch.Size]]) -> int:
    """Smaller side of the smallest adapted matrix among parameters by name; 0 if there is none."""
    sides = [min(shape) for name, shape in shapes if in_blocks(name) and len(shape) == 2]
    return min(sides, default=0)


def in_blocks(name: str) -> bool:
    """True for the name of a weight of one of the layers in ``ADAPTED``."""
    parent, _, last = name.rpartition(".")
    return last == "weight" and parent.rpartition(".")[2] in ADAPTED


def keep_bfloat16(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Make weights of the layers in ``ADAPTED`` bfloat16 where they are so in ``weights``, with any values.

    For frozen models: half the memory, and no number is lost that was published. Products in float32 widen
    them as they are read; everything else of a model is float32.
    """
    for name, layer in model.named_modules():
        given = weights.get(f"{name}.weight")
        if not isinstance(layer, nn.Linear) or given is None or not in_blocks(f"{name}.weight"):
            continue
        if given.dtype is torch.bfloat16 and layer.weight.dtype is not torch.bfloat16:
            empty = torch.empty_like(layer.weight, dtype=torch.bfloat16)
            layer.weight = nn.Parameter(empty, requires_grad=layer.weight.requires_grad)


def weight_for(x: Tensor, layer: nn.Linear) -> Tensor:
    """A layer's weight in the type of its input, but for autocast, which sees to that itself."""
    weight = layer.weight
    if weight.dtype is x.dtype or torch.is_autocast_enabled(x.device.type):
        return weight
    return weight.to(x.dtype)
