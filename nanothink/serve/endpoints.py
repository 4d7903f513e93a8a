"""The endpoints: from a request to what the model thread does, and back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import orjson
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from nanothink.inference.engine import Row
from nanothink.inference.scores import text_scores
from nanothink.runs.trained_model import TrainedModel
from nanothink.serve.answers import Answer, Choice, ScoredToken, TokenTexts
from nanothink.serve.chat import Chats
from nanothink.serve.errors import RequestError, json_response
from nanothink.serve.inspecting import inspect
from nanothink.serve.model_thread import ModelThread, Ticket
from nanothink.serve.requests import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    GenerationRequest,
    InspectRequest,
    TokenizeRequest,
    parse,
)

_T = TypeVar("_T")

_BODY_SECONDS = 30.0
"""For a client to send its body."""

_MAX_TOKEN_CHARACTERS = 16
"""Texts of more characters a token are nearly all white space."""
_LONG_TEXT = 20_000
"""Characters from which a text is tokenised beside the event loop, which answers others meanwhile."""


@dataclass(frozen=True)
class Limits:
    """Bounds of what one client can ask for."""

    max_batch: int = 32
    """Texts of one model that are written at the same time; more wait."""
    max_texts: int = 512
    """Texts in all, those that wait included; a request for more is told to come back later."""
    max_tokens: int = 4096
    """Tokens of one text."""
    max_prompt_tokens: int = 65_536
    """Tokens of a request's prompts together."""
    body_bytes: int = 4 << 20


class Gone(Exception):
    """The client has left; nobody waits for the answer."""


@dataclass(frozen=True)
class ServedModel:
    name: str
    loaded: TrainedModel
    chats: Chats
    created: int
    """Unix time at which its checkpoint was written."""

    def described(self) -> dict[str, Any]:
        """Its entry in the list of models."""
        model = self.loaded.model
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "nanothink",
            "kind": model.kind,
            "max_model_len": model.context_length,
            "components": list(getattr(self.loaded.decoder, "components", ())),
        }


class Endpoints:
    """The handlers of all paths.

    Args:
        models: by name; the first is the default.
    """

    def __init__(self, models: Mapping[str, ServedModel], thread: ModelThread, limits: Limits) -> None:
        self._models, self._thread, self._limits = models, thread, limits

    async def health(self, request: Request) -> Response:
        return json_response({"status": "ok", "texts": self._thread.n_texts})

    async def models(self, request: Request) -> Response:
        listed = [model.described() for model in self._models.values()]
        return json_response({"object": "list", "data": listed})

    async def model(self, request: Request) -> Response:
        return json_response(self._model(request.path_params["name"]).described())

    async def tokenizer_info(self, request: Request) -> Response:
        model = self._model(request.query_params.get("model"))
        tokenizer = model.loaded.tokenizer
        eos = tokenizer.eos_token
        return json_response(
            {
                "eos_token": eos,
                "bos_token": tokenizer.bos_token or eos,  # EOS begins a document where there is no other
                "pad_token": None,
                "vocab_size": tokenizer.vocab_size,
                "chat_template": model.chats.template,
            }
        )

    async def tokenize(self, request: Request) -> Response:
        asked = parse(TokenizeRequest, await self._body(request))
        model = self._model(asked.model)
        tokenizer = model.loaded.tokenizer
        tokens = await self._encoded(model, asked.prompt, "prompt")
        tokens = tokens[tokenizer.bos_id is not None :]  # a part of a text, perhaps
        if asked.prompt in (tokenizer.eos_token, tokenizer.bos_token):
            tokens = [tokenizer.eos_id if asked.prompt == tokenizer.eos_token else tokenizer.start_id]
        length = model.loaded.model.context_length
        return json_response({"count": len(tokens), "max_model_len": length, "tokens": tokens})

    async def detokenize(self, request: Request) -> Response:
        asked = parse(DetokenizeRequest, await self._body(request))
        model = self._model(asked.model)
        self._check_tokens(model, asked.tokens, "tokens")
        return json_response({"prompt": model.loaded.tokenizer.decode(asked.tokens)})

    async def inspect(self, request: Request) -> Response:
        asked = parse(InspectRequest, await self._body(request))
        model = self._model(asked.model)
        self._check_tokens(model, asked.tokens, "tokens")
        tokens = [*await self._encoded(model, asked.prompt, "prompt"), *asked.tokens]
        numbers = {"n_likeliest": asked.n_likeliest, "n_passages": asked.n_passages}
        return json_response(await self._thread.call(lambda: inspect(model.loaded, tokens, **numbers)))

    async def completions(self, request: Request) -> Response:
        asked = parse(CompletionRequest, await self._body(request))
        model = self._model(asked.model)
        if asked.best_of not in (None, asked.n_choices):
            raise RequestError("best_of must be n, or left out.", param="best_of")
        prompts = [await self._encoded(model, prompt, "prompt") for prompt in asked.prompts]
        self._check_size(asked, prompts)
        scored = asked.logprobs is not None
        listed: Sequence[Sequence[ScoredToken]] = [()] * len(prompts)
        if asked.echo and scored:
            listed = await _while_connected(request, self._score(model, asked, prompts))
        choices: list[Choice] = []
        for own, prompt, tokens in zip(listed, asked.prompts, prompts, strict=True):
            shown = prompt if isinstance(prompt, str) else model.loaded.tokenizer.decode(tokens)
            for _ in range(asked.n_choices):
                choices.append(
                    Choice(
                        len(choices),
                        model.loaded.tokenizer,
                        prompt=shown if asked.echo else "",
                        prompt_tokens=own,
                        scored=scored,
                        weighed=bool(asked.return_weights),
                    )
                )
        answer = Answer(model.name, choices, sum(map(len, prompts)))
        return await self._write(request, asked, model, prompts, answer, asked.logprobs)

    async def chat(self, request: Request) -> Response:
        asked = parse(ChatRequest, await self._body(request))
        model = self._model(asked.model)
        prompts = [await asyncio.to_thread(model.chats.tokens, asked.messages)]
        self._check_size(asked, prompts)
        choices = [
            Choice(
                index,
                model.loaded.tokenizer,
                chat=True,
                scored=bool(asked.logprobs),
                weighed=bool(asked.return_weights),
            )
            for index in range(asked.n_choices)
        ]
        answer = Answer(model.name, choices, len(prompts[0]), chat=True)
        likeliest = (asked.top_logprobs or 0) if asked.logprobs else None
        return await self._write(request, asked, model, prompts, answer, likeliest, model.chats.end_ids)

    async def _write(
        self,
        request: Request,
        asked: GenerationRequest,
        model: ServedModel,
        prompts: Sequence[Sequence[int]],
        answer: Answer,
        n_likeliest: int | None,
        end_ids: frozenset[int] = frozenset(),
    ) -> Response:
        """Have the texts of a request written, and answer at the end, or piece by piece."""
        rows = [
            Row(prompt, asked.sampling(choice), n_likeliest=n_likeliest, end_ids=end_ids)
            for prompt in prompts
            for choice in range(asked.n_choices)
        ]
        if asked.tokens_wanted == 0:
            rows = []
            for choice in answer.choices:
                choice.end("length")
        ticket = self._thread.submit(
            model.name,
            rows,
            asked.stop_strings,
            streamed=bool(asked.stream),
            weighed=bool(asked.return_weights),
        )
        if asked.stream:
            return _EventStream(_events(answer, ticket, include_usage=asked.include_usage), ticket.cancel)

        async def written() -> dict[str, Any]:
            async for pieces in ticket.pieces():
                for piece in pieces:
                    answer.add(piece)
            return answer.whole()

        try:
            return json_response(await _while_connected(request, written()))
        finally:
            ticket.cancel()

    async def _score(
        self, model: ServedModel, asked: CompletionRequest, prompts: Sequence[Sequence[int]]
    ) -> list[list[ScoredToken]]:
        """The tokens of prompts with their scores, None for the first of each; no BOS that was not sent."""
        loaded = model.loaded
        context = loaded.model.context_length or (
            loaded.config.model.max_seq_len if loaded.document_cache else None
        )
        longest = max(map(len, prompts))
        if context is not None and longest > context:
            raise RequestError(
                f"This model's context is {context} tokens, and a prompt has {longest}: it can be continued, "
                "but not scored (echo with logprobs). Send it in pieces.",
                param="prompt",
                code="context_length_exceeded",
            )
        listed, own_bos = [], loaded.tokenizer.bos_id is not None
        for sent, tokens in zip(asked.prompts, prompts, strict=True):
            scores = await self._thread.call(
                lambda tokens=tokens: text_scores(loaded.decoder, tokens, asked.logprobs or 0)  # type: ignore[misc]
            )
            scored = list(zip(tokens, [None, *scores], strict=False))[own_bos and isinstance(sent, str) :]
            texts = TokenTexts(loaded.tokenizer)
            listed.append([texts.scored(token, score) for token, score in scored])
        return listed

    # -----------------------------------------------------------------------------------------------
    # What every request goes through

    async def _body(self, request: Request) -> Any:
        """The body, read within bounds of size and time, as JSON."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # a page elsewhere could send any other without being asked about
            raise RequestError("Send JSON, with the header Content-Type: application/json.", 415)
        body = bytearray()

        async def read() -> None:
            async for piece in request.stream():
                body.extend(piece)
                if len(body) > self._limits.body_bytes:
                    raise RequestError(f"The body is larger than {self._limits.body_bytes} bytes.", 413)

        try:
            await asyncio.wait_for(read(), _BODY_SECONDS)
        except asyncio.TimeoutError:
            raise RequestError("The body did not come in time.", 408) from None
        try:
            found = orjson.loads(bytes(body))
        except orjson.JSONDecodeError as error:
            raise RequestError(f"The body is not valid JSON: {error}") from None
        if not isinstance(found, dict):
            raise RequestError("The body must be a JSON object.")
        return found

    def _model(self, name: str | None) -> ServedModel:
        if name is None:
            return next(iter(self._models.values()))
        if name not in self._models:
            raise RequestError(
                f"There is no model {name!r:.100}; there is {', '.join(self._models)}.",
                404,
                param="model",
                code="model_not_found",
            )
        return self._models[name]

    async def _encoded(self, model: ServedModel, prompt: str | list[int], field: str) -> list[int]:
        """The tokens of a prompt, a text with BOS before it if the model's texts begin with one."""
        if not isinstance(prompt, str):
            self._check_tokens(model, prompt, field)
            return prompt
        limit = _MAX_TOKEN_CHARACTERS * self._limits.max_prompt_tokens
        if len(prompt) > limit:  # before seconds of tokenising
            said = f"A text of {len(prompt)} characters; this server takes {limit}."
            raise RequestError(said, param=field, code="context_length_exceeded")
        if len(prompt) < _LONG_TEXT:
            return model.loaded.tokenizer.encode_prompt(prompt)
        return await asyncio.to_thread(model.loaded.tokenizer.encode_prompt, prompt)

    def _check_tokens(self, model: ServedModel, tokens: Sequence[int], field: str) -> None:
        size = model.loaded.model.vocab_size
        if tokens and max(tokens) >= size:
            raise RequestError(f"Token {max(tokens)}: this model knows tokens 0 to {size - 1}.", param=field)

    def _check_size(self, asked: GenerationRequest, prompts: Sequence[Sequence[int]]) -> None:
        limits, n_texts = self._limits, len(prompts) * asked.n_choices
        if asked.tokens_wanted > limits.max_tokens:
            raise RequestError(
                f"max_tokens is {asked.tokens_wanted}; this server writes at most {limits.max_tokens}.",
                param="max_tokens",
            )
        if (n_tokens := sum(map(len, prompts))) > limits.max_prompt_tokens:
            raise RequestError(
                f"The prompts have {n_tokens} tokens; this server takes {limits.max_prompt_tokens}.",
                param="prompt",
                code="context_length_exceeded",
            )
        if n_texts > limits.max_texts:
            raise RequestError(
                f"{n_texts} texts in one request; this server writes at most {limits.max_texts}.", param="n"
            )


Handler = Callable[[Request], Awaitable[Response]]


class _EventStream(StreamingResponse):
    """Server-sent events; ``on_end`` is called however they end."""

    def __init__(self, events: AsyncIterator[bytes], on_end: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_end()


async def _events(answer: Answer, ticket: Ticket, *, include_usage: bool) -> AsyncIterator[bytes]:
    def event(content: Any) -> bytes:
        return b"data: " + orjson.dumps(content) + b"\n\n"

    usage = {"usage": None} if include_usage else {}
    openings = [choice.opening() for choice in answer.choices]
    if answer.chat:
        for opening in openings:
            yield event(answer.chunk([opening]) | usage)
    else:
        for choice in answer.choices:  # the prompt, where it is to be given back
            if part := choice.part():
                yield event(answer.chunk([part]) | usage)
    try:
        async for pieces in ticket.pieces():
            for piece in pieces:
                if part := answer.add(piece).part():
                    yield event(answer.chunk([part]) | usage)
    except RequestError as error:
        yield event(error.body())
        return
    if include_usage:
        yield event(answer.chunk([]) | {"usage": answer.usage()})
    yield b"data: [DONE]\n\n"


async def _while_connected(request: Request, work: Awaitable[_T]) -> _T:
    """The result of some work, which is given up when the client leaves.

    Raises:
        Gone: it has left.
    """

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(left())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Gone
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
