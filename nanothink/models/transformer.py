"""The transformer expert: a decoder of the Qwen3 shape (Qwen3 technical report, 2025, section 2).

Pre-norm RMSNorm, rotary positions, RMSNorm per head on queries and keys, SwiGLU, no biases, a head of its
own (or tied). The state dict is that of ``transformers``' ``Qwen3ForCausalLM``, the reference that tests
compare logits and gradients with: same names, same shapes. Settings turn it into the shapes of other
published models (checkpoints/families.py), with the same names for the same parts.

It differs in the start: embeddings of standard deviation 1 (0.02 when tied, or the head would begin with
logits of size sqrt(D)), output projections and head at zero, so that the first prediction is
uniform and every block begins as the identity.

Shapes: B batch, T time, D model width, V vocabulary, F inner width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from nanothink.config import Config, ModelConfig, TransformerConfig
from nanothink.errors import UsageError
from nanothink.models import decoding
from nanothink.models.contract import Expert, State
from nanothink.models.dropout import Dropout
from nanothink.models.feed_forward import feed_forward
from nanothink.models.key_value_cache import KeyValueCache
from nanothink.models.layers import (
    Attention,
    Block,
    LayerNorm,
    LearnedPositions,
    Rotary,
    embedding,
    head_width,
    linear,
    norm,
)
from nanothink.models.loss import CHUNK_ROWS

if TYPE_CHECKING:
    from nanothink.models.decoding.steps import Step


class Decoder(nn.Module):
    """Embeddings, causal blocks and a norm: a transformer without its head, and the encoder of a diffuser.

    Args:
        vocab_size: V.
        model: width and context.
        shape: heads, feed-forward, norms, positions.
        n_layers: number of blocks.
        std: standard deviation of the embeddings.
        dropout: that of the model.
    """

    def __init__(
        self,
        vocab_size: int,
        model: ModelConfig,
        shape: TransformerConfig,
        *,
        n_layers: int,
        std: float,
        dropout: Dropout,
    ) -> None:
        super().__init__()
        self.dropout = dropout
        width, inner = model.d_model, shape_inner_width(model.d_model, shape)
        self.context_length = model.max_seq_len
        self.embed_tokens = embedding(vocab_size, width, std=std)
        self.layers = nn.ModuleList(
            Block(width, Attention(width, shape), feed_forward(width, inner, shape), dropout, shape)
            for _ in range(n_layers)
        )
        self.norm = norm(width, shape)
        rotated = 2 * int(head_width(width, shape) * shape.rotary_fraction / 2)
        self.rotary = Rotary(rotated, model.max_seq_len, shape.rope_theta) if rotated else None
        self.embed_positions = None if rotated else LearnedPositions(model.max_seq_len, width, std=std)

    def forward(self, tokens: Tensor) -> Tensor:
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
        x, rotation = self._placed(tokens)
        x = self.dropout(x)
        for block in self.layers:
            x = block(x, rotation)
        states: Tensor = self.dropout(self.norm(x))
        return states

    def _placed(
        self, tokens: Tensor, cache: KeyValueCache | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Embeddings (B, T, D) of tokens that follow those in the cache, and the rotation of their places."""
        x: Tensor = self.embed_tokens(tokens)
        places, n_tokens = self.rotary or self.embed_positions, tokens.shape[1]
        assert places is not None
        found = places(0, n_tokens) if cache is None else cache.begin(places, tokens)
        return (x, found) if self.rotary is not None else (x + found, None)

    def start(self, batch_size: int) -> KeyValueCache:
        """An empty key-value cache, which grows as it fills."""
        return KeyValueCache(len(self.layers), batch_size, self.context_length)

    def read(self, tokens: Tensor, cache: KeyValueCache, *, last_only: bool) -> Tensor:
        """``forward`` of (B, T) tokens after those in the cache, which advances. No gradients.

        Args:
            last_only: give the last token's state alone, (B, 1, D).

        Raises:
            UsageError: the cache would hold more than ``context_length`` tokens.
        """
        if (step := self.step_for(tokens, cache)) is not None:
            states = step.read(tokens, cache.lengths)
            cache.advance(tokens.shape[1])
            return states[:, -1:] if last_only else states
        with torch.no_grad():
            x, rotation = self._placed(tokens, cache)
            for layer, block in enumerate(self.layers):
                x = block(x, rotation, cache, layer)
            cache.advance(tokens.shape[1])
            return cast(Tensor, self.norm(x[:, -1:] if last_only else x))

    def step_for(self, tokens: Tensor, cache: KeyValueCache, head: Tensor | None = None) -> Step | None:
        """The program for these tokens, with logits if there is a head; None where there is none."""

        def build() -> Step | None:
            from nanothink.models.decoding.steps import decoder_step

            return decoder_step(self, cache, tokens.shape[1], head)

        return decoding.step_for(cache, tokens, self.embed_tokens.weight, head, build)


class Transformer(Expert):
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
        std = 0.02 if shape.tie_embeddings else 1.0
        self.model = Decoder(vocab_size, model, shape, n_layers=shape.n_layers, std=std, dropout=self.dropout)
        self.lm_head = None if shape.tie_embeddings else linear(width, vocab_size, zero=True)

    @classmethod
    def build(cls, config: Config, vocab_size: int) -> Transformer:
        """See ``Expert.build``."""
        return cls(vocab_size, config.model, config.transformer)

    def foreign_config(self) -> dict[str, Any]:
        """See ``Expert.foreign_config``."""
        model_type = _model_type(self.d_model, self.shape)
        if model_type is None:
            return {}
        return {
            "architectures": [f"{model_type.capitalize()}ForCausalLM"],
            "model_type": model_type,
            "rope_theta": self.shape.rope_theta,  # as transformers 4, llama.cpp and vLLM read it
            "hidden_act": "silu",
            "attention_dropout": 0.0,
            "use_sliding_window": False,
            "sliding_window": None,
            **to_qwen3_config(self),
        }

    @property
    def embedding(self) -> nn.Embedding:
        """See ``LanguageModel.embedding``."""
        return self.model.embed_tokens

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """See ``LanguageModel.blocks``."""
        return list(self.model.layers)

    def hidden(self, tokens: Tensor) -> Tensor:
        """See ``LanguageModel.hidden``; T <= context_length."""
        return cast(Tensor, self.model(tokens))

    @torch.no_grad()
    def fold_logit_scale(self) -> None:
        """See ``LanguageModel.fold_logit_scale``; the bias of a layer norm scales the logits too."""
        if isinstance(self.model.norm, LayerNorm):
            self.model.norm.bias.mul_(self.logit_scale)
        super().fold_logit_scale()

    def _scaled_weight(self) -> Tensor:
        return self.model.norm.weight  # a tied head is the embedding table too

    def activation_bytes(self, batch_size: int, length: int, value_bytes: int) -> int:
        """See ``LanguageModel.activation_bytes``; the factors were counted with saved-tensor hooks."""
        width, inner = self.d_model, shape_inner_width(self.d_model, self.shape)
        per_width, per_inner = (41, 8) if value_bytes == 4 else (24, 4)
        head, shape = head_width(width, self.shape), self.shape
        # Three tensors are as wide as the queries, and three as the keys; the factors have them at width D.
        wider = 3 * value_bytes * (head * (shape.n_heads + (shape.n_kv_heads or shape.n_heads)) - 2 * width)
        in_flight = value_bytes * (4 * width + 3 * inner)  # gradients of the block being worked on
        a_layer = per_width * width + per_inner * inner + wider
        per_token = len(self.model.layers) * a_layer + 12 * width + in_flight
        of_head = self.vocab_size * (4 * width + CHUNK_ROWS * 8)  # its gradient and one chunk of logits
        return batch_size * length * per_token + of_head

    def reading_bytes(self, batch_size: int, length: int, value_bytes: int) -> int:
        """See ``LanguageModel.reading_bytes``; the factors were counted by torch's profiler."""
        inner = shape_inner_width(self.d_model, self.shape)
        return batch_size * length * block_reading_bytes(self.d_model, inner, value_bytes)

    def start(self, batch_size: int) -> KeyValueCache:
        """See ``LanguageModel.start``."""
        return self.model.start(batch_size)

    def read(self, tokens: Tensor, state: State, *, last_only: bool = False) -> Tensor:
        """See ``LanguageModel.read``."""
        assert isinstance(state, KeyValueCache)
        return self.model.read(tokens, state, last_only=last_only)

    def step(self, tokens: Tensor, state: State) -> Tensor:
        """See ``LanguageModel.step``."""
        assert isinstance(state, KeyValueCache)
        step = self.model.step_for(tokens, state, self.head_weight)
        if step is None:
            return super().step(tokens, state)
        logits = self._scaled(step.predict(tokens, state.lengths))
        state.advance(tokens.shape[1])
        return logits


def block_reading_bytes(width: int, inner: int, value_bytes: int) -> int:
    """Bytes a token that a block holds without gradients: the stream, its norm, and the feed-forward."""
    return 8 * width + value_bytes * (2 * width + 3 * inner)


def inner_width(width: int, ffn_mult: float) -> int:
    """Inner width of the feed-forward: ``ffn_mult`` x ``width``, to the nearest multiple of 8."""
    return max(8, 8 * round(round(ffn_mult * width) / 8))


def shape_inner_width(width: int, shape: TransformerConfig) -> int:
    """F: as set, else by ``ffn_mult``."""
    return shape.ffn_dim or inner_width(width, shape.ffn_mult)


def _model_type(width: int, shape: TransformerConfig) -> str | None:
    """The family of ``transformers`` with this shape and these names of the weights; None: there is none."""
    plain = (shape.feed_forward, shape.norm, shape.rotary_fraction, shape.parallel)
    if plain != ("swiglu", "rms", 1.0, False):
        return None
    if shape.qk_norm:
        return "qwen3" if shape.attention_bias != "qkv" else None
    if shape.attention_bias == "qkv":
        return "qwen2"
    if width % shape.n_heads:  # a Llama's heads divide its width
        return "mistral" if shape.attention_bias == "none" else None
    return "llama"


def to_qwen3_config(model: Transformer) -> dict[str, Any]:
    """Keyword arguments of ``transformers.Qwen3Config`` that describe this model.

    Those of ``Qwen2Config``, ``LlamaConfig`` and ``MistralConfig`` have the same names.
    """
    shape = model.shape
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "intermediate_size": shape_inner_width(model.d_model, shape),
        "num_hidden_layers": shape.n_layers,
        "num_attention_heads": shape.n_heads,
        "num_key_value_heads": shape.n_kv_heads or shape.n_heads,
        "head_dim": head_width(model.d_model, shape),
        "max_position_embeddings": model.context_length,
        "rms_norm_eps": shape.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "attention_bias": shape.attention_bias == "all",
        "tie_word_embeddings": shape.tie_embeddings,
    }
