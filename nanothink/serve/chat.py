"""A conversation as the text that a model continues."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nanothink.errors import UsageError
from nanothink.serve.errors import RequestError


class ChatTemplate:
    """A Jinja template of the kind that tokenizers carry; it can reach neither files nor Python.

    Args:
        source: the template; None passes the text of the messages through, one after the other, which suits a
            model that was trained on plain text.
        eos_token: text of the end of a document, a variable of templates.

    Raises:
        UsageError: it is no template.
    """

    def __init__(self, source: str | None, eos_token: str) -> None:
        self.source, self._eos_token = source, eos_token
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _refuse
        try:
            self._template = None if source is None else environment.from_string(source)
        except jinja2.TemplateError as error:
            raise UsageError(f"The chat template is not valid Jinja: {error}.") from None

    def render(self, messages: Sequence[dict[str, Any]]) -> str:
        """The text of a conversation, up to where the model is to answer.

        Raises:
            RequestError: the template does not take these messages.
        """
        if self._template is None:
            return "".join(message["content"] for message in messages)
        try:
            return self._template.render(
                messages=list(messages),
                add_generation_prompt=True,
                eos_token=self._eos_token,
                bos_token=self._eos_token,
            )
        except Exception as error:  # a template is a program of its own
            raise RequestError(
                f"The model's chat template does not take these messages: {error}", param="messages"
            ) from None


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)
