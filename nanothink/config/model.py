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
    """The defaults are the shape of Qwen3; other values are there for published models of other shapes."""

    n_layers: int = Field(6, ge=1, le=256)
    """Number of blocks, each attention plus feed-forward."""

    n_heads: int = Field(6, ge=1, le=256)
    """Attention heads; must divide d_model into heads of even width, unless head_dim is set."""

    n_kv_heads: int | None = Field(None, ge=1, le=256)
    """Heads of keys and values, each for an equal number of attention heads; n_heads when empty."""

    head_dim: int | None = Field(None, ge=2, le=1024)
    """Width of a head; d_model / n_heads when empty."""

    ffn_mult: float = Field(4.0, gt=0, le=64)
    """Inner width of the feed-forward, as a multiple of d_model."""

    ffn_dim: int | None = Field(None, ge=1, le=1 << 20)
    """Inner width of the feed-forward; ffn_mult x d_model, to the nearest multiple of 8, when empty."""

    feed_forward: Literal["swiglu", "gelu", "gelu_tanh"] = "swiglu"
    """Feed-forward: gated, without biases; or by GELU or its approximation by tanh, with biases."""

    tie_embeddings: bool = False
    """Share one matrix between token embeddings and LM head. Untied reached 2.18 bits per byte where
    tied stayed at 2.28 (docs/log.md)."""

    rope_theta: float = Field(10_000.0, gt=1)
    """Base of the rotary position frequencies."""

    rotary_fraction: float = Field(1.0, ge=0, le=1)
    """Share of the features of a head that rotate with the position. 0: positions are learned embeddings."""

    norm: Literal["rms", "layer"] = "rms"
    """Norms: by the root mean square, or with mean and bias."""

    norm_eps: float = Field(1e-6, gt=0, le=1)
    """Added to the mean square, or to the variance, in every norm."""

    qk_norm: bool = True
    """Normalise queries and keys of each head."""

    attention_bias: Literal["none", "qkv", "all"] = "none"
    """Projections of attention that have biases."""

    parallel: bool = False
    """Attention and feed-forward of a block read the same state, as in GPT-NeoX."""


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

    norm_eps: float = Field(1e-6, gt=0, le=1)
    """Added to the mean square in the norms."""

    mixer_norm_eps: float | None = Field(None, gt=0, le=1)
    """Normalise step sizes, inputs and outputs of the scan for each token, with this added to the mean
    square, as in FalconMamba; not normalised when empty."""

    scan: Literal["auto", "plain", "compiled", "triton"] = "auto"
    """Implementation of the selective scan; 'auto' takes the fastest on this machine."""


class DiffuserConfig(Settings):
    """Heads, feed-forward and rotary base of its blocks are those of the ``transformer`` section."""

    n_layers: int = Field(4, ge=1, le=256)
    """Number of transformer blocks in the context encoder."""

    denoiser_layers: int = Field(2, ge=1, le=64)
    """Number of feed-forward blocks in the denoiser."""

    denoiser_mult: float = Field(2.0, gt=0, le=64)
    """Inner width of the denoiser's feed-forward, as a multiple of d_model."""

    training_steps: int = Field(100, ge=2, le=10_000)
    """Number of noise levels."""

    inference_steps: int = Field(10, ge=1, le=10_000)
    """Evaluations of the denoiser for each token when text is sampled by DDIM; at most training_steps."""

    target: Literal["input_embedding", "head_row", "hidden_state"] = "head_row"
    """Vector of the frozen transformer that is denoised: the next token's row in its embedding table or in
    its LM head, or its final state after reading that token (computed at every step, not looked up)."""

    prediction: Literal["clean", "velocity"] = "velocity"
    """Output of the network: the clean target, or the velocity, from which the target follows."""

    evaluations: Literal[1, 2] = 2
    """Evaluations of the denoiser in a training step: one from pure noise and one at a random level, or one
    that is either for half of the blocks."""

    mse_weight: float = Field(1.0, ge=0)
    """Weight of the mean squared errors in the loss."""

    cross_entropy_weight: float = Field(1.0, ge=0)
    """Weight of the LM head's cross-entropy in the loss. 0 is the objective of MSE alone: the head still
    learns, but nothing below it does by it."""

    null_fraction: float = Field(0.5, ge=0, le=1)
    """Share of the blocks whose evaluation from pure noise starts from zero, as the language model does."""

    self_conditioning: float = Field(0.0, ge=0, le=1)
    """Share of the blocks whose evaluation at a random level sees the guess that was made from pure noise."""

    rounding_every: int = Field(4, ge=0)
    """Train the head at a random level too, at every this many tokens, for sampling by DDIM; 0: never."""

    transformer: str | None = None
    """The checkpoint of the frozen transformer; transformer_expert.pt in the checkpoint folder when empty."""


class MLAConfig(Settings):
    """NanoThink itself: latent attention, router and head over frozen experts."""

    n_experts: int = Field(3, ge=1, le=64)
    """Experts that are combined; follows from the --expert options."""

    n_layers: int = Field(2, ge=0, le=256)
    """Number of blocks, each latent attention plus feed-forward. 0: the router reads the experts' states
    and the token alone."""

    n_heads: int = Field(6, ge=1, le=256)
    """Attention heads."""

    head_dim: int | None = Field(None, ge=1)
    """Width of a head's value, and of the part of its query and key that has no position; d_model / n_heads,
    rounded up, when empty."""

    rope_dim: int | None = Field(None, ge=2, multiple_of=2)
    """Width of a head's rotary query and of the rotary key that all heads share; half of head_dim when
    empty."""

    kv_latent_dim: int | None = Field(None, ge=1)
    """Width of the latent that keys and values come from, which decoding caches beside the rotary key;
    d_model / 3, rounded up to a multiple of 8, when empty."""

    ffn_mult: float = Field(4.0, gt=0, le=64)
    """Inner width of the SwiGLU feed-forward, as a multiple of d_model."""

    rope_theta: float = Field(10_000.0, gt=1)
    """Base of the rotary position frequencies."""

    router: Literal["token", "global"] = "token"
    """Weights of the experts: for each token from its state, or one learned set for all tokens."""


class DocumentCacheConfig(Settings):
    """The document cache of every model: its states over the text read so far, searched at each token."""

    window_tokens: int = Field(8192, ge=1, le=1 << 20)
    """How far back it reaches, in tokens."""

    n_neighbours: int = Field(32, ge=1, le=1024)
    """Earlier positions that are recalled for each token."""

    fit_steps: int = Field(250, ge=0, le=100_000)
    """Optimizer steps of the joint gate, which is fitted on held-out text at the end of every run; with 0 the
    model has no such gate, and so no document cache."""


class VectorStoreConfig(Settings):
    """The vector store of a NanoThink: one expert's states over the training text, searched by FAISS."""

    enabled: bool = False
    """Train with a vector store beside the experts: --use-vector-store."""

    expert: str | None = None
    """Name of the expert whose states are keys and queries; when empty the first state-space expert, else the
    first transformer, else the first."""

    n_neighbours: int = Field(32, ge=1, le=1024)
    """Keys that are recalled for each token."""

    index: Literal["auto", "exact", "sq8", "pq"] = "auto"
    """Storage of the keys: as they are; in inverted lists, a byte for each number; or a byte for each four
    numbers. 'auto' goes by their number."""

    exact_below: int = Field(50_000, ge=0)
    """Under 'auto': keys up to which the search is exact."""

    pq_above: int = Field(20_000_000, ge=1)
    """Under 'auto': keys beyond which each is kept in a quarter of a byte for each number."""

    n_probe: int = Field(16, ge=1)
    """Inverted lists that a search looks into."""

    max_keys: int | None = Field(None, ge=1)
    """Build with at most about this many keys, from blocks spread evenly over the text; with one for each
    training token when empty. What is added later is added in full."""
