"""Shapes of the models. Every model of one NanoThink shares ``ModelConfig``."""

from __future__ import annotations

from pydantic import Field, model_validator

from nanothink.config.base import Settings


class ModelConfig(Settings):
    d_model: int = Field(384, ge=8, le=16384)
    """Width of the residual stream, in features. The same for all experts that are to be combined."""

    max_seq_len: int = Field(512, ge=2, le=1 << 20)
    """Length of a training block, in tokens, and how far back attention reaches."""


class TransformerConfig(Settings):
    n_layers: int = Field(6, ge=1, le=256)
    """Number of blocks, each attention plus feed-forward."""

    n_heads: int = Field(6, ge=1, le=256)
    """Attention heads; must divide d_model into heads of even width."""

    ffn_mult: float = Field(4.0, gt=0, le=64)
    """Inner width of the SwiGLU feed-forward, as a multiple of d_model."""

    tie_embeddings: bool = False
    """Share one matrix between token embeddings and LM head. Untied reached 2.18 bits per byte where
    tied stayed at 2.28 (docs/log.md)."""

    rope_theta: float = Field(10_000.0, gt=1)
    """Base of the rotary position frequencies."""


class _Shape(Settings):
    """Checks that concern two sections at once."""

    model: ModelConfig = ModelConfig()
    transformer: TransformerConfig = TransformerConfig()

    @model_validator(mode="after")
    def _heads_divide_width(self) -> _Shape:
        width, heads = self.model.d_model, self.transformer.n_heads
        if width % heads or (width // heads) % 2:
            fitting = [h for h in range(1, width // 2 + 1) if width % h == 0 and width // h % 2 == 0]
            raise ValueError(
                f"transformer.n_heads={heads} does not split model.d_model={width} into heads of even "
                f"width; for this d_model use one of {', '.join(map(str, fitting[:12]))}"
            )
        return self
