"""The process that renders a chat template: started when it is needed, ended when it hangs."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

from nanothink.data.child_process import ChildProcess
from nanothink.errors import TokenizerError

SECONDS = 10.0
"""For one conversation; it takes a thousandth of a second as a rule."""

_START_SECONDS = 60.0

Piece = tuple[str, bool, int]
"""As of ``chat_template.Piece``."""


class ChatTemplateError(TokenizerError):
    """The chat template is none, or does not take some messages."""

    def __init__(self, reason: str, place: str = "") -> None:
        where = f"{place}: " if place else ""
        super().__init__(f"{where}the model's chat template does not take this conversation: {reason}.")
        self.reason = reason

    def at(self, place: str) -> ChatTemplateError:
        """The same, with the file and line of the conversation."""
        return ChatTemplateError(self.reason, place)


class ChatRenderer:
    """A template in its process. For several threads.

    Args:
        source, special_tokens, controls: as of ``chat_template.Template``.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str], controls: Sequence[str]) -> None:
        self._made_of = {"source": source, "special_tokens": special_tokens, "controls": list(controls)}
        self._process: ChildProcess | None = None
        self._lock = threading.Lock()

    def start(self) -> None:
        """Start the process. Raises ChatTemplateError if the template is not valid Jinja."""
        with self._lock:
            self._started()

    def pieces(self, messages: Sequence[Mapping[str, str]], *, record: bool) -> list[Piece]:
        """The pieces of a conversation: a whole one, or up to where the model is to answer.

        Raises:
            ChatTemplateError: the template does not take it, or takes too long or too much memory.
        """
        with self._lock:
            self._started()
            found = self._ask({"record": record, "messages": messages}, SECONDS)
        if "fault" in found:
            raise ChatTemplateError(found["fault"])
        return [(text, spelt, answer) for text, spelt, answer in found["pieces"]]

    def _started(self) -> None:
        if self._process is None:
            try:
                self._process = ChildProcess("nanothink.data.chat_template")
            except OSError as error:
                raise TokenizerError(
                    f"No process could be started to render the chat template: {error}."
                ) from error
            self._ask(self._made_of, _START_SECONDS)

    def _ask(self, request: Mapping[str, Any], seconds: float) -> Any:
        assert self._process is not None
        try:
            self._process.send(request)
            answer = self._process.receive(seconds)
            if "fault" in answer and request is self._made_of:
                raise ChatTemplateError(answer["fault"])
        except BaseException as error:  # what is left of it knows nothing of the next request
            self._process.stop()
            self._process = None
            if isinstance(error, TimeoutError):
                raise ChatTemplateError(f"it takes longer than {seconds:.0f} seconds") from None
            if isinstance(error, (BrokenPipeError, EOFError)):
                raise ChatTemplateError("it ended its process, as happens when memory runs out") from None
            raise
        return answer
