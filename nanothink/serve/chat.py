"""A conversation as the tokens that a model continues."""

from __future__ import annotations

from collections.abc import Sequence

from nanothink.data.chat import ChatEncoder
from nanothink.data.chat_process import ChatTemplateError
from nanothink.data.encoding import Tokenizer
from nanothink.serve.errors import RequestError
from nanothink.serve.requests import Message

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
"""Roles that a message may have, and what a template calls them."""


class Chats:
    """Conversations with one model: by its chat template, or, without one, as plain text.

    Plain text suits a model that was trained on nothing else: its messages are passed through.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._encoder = ChatEncoder(tokenizer) if tokenizer.chat else None
        self.end_ids: frozenset[int] = self._encoder.end_ids if self._encoder else frozenset()
        """Tokens that end an answer."""

    @property
    def template(self) -> str | None:
        """Its Jinja."""
        return self._tokenizer.chat.template if self._tokenizer.chat else None

    def tokens(self, messages: Sequence[Message]) -> list[int]:
        """The tokens of a conversation, up to where the model is to answer.

        Raises:
            RequestError: a role is none, or the template does not take these messages.
        """
        for number, message in enumerate(messages):
            if message.role not in _ROLES:
                raise RequestError(
                    f"messages.{number}.role: {message.role!r:.60} is none of {', '.join(_ROLES)}",
                    param="messages",
                )
        if self._encoder is None:
            return self._tokenizer.encode_prompt("".join(message.text for message in messages))
        given = [{"role": _ROLES[message.role], "content": message.text} for message in messages]
        try:
            return self._encoder.prompt(given)
        except ChatTemplateError as error:
            raise RequestError(
                f"The model's chat template does not take these messages: {error.reason}", param="messages"
            ) from None
