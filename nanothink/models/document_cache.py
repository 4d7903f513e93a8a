"""The document cache: the model's own states over the document read so far, and the token after each.

The continuous cache (Grave, Joulin and Usunier 2017, "Improving neural language models with a continuous
cache", section 3): at position t the query is the state h_t, scaled to length 1; the keys are the states h_s
of earlier positions s < t of the same document, the value of each is token s + 1, which has been read by
then. It differs in what becomes of them: the nearest K make a distribution at a fitted temperature, and a
gate (joint_gate.py) mixes it with the model's, where they take one weight and all of the window.

Nothing is trained and nothing stays: another document starts with an empty cache. The window bounds it; a
token costs one key whatever the length of the text.

Shapes: B sequences, T tokens, N positions, D width of a key, K neighbours, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanothink.models.contract import Choose, LanguageModel, State
from nanothink.models.decoding_states import JointState
from nanothink.models.drafts import MOST_DRAFTS, Drafts
from nanothink.models.joint_decoding import JointDecoding
from nanothink.models.joint_gate import JointGate, gated_rows
from nanothink.models.store_gate import NO_TOKEN, VECTOR_STORE, Neighbours

_QUERIES = 256  # at a time: their similarities to a window stay small


class DocumentCache:
    """Keys and values of one stream of documents, read from its start to its end.

    Args:
        window: how many tokens back keys are kept.
        n_neighbours: K.
    """

    def __init__(self, window: int, n_neighbours: int) -> None:
        self.window = window
        self.n_neighbours = n_neighbours
        self._keys: Tensor | None = None  # (n, D)
        self._tokens = torch.empty(0, dtype=torch.int64)
        self._documents = torch.empty(0, dtype=torch.int64)

    def read(self, states: Tensor, following: Tensor, documents: Tensor) -> Neighbours:
        """Neighbours (N, K) of the next N positions, each among those before it in its document.

        Args:
            states: (N, D).
            following: (N,) the token after each, which only later positions see; NO_TOKEN for the last where
                it is not known yet, see ``tell``.
            documents: (N,) numbers that never decrease: equal for positions of one document.
        """
        new = F.normalize(states.float(), dim=-1)
        if self._keys is None:
            self._keys = new[:0]
            self._tokens, self._documents = following[:0], documents[:0]
        before = len(self._keys)
        keys = torch.cat([self._keys, new])
        tokens = torch.cat([self._tokens, following])
        groups = torch.cat([self._documents, documents])
        found = [
            self._search(keys, tokens, groups, start, min(start + _QUERIES, len(keys)))
            for start in range(before, len(keys), _QUERIES)
        ]
        # Earlier documents are never looked at again. As much more as may be taken back stays.
        first = max(len(keys) - self.window - MOST_DRAFTS, int((groups == groups[-1]).nonzero()[0]))
        self._keys, self._tokens, self._documents = keys[first:], tokens[first:], groups[first:]
        similarities, values = (torch.cat(column) for column in zip(*found, strict=True))
        return Neighbours(similarities, values)

    def tell(self, token: Tensor) -> None:
        """Set the token after the last state, which was unknown (NO_TOKEN) when that was read."""
        self._tokens = torch.cat([self._tokens[:-1], token.view(1)])

    def rewind(self, n_tokens: int) -> None:
        """Forget the last positions, so many, which are of one document with those before."""
        assert self._keys is not None
        self._keys, self._tokens = self._keys[:-n_tokens], self._tokens[:-n_tokens]
        self._documents = self._documents[:-n_tokens]

    def _search(
        self, keys: Tensor, tokens: Tensor, documents: Tensor, start: int, stop: int
    ) -> tuple[Tensor, Tensor]:
        """Of positions start to stop - 1: similarities and tokens, (stop - start, K) each, nearest first."""
        begin = int((documents[: start + 1] == documents[start]).nonzero()[0])  # of the first one's document
        oldest = max(begin, start - self.window)
        there = torch.arange(oldest, stop, device=keys.device)
        own = torch.arange(start, stop, device=keys.device)[:, None]
        allowed = (there < own) & (there >= own - self.window)
        allowed &= documents[oldest:stop] == documents[start:stop, None]
        scores = (keys[start:stop] @ keys[oldest:stop].T).masked_fill_(~allowed, -torch.inf)
        n = min(self.n_neighbours, stop - oldest)
        nearest, places = scores.topk(n, -1)
        values = tokens[oldest:stop][places].masked_fill(nearest == -torch.inf, NO_TOKEN)
        padding = (0, self.n_neighbours - n)
        return F.pad(nearest, padding, value=-torch.inf), F.pad(values, padding, value=NO_TOKEN)


@dataclass
class CachedRow:
    """One sequence: the model's state, the cache, and where the text is."""

    state: State
    caches: list[DocumentCache]
    """One, or one for each expert."""
    tokens: list[int] = field(default_factory=list)
    """The last tokens read, at most a context of them."""
    n_read: int = 0
    """Tokens that the state holds."""
    document: int = 0
    """Number of ends of documents read."""
    shares: Tensor | None = None
    """(components,) of the last prediction."""
    drafts: Drafts[tuple[Tensor, Tensor]] = field(default_factory=Drafts)
    """With log-probabilities and shares after each."""

    def rewind(self, n_tokens: int) -> None:
        """Forget the last tokens, so many, none of which ends a document."""
        self.state.rewind(n_tokens)
        for cache in self.caches:
            cache.rewind(n_tokens)
        self.tokens, self.n_read = self.tokens[:-n_tokens], self.n_read - n_tokens


class CachedState(State):
    """Decoding state of ``CachedModel``: one of batch 1 for each sequence, since their windows differ."""

    def __init__(self, rows: list[CachedRow]) -> None:
        self.rows = rows

    @property
    def weights(self) -> Tensor | None:
        """(B, components): how far each was trusted in the last prediction."""
        shares = [row.shares for row in self.rows]
        return None if None in shares else torch.stack(cast(list[Tensor], shares))

    def drop(self, row: int) -> None:
        """See ``State.drop``."""
        self.rows[row] = self.rows[-1]
        self.rows.pop()

    def join(self, other: State) -> None:
        """See ``State.join``."""
        assert isinstance(other, CachedState)
        self.rows += other.rows


class CachedModel(nn.Module):
    """A model with a document cache, for decoding and for whole texts. Has no weights of its own.

    It has no limit of context: where the model's is full, the model starts again with the last half of it,
    and the cache stays.

    Args:
        model: one with a joint gate that knows the document cache.
        eos_id: ends a document.
        window: of the cache, in tokens.
        n_neighbours: K.
    """

    def __init__(self, model: LanguageModel, *, eos_id: int, window: int, n_neighbours: int) -> None:
        super().__init__()
        assert model.joint_gate is not None
        self.model = model
        self.gate: JointGate = model.joint_gate
        self.eos_id, self.window, self.n_neighbours = eos_id, window, n_neighbours

    context_length = None

    @property
    def vocab_size(self) -> int:
        return self.model.vocab_size

    @property
    def head_weight(self) -> nn.Parameter:
        """That of the model; decoding asks it for the device."""
        return self.model.head_weight

    @property
    def components(self) -> tuple[str, ...]:
        """Names of the parts of a prediction: the experts or the model itself, then the memories."""
        return (*self.model.expert_names, *dict.fromkeys(self.gate.names))

    def start(self, batch_size: int) -> CachedState:
        """Empty states and caches."""
        return CachedState([CachedRow(self.model.start(1), self._caches()) for _ in range(batch_size)])

    def _caches(self) -> list[DocumentCache]:
        return [DocumentCache(self.window, self.n_neighbours) for _ in range(self.gate.n_caches)]

    @torch.no_grad()
    def step(self, tokens: Tensor, state: State) -> Tensor:
        """Read (B, T) more tokens and predict the one after them: (B, V) log-probabilities."""
        assert isinstance(state, CachedState)
        row, model = state.rows[0], self.model
        if tokens.numel() == 1 and state.choose is not None and isinstance(model, JointDecoding):
            assert isinstance(row.state, JointState)
            if model.prepare(row.drafts, row.state, gated=True):
                text = _Text(self, model, row, state.choose)
                logits, row.shares = row.drafts.next(int(tokens), text)
                return logits
        return torch.cat([self._advance(own, row)[-1:] for own, row in zip(tokens, state.rows, strict=True)])

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        """(B, T) -> (B, T, V) log-probabilities; each row is the beginning of a text."""
        rows = self.start(len(tokens)).rows
        return torch.stack(
            [self._advance(own, row, last=False) for own, row in zip(tokens, rows, strict=True)]
        )

    def _advance(self, tokens: Tensor, row: CachedRow, *, last: bool = True) -> Tensor:
        """(T,) more tokens of one row -> (T, V) log-probabilities; with ``last`` the last one's, (1, V)."""
        context, found = self.model.context_length, []
        row.drafts.settle(row.rewind)
        while len(tokens):
            self._make_room(row)
            room = len(tokens) if context is None else context - row.n_read
            piece, tokens = tokens[:room], tokens[room:]
            logits, shares = self._read(piece, row, last=last)
            row.shares = shares[-1]
            found.append(logits)
        return found[-1] if last else torch.cat(found)

    def _make_room(self, row: CachedRow) -> None:
        """A new state where it is full: its next token is the last of half a context, as in ``generate``."""
        context = self.model.context_length
        if context is None or row.n_read < context:
            return
        before = max(1, context // 2) - 1
        kept = torch.tensor([row.tokens[len(row.tokens) - before :]], device=self.head_weight.device)
        row.state, row.n_read = self.model.start(1), before
        if before:
            self.model.read(kept, row.state)

    def _read(self, tokens: Tensor, row: CachedRow, *, last: bool) -> tuple[Tensor, Tensor]:
        """The same for tokens that fit into the state of the model, with the shares (T, components)."""
        states = self.model.read(tokens[None], row.state)[0]  # (T, D)
        weights = self.model.weights_read(row.state)
        ended = row.document + (tokens == self.eos_id).cumsum(0)  # (T,): a token after the end is another's
        following = torch.cat([tokens[1:], tokens.new_tensor([NO_TOKEN])])
        if row.tokens:
            for cache in row.caches:
                cache.tell(tokens[0])
        keys = self.model.cache_keys(states)  # more of them than caches, if there is one for all experts
        cached = [cache.read(own, following, ended) for cache, own in zip(row.caches, keys, strict=False)]
        row.tokens = (row.tokens + tokens.tolist())[-(self.model.context_length or 1) :]
        row.n_read += len(tokens)
        row.document = int(ended[-1])
        rows = slice(-1, None) if last else slice(None)
        memories = [found.rows(rows) for found in cached]
        if VECTOR_STORE in self.gate.names:
            memories.insert(0, self.model.stored_neighbours(keys[0][rows]))
        parts, shares = [], []
        for _, product, evidence in gated_rows(
            self.model,
            self.gate.weights["unigram"],
            states[rows],
            None if weights is None else weights[0, rows],
            tokens[rows],
            memories,
        ):
            mixed, share = self.gate.mix_logits(product, evidence)
            parts.append(mixed)
            shares.append(share.exp())
        trusted = torch.cat(shares)  # (T, memories + 1)
        own = trusted.new_ones(1, 1) if weights is None else weights[0, rows].to(trusted.device)
        of_caches = trusted[:, -len(cached) :].sum(1, keepdim=True)
        trust = torch.cat([own * trusted[:, :1], trusted[:, 1 : -len(cached)], of_caches], -1)
        return torch.cat(parts), trust


@dataclass(frozen=True)
class _Text:
    """See ``drafts.Drafting``."""

    cached: CachedModel
    model: JointDecoding
    row: CachedRow
    choose: Choose

    def draft(self, token: int, n_tokens: int) -> list[int]:
        self.cached._make_room(self.row)
        assert isinstance(self.row.state, JointState)
        return self.model.draft(token, n_tokens, self.row.state, self._choose)

    def _choose(self, logits: Tensor, drafted: Sequence[int]) -> int | None:
        """No draft ends a document: the cache could not go back to it."""
        token = self.choose(logits, drafted)
        return None if token == self.cached.eos_id else token

    def predict(self, tokens: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        logits, shares = self.cached._read(torch.tensor(tokens), self.row, last=False)
        return list(zip(logits[:, None], shares, strict=True))

    def rewind(self, n_tokens: int) -> None:
        self.row.rewind(n_tokens)
