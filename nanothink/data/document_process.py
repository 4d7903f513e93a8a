"""The process that reads documents: their parsers meet files of strangers, and some of those never end.

A page of a PDF of 92 kB took 6 GB and 83 s. So the process has a bound on its memory, and is ended when it
gives no sign of life; a parser that crashes ends no import. It is started by the first document and reads the
others too.
"""

from __future__ import annotations

import importlib.util
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import orjson

from nanothink.data.lines import shown
from nanothink.data.text_files import file_size
from nanothink.errors import DataError
from nanothink.suggestions import install

MAX_MEMORY_BYTES = 3 * 2**30
SECONDS = 60.0
"""Longest wait for a page of a PDF, or for any other document."""

_LIBRARIES = ("lxml", "mammoth", "pypdfium2")
_START = "import sys; sys.path[:] = sys.argv[1:]; from nanothink.data.documents import serve; serve()"


class DocumentReader:
    """Reads documents in a process of its own, which ends with the ``with`` block."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._received = bytearray()

    def __enter__(self) -> DocumentReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def text(self, kind: str, path: Path, encoding: str | None, on_bytes: Callable[[int], None]) -> str:
        """Return the text of a document. ``on_bytes`` receives the bytes read, in the end the file's size.

        Raises:
            DataError: the extra is not installed, or the document cannot be read, with what to do.
        """
        missing = [name for name in _LIBRARIES if not _is_installed(name)]
        if missing:
            raise DataError(f"Reading {shown(path)} needs {missing[0]}: {install('nanothink[documents]')}")
        size, n_told = file_size(path), 0
        try:
            self._send({"kind": kind, "path": str(path), "encoding": encoding, "memory": MAX_MEMORY_BYTES})
            while True:
                answer = self._receive()
                if "text" in answer:
                    on_bytes(size - n_told)
                    return str(answer["text"])
                if "fault" in answer:
                    raise DataError(answer["fault"])
                now = int(size * answer["part"])
                on_bytes(now - n_told)
                n_told = now
        except TimeoutError:
            self._stop()
            reason = f"a page or all of it takes longer than {SECONDS:.0f} seconds"
        except (EOFError, BrokenPipeError):
            self._stop()
            reason = (
                f"its reader has crashed, or needed more than {MAX_MEMORY_BYTES / 2**30:.0f} GiB of memory"
            )
        except BaseException as error:
            if not isinstance(error, DataError):  # what is left of an answer is none to the next question
                self._stop()
            raise
        raise DataError(f"{shown(path)} cannot be read: {reason}. Save it as plain text in its program.")

    def _send(self, request: dict[str, Any]) -> None:
        if self._process is None:
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-c", _START, *sys.path],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                )
            except OSError as error:
                raise DataError(f"No process could be started to read documents: {error}.") from error
        assert self._process.stdin is not None
        self._process.stdin.write(orjson.dumps(request) + b"\n")
        self._process.stdin.flush()

    def _receive(self) -> Any:
        assert self._process is not None
        assert self._process.stdout is not None
        deadline = time.monotonic() + SECONDS
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

    def _stop(self) -> None:
        process, self._process = self._process, None
        self._received.clear()
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with suppress(OSError):  # what was not sent yet
                    pipe.close()


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ValueError:  # a module that was imported from nowhere
        return False
