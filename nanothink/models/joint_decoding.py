"""Decoding by the combined model: plain steps, and passes that verify what its cheapest expert drafted.

The drafter reads each token once: its states while drafting are those that the whole reads too. Of everything
else the pass reads the weights once for all tokens (drafts.py).

Shapes: B batch, T time, N predictions, D model width, V vocabulary, E experts, C components.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from nanothink.models import decoding
from nanothink.models.contract import Choose, LanguageModel, State
from nanothink.models.decoding import int8
from nanothink.models.decoding_states import JointState
from nanothink.models.drafts import Drafts
from nanothink.models.key_value_cache import KeyValueCache
from nanothink.models.layers import Rotary
from nanothink.models.product_of_experts import ProductOfExperts
from nanothink.models.router import with_store
from nanothink.models.store_gate import NeighbourSearch

if TYPE_CHECKING:
    from nanothink.models.decoding.steps import JointStep, Step

# What a draft costs, counted in weights that are read from memory in the same time (docs/decisions/0051).
_A_STEP, _A_DRAFT = 4.5e6, 6.5e6  # all that is no reading: choosing a token, calls, copies
_A_ROW = 0.17  # arithmetic of one more token in a pass, for each weight
_MEMORIES, _MEMORIES_A_ROW = 20e6, 4.7e6  # joint gate and memories in a plain step, and for one more token

_LARGE_HEAD = 1 << 21
"""Weights of a drafter's head from which on drafts read it in eight bits: no cache holds it."""

_FEW_DRAFTS = 32
"""Drafts that take less time than making the codes does."""


class JointDecoding(ProductOfExperts):
    """The part of ``NanoThink`` that decodes."""

    embed_tokens: nn.Embedding
    embed_norm: nn.Module
    expert_projs: nn.ModuleList
    norm: nn.Module
    rotary: Rotary
    context_length: int
    _n_drafted = 0
    _coded: tuple[int, tuple[Tensor, Tensor]] | None = None
    """Data pointer of the drafter's head, its codes and scales."""
    _combine: Callable[..., tuple[Tensor, Tensor]]
    _query: Callable[[Sequence[Tensor]], Tensor | None]

    def start(self, batch_size: int) -> JointState:
        """Empty states of all experts, and an empty cache of latents."""
        return JointState(
            [cast(LanguageModel, expert).start(batch_size) for expert in self.experts],
            KeyValueCache(len(self.layers), batch_size, self.context_length),
        )

    def read(self, tokens: Tensor, state: State, *, last_only: bool = False) -> Tensor:
        """See ``LanguageModel.read``."""
        assert isinstance(state, JointState)
        state.settle()
        hidden = self._read(tokens, state)
        return hidden[:, -1:] if last_only else hidden

    def step(self, tokens: Tensor, state: State) -> Tensor:
        """See ``LanguageModel.step``."""
        assert isinstance(state, JointState)
        if tokens.numel() == 1 and state.choose is not None:
            gated = self.vector_store is not None and self.gates_store
            if self.prepare(state.drafts, state, gated=gated):
                text = _Text(self, state, state.choose)
                logits, state.weights = state.drafts.next(int(tokens), text)
                return logits
        state.settle()
        logits, state.weights = self._predict(tokens, state)
        return logits

    def prepare(self, drafts: Drafts[Any], state: JointState, *, gated: bool) -> bool:
        """Tell the drafts of a state of one sequence, once, what they cost; True if they may serve.

        Args:
            gated: the joint gate mixes memories in, for which every expert's own head is read too.
        """
        if drafts.cost is None:
            states = (*state.experts, state.latents)
            suits = decoding.suits(torch.empty(1, 1, dtype=torch.int64), self.embed_tokens.weight)
            can = suits and len(states) > 2 and all(own.rewind_every for own in states)
            drafts.cost = self._draft_cost(gated=gated) if can else math.inf
        return drafts.may_serve

    def _draft_cost(self, *, gated: bool) -> float:
        """Time of one more drafted token, in plain steps."""
        bodies, head, whole, heads = self._weights_read
        if gated:
            whole += heads
        narrow = 4 if int8.codes_of(self.head_weight) else 1
        if head < _LARGE_HEAD:
            bodies += head
        else:
            bodies += narrow * head // 2  # in eight bits in any case
        draft = _A_DRAFT + gated * _MEMORIES_A_ROW + bodies / narrow + _A_ROW * whole
        return draft / (_A_STEP + gated * _MEMORIES + whole / narrow)

    @cached_property
    def _weights_read(self) -> tuple[int, int, int, int]:
        """Numbers of weights: of a draft without its head, that head, a plain step, and all experts' heads.

        An expert that cannot go back within a reading is read anew for every draft, as the drafter is.
        """
        experts = cast("list[LanguageModel]", list(self.experts))
        bodies = [_weights_of_step(expert) - expert.head_weight.numel() for expert in experts]
        again = {i for i, expert in enumerate(experts) if expert.start(1).rewind_every == 1} | {self.drafter}
        own = sum(p.numel() for name, p in self.named_parameters() if not name.startswith("experts."))
        whole = sum(bodies) + own - self.embed_tokens.weight.numel()
        heads = [expert.head_weight.numel() for expert in experts]
        return sum(bodies[i] for i in again), heads[self.drafter], whole, sum(heads)

    @cached_property
    def drafter(self) -> int:
        """The expert that reads the fewest weights for a prediction of its own."""
        costs = [_weights_of_step(cast(LanguageModel, expert)) for expert in self.experts]
        return costs.index(min(costs))

    def draft(self, token: int, n_tokens: int, state: JointState, choose: Choose) -> list[int]:
        """At most so many tokens that could follow this one. The next reading is of it and of them."""
        n_tokens = min(n_tokens, self.context_length - state.latents.length - 1)
        if n_tokens <= 0:
            return []
        drafter, own = cast(LanguageModel, self.experts[self.drafter]), state.experts[self.drafter]
        tokens, states = [token], []
        while True:
            own.remember()
            states.append(drafter.read(torch.tensor([tokens[-1:]]), own))
            if len(tokens) > n_tokens:
                break
            following = choose(self._draft_logits(drafter, states[-1][:, -1]), tokens[1:])
            if following is None:
                break
            tokens.append(following)
        state.drafted = torch.cat(states, 1)
        return tokens[1:]

    def _draft_logits(self, drafter: LanguageModel, states: Tensor) -> Tensor:
        """Logits of the drafter alone, (1, V), by a head of eight bits where it is large."""
        head = drafter.head_weight
        self._n_drafted += 1
        if self._n_drafted < _FEW_DRAFTS or head.numel() < _LARGE_HEAD or head.shape[1] % 4:
            return drafter.predicted(states)
        if self._coded is None or self._coded[0] != head.data_ptr():
            self._coded = head.data_ptr(), int8.codes_for(head.detach())
        return decoding.project(states * drafter.logit_scale, head, self._coded[1])

    def _predict(self, tokens: Tensor, state: JointState, *, every: bool = False) -> tuple[Tensor, Tensor]:
        """Read (B, T) tokens: logits (N, V) and weights (N, C) after each sequence's last, or after all."""
        rows = slice(None) if every else slice(-1, None)
        if self.vector_store is not None and self.gates_store:
            with torch.no_grad():
                hidden = self._read(tokens, state)[:, rows]
                ((_, logits, weights),) = self._gated(hidden, state.weights_read(rows), tokens[:, rows])
            return logits, weights
        step = self._step_for(tokens, state, self.head_weight)
        if step is None:
            hidden = self._read(tokens, state)[:, rows]
            with torch.no_grad():
                logits = self.predicted(hidden.flatten(0, 1))
        else:
            logits = self._scaled(self._run(step, tokens, state, partial(step.predict, every=every)))
        weights = state.weights_read(rows).flatten(0, 1)
        if state.queries is None or state.streams is None:
            return logits, weights
        assert self.store_gate is not None
        with torch.no_grad():
            queries, streams = (x[:, rows].flatten(0, 1) for x in (state.queries, state.streams))
            neighbours = cast(NeighbourSearch, self.vector_store).search(queries)
            logits, share = self.store_gate.mix_logits(logits, streams, neighbours)
        return logits, with_store(weights, share)

    def _read(self, tokens: Tensor, state: JointState) -> Tensor:
        """The states (B, T, (E + 1) D) of more tokens."""
        if (step := self._step_for(tokens, state)) is not None:
            return self._run(step, tokens, state, step.read)
        state.latents.check_room(tokens)  # before any expert's state has advanced
        states = self._read_experts(tokens, state)
        with torch.no_grad():
            rotation = state.latents.begin(self.rotary, tokens)
            hidden, weights = self._combine(tokens, states, rotation, state.latents)
        self._keep(state, states, weights, hidden[..., -self.d_model :])
        return hidden

    def _read_experts(self, tokens: Tensor, state: JointState) -> list[Tensor]:
        """States of the tokens, (B, T, D) for every expert, which advances."""
        drafted, state.drafted = state.drafted, None
        found = []
        for i, (expert, own) in enumerate(zip(self.experts, state.experts, strict=True)):
            if drafted is None:
                found.append(cast(LanguageModel, expert).read(tokens, own))
            elif i == self.drafter:
                found.append(drafted)
            else:
                pieces = []
                for first in range(0, tokens.shape[1], own.rewind_every):
                    own.remember()
                    piece = tokens[:, first : first + own.rewind_every]
                    pieces.append(cast(LanguageModel, expert).read(piece, own))
                found.append(torch.cat(pieces, 1))
        return found

    def _keep(self, state: JointState, states: list[Tensor], weights: Tensor, streams: Tensor) -> None:
        """Advance the latents; keep weights (B, T, E), queries and streams of the tokens."""
        state.latents.advance(states[0].shape[1])
        state.weights, state.read_weights = weights[:, -1], weights
        state.queries, state.streams = self._query(states), streams

    def _step_for(self, tokens: Tensor, state: JointState, head: Tensor | None = None) -> JointStep | None:
        """The program for these tokens, with logits if there is a head; None where there is none."""
        if set(self.expert_widths) != {self.d_model}:
            return None  # its buffers are of one width

        def build() -> Step | None:
            from nanothink.models.decoding.steps import joint_step

            return joint_step(self, state.latents, tokens.shape[1], head)

        found = decoding.step_for(state.latents, tokens, self.embed_tokens.weight, head, build)
        return cast("JointStep | None", found)

    def _run(self, step: JointStep, tokens: Tensor, state: JointState, run: Callable[..., Tensor]) -> Tensor:
        """Read (B, T) tokens by a compiled step, after the experts; returns what ``run`` does."""
        states = self._read_experts(tokens, state)
        for place, of_expert in zip(step.experts, states, strict=True):
            place[: tokens.numel()].copy_(of_expert.flatten(0, 1))
        found = run(tokens, state.latents.lengths)
        weights, streams = step.weights[: tokens.numel()], step.states[: tokens.numel(), -self.d_model :]
        self._keep(state, states, *(kept.clone().view(*tokens.shape, -1) for kept in (weights, streams)))
        return found


@dataclass(frozen=True)
class _Text:
    """See ``drafts.Drafting``."""

    model: JointDecoding
    state: JointState
    choose: Choose

    def draft(self, token: int, n_tokens: int) -> list[int]:
        return self.model.draft(token, n_tokens, self.state, self.choose)

    def predict(self, tokens: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        logits, weights = self.model._predict(torch.tensor([tokens]), self.state, every=True)
        return list(zip(logits[:, None], weights[:, None], strict=True))

    def rewind(self, n_tokens: int) -> None:
        self.state.rewind(n_tokens)


def _weights_of_step(expert: LanguageModel) -> int:
    """Number of weights that a step of one token reads."""
    tied = expert.head_weight is expert.embedding.weight
    return sum(p.numel() for p in expert.parameters()) - (0 if tied else expert.embedding.weight.numel())
