"""The transformer expert: a decoder of the Qwen3 shape (Qwen3 technical report, 2025, section 2).

Pre-norm RMSNorm, rotary positions, RMSNorm per head on queries and keys, SwiGLU, no biases, a head of its
own (or tied). Weights exchange one to one with ``transformers``' ``Qwen3ForCausalLM``, the reference
that tests compare logits and gradients with.

It differs in the start: embeddings of standard deviation 1 (0.02 when tied, or the head would begin with
logits of size sqrt(D)), output projections and head at zero, so that the first prediction is
uniform and every block begins as the identity.

Shapes: B batch, T time, D model width, V vocabulary, F inner width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from nanothink.config import ModelConfig, TransformerConfig
from nanothink.errors import CheckpointMismatchError, UsageError
from nanothink.models.contract import LanguageModel, State
from nanothink.models.layers import (
    NORM_EPS,
    Attention,
    Block,
    KeyValueCache,
    RMSNorm,
    Rotary,
    embedding,
    linear,
)
from nanothink.models.loss import CHUNK_ROWS
from nanothink.models.precision import products


class Decoder(LanguageModel):
    """Embeddings, causal blocks and a norm: the body of a transformer, and the encoder of a diffuser."""

    context_length: int
    blocks: nn.ModuleList
    norm: RMSNorm
    rotary: Rotary

    def encode(self, tokens: Tensor) -> Tensor:
        """(B, T) int64, T <= context_length -> (B, T, D) float32.

        Raises:
            UsageError: more tokens than the context holds.
        """
        n_tokens = tokens.shape[1]
        if n_tokens > self.context_length:
            raise UsageError(
                f"{n_tokens} tokens were given, but this model's context is {self.context_length}; "
                f"cut the text or train with a larger model.max_seq_len"
            )
        rotation = self.rotary(0, n_tokens)
        x = self.embedding(tokens)  # (B, T, D)
        with products(x.device.type):
            for block in self.blocks:
                x = block(x, rotation)
            states: Tensor = self.norm(x)
        return states

    def encode_next(self, tokens: Tensor, cache: KeyValueCache, *, last_only: bool) -> Tensor:
        """``encode`` of (B, T) tokens after those in the cache, which moves on. No gradients.

        Args:
            last_only: give the last token's state alone, (B, 1, D).

        Raises:
            UsageError: the cache would hold more than ``context_length`` tokens.
        """
        cache.check_room(tokens)
        with torch.no_grad(), products(tokens.device.type):
            rotation = self.rotary(cache.length, tokens.shape[1])
            x = self.embedding(tokens)  # (B, T, D)
            for layer, block in enumerate(self.blocks):
                x = block(x, rotation, cache, layer)
            cache.advance(tokens.shape[1])
            states: Tensor = self.norm(x[:, -1:] if last_only else x)
        return states


class Transformer(Decoder):
    """See the head of this file.

    Args:
        vocab_size: V.
        model: width and context.
        shape: layers, heads, feed-forward, tying.
    """

    kind: ClassVar[str] = "transformer"

    def __init__(self, vocab_size: int, model: ModelConfig, shape: TransformerConfig) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.d_model = width = model.d_model
        self.context_length = model.max_seq_len
        self.shape = shape
        self.embedding = embedding(vocab_size, width, std=0.02 if shape.tie_embeddings else 1.0)
        inner = inner_width(width, shape.ffn_mult)
        self.blocks = nn.ModuleList(
            Block(width, Attention(width, shape.n_heads), inner) for _ in range(shape.n_layers)
        )
        self.norm = RMSNorm(width)
        self.head = None if shape.tie_embeddings else linear(width, vocab_size, zero=True)
        self.rotary = Rotary(width // shape.n_heads, model.max_seq_len, shape.rope_theta)

    @property
    def head_weight(self) -> nn.Parameter:
        """(V, D): the LM head, or the embedding table when tied."""
        weight = self.embedding.weight if self.head is None else self.head.weight
        return cast(nn.Parameter, weight)

    def hidden(self, tokens: Tensor) -> Tensor:
        """See ``LanguageModel.hidden``; T <= context_length."""
        return self.encode(tokens)

    def activation_bytes(self, batch_size: int, length: int, value_bytes: int) -> int:
        """See ``LanguageModel.activation_bytes``; the factors were counted with saved-tensor hooks."""
        width, inner = self.d_model, inner_width(self.d_model, self.shape.ffn_mult)
        per_width, per_inner = (41, 8) if value_bytes == 4 else (24, 4)
        in_flight = value_bytes * (4 * width + 3 * inner)  # gradients of the block being worked on
        per_token = len(self.blocks) * (per_width * width + per_inner * inner) + 12 * width + in_flight
        head = self.vocab_size * (4 * width + CHUNK_ROWS * 8)  # the head's gradient and one chunk of logits
        return batch_size * length * per_token + head

    def reading_bytes(self, batch_size: int, length: int, value_bytes: int) -> int:
        """See ``LanguageModel.reading_bytes``; the factors were counted by torch's profiler."""
        inner = inner_width(self.d_model, self.shape.ffn_mult)
        return batch_size * length * block_reading_bytes(self.d_model, inner, value_bytes)

    def start(self, batch_size: int) -> KeyValueCache:
        """An empty key-value cache, which grows as it fills."""
        return KeyValueCache(len(self.blocks), batch_size, self.context_length)

    def read(self, tokens: Tensor, state: State, *, last_only: bool = False) -> Tensor:
        """See ``LanguageModel.read``."""
        assert isinstance(state, KeyValueCache)
        return self.encode_next(tokens, state, last_only=last_only)


def block_reading_bytes(width: int, inner: int, value_bytes: int) -> int:
    """Bytes a token that a block holds without gradients: the stream, its norm, and the feed-forward."""
    return 8 * width + value_bytes * (2 * width + 3 * inner)


def inner_width(width: int, ffn_mult: float) -> int:
    """Inner width of the feed-forward: ``ffn_mult`` x ``width``, to the nearest multiple of 8."""
    return max(8, 8 * round(round(ffn_mult * width) / 8))


_OUTER_NAMES = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
_BLOCK_NAMES = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention.query.weight": "self_attn.q_proj.weight",
    "attention.key.weight": "self_attn.k_proj.weight",
    "attention.value.weight": "self_attn.v_proj.weight",
    "attention.query_norm.weight": "self_attn.q_norm.weight",
    "attention.key_norm.weight": "self_attn.k_norm.weight",
    "attention.output.weight": "self_attn.o_proj.weight",
    "feed_forward_norm.weight": "post_attention_layernorm.weight",
    "feed_forward.gate.weight": "mlp.gate_proj.weight",
    "feed_forward.up.weight": "mlp.up_proj.weight",
    "feed_forward.down.weight": "mlp.down_proj.weight",
}


def _qwen3_names(n_layers: int) -> dict[str, str]:
    """Our name -> Qwen3's name, for every parameter."""
    names = dict(_OUTER_NAMES)
    for i in range(n_layers):
        names |= {f"blocks.{i}.{ours}": f"model.layers.{i}.{theirs}" for ours, theirs in _BLOCK_NAMES.items()}
    return names


def to_qwen3_state_dict(model: Transformer) -> dict[str, Tensor]:
    """The model's weights under the names of ``Qwen3ForCausalLM``. Shared with the model, not copied.

    A tied model has no ``lm_head.weight``; ``transformers`` ties it on loading.
    """
    names = _qwen3_names(len(model.blocks))
    return {names[name]: tensor for name, tensor in model.state_dict().items()}


def from_qwen3_state_dict(state: Mapping[str, Tensor], *, tied: bool = False) -> dict[str, Tensor]:
    """The inverse: weights of a ``Qwen3ForCausalLM`` under the names of ``Transformer``.

    Args:
        state: by Qwen3's names.
        tied: leave out the head, which is the embedding table.

    Raises:
        CheckpointMismatchError: a weight that this shape does not have, such as a bias.
    """
    layers = [int(name.split(".")[2]) for name in state if name.startswith("model.layers.")]
    names = {theirs: ours for ours, theirs in _qwen3_names(max(layers, default=-1) + 1).items()}
    unknown = sorted(set(state) - set(names))
    if unknown:
        raise CheckpointMismatchError(
            f"not the weights of a Qwen3 model of this shape: {', '.join(unknown[:5])} "
            f"({len(unknown)} of {len(state)}) have no place here"
        )
    return {names[name]: tensor for name, tensor in state.items() if not (tied and name == "lm_head.weight")}


def to_qwen3_config(model: Transformer) -> dict[str, Any]:
    """Keyword arguments of ``transformers.Qwen3Config`` that describe this model."""
    shape = model.shape
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "intermediate_size": inner_width(model.d_model, shape.ffn_mult),
        "num_hidden_layers": shape.n_layers,
        "num_attention_heads": shape.n_heads,
        "num_key_value_heads": shape.n_heads,
        "head_dim": model.d_model // shape.n_heads,
        "max_position_embeddings": model.context_length,
        "rms_norm_eps": NORM_EPS,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "attention_bias": False,
        "tie_word_embeddings": shape.tie_embeddings,
    }
