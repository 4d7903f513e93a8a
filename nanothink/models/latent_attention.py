"""Multi-head latent attention, MLA (DeepSeek-V2, 2024, section 2.1).

Keys and values of all heads are computed from one latent per token, and only the latent is cached. A
rotation of the keys would prevent that, so position is encoded apart: in rotary queries and one rotary key
that all heads share (section 2.1.3). While decoding, the matrices that expand latents to keys and values
are applied to queries and results instead, so that no key or value is computed again (section 2.1.2,
"absorbed").

The state dict is that of ``transformers``' ``DeepseekV3Attention`` (``q_lora_rank=None``), the reference that
tests compare outputs and gradients with. It differs in the layout of the rotation, whose halves are turned
against one another as in the rest of this package (its ``rope_interleave`` pairs neighbours), and in an
output projection that starts at zero.

The code's names in the paper's letters: latent c^KV, rotary key k^R, query content q^C and rotary query q^R,
``kv_a_proj_with_mqa`` W^DKV and W^KR, ``kv_b_proj`` W^UK and W^UV.

Shapes: B batch, T time, S keys (cached and new), D model width, H heads, K content width of a head's query
and key and width of its value, R rotary width, C latent width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanothink.config import MLAConfig
from nanothink.models.key_value_cache import KeyValueCache
from nanothink.models.layers import RMSNorm, linear, rotate


class LatentAttention(nn.Module):
    """Causal multi-head attention over latents.

    Args:
        width: D.
        n_heads: H.
        head_dim: K.
        rope_dim: R.
        latent_dim: C.
    """

    def __init__(self, width: int, n_heads: int, head_dim: int, rope_dim: int, latent_dim: int) -> None:
        super().__init__()
        self.n_heads, self.head_dim, self.rope_dim, self.latent_dim = n_heads, head_dim, rope_dim, latent_dim
        self.q_proj = linear(width, n_heads * (head_dim + rope_dim))
        self.kv_a_proj_with_mqa = linear(width, latent_dim + rope_dim)  # the latent, then the rotary key
        self.kv_a_layernorm = RMSNorm(latent_dim)
        self.kv_b_proj = linear(latent_dim, n_heads * 2 * head_dim)  # of each head: its key, then its value
        self.o_proj = linear(n_heads * head_dim, width, zero=True)

    def forward(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], cache: KeyValueCache | None = None, layer: int = 0
    ) -> Tensor:
        """(B, T, D) -> (B, T, D). With a cache, the T tokens follow those it holds and are added to it.

        The cache holds latents (B, 1, S, C) where another would hold keys, and rotary keys (B, 1, S, R) in
        place of values.
        """
        queries = self._split(self.q_proj(x))  # (B, H, T, K + R)
        content, rotary = torch.split(queries, [self.head_dim, self.rope_dim], dim=-1)
        rotary = rotate(rotary, rotation, x.dtype)
        compressed = self.kv_a_proj_with_mqa(x)  # (B, T, C + R)
        latent, shared_key = torch.split(compressed, [self.latent_dim, self.rope_dim], dim=-1)
        latent = self.kv_a_layernorm(latent, x.dtype).unsqueeze(1)  # (B, 1, T, C)
        shared_key = rotate(shared_key.unsqueeze(1), rotation, x.dtype)  # (B, 1, T, R)
        if cache is not None and cache.length > 0:
            latent, shared_key = cache.extend(layer, latent, shared_key)
            y = self._absorbed(content, rotary, latent, shared_key, cache.mask(x.shape[1], x.device))
        else:
            if cache is not None:
                cache.extend(layer, latent, shared_key)
            y = self._expanded(content, rotary, latent, shared_key)
        output: Tensor = self.o_proj(y.transpose(1, 2).flatten(2))  # (B, H, T, K) -> (B, T, D)
        return output

    def _expanded(self, content: Tensor, rotary: Tensor, latent: Tensor, shared_key: Tensor) -> Tensor:
        """Attention as in training: keys and values are computed for every token. (B, H, T, K)."""
        keys, values = self._split(self.kv_b_proj(latent.squeeze(1))).chunk(2, dim=-1)  # (B, H, T, K)
        keys = torch.cat([keys, shared_key.expand(-1, self.n_heads, -1, -1)], dim=-1)  # (B, H, T, K + R)
        # Values as wide as the keys let the fused kernels serve: 1.4 to 1.8 times the speed on a CPU.
        padded = F.pad(values, (0, self.rope_dim))
        queries = torch.cat([content, rotary], dim=-1)
        return F.scaled_dot_product_attention(queries, keys, padded, is_causal=True)[..., : self.head_dim]

    def _absorbed(
        self, content: Tensor, rotary: Tensor, latent: Tensor, shared_key: Tensor, mask: Tensor | None
    ) -> Tensor:
        """The same on cached latents, of which each query sees those of the cache's mask. (B, H, T, K)."""
        up = self.kv_b_proj.weight.view(self.n_heads, 2 * self.head_dim, self.latent_dim).to(content.dtype)
        to_key, to_value = up.chunk(2, dim=1)  # (H, K, C)
        latent, shared_key = latent.squeeze(1), shared_key.squeeze(1)  # (B, S, C), (B, S, R)
        # All heads share the keys, so they are rows of one matrix product.
        scores = (content @ to_key).flatten(1, 2) @ latent.mT + rotary.flatten(1, 2) @ shared_key.mT
        (batch, _, n_new, _), n_keys = content.shape, latent.shape[1]
        scores = scores.view(batch, self.n_heads, n_new, n_keys)
        scores = scores.float() * (self.head_dim + self.rope_dim) ** -0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        seen = scores.softmax(-1).to(latent.dtype).flatten(1, 2) @ latent  # (B, H * T, C)
        values: Tensor = seen.view(batch, self.n_heads, n_new, self.latent_dim) @ to_value.mT
        return values

    def _split(self, x: Tensor) -> Tensor:
        """(B, T, H * n) -> (B, H, T, n)."""
        return x.view(*x.shape[:2], self.n_heads, -1).transpose(1, 2)


def latent_widths(width: int, shape: MLAConfig) -> tuple[int, int, int]:
    """K, R and C: as set, else in proportion to the model width."""
    head_dim = shape.head_dim or -(-width // shape.n_heads)
    rope_dim = shape.rope_dim or max(2, 2 * round(head_dim / 4))
    return head_dim, rope_dim, shape.kv_latent_dim or 8 * -(-width // 24)


def latent_block_bytes(width: int, shape: MLAConfig, inner: int, value_bytes: int) -> int:
    """Bytes a token that a block, attention and feed-forward, keeps for the backward pass."""
    head_dim, rope_dim, latent_dim = latent_widths(width, shape)
    of_heads = 4 * shape.n_heads * (head_dim + rope_dim) + 2 * latent_dim
    return 16 * width + value_bytes * (2 * width + of_heads + 2 * inner)
