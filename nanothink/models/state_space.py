"""The state-space expert: Mamba-1 (Gu & Dao 2023, "Mamba", section 3.4 and figure 3), of S6 layers.

A layer widens its input to E channels and a gate, mixes each channel over the last few steps by a
causal convolution, runs the selective scan, whose step sizes Δ, inputs B and outputs C depend on the token,
and closes with the gate and a projection. The state dict is that of ``transformers``' ``MambaForCausalLM``,
the reference that tests compare logits and gradients with: same names, same shapes.

The start follows the paper where the state is concerned: A = -(1 .. N) (S4D-Real, section 3.6), D = 1, and a
bias of Δ through the inverse of softplus so that Δ begins log-uniform in [0.001, 0.1] (section 3.6 and
appendix E.2). Elsewhere it is that of our transformer: embeddings of standard deviation 1 (0.02 when tied),
output projections and head at zero.

The decoding state has one size whatever the length, so there is no context to run out of: a forward pass
takes any T, and memory grows linearly with T.

Shapes: B batch, T time, D model width, V vocabulary; E = expand x D channels, N state, R rank of Δ, W width
of the convolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from nanothink.config import Config, ModelConfig, StateSpaceConfig
from nanothink.errors import UsageError
from nanothink.models import decoding
from nanothink.models.contract import Expert, State
from nanothink.models.dropout import Dropout
from nanothink.models.layers import RMSNorm, embedding, linear
from nanothink.models.loss import CHUNK_ROWS
from nanothink.models.mamba_mixer import Mixer, Recurrence, delta_rank
from nanothink.models.precision import matmul_dtype
from nanothink.models.selective_scan import choose_scan

if TYPE_CHECKING:
    from nanothink.models.decoding.steps import Step

_STEPS_BETWEEN_STATES = 32  # of those that the scan keeps for its backward pass (plain.py, compiled.py)

_PIECE = 8192
"""Tokens of a long prompt read at a time, so that memory does not grow with its length."""


class Layer(nn.Module):
    """A mixer on a normalised copy of the stream."""

    def __init__(self, width: int, shape: StateSpaceConfig, dropout: Dropout) -> None:
        super().__init__()
        self.dropout = dropout
        self.norm = RMSNorm(width, shape.norm_eps)
        self.mixer = Mixer(width, shape)

    def forward(self, x: Tensor, recurrence: Recurrence | None = None, layer: int = 0) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        update: Tensor = self.dropout(self.mixer(self.norm(x, matmul_dtype(x)), recurrence, layer))
        return x + update


class Backbone(nn.Module):
    """Embeddings, layers and a norm: everything but the head."""

    def __init__(self, vocab_size: int, width: int, shape: StateSpaceConfig, dropout: Dropout) -> None:
        super().__init__()
        self.dropout = dropout
        self.embeddings = embedding(vocab_size, width, std=0.02 if shape.tie_embeddings else 1.0)
        self.layers = nn.ModuleList(Layer(width, shape, dropout) for _ in range(shape.n_layers))
        self.norm_f = RMSNorm(width, shape.norm_eps)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) int64 -> (B, T, D) float32, for any T."""
        x = self.dropout(self.embeddings(tokens))  # (B, T, D)
        for layer in self.layers:
            x = layer(x)
        states: Tensor = self.dropout(self.norm_f(x))
        return states

    def read(self, tokens: Tensor, recurrence: Recurrence, *, last_only: bool) -> Tensor:
        """The same of (B, T) tokens after those in the decoding state, which advances. No gradients."""
        if (step := self.step_for(tokens, recurrence)) is not None:
            states = step.read(tokens, [0] * recurrence.batch_size)
            return states[:, -1:] if last_only else states
        recurrence.step = None
        with torch.no_grad():
            pieces = []
            for piece in torch.split(tokens, _PIECE, 1):
                x = self.embeddings(piece)  # (B, T, D)
                for i, layer in enumerate(self.layers):
                    x = layer(x, recurrence, i)
                if not last_only:
                    pieces.append(self.norm_f(x))
            return cast(Tensor, self.norm_f(x[:, -1:])) if last_only else torch.cat(pieces, 1)

    def step_for(self, tokens: Tensor, recurrence: Recurrence, head: Tensor | None = None) -> Step | None:
        """The program for these tokens, with logits if there is a head; None where there is none."""

        def build() -> Step | None:
            from nanothink.models.decoding.steps import state_space_step

            return state_space_step(self, recurrence, head)

        return decoding.step_for(recurrence, tokens, self.embeddings.weight, head, build)


class StateSpace(Expert):
    """See the head of this file.

    Args:
        vocab_size: V.
        model: width.
        shape: layers, state, convolution, scan, tying.
    """

    kind: ClassVar[str] = "state_space"
    context_length = None

    def __init__(self, vocab_size: int, model: ModelConfig, shape: StateSpaceConfig) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.d_model = width = model.d_model
        self.shape = shape
        self.backbone = Backbone(vocab_size, width, shape, self.dropout)
        self.lm_head = None if shape.tie_embeddings else linear(width, vocab_size, zero=True)

    @classmethod
    def build(cls, config: Config, vocab_size: int) -> StateSpace:
        """See ``Expert.build``."""
        return cls(vocab_size, config.model, config.state_space)

    @classmethod
    def settle(cls, config: Config, device: torch.device) -> tuple[Config, str]:
        """See ``Expert.settle``: the scan that this machine runs fastest."""
        scan = choose_scan(device.type, config.state_space.scan)
        return _with_scan(config, scan.name), f"Selective scan: {scan.name} ({scan.reason})."

    @classmethod
    def runnable(cls, config: Config, device: torch.device) -> Config:
        """See ``Expert.runnable``: the scan of training if this machine has it, else "auto"."""
        try:
            choose_scan(device.type, config.state_space.scan)
        except UsageError:
            return _with_scan(config, "auto")
        return config

    def foreign_config(self) -> dict[str, Any]:
        """See ``Expert.foreign_config``."""
        # llama.cpp's converter would pad the list of tokens to a multiple of 8, and not the embedding.
        config = {**to_mamba_config(self), "pad_vocab_size_multiple": 1}
        if (eps := self.shape.mixer_norm_eps) is not None:
            falcon = {"architectures": ["FalconMambaForCausalLM"], "model_type": "falcon_mamba"}
            return {**falcon, **config, "mixer_rms_eps": eps}
        return {"architectures": ["MambaForCausalLM"], "model_type": "mamba", **config}

    @property
    def embedding(self) -> nn.Embedding:
        """See ``LanguageModel.embedding``."""
        return self.backbone.embeddings

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """See ``LanguageModel.blocks``."""
        return list(self.backbone.layers)

    def hidden(self, tokens: Tensor) -> Tensor:
        """(B, T) int64 -> (B, T, D) float32, for any T."""
        return cast(Tensor, self.backbone(tokens))

    def start(self, batch_size: int) -> Recurrence:
        """An empty decoding state."""
        return Recurrence(len(self.backbone.layers), batch_size)

    def read(self, tokens: Tensor, state: State, *, last_only: bool = False) -> Tensor:
        """See ``LanguageModel.read``. Many tokens are read by one scan, which returns its last state."""
        assert isinstance(state, Recurrence)
        state.check_room(tokens)
        return self.backbone.read(tokens, state, last_only=last_only)

    def step(self, tokens: Tensor, state: State) -> Tensor:
        """See ``LanguageModel.step``."""
        assert isinstance(state, Recurrence)
        state.check_room(tokens)
        step = self.backbone.step_for(tokens, state, self.head_weight)
        if step is None:
            return super().step(tokens, state)
        return self._scaled(step.predict(tokens, [0] * state.batch_size))

    def _scaled_weight(self) -> Tensor:
        return self.backbone.norm_f.weight  # a tied head is the embedding table too

    def activation_bytes(self, batch_size: int, length: int, value_bytes: int) -> int:
        """See ``LanguageModel.activation_bytes``; what is kept was listed with saved-tensor hooks."""
        width, n_states = self.d_model, self.shape.d_state
        channels, rank = self.shape.expand * width, delta_rank(width, self.shape)
        in_products = width + 4 * channels + rank + 4 * n_states  # norm; u, y, channels and gates; Δ, B, C
        in_float32 = width + channels + channels * n_states // _STEPS_BETWEEN_STATES  # stream; Δ; states
        in_flight = 4 * 8 * channels  # gradients of the layer being worked on
        a_layer = value_bytes * in_products + 4 * in_float32
        per_token = self.shape.n_layers * a_layer + 12 * width + in_flight
        head = self.vocab_size * (4 * width + CHUNK_ROWS * 8)  # the head's gradient and one chunk of logits
        return batch_size * length * per_token + head

    def reading_bytes(self, batch_size: int, length: int, value_bytes: int) -> int:
        """See ``LanguageModel.reading_bytes``; counted by torch's profiler, with a scan in one kernel."""
        channels = self.shape.expand * self.d_model
        per_token = 8 * self.d_model + value_bytes * 2 * channels + 4 * 5 * channels
        return batch_size * length * per_token


def _with_scan(config: Config, scan: str) -> Config:
    settled = config.state_space.model_copy(update={"scan": scan})
    return config.model_copy(update={"state_space": settled})


def to_mamba_config(model: StateSpace) -> dict[str, Any]:
    """Keyword arguments of ``transformers.MambaConfig`` that describe this model."""
    shape = model.shape
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "state_size": shape.d_state,
        "num_hidden_layers": shape.n_layers,
        "layer_norm_epsilon": shape.norm_eps,
        "expand": shape.expand,
        "conv_kernel": shape.conv_width,
        "time_step_rank": delta_rank(model.d_model, shape),
        "use_bias": False,
        "use_conv_bias": True,
        "hidden_act": "silu",
        "residual_in_fp32": True,
        "tie_word_embeddings": shape.tie_embeddings,
    }
