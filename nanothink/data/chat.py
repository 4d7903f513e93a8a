r"""Conversations as tokens: the chat template of a tokenizer, and a plain one for tokenizers that have none.

    messages        user: Hi   assistant: Hello
    text, plainly   User:\nHi<|endoftext|>Assistant:\nHello<|endoftext|>
    trained on                                        Hello<|endoftext|>
    prompt          <|endoftext|>User:\nHi<|endoftext|>Assistant:\n

A message cannot write a control token: what it spells of one is encoded as the text that it is. The rest is
encoded as ``transformers`` does, token for token, except that an answer in training begins with tokens of its
own, as it does when the model writes it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import orjson

from nanothink.data.chat_process import ChatRenderer, ChatTemplateError

if TYPE_CHECKING:
    from nanothink.data.encoding import Tokenizer

Message = Mapping[str, str]
"""``role`` and ``content``."""

ROLES = ("system", "user", "assistant")

MAX_TEMPLATE_CHARS = 1 << 17

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Names under which templates know them."""

_PROBE = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})


@dataclass(frozen=True)
class ChatFormat:
    """A chat template and the special tokens that it names."""

    template: str
    """Jinja, as ``transformers`` renders it."""
    special_tokens: tuple[tuple[str, str], ...] = ()
    """(name, text), of ``SPECIAL_TOKENS``. BOS and EOS are the tokenizer's EOS unless they are among them."""

    @classmethod
    def of(cls, template: object, special_tokens: Mapping[str, object]) -> ChatFormat | None:
        """The format in a tokenizer's settings; None without a template of bounded length.

        Args:
            template: Jinja, or a list of named ones, of which "default" counts.
            special_tokens: by name, as texts or objects with ``content``.
        """
        if isinstance(template, list):
            named = {
                entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)
            }
            template = named.get("default")
        if not isinstance(template, str) or not template.strip() or len(template) > MAX_TEMPLATE_CHARS:
            return None
        texts = {name: _content(special_tokens.get(name)) for name in SPECIAL_TOKENS}
        return cls(template, tuple((name, text) for name, text in texts.items() if text))

    def to_state(self) -> dict[str, str]:
        """The format as strings, for a checkpoint."""
        return {"chat_template": self.template, "special_tokens": json.dumps(dict(self.special_tokens))}

    @classmethod
    def from_state(cls, state: Mapping[str, str]) -> ChatFormat | None:
        """Inverse of ``to_state``; None if there is none in ``state``."""
        try:
            return cls.of(state.get("chat_template"), orjson.loads(state.get("special_tokens", "{}")))
        except (orjson.JSONDecodeError, AttributeError):
            return None


def _content(token: object) -> str | None:
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


PLAIN = ChatFormat(
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ message['role'] | capitalize + ':\\n' + message['content'] + eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:\\n' }}{% endif %}"
)
"""For every tokenizer: a turn is its role, a line end and its text, up to EOS. Only a template can put a role
behind an EOS, so no message can make itself another's."""


class ChatEncoder:
    """Conversations as tokens of one tokenizer, by its own template or ``PLAIN``.

    Raises ChatTemplateError at the first use if the template is not valid Jinja.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        chat = tokenizer.chat or PLAIN
        eos = tokenizer.eos_token
        names = {"bos_token": tokenizer.bos_token or eos, "eos_token": eos, **dict(chat.special_tokens)}
        self._renderer = _renderer(chat.template, tuple(names.items()), tuple(tokenizer.special_ids))

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Tokens of a conversation up to where the model is to answer.

        Raises:
            ChatTemplateError: the template does not take these messages.
        """
        pieces = self._renderer.pieces(messages, record=False)
        return [token for text, spelt, _ in pieces for token in self._encoded(text, spelt)]

    def record(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """Tokens of a whole conversation, EOS at its end, and which of them are trained on.

        Those are the answers with the token that ends each of them: the last special one in what the template
        makes of an answer, or else the EOS of the conversation.

        Raises:
            ChatTemplateError: the template does not take these messages.
        """
        tokens: list[int] = []
        trained: list[bool] = []
        eos = self._tokenizer.eos_id
        begun: dict[int, int] = {}
        for text, spelt, answer in self._renderer.pieces(messages, record=True):
            own = self._encoded(text, spelt)
            if answer >= 0:
                begun.setdefault(answer, len(tokens))
            tokens += own
            trained += [answer >= 0] * len(own)
        special = set(self._tokenizer.special_ids.values())
        for start in begun.values():
            stop = next((n for n in range(start, len(tokens)) if not trained[n]), len(tokens))
            last = next((n for n in reversed(range(start, stop)) if tokens[n] in special), stop)
            trained[last + 1 : stop] = [False] * len(trained[last + 1 : stop])
        if not any(trained):
            raise ChatTemplateError("it writes no answer of it")
        if tokens[:1] == [eos]:  # documents are separated by it
            tokens, trained = tokens[1:], trained[1:]
        if tokens[-1:] != [eos]:
            open_ended = bool(tokens) and trained[-1] and tokens[-1] not in special
            tokens, trained = [*tokens, eos], [*trained, open_ended]
        return tokens, trained

    def check(self) -> None:
        """Raise ChatTemplateError unless the template is valid Jinja."""
        self._renderer.start()

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """Tokens that end an answer: EOS, and the one that the template puts there."""
        try:
            tokens, trained = self.record(_PROBE)
        except ChatTemplateError:
            return frozenset({self._tokenizer.eos_id})
        special = set(self._tokenizer.special_ids.values())
        ends = [token for token, own in zip(tokens, trained, strict=True) if own and token in special]
        return frozenset({self._tokenizer.eos_id, *ends[-1:]})

    def _encoded(self, text: str, spelt: bool) -> list[int]:
        return self._tokenizer.encode(text) if spelt else self._tokenizer.encode_template(text)


@lru_cache(maxsize=4)
def _renderer(
    template: str, special_tokens: tuple[tuple[str, str], ...], controls: tuple[str, ...]
) -> ChatRenderer:
    """One process for all encoders of the same template."""
    return ChatRenderer(template, dict(special_tokens), controls)
