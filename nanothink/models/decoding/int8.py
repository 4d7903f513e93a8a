"""Matrices rounded to eight bits a number, for steps that read a quarter of the bytes.

A row w becomes round(127 w / max |w|) and one scale (absmax quantization; Dettmers et al. 2022, "LLM.int8()",
section 2.1). The model's own weights are rounded to the same values, float32 as before: prompts, evaluation
and a step without a compiler compute with what the codes mean, and only compiled steps read the codes. So
memory grows by a quarter; what falls is what a step reads.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

_LEAST_WIDTH = 32  # rows shorter than this are not what a step spends its time on


@dataclass(frozen=True)
class _Codes:
    numbers: Tensor  # (out, in / 4) float32, whose bytes are the codes
    scales: Tensor  # (out,)
    address: int  # of the weight, which changes when a model is moved or converted


_known: MutableMapping[Tensor, _Codes] = WeakTensorKeyDictionary()  # by weight


@torch.no_grad()
def round_weights(model: nn.Module) -> int:
    """Round the matrices of linear layers and heads, in place; return how many there were.

    Norms, convolutions and narrow matrices stay as they are, and so do float16 and bfloat16 weights.
    """
    weights: list[Tensor] = []
    for part in model.modules():
        if isinstance(part, nn.Linear):
            weights.append(part.weight)
        elif isinstance(head := getattr(part, "head_weight", None), Tensor):
            weights.append(head)
    rounded = 0
    for weight in {id(weight): weight for weight in weights}.values():  # once, where they are tied
        n_in = weight.shape[1]
        if weight.dtype is torch.float32 and n_in >= _LEAST_WIDTH and n_in % 4 == 0:
            numbers, scales = codes_for(weight)
            weight.copy_(numbers.view(torch.int8) * scales.unsqueeze(1))
            _known[weight] = _Codes(numbers, scales, weight.data_ptr())
            rounded += 1
    return rounded


def codes_for(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes as float32, (out, in / 4), and scales (out,) of a float32 matrix, which stays as it is."""
    scales = weight.abs().amax(1) / 127
    codes = (weight / scales.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(1)).round_()
    return codes.to(torch.int8).view(torch.float32), scales


def codes_of(weight: Tensor) -> tuple[Tensor, Tensor] | None:
    """Codes and scales of a weight, or of some rows of one, that was rounded and lies where it lay then."""
    n_in = weight.shape[1]
    for whole, codes in _known.items():
        first, rest = divmod(weight.data_ptr() - codes.address, 4 * n_in)
        rows = slice(first, first + weight.shape[0])
        if not rest and first >= 0 and rows.stop <= len(codes.scales) and whole.shape[1] == n_in:
            return (codes.numbers[rows], codes.scales[rows]) if whole.data_ptr() == codes.address else None
    return None
