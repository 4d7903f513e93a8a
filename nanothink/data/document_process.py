"""The process that reads documents: their parsers meet files of strangers, and some of those never end.

A page of a PDF of 92 kB took 6 GB and 83 s. So the process has a bound on its memory, and is ended when it
gives no sign of life; a parser that crashes ends no import. It is started by the first document and reads the
others too.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from nanothink.data.child_process import ChildProcess
from nanothink.data.lines import shown
from nanothink.data.text_files import file_size
from nanothink.errors import DataError
from nanothink.suggestions import install

MAX_MEMORY_BYTES = 3 * 2**30
SECONDS = 60.0
"""Longest wait for a page of a PDF, or for any other document."""

_LIBRARIES = ("lxml", "mammoth", "pypdfium2")


class DocumentReader:
    """Reads documents in a process of its own, which ends with the ``with`` block."""

    def __init__(self) -> None:
        self._process: ChildProcess | None = None

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
            process = self._started()
            process.send({"kind": kind, "path": str(path), "encoding": encoding, "memory": MAX_MEMORY_BYTES})
            while True:
                answer = process.receive(SECONDS)
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

    def _started(self) -> ChildProcess:
        if self._process is None:
            try:
                self._process = ChildProcess("nanothink.data.documents")
            except OSError as error:
                raise DataError(f"No process could be started to read documents: {error}.") from error
        return self._process

    def _stop(self) -> None:
        if self._process is not None:
            self._process.stop()
            self._process = None


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ValueError:  # a module that was imported from nowhere
        return False
