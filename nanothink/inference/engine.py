"""Continuous batching: sequences join and leave the batch of a model between any two tokens.

A row is read once, by itself or with others of its length, and its decoding state then joins that of the
batch (Yu et al. 2022, "Orca", section 3.1, iteration-level scheduling). A row's tokens depend on its prompt,
settings and seed alone; batches only change the rounding of its logits, which ``sampling`` makes harmless.

Past the context a row begins a new state from its last tokens, as in ``generate``.
"""

from __future__ import annotations

import functools
import secrets
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nanothink.errors import UsageError
from nanothink.inference.generate import evaluating, window_start
from nanothink.inference.sampling import SamplingConfig, drafted_token, next_tokens
from nanothink.inference.scores import TokenScore, token_scores
from nanothink.models.contract import LanguageModel, State

READ_TOKENS = 512
"""Prompt tokens read between two tokens of the batch, which waits for them."""

_PIECE = 256
"""Most prompt tokens of one reading."""


@dataclass(frozen=True)
class Drawn:
    """A token that a row has drawn."""

    row: Row
    token: int | None
    """None: the model ended the document, and the token is not part of the text."""
    finished: str | None
    """"stop" after the end of a document, "length" after ``max_new_tokens``; None while the row goes on."""
    score: TokenScore | None = None
    weights: tuple[float, ...] = ()
    """Weights of a combined model's components."""


class Row:
    """A sequence that is being continued.

    Args:
        prompt: token ids; an empty prompt stands for the beginning of a document.
        config: its settings; with the same seed it gives the same tokens in any company.
        n_likeliest: score every token, beside so many of the likeliest; None to score nothing.
        end_ids: tokens that end the text as the end of a document does.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        config: SamplingConfig,
        *,
        n_likeliest: int | None = None,
        end_ids: frozenset[int] = frozenset(),
    ) -> None:
        self.config, self.n_likeliest, self.end_ids = config, n_likeliest, end_ids
        self.tokens = list(prompt)
        """Prompt and what was drawn since."""
        self.n_prompt = len(self.tokens)
        self.seed = secrets.randbits(62) if config.seed is None else config.seed
        self.law = _law(config)


def _law(config: SamplingConfig) -> SamplingConfig:
    """The settings that a draw depends on: rows for which this is the same object are drawn together."""
    return _same_law(config.model_copy(update={"seed": None, "max_new_tokens": 1, "stop_at_eos": True}))


@functools.lru_cache(1024)
def _same_law(law: SamplingConfig) -> SamplingConfig:
    return law


@dataclass
class _Reading:
    """Rows with as many tokens left to read as one another, on their way into the batch."""

    rows: list[Row]
    state: State
    left: Tensor
    """(rows, tokens), those left to read."""


class Engine:
    """The batch of one model, one token at a time. Not for several threads at once.

    Args:
        model: any model. The caller sets autocast.
        eos_id: ends a document.
        start: makes a decoding state from the seed of each of its rows; the default is ``model.start``.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        eos_id: int,
        start: Callable[[Sequence[int]], State] | None = None,
    ) -> None:
        self._model, self._eos_id = model, eos_id
        self._modules = list(model.modules())
        self._start = start or (lambda seeds: model.start(len(seeds)))
        self._waiting: deque[Row] = deque()
        self._readings: deque[_Reading] = deque()
        self._rows: list[Row] = []  # in the order of the state's
        self._state: State | None = None

    @property
    def rows(self) -> list[Row]:
        """Every row that is not finished."""
        read = [row for reading in self._readings for row in reading.rows]
        return [*self._rows, *read, *self._waiting]

    def add(self, row: Row) -> None:
        """Add a row to the batch at its next step.

        Raises:
            UsageError: its prompt has a token that is not in the model's vocabulary.
        """
        bad = next((token for token in row.tokens if not 0 <= token < self._model.vocab_size), None)
        if bad is not None:
            raise UsageError(
                f"the prompt has token {bad}, but the model knows tokens 0 to {self._model.vocab_size - 1}; "
                "encode it with the tokenizer of the model's own checkpoint"
            )
        if not row.tokens:
            row.tokens, row.n_prompt = [self._eos_id], 1
        self._waiting.append(row)

    @torch.inference_mode()
    def remove(self, row: Row) -> None:
        """Take a row out, wherever it is; nothing happens if it has finished."""
        if row in self._waiting:
            self._waiting.remove(row)
        elif row in self._rows:
            self._drop(self._rows.index(row))
        for reading in [reading for reading in self._readings if row in reading.rows]:
            at = reading.rows.index(row)
            reading.state.drop(at)
            reading.rows[at], reading.left[at] = reading.rows[-1], reading.left[-1]
            reading.rows.pop()
            reading.left = reading.left[:-1]
            if not reading.rows:
                self._readings.remove(reading)

    def step(self) -> list[Drawn]:
        """Draw one token for every row in the batch, and read part of the waiting prompts."""
        with evaluating(self._model, self._modules), torch.inference_mode():
            self._renew_windows()
            logits = []
            if self._rows:
                assert self._state is not None
                self._state.choose = self._choose if len(self._rows) == 1 else None
                last = [[row.tokens[-1]] for row in self._rows]
                logits.append(self._model.step(self._tensor(last), self._state))
            logits += self._read_waiting()
            if not logits:
                return []
            return self._draw(logits[0] if len(logits) == 1 else torch.cat(logits))

    def _choose(self, logits: Tensor, drafted: Sequence[int]) -> int | None:
        """See ``contract.Choose``."""
        (row,) = self._rows
        text, ends = [*row.tokens, *drafted], row.end_ids | {self._eos_id}
        return drafted_token(logits, text, len(text) - row.n_prompt, row.config, row.seed, ends)

    def _renew_windows(self) -> None:
        """Rows whose context is full wait to be read anew from their last tokens."""
        context = self._model.context_length
        for at in reversed(range(len(self._rows))):
            row = self._rows[at]
            n_read = len(row.tokens)
            if window_start(n_read, context) != window_start(n_read - 1, context):
                self._waiting.appendleft(row)
                self._drop(at)

    def _read_waiting(self) -> list[Tensor]:
        """Read about READ_TOKENS tokens of waiting rows; logits (b, V) of those that joined the batch.

        A long prompt is read in pieces, between which the short ones behind it have their turn.
        """
        joined, budget = [], READ_TOKENS
        while budget > 0 and (self._readings or self._waiting):
            if self._waiting:
                self._readings.append(self._next_reading())
            reading = self._readings.popleft()
            width = max(1, min(budget, _PIECE) // len(reading.rows))
            piece, reading.left = reading.left[:, :width], reading.left[:, width:]
            budget -= piece.numel()
            logits = self._model.step(piece, reading.state)
            if reading.left.shape[1]:
                self._readings.append(reading)
            else:
                self._join(reading.rows, reading.state)
                joined.append(logits)
        return joined

    def _next_reading(self) -> _Reading:
        """The first of the waiting rows, and those behind it whose windows are as long."""
        context = self._model.context_length

        def window(row: Row) -> list[int]:
            return row.tokens[window_start(len(row.tokens), context) :]

        first = len(window(self._waiting[0]))
        rows = [row for row in self._waiting if len(window(row)) == first][: max(1, _PIECE // first)]
        for row in rows:
            self._waiting.remove(row)
        state = self._start([row.seed for row in rows])
        return _Reading(rows, state, self._tensor([window(row) for row in rows]))

    def _draw(self, logits: Tensor) -> list[Drawn]:
        """A token of each row from its logits, (rows, V); finished rows leave."""
        rows = list(self._rows)
        chosen = [0] * len(rows)
        laws: dict[SamplingConfig, list[int]] = {}
        for at, row in enumerate(rows):
            laws.setdefault(row.law, []).append(at)
        for law, places in laws.items():
            own = [rows[at] for at in places]
            tokens = next_tokens(logits[places], [row.tokens for row in own], law, [row.seed for row in own])
            for at, token in zip(places, tokens.tolist(), strict=True):
                chosen[at] = token
        scores = self._scores(logits, chosen)
        weights = getattr(self._state, "weights", None)
        trusted = weights.tolist() if weights is not None else [()] * len(rows)
        drawn = []
        for row, token, score, trust in zip(rows, chosen, scores, trusted, strict=True):
            ended = row.config.stop_at_eos and (token == self._eos_id or token in row.end_ids)
            if not ended:
                row.tokens.append(token)
            full = len(row.tokens) - row.n_prompt >= row.config.max_new_tokens
            finished = "stop" if ended else "length" if full else None
            drawn.append(Drawn(row, None if ended else token, finished, score, tuple(trust)))
        for one in drawn:
            if one.finished:
                self.remove(one.row)
        return drawn

    def _scores(self, logits: Tensor, chosen: Sequence[int]) -> list[TokenScore | None]:
        wanted = [at for at, row in enumerate(self._rows) if row.n_likeliest is not None]
        scores: list[TokenScore | None] = [None] * len(self._rows)
        if wanted:
            found = token_scores(
                logits[wanted],
                [chosen[at] for at in wanted],
                max(self._rows[at].n_likeliest or 0 for at in wanted),
            )
            for at, score in zip(wanted, found, strict=True):
                few = score.likeliest[: self._rows[at].n_likeliest]
                scores[at] = TokenScore(score.log_probability, few)
        return scores

    def _join(self, rows: list[Row], state: State) -> None:
        if not self._rows:
            self._state = state
        else:
            assert self._state is not None
            self._state.join(state)
        self._rows += rows

    def _drop(self, at: int) -> None:
        """Take the row out of the state, where the last one takes its place."""
        assert self._state is not None
        self._rows[at] = self._rows[-1]
        self._rows.pop()
        if self._rows:
            self._state.drop(at)
        else:
            self._state = None

    def _tensor(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(tokens, dtype=torch.int64, device=self._model.head_weight.device)
