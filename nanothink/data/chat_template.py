"""A chat template: messages to text, with the answers in it marked.

A template is a Jinja program that comes with a model, so it is a stranger's. It is rendered in jinja2's
sandbox, with the names that ``transformers`` gives it, in a process of its own that may open no file, has a
bound on its memory and is ended when it takes too long (chat_process.py). ``serve`` is that process. This
module imports jinja2 alone, so that it starts in a tenth of a second.

    messages  →  text  →  pieces, each of them
                            of the template, or a message's text that spells a control token and stays text
                            inside an answer, or not

An answer begins where the text of the messages before it ends, generation prompt included, and ends where
that of the messages up to it ends. That holds for templates that append; one that changes what it wrote
before is refused, unless it marks its answers with ``{% generation %}``.
"""

from __future__ import annotations

import json
import re
import resource
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from typing import Any

import jinja2
import jinja2.debug  # imported at the first error otherwise, when no file can be opened any more
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

Message = Mapping[str, str]
Piece = tuple[str, bool, int]
"""Text, whether what it spells stays text, and the number of the answer that it is in, or -1."""

MEMORY_BYTES = 1 << 30
"""Address space of the process."""

_MOST_SECONDS = 60
"""After which the process ends itself, in case that nobody is left who would end it."""

_SLACK_CHARS = 1 << 20
_TIMES = 4
"""A template's text is at most so many times as long as the messages, and the slack."""

RECORD_DAY = datetime(2024, 7, 26)
"""Today, to a template of a record: training text is the same on any day. Llama 3.2's own default."""

_PRIVATE = 0xF0000
"""Characters from here on have no meaning (Unicode's private use plane)."""


class TemplateFault(Exception):
    """The template is none, or does not take these messages."""


class Template:
    """A compiled template.

    Args:
        source: Jinja.
        special_tokens: ``bos_token``, ``eos_token`` and the like, as the template's variables.
        controls: texts of the tokens that no message can write.

    Raises:
        TemplateFault: the source is not valid Jinja.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str], controls: Sequence[str]) -> None:
        self._source, self._special_tokens = source, dict(special_tokens)
        longest_first = sorted(filter(None, controls), key=len, reverse=True)
        self._controls = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._environment = _Environment()
        try:
            self._template = self._environment.from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise TemplateFault(f"it is not valid Jinja: {error}") from None

    def prompt(self, messages: Sequence[Message]) -> list[Piece]:
        """The text of a conversation up to where the model is to answer."""
        marks = self._marks(messages)
        self._environment.answer_marks, self._environment.today = ("", ""), None
        return self._pieces(self._render(self._marked(messages, marks), ask=True), marks)

    def record(self, messages: Sequence[Message]) -> list[Piece]:
        """The text of a whole conversation, with its answers."""
        marks = self._marks(messages)
        marked = self._marked(messages, marks)
        self._environment.answer_marks, self._environment.today = (marks[2], marks[3]), RECORD_DAY
        whole = text = self._render(marked)
        if self._environment.marks_answers:
            return self._pieces(whole, marks)
        for start, end in reversed(list(self._answers(marked, whole))):
            text = text[:start] + marks[2] + text[start:end] + marks[3] + text[end:]
        return self._pieces(text, marks)

    def _answers(self, messages: Sequence[Message], whole: str) -> Iterator[tuple[int, int]]:
        """Start and end of each answer in the text of the messages."""
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            asked = self._render(messages[:number], ask=True)
            answered = self._render(messages[: number + 1])
            if not (answered.startswith(asked) and whole.startswith(answered)):
                raise TemplateFault(
                    f"its text up to message {number + 1} does not begin with that of the messages before, "
                    "so the answer cannot be told from the question"
                )
            yield len(asked), len(answered)

    def _render(self, messages: Sequence[Message], *, ask: bool = False) -> str:
        try:
            text = self._template.render(
                messages=list(messages),
                tools=None,
                documents=None,
                add_generation_prompt=ask,
                **self._special_tokens,
            )
        except MemoryError:
            raise TemplateFault("it needs too much memory") from None
        except Exception as error:  # a template is a program of its own
            raise TemplateFault(" ".join(str(error).split())[:300] or type(error).__name__) from None
        if len(text) > _SLACK_CHARS + _TIMES * sum(len(message["content"]) for message in messages):
            raise TemplateFault(f"it makes a text of {len(text):,} characters of them")
        return text

    def _marks(self, messages: Sequence[Message]) -> str:
        """Four characters that are in neither the template nor the messages."""
        used = set(self._source).union(*(message["content"] for message in messages))
        return "".join(_unused(used, 4))

    def _marked(self, messages: Sequence[Message], marks: str) -> list[dict[str, str]]:
        """The messages with each control token that they spell between the first two marks."""

        def put(text: str) -> str:
            return self._controls.sub(rf"{marks[0]}\g<0>{marks[1]}", text)

        return [{key: put(value) for key, value in message.items()} for message in messages]

    def _pieces(self, text: str, marks: str) -> list[Piece]:
        first, last, opening, closing = tuple(marks)
        spelt = re.compile(f"{first}({self._controls.pattern}){last}|[{first}{last}]")
        pieces: list[Piece] = []
        answer, n_answers = -1, 0
        for part in re.split(f"([{opening}{closing}])", text):
            if part == opening:
                answer, n_answers = n_answers, n_answers + 1
            elif part == closing:
                answer = -1
            else:  # odd ones are what the group found, None for a mark that the template has torn off
                found = enumerate(spelt.split(part))
                pieces += [(own, bool(number % 2), answer) for number, own in found if own]
        return pieces


class _Environment(ImmutableSandboxedEnvironment):
    """What ``transformers`` renders templates in."""

    def __init__(self) -> None:
        self.marks_answers = False
        self.answer_marks = "", ""
        self.today: datetime | None = None
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        del self.globals["lipsum"]
        self.globals |= {
            "raise_exception": _refuse,
            "strftime_now": lambda form: (self.today or datetime.now()).strftime(form),
            "namespace": _Namespace,
        }
        self.filters["tojson"] = _to_json


class _Generation(Extension):
    """``{% generation %} ... {% endgeneration %}``, between which an answer stands."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        self.environment.marks_answers = True  # type: ignore[attr-defined]
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        opening, closing = self.environment.answer_marks  # type: ignore[attr-defined]
        return f"{opening}{caller()}{closing}"


class _Namespace(Namespace):
    """Jinja's namespace without names that begin with an underscore, which Python gives a meaning."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.TemplateError(f"a template may not set {name!r:.40}")
        super().__setitem__(name, value)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is; Jinja's own filter writes it for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _unused(used: set[str], count: int) -> Iterator[str]:
    number = _PRIVATE
    while count:
        if chr(number) not in used:
            count -= 1
            yield chr(number)
        number += 1


# ---------------------------------------------------------------------------------------------------
# The process


def serve() -> None:
    """Answer requests until standard input ends: a line of JSON each, and a line of JSON for each.

    The first makes the template; every other is ``{"record": bool, "messages": [...]}``.
    """
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the end of standard input is its end
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    time.tzset()  # reads a file
    _bound(resource.RLIMIT_AS, MEMORY_BYTES)
    template: Template | None = None
    for line in sys.stdin.buffer:
        request = json.loads(line)
        answer: dict[str, Any] = {}
        signal.alarm(_MOST_SECONDS)
        try:
            if template is None:
                template = Template(**request)  # compiling loads modules
                _bound(resource.RLIMIT_NOFILE, 0)
            else:
                make = template.record if request["record"] else template.prompt
                answer["pieces"] = make(request["messages"])
        except TemplateFault as fault:
            answer["fault"] = str(fault)
        signal.alarm(0)
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        sys.stdout.buffer.flush()


def _bound(kind: int, most: int) -> None:
    with suppress(ValueError, OSError):  # a system that does not have it
        resource.setrlimit(kind, (most, most))
