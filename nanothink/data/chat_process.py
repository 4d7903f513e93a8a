"""The process that renders a chat template: started when it is needed, ended when it hangs."""

from __future__ import annotations

import selectors
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import orjson

from nanothink.errors import TokenizerError

_START = "import sys; sys.path[:] = sys.argv[1:]; from nanothink.data.chat_template import serve; serve()"

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
        self._process: subprocess.Popen[bytes] | None = None
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
            self._process = _new_process()
            self._stop = weakref.finalize(self, _ended, self._process)
            self._ask(self._made_of, _START_SECONDS)

    def _ask(self, request: Mapping[str, Any], seconds: float) -> Any:
        assert self._process is not None
        try:
            answer = orjson.loads(_exchanged(self._process, orjson.dumps(request) + b"\n", seconds))
            if "fault" in answer and request is self._made_of:
                raise ChatTemplateError(answer["fault"])
        except BaseException as error:  # what is left of it knows nothing of the next request
            self._stop()
            self._process = None
            if isinstance(error, (BrokenPipeError, EOFError)):
                raise ChatTemplateError("it ended its process, as happens when memory runs out") from None
            raise
        return answer


def _new_process() -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            [sys.executable, "-c", _START, *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
    except OSError as error:
        raise TokenizerError(f"No process could be started to render the chat template: {error}.") from error


def _exchanged(process: subprocess.Popen[bytes], line: bytes, seconds: float) -> bytearray:
    """Send a line, and return the one that comes back.

    Raises:
        ChatTemplateError: none came in time.
        EOFError, BrokenPipeError: the process has ended.
    """
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(line)
    process.stdin.flush()
    answer, deadline = bytearray(), time.monotonic() + seconds
    with selectors.DefaultSelector() as ready:
        ready.register(process.stdout, selectors.EVENT_READ)
        while not answer.endswith(b"\n"):
            if not ready.select(max(0.0, deadline - time.monotonic())):
                raise ChatTemplateError(f"it takes longer than {seconds:.0f} seconds")
            part = process.stdout.read1(1 << 20)  # type: ignore[attr-defined]
            if not part:
                raise EOFError
            answer += part
    return answer


def _ended(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(OSError):  # what was not sent yet
                pipe.close()
