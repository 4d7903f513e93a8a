"""Training of a BPE in a child process, with progress and immediate interruption.

The library holds the calling thread until the last merge, so Python cannot handle Ctrl-C there, and it writes
its progress to file descriptor 2 of its process and nowhere else (docs/decisions/0021).
"""

from __future__ import annotations

import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable
from contextlib import suppress
from typing import IO

import orjson

from nanothink.data.bpe import END, LENGTH, RESULT
from nanothink.errors import TokenizerError
from nanothink.reporter import SILENT, Reporter

_START = (
    "import sys; size, eos, *sys.path[:] = sys.argv[1:]; "
    "from nanothink.data.bpe import serve; serve(int(size), eos)"
)
STAGE = "tokenizer: merging"

_STEPS = 500
"""Most reports of progress; a bar is redrawn less often."""


def learn_in_process(texts: Iterable[str], vocab_size: int, eos: str, reporter: Reporter = SILENT) -> str:
    """``bpe.learn`` elsewhere: the tokenizer as JSON.

    Merges done are reported once ``texts`` are at their end. What ``texts`` raises, and what a signal does,
    ends the process and is passed on. Raises TokenizerError when the process ends before its work does, or
    for text that is no Unicode.
    """
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", _START, str(vocab_size), eos, *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
    except OSError as error:
        raise TokenizerError(f"No process could be started to train the tokenizer: {error}.") from error
    assert process.stdin is not None
    assert process.stdout is not None
    lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    # A thread reads, so that neither of the two ever waits for the other to empty a pipe.
    reader = threading.Thread(target=_read, args=(process.stdout, lines), daemon=True)
    try:
        reader.start()
        _send(texts, process.stdin)
        reporter.progress(STAGE, 0, vocab_size)
        learnt, last = _follow(lines, vocab_size, reporter)
        code = process.wait()
    except BaseException:
        process.kill()
        raise
    finally:
        process.wait()
        reader.join()
        with suppress(BrokenPipeError):
            process.stdin.close()
        process.stdout.close()
    if code != 0 or learnt is None:
        raise TokenizerError(_why(code, last))
    return learnt


def _read(pipe: IO[bytes], lines: queue.SimpleQueue[bytes | None]) -> None:
    for line in pipe:
        lines.put(line)
    lines.put(None)


def _send(texts: Iterable[str], pipe: IO[bytes]) -> None:
    for text in texts:
        try:
            content = text.encode()
        except UnicodeEncodeError as error:
            raise TokenizerError(
                f"Character {error.start + 1} of a text is half of a surrogate pair, which is no valid "
                "Unicode; remove it."
            ) from error
        try:
            pipe.write(LENGTH.pack(len(content)))
            pipe.write(content)
        except BrokenPipeError:  # it has ended; why is told by its exit code
            return
    with suppress(BrokenPipeError):
        pipe.write(LENGTH.pack(END))
        pipe.flush()


def _follow(
    lines: queue.SimpleQueue[bytes | None], vocab_size: int, reporter: Reporter
) -> tuple[str | None, str]:
    """Report progress until the pipe ends; return the tokenizer as JSON and the last other line."""
    learnt, last, told = None, "", 0
    while (line := lines.get()) is not None:
        if line.startswith(RESULT):
            learnt = line.removeprefix(RESULT).decode()
            continue
        if not line.startswith(b'{"stage":'):
            last = line.decode(errors="replace").strip() or last
            continue
        state = orjson.loads(line)
        done, total = state["current"], state["total"]
        if state["stage"] == "Compute merges" and (done - told) * _STEPS >= total > 0:
            told = done
            reporter.progress(STAGE, done, total)
    if learnt is not None:
        reporter.progress(STAGE, vocab_size, vocab_size)
    return learnt, last


def _why(code: int, last: str) -> str:
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        cause = f"was ended by {name}, as happens when memory runs out"
    else:
        cause = f"failed: {last:.300}" if last else f"left with exit code {code}"
    return (
        f"The process that trained the tokenizer {cause}. Nothing was written. Free some memory and try "
        "again, or train it on less text with --domains and use it with --tokenizer."
    )
