"""Standard output and standard error that may be gone: closed, on a full disk, at a terminal that hung up.

    standard output   results; the first write that fails raises OutputError
    standard error    notes, progress and errors; what cannot be written is dropped

So nothing that only tells how a command is doing can end it, and a result that nobody got is no success.
"""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from nanothink.errors import OutputError, ReaderGoneError

_STANDARD = (0, 1, 2)


def hold_descriptors() -> None:
    """Give each standard descriptor that is closed a place: the null device.

    Else the next file that is opened takes its number, and what a library prints goes into that file.
    """
    for descriptor in _STANDARD:
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one


def install() -> None:
    """Put streams that behave as above in the place of ``sys.stdout`` and ``sys.stderr``.

    Streams that somebody else has put there (a test, a notebook) stay.
    """
    hold_descriptors()
    sys.stdout = _replacement(sys.stdout, _Results(1, lost=sys.stdout is None))
    sys.stderr = _replacement(sys.stderr, _Notes(2, lost=sys.stderr is None))


def finish() -> None:
    """Write what is buffered, or drop it: the interpreter would complain of it at exit."""
    drop()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()


def drop() -> None:
    """From here on results go nowhere if standard output does not take them: that has been said."""
    if (results := _results()) is not None:
        results.optional = True


@contextmanager
def optional_results() -> Iterator[list[OutputError]]:
    """A context for results that may be lost; gives the errors that there were, once it is left."""
    lost: list[OutputError] = []
    results = _results()
    if results is None:
        yield lost
        return
    results.optional, results.errors = True, lost
    try:
        yield lost
        sys.stdout.flush()
    finally:
        results.optional, results.errors = False, []


class _Descriptor(io.FileIO):
    """A standard descriptor; ``lost`` where the process was started without it."""

    replaced: Any = None  # the stream of before, which might close the descriptor at its own end

    def __init__(self, descriptor: int, *, lost: bool) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self._lost = lost

    def write(self, data: Any) -> int:
        try:
            if self._lost:
                raise OSError(errno.EBADF, "it is closed")
            while (written := super().write(data)) is None:  # full for now, and not to be waited for
                select.select([], [self], [])
            return written
        except OSError as error:
            self._failed(error)
            return len(data)

    def _failed(self, error: OSError) -> None:
        raise NotImplementedError


class _Notes(_Descriptor):
    def _failed(self, error: OSError) -> None:
        """There is nowhere to say it."""


class _Results(_Descriptor):
    optional = False
    errors: list[OutputError]

    def __init__(self, descriptor: int, *, lost: bool) -> None:
        super().__init__(descriptor, lost=lost)
        self.errors = []

    def _failed(self, error: OSError) -> None:
        kind = ReaderGoneError if error.errno == errno.EPIPE else OutputError
        failure = kind(error.strerror or str(error))
        if not self.optional:
            raise failure from error
        self.errors.append(failure)


def _replacement(stream: Any, raw: _Descriptor) -> Any:
    encoding, by_line, at_once = "utf-8", True, False
    if stream is not None:
        if not _writes_to(stream, raw):
            return stream
        with suppress(OSError):
            stream.flush()
        raw.replaced = stream
        encoding, by_line, at_once = stream.encoding, stream.line_buffering, stream.write_through
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=encoding,
        errors="replace",  # what a terminal's encoding lacks is shown as '?'
        line_buffering=by_line,
        write_through=at_once,
    )


def _writes_to(stream: Any, raw: _Descriptor) -> bool:
    """True for Python's own stream on that descriptor."""
    if not isinstance(stream, io.TextIOWrapper) or isinstance(
        getattr(stream.buffer, "raw", None), _Descriptor
    ):
        return False
    try:
        return stream.fileno() == raw.fileno()
    except (OSError, ValueError):
        return False


def _results() -> _Results | None:
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    return raw if isinstance(raw, _Results) else None
