"""NanoThink itself: latent attention and a router over frozen experts.

Experts e = 1 .. E are language models of any kind that share vocabulary and width. They are frozen, always
in evaluation mode, and read the tokens by themselves; h_e is the final state of one, W_e its LM head.

    u⁰ = norm(E x) + Σ_e P_e h_e
    u  = block ∘ ... ∘ block (u⁰)                     latent attention, then feed-forward
    w  = softmax(R norm(u) + b)                       one weight an expert, for each token
    z  = e^s O [w_1 h_1 ; ... ; w_E h_E ; norm(u)]    the logits

With O = [W_1 ... W_E 0], R = b = s = 0 and blocks that begin as the identity, the model starts as the
uniform log-linear ensemble of its experts (Hinton 2002, "Training products of experts", section 1), and
training goes on from there. A mixture of experts (Jacobs et al. 1991) gates outputs, or runs a few experts
(Shazeer et al. 2017); here all experts speak, and every token decides anew how loud.

What the head reads, [w_1 h_1 ; ... ; norm(u)], is (E + 1) D wide: that is this model's ``hidden``, so that
one chunked cross-entropy serves it as it serves the others.

Shapes: B batch, T time, D model width, V vocabulary, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanothink.config import MLAConfig, ModelConfig
from nanothink.errors import UsageError
from nanothink.models.contract import LanguageModel, State
from nanothink.models.latent_attention import LatentBlock, latent_widths
from nanothink.models.layers import KeyValueCache, RMSNorm, Rotary, linear
from nanothink.models.loss import CHUNK_ROWS, linear_cross_entropy
from nanothink.models.precision import product_dtype, products
from nanothink.models.transformer import Transformer, inner_width


class Router(nn.Module):
    """How far each expert is trusted: equally at first.

    Its parameters are no linear layer's, so that the optimizer treats them like a bias: orthogonalised,
    the first step would already decide between the experts.
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
    """(..., E) weights -> (...) nats: log E where all are equal, 0 where one has all."""
    entropy: Tensor = torch.special.entr(weights).sum(-1)
    return entropy


@dataclass
class JointState(State):
    """What every expert remembers, the latents of the blocks, and the weights of the last token read."""

    experts: Sequence[State]
    latents: KeyValueCache
    weights: Tensor | None = None  # (B, E)


class NanoThink(LanguageModel):
    """See the head of this file.

    Token embeddings start as those of the first transformer among the experts (of the first expert if there
    is none), brought to RMS 1; the head as the experts' heads. Both are copies.

    Args:
        vocab_size: V.
        model: width and context.
        shape: blocks, latents, router.
        experts: by name, in the order of their weights. They become part of this model, and are frozen.
    """

    kind: ClassVar[str] = "nanothink_mla"
    context_length: int

    def __init__(
        self, vocab_size: int, model: ModelConfig, shape: MLAConfig, experts: Mapping[str, LanguageModel]
    ) -> None:
        super().__init__()
        width, parts = model.d_model, list(experts.values())
        for name, expert in experts.items():
            if (expert.vocab_size, expert.d_model) != (vocab_size, width):
                raise UsageError(
                    f"expert '{name}' has a vocabulary of {expert.vocab_size} and width {expert.d_model}, "
                    f"the combined model {vocab_size} and {width}; they must agree in both"
                )
        self.vocab_size = vocab_size
        self.d_model = width
        self.shape = shape
        self.names = tuple(experts)
        self.context_length = min(
            [model.max_seq_len, *(e.context_length for e in parts if e.context_length is not None)]
        )
        self.experts = nn.ModuleList(parts).requires_grad_(False).eval()
        self.embedding = nn.Embedding(vocab_size, width, _weight=_unit_rows(_first_transformer(parts)))
        self.embedding_norm = RMSNorm(width)
        self.inject = nn.ModuleList(linear(width, width) for _ in parts)  # P_e
        self.inner = inner_width(width, shape.ffn_mult)
        self.blocks = nn.ModuleList(LatentBlock(width, shape, self.inner) for _ in range(shape.n_layers))
        self.norm = RMSNorm(width)
        self.router = Router(width, len(parts), by_token=shape.router == "token")
        self.log_scale = nn.Parameter(torch.zeros(()))  # s
        self.head = nn.Linear((len(parts) + 1) * width, vocab_size, bias=False, device="meta")
        heads = [expert.head_weight.detach() for expert in parts]
        own = torch.zeros(vocab_size, width, dtype=heads[0].dtype)
        self.head.weight = nn.Parameter(torch.cat([*heads, own], dim=1))  # O, (V, (E + 1) D)
        self.rotary = Rotary(latent_widths(width, shape)[1], self.context_length, shape.rope_theta)

    @property
    def head_weight(self) -> nn.Parameter:
        """(V, (E + 1) D)."""
        return cast(nn.Parameter, self.head.weight)

    def train(self, mode: bool = True) -> NanoThink:
        """Training mode for everything but the experts, which stay in evaluation mode."""
        super().train(mode)
        self.experts.eval()
        return self

    def hidden(self, tokens: Tensor) -> Tensor:
        """(B, T) int64, T <= context_length -> (B, T, (E + 1) D) float32.

        Raises:
            UsageError: more tokens than the context holds.
        """
        return self.routed(tokens)[0]

    def routing(self, tokens: Tensor) -> Tensor:
        """(B, T) int64 -> (B, T, E) float32: the weight of each expert in the prediction after each token."""
        return self.routed(tokens)[1]

    def expert_states(self, tokens: Tensor) -> list[Tensor]:
        """(B, T) int64 -> h_e of every expert, (B, T, D) float32 each. Without gradients."""
        with torch.no_grad():
            return [cast(LanguageModel, expert).hidden(tokens) for expert in self.experts]

    def routed(self, tokens: Tensor, states: Sequence[Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """``hidden`` and ``routing`` of the same tokens, from one pass.

        Args:
            states: what ``expert_states`` gives for these tokens, where it is known already.
        """
        n_tokens = tokens.shape[1]
        if n_tokens > self.context_length:
            raise UsageError(
                f"{n_tokens} tokens were given, but this model's context is {self.context_length}; "
                f"cut the text or combine experts with a longer one"
            )
        if states is None:
            states = self.expert_states(tokens)
        return self._combine(tokens, states, self.rotary(0, n_tokens), None)

    def loss_and_routing(
        self, inputs: Tensor, targets: Tensor, *, scale: float = 1.0, states: Sequence[Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """``loss``, and the weights (B, T, E), from one pass; ``states`` as for ``routed``."""
        read, weights = self.routed(inputs, states)
        loss = linear_cross_entropy(read.flatten(0, 1), self.head_weight, targets.flatten(), scale=scale)
        return loss, weights

    def start(self, batch_size: int) -> JointState:
        """Empty states of all experts, and an empty cache of latents."""
        return JointState(
            [cast(LanguageModel, expert).start(batch_size) for expert in self.experts],
            KeyValueCache(len(self.blocks), batch_size, self.context_length),
        )

    def read(self, tokens: Tensor, state: State, *, last_only: bool = False) -> Tensor:
        """See ``LanguageModel.read``."""
        assert isinstance(state, JointState)
        state.latents.check_room(tokens)  # before any expert has moved on
        with torch.no_grad():
            states = [
                cast(LanguageModel, expert).read(tokens, of_expert)
                for expert, of_expert in zip(self.experts, state.experts, strict=True)
            ]
            rotation = self.rotary(state.latents.length, tokens.shape[1])
            hidden, weights = self._combine(tokens, states, rotation, state.latents)
        state.latents.advance(tokens.shape[1])
        state.weights = weights[:, -1]
        return hidden[:, -1:] if last_only else hidden

    def _combine(
        self,
        tokens: Tensor,
        states: Sequence[Tensor],
        rotation: tuple[Tensor, Tensor],
        cache: KeyValueCache | None,
    ) -> tuple[Tensor, Tensor]:
        """What the head reads, (B, T, (E + 1) D), and the weights, (B, T, E), given the experts' states."""
        with products(tokens.device.type):
            u = self.embedding_norm(self.embedding(tokens))  # (B, T, D)
            dtype = product_dtype(u)
            for project, of_expert in zip(self.inject, states, strict=True):
                u = u + project(of_expert.to(dtype))
            for layer, block in enumerate(self.blocks):
                u = block(u, rotation, cache, layer)
            u = self.norm(u)
            weights = self.router(u)
        weighted = [h * weights[..., e : e + 1] for e, h in enumerate(states)]
        return torch.cat([*weighted, u], dim=-1) * self.log_scale.exp(), weights

    def activation_bytes(self, batch_size: int, length: int, value_bytes: int) -> int:
        """See ``LanguageModel.activation_bytes``; the factors were counted with saved-tensor hooks."""
        width, n_experts = self.d_model, len(self.experts)
        head_dim, rope_dim, latent_dim = latent_widths(width, self.shape)
        of_heads = 4 * self.shape.n_heads * (head_dim + rope_dim) + 2 * latent_dim
        a_block = 16 * width + value_bytes * (2 * width + of_heads + 2 * self.inner)
        narrow = n_experts * value_bytes if value_bytes < 4 else 0  # states in the type of the products
        joined = width * (4 * (2 * n_experts + 1) + narrow)  # states, and what the head reads
        in_flight = value_bytes * (4 * width + 3 * self.inner)
        columns = (n_experts + 1) * width
        per_token = len(self.blocks) * a_block + joined + 12 * width + in_flight + 4 * columns
        head = self.vocab_size * (4 * columns + CHUNK_ROWS * 8)  # the head's gradient and a chunk of logits
        training = batch_size * length * per_token + head
        return max(training, self.reading_bytes(batch_size, length, value_bytes))

    def reading_bytes(self, batch_size: int, length: int, value_bytes: int) -> int:
        """See ``LanguageModel.reading_bytes``: the experts read one after another, before anything else."""
        a_state = 4 * self.d_model * batch_size * length
        return max(
            i * a_state + cast(LanguageModel, expert).reading_bytes(batch_size, length, value_bytes)
            for i, expert in enumerate(self.experts)
        )


def _first_transformer(experts: Sequence[LanguageModel]) -> Tensor:
    chosen = next((e for e in experts if isinstance(e, Transformer)), experts[0])
    return chosen.embedding.weight.detach()


def _unit_rows(table: Tensor) -> Tensor:
    """A copy with rows of RMS 1. The norm that follows makes no difference between them."""
    return F.rms_norm(table, table.shape[-1:])
