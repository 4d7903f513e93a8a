"""The one thread that computes: continuous batches of every served model, and single calls between tokens.

The event loop and the thread share nothing but two queues. The loop sends what is to be done; the thread
sends back, once a turn, everything that was drawn.
"""

from __future__ import annotations

import asyncio
import os
import queue
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from nanothink.errors import NanoThinkError
from nanothink.inference.engine import Drawn, Engine, Row
from nanothink.inference.scores import TokenScore
from nanothink.inference.stopping import StoppingDecoder
from nanothink.runs.trained_model import TrainedModel
from nanothink.serve.errors import RequestError

_T = TypeVar("_T")

_TURN_SECONDS = 10.0
"""For the turn under way when the thread is told to end."""


@dataclass(frozen=True)
class Piece:
    """A part of a text: what one token added, or all of it."""

    choice: int
    """Which text of the request."""
    text: str
    """What became final with it."""
    token: int | None
    """The last one; None: the model ended the document."""
    finished: str | None
    """"stop" or "length" with the last piece of a text."""
    n_tokens: int
    """How many it is of: one, none at the end of the document, or all of a text that comes whole."""
    score: TokenScore | None = None
    weights: tuple[float, ...] = ()


@dataclass(eq=False)
class _Text:
    """A row of a batch, and the request that it is written for."""

    ticket: Ticket
    choice: int
    row: Row
    decoder: StoppingDecoder | None
    """None: nobody asks for its tokens one by one, so it is decoded at the end."""


class Ticket:
    """A request's texts on their way. Made by ``ModelThread.submit``; ``cancel`` it when nobody waits."""

    def __init__(self, thread: ModelThread, model: str, n_texts: int, *, streamed: bool) -> None:
        self._thread, self.model, self._n_open = thread, model, n_texts
        self.streamed = streamed
        self.n_unfinished = n_texts  # of the thread
        self._pieces: asyncio.Queue[list[Piece] | RequestError] = asyncio.Queue()

    async def pieces(self) -> AsyncIterator[list[Piece]]:
        """Pieces as they come, those of one turn together.

        Raises:
            RequestError: the model failed.
        """
        while self._n_open or not self._pieces.empty():
            arrived = await self._pieces.get()
            if isinstance(arrived, RequestError):
                raise arrived
            yield arrived

    def deliver(self, arrived: list[Piece] | RequestError) -> None:
        """Called in the event loop."""
        n_ended = self._n_open
        if isinstance(arrived, list):
            n_ended = sum(piece.finished is not None for piece in arrived)
        self._end(min(n_ended, self._n_open))
        self._pieces.put_nowait(arrived)

    def cancel(self) -> None:
        """Free the places of the texts that are not finished."""
        if self._n_open:
            self._end(self._n_open)
            self._thread.forget(self)

    def _end(self, n_texts: int) -> None:
        self._n_open -= n_texts
        self._thread.n_texts -= n_texts


@dataclass
class _Batch:
    """The texts of one model."""

    loaded: TrainedModel
    engine: Engine
    waiting: deque[_Text] = field(default_factory=deque)
    running: dict[Row, _Text] = field(default_factory=dict)


class ModelThread:
    """See the head of this file. Its methods belong to the event loop.

    Args:
        models: by name.
        max_batch: texts of one model that are written at the same time.
        max_texts: texts in all, those that wait included.
        on_failure: hears of exceptions that should not happen, in the thread.
    """

    def __init__(
        self,
        models: Mapping[str, TrainedModel],
        *,
        max_batch: int,
        max_texts: int,
        on_failure: Callable[[BaseException], None],
    ) -> None:
        self._batches = {name: _Batch(loaded, _engine(loaded)) for name, loaded in models.items()}
        self._max_batch, self._max_texts, self._on_failure = max_batch, max_texts, on_failure
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._calls: deque[Callable[[], None]] = deque()  # of the thread
        self._arrived: dict[Ticket, list[Piece]] = {}  # of the thread
        self.n_texts = 0
        """Texts that are written or wait."""

    def start(self) -> None:
        """Begin; to be called in the event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        """End after the current turn, whatever is left to do; one that takes long ends with the process."""
        self._inbox.put(None)
        self._thread.join(_TURN_SECONDS)

    def submit(
        self, model: str, rows: Sequence[Row], stop: Sequence[str], *, streamed: bool, weighed: bool = False
    ) -> Ticket:
        """Have texts written, one for each row; they join the model's batch as soon as there is room.

        Args:
            streamed: their pieces are wanted as they come. Otherwise they come together at the end, and the
                event loop does not take turns with the thread at every token.
            weighed: the weights of each token are wanted.

        Raises:
            RequestError: too many texts wait already.
        """
        if self.n_texts + len(rows) > self._max_texts:
            raise RequestError(
                f"{self.n_texts} texts are being written or wait, and {self._max_texts} can be; try again "
                "in a moment.",
                503,
                code="server_overloaded",
            )
        ticket = Ticket(self, model, len(rows), streamed=streamed)
        self.n_texts += len(rows)
        batch = self._batches[model]
        by_token = streamed or weighed or bool(stop)
        tokenizer = batch.loaded.tokenizer
        texts = [
            _Text(
                ticket,
                choice,
                row,
                StoppingDecoder(tokenizer, stop) if by_token or row.n_likeliest is not None else None,
            )
            for choice, row in enumerate(rows)
        ]
        self._inbox.put(lambda: batch.waiting.extend(texts))
        return ticket

    async def call(self, work: Callable[[], _T]) -> _T:
        """Have something else computed between two tokens."""
        future: Future[_T] = Future()

        def carry_out() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(work())
                except BaseException as error:
                    future.set_exception(error)

        self._inbox.put(lambda: self._calls.append(carry_out))
        return await asyncio.wrap_future(future)

    def forget(self, ticket: Ticket) -> None:
        """Remove what is left of a request's texts."""
        batch = self._batches[ticket.model]

        def carry_out() -> None:
            self._arrived.pop(ticket, None)
            batch.waiting = deque(text for text in batch.waiting if text.ticket is not ticket)
            for row in [row for row, text in batch.running.items() if text.ticket is ticket]:
                batch.engine.remove(row)
                del batch.running[row]

        self._inbox.put(carry_out)

    # -----------------------------------------------------------------------------------------------
    # In the thread

    def _run(self) -> None:
        torch.set_num_threads(_n_threads())
        while True:
            busy = self._calls or any(batch.waiting or batch.running for batch in self._batches.values())
            with suppress(queue.Empty):
                while True:
                    work = self._inbox.get(block=not busy)
                    if work is None:
                        return
                    work()
                    busy = True
            if self._calls:  # one at a time, so that texts go on between them
                self._calls.popleft()()
            for batch in self._batches.values():
                try:
                    self._turn(batch)
                except Exception as error:
                    self._fail(batch, error)
            self._send()

    def _turn(self, batch: _Batch) -> None:
        """One more token of every running text of a model."""
        while batch.waiting and len(batch.running) < self._max_batch:
            text = batch.waiting.popleft()
            batch.running[text.row] = text
            batch.engine.add(text.row)
        if batch.running:
            for drawn in batch.engine.step():
                self._take(batch, drawn)

    def _take(self, batch: _Batch, drawn: Drawn) -> None:
        text, row, finished = batch.running[drawn.row], drawn.row, drawn.finished
        if text.decoder is None:
            if not finished:
                return
            written = row.tokens[row.n_prompt :]
            shown, n_tokens = batch.loaded.tokenizer.decode(written), len(written)
        else:
            shown = "" if drawn.token is None else text.decoder.push(drawn.token)
            n_tokens = int(drawn.token is not None)
            if text.decoder.stopped:
                batch.engine.remove(row)
                finished = "stop"
            elif finished:
                shown += text.decoder.flush()
        if finished:
            del batch.running[row]
            text.ticket.n_unfinished -= 1
        piece = Piece(text.choice, shown, drawn.token, finished, n_tokens, drawn.score, drawn.weights)
        self._arrived.setdefault(text.ticket, []).append(piece)

    def _fail(self, batch: _Batch, error: Exception) -> None:
        """Every text of the batch ends in an error; the next ones find a new batch."""
        if isinstance(error, NanoThinkError):
            failure = RequestError(str(error), 500)
        else:
            failure = RequestError("The model failed; see the server's log.", 500)
            self._on_failure(error)
        assert self._loop is not None
        failed = {text.ticket for text in batch.running.values()}
        for ticket in failed:
            self._arrived.pop(ticket, None)
            self._loop.call_soon_threadsafe(ticket.deliver, failure)
        batch.waiting = deque(text for text in batch.waiting if text.ticket not in failed)
        batch.running.clear()
        batch.engine = _engine(batch.loaded)

    def _send(self) -> None:
        ready = [ticket for ticket in self._arrived if ticket.streamed or not ticket.n_unfinished]
        if ready:
            assert self._loop is not None
            self._loop.call_soon_threadsafe(_deliver, {t: self._arrived.pop(t) for t in ready})


def _deliver(arrived: Mapping[Ticket, list[Piece]]) -> None:
    for ticket, pieces in arrived.items():
        ticket.deliver(pieces)


def _n_threads() -> int:
    """PyTorch's threads: all cores but the one of the event loop.

    With one for each core, all of them wait at the end of every operation for the one that was interrupted.
    """
    has_affinity = hasattr(os, "sched_getaffinity")  # Linux
    n_cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    return min(torch.get_num_threads(), max(1, n_cores - 1))


def _engine(loaded: TrainedModel) -> Engine:
    return Engine(loaded.decoder, eos_id=loaded.tokenizer.eos_id)
