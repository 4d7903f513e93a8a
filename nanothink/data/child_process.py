"""A Python process that answers requests, a line of JSON each: for what may hang, crash or fill memory."""

from __future__ import annotations

import os
import selectors
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import orjson


class ChildProcess:
    """A process that runs ``serve()`` of a module. It ends with ``stop``, or with this object.

    Raises OSError if none can be started.
    """

    def __init__(self, module: str) -> None:
        start = f"import sys; sys.path[:] = sys.argv[1:]; from {module} import serve; serve()"
        self._process = subprocess.Popen(
            [sys.executable, "-c", start, *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self._received = bytearray()
        self.stop = weakref.finalize(self, _ended, self._process)
        """Kill it."""

    def send(self, request: Mapping[str, Any]) -> None:
        """Send a request. Raises BrokenPipeError if the process has ended."""
        assert self._process.stdin is not None
        self._process.stdin.write(orjson.dumps(request) + b"\n")
        self._process.stdin.flush()

    def receive(self, seconds: float) -> Any:
        """Wait for the next answer. Raises TimeoutError, or EOFError if the process has ended."""
        assert self._process.stdout is not None
        deadline = time.monotonic() + seconds
        with selectors.DefaultSelector() as ready:
            ready.register(self._process.stdout, selectors.EVENT_READ)
            while (end := self._received.find(b"\n")) < 0:
                if not ready.select(max(0.0, deadline - time.monotonic())):
                    raise TimeoutError
                piece = os.read(self._process.stdout.fileno(), 2**20)
                if not piece:
                    raise EOFError
                self._received += piece
        line = bytes(self._received[:end])
        del self._received[: end + 1]
        return orjson.loads(line)


def _ended(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(OSError):  # what was not sent yet
                pipe.close()
