"""The experts of a combined model: their logits, states and scales, the joint gate, memory estimates.

The gate and the document cache (joint_gate.py, document_cache.py) know a model by this alone.

Shapes: B batch, T time, N positions, D model width, V vocabulary, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanothink.config import MLAConfig
from nanothink.models.contract import LanguageModel, State
from nanothink.models.decoding import project
from nanothink.models.decoding_states import JointState
from nanothink.models.joint_gate import DOCUMENT_CACHE, gated_rows, no_neighbours
from nanothink.models.latent_attention import latent_block_bytes
from nanothink.models.loss import CHUNK_ROWS
from nanothink.models.router import Router, with_store
from nanothink.models.store_gate import VECTOR_STORE, Neighbours, NeighbourSearch, StoreGate


class ProductOfExperts(LanguageModel):
    """Base of the combined model. Its final state is e^s [w_1 h_1 ; ... ; w_E h_E ; norm(u)]."""

    experts: nn.ModuleList
    names: tuple[str, ...]
    expert_widths: list[int]
    """D_e of each expert's h_e."""
    key_expert: int
    """Whose states are keys."""
    router: Router
    layers: nn.ModuleList
    inner: int
    shape: MLAConfig
    store_gate: StoreGate | None
    n_neighbours: int
    log_scale: nn.Parameter
    """s, a scalar."""
    vector_store: NeighbourSearch | None = None
    """Finds neighbours in the vector store; None to predict without. Attached, not part of the weights."""

    @property
    def gates_store(self) -> bool:
        """True if the joint gate mixes in the vector store where there is no document cache."""
        return self.joint_gate is not None and not self.joint_gate.cache_alone

    def expert_heads(self) -> list[Tensor]:
        """The columns of the head that read each expert's state, (V, D) each."""
        own = self.head_weight[:, : -self.d_model]
        return list(torch.split(own, self.expert_widths, 1))

    def expert_scales(self) -> list[float]:
        """e^s w_e of each expert, where the weights are the same for every token."""
        scales: list[float] = (self.log_scale.exp() * self.router.bias.softmax(-1)).tolist()
        return scales

    @torch.no_grad()
    def set_expert_scales(self, scales: Sequence[float]) -> None:
        """Make ``expert_scales`` these, in place of what the router says of a token."""
        given = torch.tensor(scales, dtype=torch.float64)
        self.router.bias.copy_((given / given.sum()).log())
        self.log_scale.copy_(given.sum().log())
        if self.router.weight is not None:
            self.router.weight.zero_()

    def expert_logits(self, states: Tensor, weights: Tensor | None) -> list[Tensor]:
        """See ``LanguageModel.expert_logits``."""
        assert weights is not None
        own = torch.split(states[..., : -self.d_model], self.expert_widths, -1)  # e^s w_e h_e
        factors = self.log_scale.exp() * weights
        return [
            project(part / factors[..., e : e + 1], cast(LanguageModel, expert).head_weight).float()
            for e, (part, expert) in enumerate(zip(own, self.experts, strict=True))
        ]

    @property
    def expert_names(self) -> tuple[str, ...]:
        """See ``LanguageModel.expert_names``."""
        return self.names

    def weights_read(self, state: State) -> Tensor | None:
        """See ``LanguageModel.weights_read``."""
        assert isinstance(state, JointState)
        return state.read_weights

    def stored_neighbours(self, keys: Tensor) -> Neighbours:
        """See ``LanguageModel.stored_neighbours``."""
        if self.vector_store is None:
            return super().stored_neighbours(keys)
        return self.vector_store.search(F.normalize(keys.float(), dim=-1))

    def key_states(self, states: Tensor) -> Tensor:
        """See ``LanguageModel.key_states``: those of one expert."""
        return torch.split(states[..., : -self.d_model], self.expert_widths, -1)[self.key_expert]

    def cache_keys(self, states: Tensor) -> list[Tensor]:
        """See ``LanguageModel.cache_keys``."""
        own = list(torch.split(states[..., : -self.d_model], self.expert_widths, -1))
        return [own.pop(self.key_expert), *own]

    def _gated(
        self, states: Tensor, weights: Tensor, tokens: Tensor
    ) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Predictions of the joint gate without a document cache: rows of all positions, log-probabilities,
        routing."""
        gate = self.joint_gate
        assert gate is not None
        states, weights, tokens = states.flatten(0, 1), weights.flatten(0, 1), tokens.flatten()
        found = {
            VECTOR_STORE: self.stored_neighbours(self.key_states(states)),
            DOCUMENT_CACHE: no_neighbours(len(states), states.device),
        }
        memories = [found[name] for name in gate.names]
        unigram = gate.weights["unigram"]
        for rows, product, evidence in gated_rows(self, unigram, states, weights, tokens, memories):
            mixed, log_shares = gate.mix_logits(product, evidence)
            share = log_shares[:, 1 + gate.names.index(VECTOR_STORE)].exp()
            yield rows, mixed, with_store(weights[rows], share)

    def _neighbours_of(self, queries: Tensor) -> Neighbours:
        """(B, T, D) -> neighbours (B, T, K)."""
        assert self.vector_store is not None
        return self.vector_store.search(queries.flatten(0, 1)).view(*queries.shape[:2])

    def _predicted_rows(
        self, states: Tensor, weights: Tensor, tokens: Tensor, queries: Tensor | None
    ) -> Iterator[Tensor]:
        """``predictions`` from the states (B, T, D), the experts' weights, and the queries if a store is
        attached."""
        if queries is not None and self.gates_store:
            yield from (mixed for _, mixed, _ in self._gated(states, weights, tokens))
            return
        neighbours = None if queries is None else self._neighbours_of(queries).view(tokens.numel())
        for start in range(0, tokens.numel(), CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            chunk = states.flatten(0, 1)[rows]
            logits = self.predicted(chunk)
            if neighbours is not None and self.store_gate is not None:
                stream = chunk[:, -self.d_model :]
                logits, _ = self.store_gate.mix_logits(logits, stream, neighbours.rows(rows))
            yield logits

    def activation_bytes(self, batch_size: int, length: int, value_bytes: int) -> int:
        """See ``LanguageModel.activation_bytes``; the factors were counted with saved-tensor hooks."""
        width, n_experts = self.d_model, len(self.experts)
        a_block = latent_block_bytes(width, self.shape, self.inner, value_bytes)
        narrow = n_experts * value_bytes if value_bytes < 4 else 0  # states in the type of the products
        widths, wide = width + sum(self.expert_widths), width * (n_experts + 1)
        joined = width * (4 * (2 * n_experts + 1) + narrow) * widths // wide  # states; input of the head
        in_flight = value_bytes * (4 * width + 3 * self.inner)
        per_token = len(self.layers) * a_block + joined + 12 * width + in_flight + 4 * widths
        if self.store_gate is not None:
            per_token += 32 * self.n_neighbours + 4 * widths
        head = self.vocab_size * (4 * widths + CHUNK_ROWS * 8)  # the head's gradient and a chunk of logits
        reading = self.reading_bytes(batch_size, length, value_bytes)
        return max(batch_size * length * per_token + head, reading)

    def reading_bytes(self, batch_size: int, length: int, value_bytes: int) -> int:
        """See ``LanguageModel.reading_bytes``: the experts run one after another, before the rest."""
        a_state = 4 * self.d_model * batch_size * length
        return max(
            i * a_state + cast(LanguageModel, expert).reading_bytes(batch_size, length, value_bytes)
            for i, expert in enumerate(self.experts)
        )
