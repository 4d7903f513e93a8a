"""Conversations in records: ``{"messages": [{"role": "user", "content": "..."}, ...]}``.

A conversation is a system message or none, then messages of the user and the assistant in turns, the user's
first. At least one is the assistant's: these are trained on, the others are read. Other keys of a message are
ignored, and a content of text parts, as OpenAI writes them, is their text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from nanothink.data.chat import ROLES
from nanothink.suggestions import did_you_mean

_OTHER_NAMES = {
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "developer": "system",
}


_TURNS = ("messages", "conversations", "conversation")
_PAIRS = (("instruction", ("output", "response")), ("prompt", ("completion", "response")))


def conversation_fields(names: Iterable[str]) -> list[str]:
    """Return the fields that hold a conversation in another program's records; none if they do not.

    A list of turns, or a question (in one field or, as Alpaca has it, two) and its answer, in this order.
    """
    known = set(names)
    for name in _TURNS:
        if name in known:
            return [name]
    for question, answers in _PAIRS:
        for answer in answers:
            if question in known and answer in known:
                more = ["input"] if question == "instruction" and "input" in known else []
                return [question, *more, answer]
    return []


class Message(NamedTuple):
    role: str
    """"system", "user" or "assistant"."""
    content: str


def read_messages(value: object) -> tuple[Message, ...]:
    """The messages of a record. Raises ValueError with the reason why they are none."""
    if not isinstance(value, list) or not value:
        raise ValueError("`messages` must be a list of messages" + ("" if value else ", and it is empty"))
    messages = tuple(_message(item, number) for number, item in enumerate(value, 1))
    turns = messages[1:] if messages[0].role == "system" else messages
    for number, message in enumerate(turns):
        place = number + 1 + len(messages) - len(turns)
        if message.role == "system":
            raise ValueError(f"message {place} is a system message; only the first may be one")
        due = ROLES[1 + number % 2]
        if message.role != due:
            before = f"after another of the {message.role}" if number else "at the beginning"
            raise ValueError(f"message {place} is the {message.role}'s {before}; the {due}'s is due")
    if len(turns) < 2:
        raise ValueError("there is no message of the assistant, so nothing to train on")
    return messages


def text_of(messages: Sequence[Message]) -> str:
    """All contents as one text: what tokenizers are trained on, and by which copies are found."""
    return "\n\n".join(message.content for message in messages)


def answer_bytes(messages: Sequence[Message]) -> int:
    """UTF-8 bytes of the assistant's messages."""
    return sum(len(message.content.encode()) for message in messages if message.role == "assistant")


def _message(item: object, number: int) -> Message:
    if not isinstance(item, dict):
        raise ValueError(f"message {number} is no object with `role` and `content`")
    role, content = item.get("role"), item.get("content")
    if not isinstance(role, str):
        raise ValueError(f"message {number} has no `role`" + (" but `from`" if "from" in item else ""))
    if role not in ROLES:
        meant = _OTHER_NAMES.get(role.lower())
        hint = f" Did you mean '{meant}'?" if meant else did_you_mean(role.lower(), ROLES)
        raise ValueError(
            f"message {number} has the role '{role:.40}', and roles are {', '.join(ROLES)}.{hint}"
        )
    if isinstance(content, list):
        content = "".join(_part(part, number) for part in content)
    if not isinstance(content, str):
        raise ValueError(f"the `content` of message {number} must be a string")
    if not content or content.isspace():
        raise ValueError(f"the `content` of message {number} is empty")
    return Message(role, content)


def _part(part: object, number: int) -> str:
    if isinstance(part, dict) and isinstance(text := part.get("text"), str):
        return text
    kind = part.get("type") if isinstance(part, dict) else None
    raise ValueError(f"message {number} has a part that is no text" + (f" but '{kind}'" if kind else ""))
