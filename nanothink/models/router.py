"""The router: one weight for each expert, at every token.

Shapes: B batch, T time, D model width, E experts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Router(nn.Module):
    """The weights of the experts, equal at first.

    Its parameters are not those of a linear layer, so that the optimizer treats them like a bias. With an
    orthogonalised update the first step would already decide between the experts.
    """

    def __init__(self, width: int, n_experts: int, *, by_token: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(n_experts, width)) if by_token else None
        self.bias = nn.Parameter(torch.zeros(n_experts))

    def forward(self, stream: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, E) float32, positive, with sum 1."""
        with torch.autocast(stream.device.type, enabled=False):
            scores = self.bias.expand(*stream.shape[:-1], -1)
            if self.weight is not None:
                scores = scores + F.linear(stream.float(), self.weight)
            return scores.softmax(-1)


def routing_entropy(weights: Tensor) -> Tensor:
    """(..., E) weights -> (...) nats: log E where all are equal, 0 where one of them is 1."""
    entropy: Tensor = torch.special.entr(weights).sum(-1)
    return entropy


def with_store(weights: Tensor, share: Tensor) -> Tensor:
    """The experts' weights (..., E) and the vector store's share (...) as one distribution, (..., E + 1)."""
    share = share.unsqueeze(-1)
    return torch.cat([weights * (1 - share), share], dim=-1)
