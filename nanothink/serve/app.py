"""The application: paths, who may ask, and errors in one shape."""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from nanothink.serve.endpoints import Endpoints, Gone, Handler, Limits, ServedModel
from nanothink.serve.errors import RequestError, json_response
from nanothink.serve.model_thread import ModelThread
from nanothink.serve.openapi import description

_OPEN = ("/", "/health", "/openapi.json")
"""Paths that need no key: they say nothing of the models."""


@dataclass(frozen=True)
class Access:
    """Who may ask."""

    api_key: str | None = None
    """Every request must carry it as a bearer token; None: none is needed."""
    hosts: Sequence[str] | None = None
    """Values of the header Host that are answered, without the port; None: all. A page elsewhere can give its
    own name this machine's address, and would then be asked in that name (DNS rebinding)."""
    origins: Sequence[str] = ()
    """Origins of pages elsewhere that may ask (CORS); "*" for all."""


def build_app(
    models: Sequence[ServedModel],
    access: Access,
    limits: Limits,
    *,
    on_failure: Callable[[BaseException], None],
) -> Starlette:
    """The application over open models. Its lifespan starts and stops the thread that computes.

    Args:
        on_failure: hears of exceptions that should not happen.
    """
    thread = ModelThread(
        {model.name: model.loaded for model in models},
        max_batch=limits.max_batch,
        max_texts=limits.max_texts,
        on_failure=on_failure,
    )
    endpoints = Endpoints({model.name: model for model in models}, thread, limits)
    page = (Path(__file__).parent / "playground.html").read_text("utf-8")
    policy, described = _policy(page), description()

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        thread.start()
        try:
            yield
        finally:
            thread.stop()

    async def playground(request: Request) -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": policy})

    async def openapi(request: Request) -> Response:
        return json_response(described)

    def route(path: str, handler: Handler, method: str = "GET") -> Route:
        return Route(path, _answered(handler, on_failure), methods=[method])

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        names = {404: "There is no such path; see /openapi.json.", 405: "This path takes another method."}
        return RequestError(names.get(error.status_code, error.detail), error.status_code).response()

    middleware = [Middleware(_Guard, access=access)]
    if access.origins:
        cors = Middleware(
            CORSMiddleware,
            allow_origins=list(access.origins),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
        )
        middleware.insert(0, cors)
    return Starlette(
        routes=[
            route("/", playground),
            route("/health", endpoints.health),
            route("/openapi.json", openapi),
            route("/v1/models", endpoints.models),
            route("/v1/models/{name}", endpoints.model),
            route("/v1/completions", endpoints.completions, "POST"),
            route("/v1/chat/completions", endpoints.chat, "POST"),
            route("/inspect", endpoints.inspect, "POST"),
            route("/tokenizer_info", endpoints.tokenizer_info),
            route("/tokenize", endpoints.tokenize, "POST"),
            route("/detokenize", endpoints.detokenize, "POST"),
        ],
        middleware=middleware,
        exception_handlers={HTTPException: refused},
        lifespan=lifespan,
    )


def _answered(handler: Handler, on_failure: Callable[[BaseException], None]) -> Handler:
    """A handler whose exceptions are answers."""

    async def answered(request: Request) -> Response:
        try:
            return await handler(request)
        except RequestError as error:
            return error.response()
        except (Gone, ClientDisconnect):
            return Response(status_code=499)  # nobody reads it
        except Exception as error:
            on_failure(error)
            return RequestError("The server failed; see its log.", 500).response()

    return answered


class _Guard:
    """Turns away those who may not ask, before anything of a request is read."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app, self._access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (error := self._refusal(scope)) is not None:
            await error.response()(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _refusal(self, scope: Scope) -> RequestError | None:
        headers = Headers(scope=scope)
        if self._access.hosts is not None and _name(headers.get("host", "")) not in self._access.hosts:
            return RequestError("This server answers to its own address alone.", 421)
        key = self._access.api_key
        if key is not None and scope["path"] not in _OPEN:
            scheme, _, given = headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), key.encode()):
                return RequestError(
                    "This server asks for its API key, as the header Authorization: Bearer KEY.",
                    401,
                    code="invalid_api_key",
                )
        return None


def _policy(page: str) -> str:
    """What the page may do: run its own script in its own style, and speak to this server."""

    def own(tag: str) -> str:
        content = page.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
        return base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()

    return (
        f"default-src 'none'; script-src 'sha256-{own('script')}'; style-src 'sha256-{own('style')}'; "
        "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _name(host: str) -> str:
    """The header Host without its port."""
    name, colon, port = host.rpartition(":")
    return (name if colon and port.isdigit() else host).strip("[]").lower()
