"""Continue prompts with any model of the contract, one or many at once, as a stream.

The rows of a batch advance together. Positions that all prompts have are read in one parallel pass; after
that, a row with prompt tokens left takes the next of them where another row takes a sampled token. That
needs neither padding nor masks, so it works for recurrent states and for caches.

Past the model's context a new state is started from the last half of a context. The position where that
happens is a function of the number of tokens read alone, so a long prompt is treated the same whether it was
read at once or token by token, alone or in a batch.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch

from nanothink.errors import UsageError
from nanothink.inference.sampling import SamplingConfig, drafted_token, next_tokens
from nanothink.models.contract import LanguageModel, State

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_MAX_PENDING = 16
"""Tokens held back before they are searched for a place to cut; an unfinished character has three bytes."""


class Decoder(Protocol):
    """The part of a tokenizer that streaming needs."""

    def decode(self, ids: list[int], /) -> str: ...


def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    config: SamplingConfig,
    *,
    eos_id: int,
    on_token: Callable[[int, int], None] | None = None,
    start: Callable[[Sequence[int]], State] | None = None,
) -> list[list[int]]:
    """Continue each prompt.

    Args:
        model: any model; in evaluation mode during the call, left as it was. The caller sets autocast.
        prompts: token ids; an empty prompt stands for the beginning of a document, ``[eos_id]``.
        config: see its fields. Row i draws with seed + i.
        eos_id: ends a document.
        on_token: called with (row, token) for each new token as soon as it is drawn.
        start: makes a decoding state from the seed of each of its rows, for models with several ways to
            decode; the default is ``model.start``.

    Returns:
        The new tokens of each prompt, without the prompt and without EOS.

    Raises:
        UsageError: a prompt holds a token that is not in the model's vocabulary.
    """
    if not prompts:
        return []
    _check_prompts(prompts, model.vocab_size)
    texts = [list(prompt) or [eos_id] for prompt in prompts]
    prompt_lengths = [len(text) for text in texts]
    seed = secrets.randbits(62) if config.seed is None else config.seed
    seeds = [(seed + row) % (1 << 63) for row in range(len(texts))]
    begin = start or (lambda of_rows: model.start(len(of_rows)))
    device = model.head_weight.device
    with evaluating(model), torch.inference_mode():
        unfinished = set(range(len(texts)))
        rows = list(range(len(texts)))  # of the state; the finished ones leave with the next new state
        read = min(prompt_lengths)
        first = window_start(read, model.context_length)
        state = begin(seeds)
        logits = model.step(_window(texts, rows, first, read, device), state)

        def choose(logits: torch.Tensor, drafted: Sequence[int]) -> int | None:
            """See ``contract.Choose``."""
            text = [*texts[rows[0]], *drafted]
            n_new = len(text) - prompt_lengths[rows[0]]
            return drafted_token(logits, text, n_new, config, seeds[rows[0]], (eos_id,))

        while True:
            drawing = [i for i, row in enumerate(rows) if row in unfinished and len(texts[row]) == read]
            if drawing:
                chosen = next_tokens(
                    logits if len(drawing) == len(rows) else logits[drawing],
                    [texts[rows[i]] for i in drawing],
                    config,
                    [seeds[rows[i]] for i in drawing],
                )
                for i, token in zip(drawing, chosen.tolist(), strict=True):
                    row = rows[i]
                    if config.stop_at_eos and token == eos_id:
                        unfinished.discard(row)
                        continue
                    texts[row].append(token)
                    if on_token is not None:
                        on_token(row, token)
                    if len(texts[row]) - prompt_lengths[row] >= config.max_new_tokens:
                        unfinished.discard(row)
            if not unfinished:
                break
            read += 1
            state.choose = choose if len(rows) == 1 and len(texts[rows[0]]) == read else None
            new_first = window_start(read, model.context_length)
            if new_first != first:
                first = new_first
                rows = sorted(unfinished)
                state = begin([seeds[row] for row in rows])
                logits = model.step(_window(texts, rows, first, read, device), state)
            else:
                logits = model.step(_window(texts, rows, read - 1, read, device), state)
    return [text[length:] for text, length in zip(texts, prompt_lengths, strict=True)]


def window_start(n_read: int, context_length: int | None) -> int:
    """First token in the decoding state when ``n_read`` tokens have been read.

    0 while everything fits. The first token that does not fit starts a new state, in which it is the last of
    ``context_length // 2`` tokens; that state is used until it is full, and so on.
    """
    if context_length is None or n_read <= context_length:
        return 0
    kept = max(1, context_length // 2)
    advance = context_length + 1 - kept
    return -(-(n_read - context_length) // advance) * advance


@contextmanager
def evaluating(model: torch.nn.Module, modules: Sequence[torch.nn.Module] | None = None) -> Iterator[None]:
    """Set evaluation mode in the block; afterwards every module is as it was, frozen parts included.

    Args:
        modules: all of the model's, for callers in a hurry: finding them takes as long as a small step.
    """
    were_training = [m for m in (model.modules() if modules is None else modules) if m.training]
    for module in were_training:
        module.training = False
    try:
        yield
    finally:
        for module in were_training:
            module.training = True


class StreamDecoder:
    """Decode tokens one by one to text, without showing unfinished characters.

    A token may end inside a UTF-8 character. Text that could still change is held back, at most
    ``_MAX_PENDING`` tokens of it: otherwise bytes that never become a character would make each token decode
    all those before it.

    Args:
        tokenizer: anything that decodes a list of token ids.
    """

    def __init__(self, tokenizer: Decoder) -> None:
        self._tokenizer = tokenizer
        # Tokens already shown: decoders may treat the first of a text differently.
        self._context: list[int] = []
        self._pending: list[int] = []
        self._shown = 0  # characters of decode(context + pending) given out

    def push(self, token: int) -> str:
        """Text that became final with this token: often that of one token, sometimes none or more."""
        self._pending.append(token)
        text = self._tokenizer.decode(self._context + self._pending)
        final = max(self._shown, len(text.rstrip(_REPLACEMENT)))
        n_tokens = end = 0
        if final == len(text):
            n_tokens, end = len(self._pending), final
        elif len(self._pending) >= _MAX_PENDING:
            n_tokens, end = self._place_to_cut(text)
            final = max(final, end)
        new = text[self._shown : final]
        self._shown = final
        if n_tokens:
            self._context, self._pending = self._pending[:n_tokens], self._pending[n_tokens:]
            self._shown = len(self._tokenizer.decode(self._context)) + final - end
        return new

    def _place_to_cut(self, text: str) -> tuple[int, int]:
        """Number of pending tokens that later ones cannot change, and the end of their text; (0, 0) if none.

        If the tokens before and after a place decode to the same apart and together, no character spans it: a
        first byte and one that continues it give one replacement character together, and two apart.
        """
        for n_tokens in range(len(self._pending) - 1, 0, -1):
            before = self._tokenizer.decode(self._context + self._pending[:n_tokens])
            after = self._tokenizer.decode(self._pending[n_tokens:])
            if after and before + after == text:
                return n_tokens, len(before)
        # Another kind of decoder, which may change earlier text at any time.
        return (len(self._pending), len(text)) if len(self._pending) >= 4 * _MAX_PENDING else (0, 0)

    def flush(self) -> str:
        """The rest at the end of the text: unfinished bytes, as replacement characters."""
        text = self._tokenizer.decode(self._context + self._pending)[self._shown :]
        self._context, self._pending, self._shown = [], [], 0
        return text


def _window(
    texts: Sequence[Sequence[int]], rows: Sequence[int], start: int, stop: int, device: torch.device
) -> torch.Tensor:
    """Tokens ``start`` to ``stop`` of the rows, (rows, stop - start). Finished rows repeat their last."""
    if stop - start == 1:
        newest = [[text[start] if start < len(text) else text[-1]] for text in map(texts.__getitem__, rows)]
        return torch.tensor(newest, dtype=torch.int64, device=device)
    windows = [list(texts[row][start:stop]) for row in rows]
    full = [w + [texts[row][-1]] * (stop - start - len(w)) for w, row in zip(windows, rows, strict=True)]
    return torch.tensor(full, dtype=torch.int64, device=device)


def _check_prompts(prompts: Sequence[Sequence[int]], vocab_size: int) -> None:
    for row, prompt in enumerate(prompts):
        for token in prompt:
            if not 0 <= token < vocab_size:
                raise UsageError(
                    f"prompt {row} has token {token}, but the model knows tokens 0 to {vocab_size - 1}; "
                    f"encode it with the tokenizer of the model's own checkpoint"
                )
