"""Shapes of the models. Every model of one NanoThink shares ``ModelConfig``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

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


class StateSpaceConfig(Settings):
    n_layers: int = Field(6, ge=1, le=256)
    """Number of layers, each a norm and a mixer."""

    d_state: int = Field(16, ge=1, le=1024)
    """Numbers that the state keeps for each channel."""

    expand: int = Field(2, ge=1, le=16)
    """Channels of a mixer, as a multiple of d_model."""

    conv_width: int = Field(4, ge=2, le=16)
    """Steps that the causal convolution before the scan spans."""

    delta_rank: int | None = Field(None, ge=1)
    """Rank of the projection that gives each token its step sizes; d_model / 16 when empty."""

    tie_embeddings: bool = False
    """Share one matrix between token embeddings and LM head."""

    scan: Literal["auto", "plain", "compiled", "triton", "mamba_ssm"] = "auto"
    """How the selective scan is computed; 'auto' takes the fastest that this machine has."""
