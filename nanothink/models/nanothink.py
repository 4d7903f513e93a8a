"""NanoThink itself: latent attention and a router over frozen experts.

Experts e = 1 .. E are language models of any kind with the same vocabulary and width. They are frozen, stay
in evaluation mode, and read the tokens independently; h_e is the final state of one, W_e its LM head.

    u⁰ = norm(E x) + Σ_e P_e h_e
    u  = block ∘ ... ∘ block (u⁰)                     latent attention, then feed-forward
    w  = softmax(R norm(u) + b)                       one weight per expert and token
    z  = e^s O [w_1 h_1 ; ... ; w_E h_E ; norm(u)]    the logits

With O = [W_1 ... W_E 0], R = b = s = 0 and blocks that begin as the identity, the model starts as the
uniform log-linear ensemble of its calibrated experts (Hinton 2002, "Training products of experts", section
1). A mixture of experts (Jacobs et al. 1991) gates outputs, or runs a few experts (Shazeer et al. 2017); here
all experts run, and each token sets their weights.

With a vector store (store_gate.py) that is p_model, and it is mixed with the tokens that followed similar
states of one expert in the training text.

The head reads [w_1 h_1 ; ... ; norm(u)], which is (E + 1) D wide: that is this model's ``hidden``, so that it
uses the same chunked cross-entropy as the other models.

Shapes: B batch, T time, D model width, V vocabulary, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanothink.config import MLAConfig, ModelConfig, VectorStoreConfig
from nanothink.data.tokens import IGNORE
from nanothink.errors import UsageError
from nanothink.models.contract import LanguageModel
from nanothink.models.feed_forward import SwiGLU
from nanothink.models.joint_decoding import JointDecoding
from nanothink.models.key_value_cache import KeyValueCache
from nanothink.models.latent_attention import LatentAttention, latent_widths
from nanothink.models.layers import Block, RMSNorm, Rotary, linear
from nanothink.models.loss import likelihood_and_peak, linear_cross_entropy, linear_log_likelihood
from nanothink.models.precision import matmul_dtype
from nanothink.models.router import Router, with_store
from nanothink.models.store_gate import (
    VECTOR_STORE,
    Neighbours,
    StoreGate,
    choose_key_expert,
)
from nanothink.models.transformer import Transformer, inner_width


class NanoThink(JointDecoding):
    """See the head of this file.

    Experts may differ in width; one of them at least has that of the model. Token embeddings start as a copy
    of those of the first transformer of this width (of the first such expert if there is none), scaled to RMS
    1; the head as a copy of the experts' heads.

    Args:
        vocab_size: V.
        model: width and context.
        shape: blocks, latents, router.
        experts: by name, in the order of their weights. They become part of this model and are frozen.
        store: settings of the vector store; nothing of it is built unless it is enabled.
    """

    kind: ClassVar[str] = "nanothink_mla"
    context_length: int

    def __init__(
        self,
        vocab_size: int,
        model: ModelConfig,
        shape: MLAConfig,
        experts: Mapping[str, LanguageModel],
        store: VectorStoreConfig | None = None,
    ) -> None:
        super().__init__()
        width, parts = model.d_model, list(experts.values())
        for name, expert in experts.items():
            if expert.vocab_size != vocab_size:
                raise UsageError(
                    f"expert '{name}' has a vocabulary of {expert.vocab_size}, the combined model of "
                    f"{vocab_size}; they must agree"
                )
        self.vocab_size = vocab_size
        self.d_model = width
        self.shape = shape
        self.names = tuple(experts)
        self.context_length = min(
            [model.max_seq_len, *(e.context_length for e in parts if e.context_length is not None)]
        )
        self.experts = nn.ModuleList(parts).requires_grad_(False).eval()
        table = F.rms_norm(_first_table(parts, width), (width,))  # embed_norm makes the scale irrelevant
        self.embed_tokens = nn.Embedding(vocab_size, width, _weight=table)
        self.embed_norm = RMSNorm(width)
        self.expert_widths = [expert.d_model for expert in parts]
        self.expert_projs = nn.ModuleList(linear(own, width) for own in self.expert_widths)  # P_e
        self.inner = inner_width(width, shape.ffn_mult)
        widths = latent_widths(width, shape)
        self.layers = nn.ModuleList()
        for _ in range(shape.n_layers):
            attention, mlp = LatentAttention(width, shape.n_heads, *widths), SwiGLU(width, self.inner)
            self.layers.append(Block(width, attention, mlp, self.dropout))
        self.norm = RMSNorm(width)
        self.router = Router(width, len(parts), by_token=shape.router == "token")
        self.log_scale = nn.Parameter(torch.zeros(()))  # s
        self.lm_head = nn.Linear(sum(self.expert_widths) + width, vocab_size, bias=False, device="meta")
        heads = [expert.head_weight.detach() * expert.logit_scale for expert in parts]
        own = torch.zeros(vocab_size, width, dtype=heads[0].dtype, device=heads[0].device)
        self.lm_head.weight = nn.Parameter(torch.cat([*heads, own], dim=1))  # O, (V, (E + 1) D)
        self.rotary = Rotary(widths[1], self.context_length, shape.rope_theta)
        store = store or VectorStoreConfig()
        kinds = {name: expert.kind for name, expert in experts.items()}
        self.key_expert = self.names.index(choose_key_expert(kinds, store.expert if store.enabled else None))
        self.store_gate: StoreGate | None = None
        if store.enabled:
            self.store_gate = StoreGate(width)
            self.n_neighbours = store.n_neighbours

    @property
    def embedding(self) -> nn.Embedding:
        """See ``LanguageModel.embedding``."""
        return self.embed_tokens

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """See ``LanguageModel.blocks``."""
        return list(self.layers)

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

    @property
    def components(self) -> tuple[str, ...]:
        """Names of the parts of each prediction: the experts, and the vector store if one is attached."""
        searches = self.vector_store is not None and self.store_gate is not None
        return (*self.names, VECTOR_STORE) if searches else self.names

    def routing(self, tokens: Tensor) -> Tensor:
        """Weight of each of ``components`` in the prediction after each token: rows of sum 1.

        (B, T) int64 -> (B, T, E) float32, the router's weights; with a vector store (B, T, E + 1),
        [(1 - g) w_1, ..., (1 - g) w_E, g].
        """
        states, weights, queries = self._passed(tokens)
        if queries is None:
            return weights
        if self.gates_store:
            shares = [share for *_, share in self._gated(states, weights, tokens)]
            return torch.cat(shares).view(*tokens.shape, -1)
        assert self.store_gate is not None
        neighbours = self._neighbours_of(queries)
        with torch.no_grad():
            logits = F.linear(self._scaled(states), self.head_weight)
            _, share = self.store_gate.mix_logits(logits, states[..., -self.d_model :], neighbours)
        return with_store(weights, share)

    def router_weights(self, trust: Tensor) -> Tensor:
        """The router's own weights (B, T, E) in what ``routing`` gives."""
        if trust.shape[-1] == len(self.names):
            return trust
        of_experts = trust[..., : len(self.names)]
        return of_experts / of_experts.sum(-1, keepdim=True)

    def expert_states(self, tokens: Tensor) -> list[Tensor]:
        """(B, T) int64 -> h_e of every expert, (B, T, D) float32 each. Without gradients."""
        with torch.no_grad():
            return [cast(LanguageModel, expert).hidden(tokens) for expert in self.experts]

    def routed(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """``hidden`` and the router's weights (B, T, E) of the same tokens, from one pass."""
        return self._passed(tokens)[:2]

    def _passed(
        self, tokens: Tensor, states: Sequence[Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """``routed``, and the queries for the vector store, (B, T, D), where one is attached."""
        n_tokens = tokens.shape[1]
        if n_tokens > self.context_length:
            raise UsageError(
                f"{n_tokens} tokens were given, but this model's context is {self.context_length}; "
                f"cut the text or combine experts with a longer one"
            )
        if states is None:
            states = self.expert_states(tokens)
        combined = self._combine(tokens, states, self.rotary(0, n_tokens), None)
        return *combined, self._query(states)

    def _query(self, states: Sequence[Tensor]) -> Tensor | None:
        """The key expert's state, scaled to length 1 as keys are; None without a vector store."""
        if self.vector_store is None or self.store_gate is None:
            return None
        return F.normalize(states[self.key_expert].detach().float(), dim=-1)

    def loss_and_routing(
        self,
        inputs: Tensor,
        targets: Tensor,
        *,
        scale: float = 1.0,
        states: Sequence[Tensor] | None = None,
        neighbours: Neighbours | None = None,
    ) -> tuple[Tensor, Tensor]:
        """``loss``, and ``routing`` of the inputs, from one pass.

        Args:
            states: as for ``routed``.
            neighbours: of each input, (B, T, K); searched for if None.
        """
        read, weights, queries = self._passed(inputs, states)
        if queries is None:
            loss = linear_cross_entropy(read.flatten(0, 1), self.head_weight, targets.flatten(), scale=scale)
            return loss, weights
        mixed, share = self._mixed(read, targets, neighbours or self._neighbours_of(queries))
        return -mixed.sum() * scale, with_store(weights, share)

    def loss(self, inputs: Tensor, targets: Tensor, *, scale: float = 1.0) -> Tensor:
        """See ``LanguageModel.loss``."""
        return self.loss_and_routing(inputs, targets, scale=scale)[0]

    def log_likelihood(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """See ``LanguageModel.log_likelihood``."""
        return self.likelihood_and_routing(inputs, targets)[0]

    def likelihood_and_routing(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """``log_likelihood``, and ``routing`` of the inputs, from one pass."""
        states, weights, queries = self._passed(inputs)
        if queries is None:
            read = self._scaled(states).flatten(0, 1)
            own = linear_log_likelihood(read, self.head_weight, targets.flatten())
            return own.view(targets.shape), weights
        if self.gates_store:
            wanted = targets.clamp_min(0).view(-1, 1)
            parts, shares = [], []
            for rows, mixed, share in self._gated(states, weights, inputs):
                parts.append(mixed.gather(-1, wanted[rows])[:, 0])
                shares.append(share)
            own = torch.cat(parts).view(targets.shape).masked_fill(targets == IGNORE, 0.0)
            return own, torch.cat(shares).view(*targets.shape, -1)
        mixed, share = self._mixed(states, targets, self._neighbours_of(queries))
        return mixed, with_store(weights, share)

    def _mixed(self, states: Tensor, targets: Tensor, neighbours: Neighbours) -> tuple[Tensor, Tensor]:
        """(B, T) log-likelihoods, 0 where there is no target, and the shares of the vector store."""
        assert self.store_gate is not None
        found = likelihood_and_peak(states.flatten(0, 1), self.head_weight, targets.flatten())
        own, peak = (each.view(targets.shape) for each in found)
        mixed, share = self.store_gate.mix(own, peak, states[..., -self.d_model :], neighbours, targets)
        return mixed.masked_fill(targets == IGNORE, 0.0), share

    def logits(self, tokens: Tensor) -> Tensor:
        """See ``LanguageModel.logits``. With a vector store these are logarithms of probabilities."""
        return torch.cat(list(self.predictions(tokens))).view(*tokens.shape, -1)

    def predictions(self, tokens: Tensor) -> Iterator[Tensor]:
        """See ``LanguageModel.predictions``; logarithms of probabilities as those of ``logits``."""
        states, weights, queries = self._passed(tokens)
        yield from self._predicted_rows(states, weights, tokens, queries)

    def _combine(
        self,
        tokens: Tensor,
        states: Sequence[Tensor],
        rotation: tuple[Tensor, Tensor],
        cache: KeyValueCache | None,
    ) -> tuple[Tensor, Tensor]:
        """Input of the head, (B, T, (E + 1) D), and the weights, (B, T, E), from the experts' states."""
        u = self.dropout(self.embed_norm(self.embed_tokens(tokens)))  # (B, T, D)
        states = [self.dropout(of_expert) for of_expert in states]
        dtype = matmul_dtype(u)
        for project, of_expert in zip(self.expert_projs, states, strict=True):
            u = u + project(of_expert.to(dtype))
        for layer, block in enumerate(self.layers):
            u = block(u, rotation, cache, layer)
        u = self.dropout(self.norm(u))
        weights = self.router(u)
        weighted = [h * weights[..., e : e + 1] for e, h in enumerate(states)]
        return torch.cat([*weighted, u], dim=-1) * self.log_scale.exp(), weights


def _first_table(experts: Sequence[LanguageModel], width: int) -> Tensor:
    """Embeddings of the first transformer of this width; else those of the first expert of it."""
    fitting = [expert for expert in experts if expert.d_model == width]
    if not fitting:
        raise UsageError(f"no expert has the width {width} of the combined model, whose embeddings it lends")
    chosen = next((e for e in fitting if isinstance(e, Transformer)), fitting[0])
    return chosen.embedding.weight.detach()
