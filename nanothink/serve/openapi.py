"""The description of the API (OpenAPI 3.1), made from the classes of the requests."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from nanothink import __version__
from nanothink.serve.requests import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    InspectRequest,
    TokenizeRequest,
)

_BODIES: dict[str, tuple[type[BaseModel], str]] = {
    "/v1/completions": (CompletionRequest, "Continue texts."),
    "/v1/chat/completions": (ChatRequest, "Answer a conversation."),
    "/inspect": (InspectRequest, "The likeliest next tokens, and the training text that is recalled."),
    "/tokenize": (TokenizeRequest, "Token ids of a text."),
    "/detokenize": (DetokenizeRequest, "Text of token ids."),
}
_PLAIN = {
    "/health": "Whether the server is up.",
    "/v1/models": "The models that are served.",
    "/tokenizer_info": "Special tokens and the chat template of a model.",
}
_REFUSED = {
    "400": "The request is wrong; the error says where.",
    "401": "The API key is missing or wrong.",
    "404": "There is no such model.",
    "408": "The body did not come in time.",
    "413": "The body is too large.",
    "415": "The body is not JSON.",
    "503": "Too many texts are waiting; Retry-After says when to ask again.",
}


def description() -> dict[str, Any]:
    """The document that /openapi.json gives."""
    bodies = [body for body, _ in _BODIES.values()]
    _, schemas = models_json_schema(
        [(body, "validation") for body in bodies], ref_template="#/components/schemas/{model}"
    )
    definitions = dict(schemas["$defs"])
    definitions["Error"] = _error()
    paths: dict[str, Any] = {path: {"get": _operation(text)} for path, text in _PLAIN.items()}
    for path, (body, text) in _BODIES.items():
        reference = {"$ref": f"#/components/schemas/{body.__name__}"}
        content = {"application/json": {"schema": reference}}
        asked = {"requestBody": {"required": True, "content": content}}
        paths[path] = {"post": _operation(text) | asked}
    return {
        "openapi": "3.1.0",
        "info": {"title": "NanoThink", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": definitions,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(text: str) -> dict[str, Any]:
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    refused = {status: {"description": why, "content": error} for status, why in _REFUSED.items()}
    done = {"description": "Done.", "content": {"application/json": {}, "text/event-stream": {}}}
    return {"summary": text, "responses": {"200": done} | refused}


def _error() -> dict[str, Any]:
    optional = {"type": ["string", "null"]}
    fields = {
        "message": {"type": "string"},
        "type": {"type": "string"},
        "param": optional,
        "code": optional,
    }
    inner = {"type": "object", "properties": fields, "required": list(fields)}
    return {"type": "object", "properties": {"error": inner}, "required": ["error"]}
