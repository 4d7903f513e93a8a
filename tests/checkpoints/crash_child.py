"""Run by the tests as a process of its own: a task per line on stdin, each in a fork, to be killed."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch  # noqa: F401 (here, and not in each fork)

from nanothink.checkpoints import CheckpointStore, read_checkpoint, write_checkpoint
from nanothink.errors import NanoThinkError


def say(**answer: Any) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def pause_to_be_killed() -> None:
    say(paused=os.getpid())
    while True:
        signal.pause()


def pause_at_byte(at: int) -> None:
    """Stop when ``at`` bytes are written. Writes are short, as a full pipe or a network disk makes them."""
    really_write, written = os.write, 0

    def write(descriptor: int, data: Any) -> int:
        nonlocal written
        if written >= at:
            pause_to_be_killed()
        n = really_write(descriptor, bytes(data[: min(700, max(1, at - written))]))
        written += n
        return n

    os.write = write


def pause_around(name: str, call: int, *, after: bool) -> None:
    """Stop before or after the ``call``-th call of ``os.<name>``."""
    really, n_calls = getattr(os, name), 0

    def function(*arguments: Any) -> Any:
        nonlocal n_calls
        n_calls += 1
        if n_calls == call and not after:
            pause_to_be_killed()
        result = really(*arguments)
        if n_calls == call and after:
            pause_to_be_killed()
        return result

    setattr(os, name, function)


def write(target: str, source: str, point: list[Any]) -> None:
    payload = read_checkpoint(Path(source))
    if point[0] == "byte":
        pause_at_byte(point[1])
    else:
        pause_around(point[1], point[2], after=point[0] == "after")
    write_checkpoint(Path(target), payload)
    say(error="the point was never reached")


def write_slowly_for_ever(target: str, sources: list[str]) -> None:
    payloads = [read_checkpoint(Path(source)) for source in sources]
    really_write = os.write

    def slow_write(descriptor: int, data: Any) -> int:
        time.sleep(0.0003)
        return really_write(descriptor, bytes(data[:500]))

    os.write = slow_write
    say(paused=os.getpid())
    while True:
        for payload in payloads:
            write_checkpoint(Path(target), payload)


def write_with_file_limit(target: str, source: str, limit: int) -> None:
    payload = read_checkpoint(Path(source))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    answer_with_error(lambda: write_checkpoint(Path(target), payload))


def write_as_nobody(target: str, source: str) -> None:
    payload = read_checkpoint(Path(source))
    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    answer_with_error(lambda: write_checkpoint(Path(target), payload))


def write_to_small_disk(folder: str, sources: list[str], kilobytes: int) -> None:
    """A file system of its own; the first source fits, the second doesn't."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", folder]
    subprocess.run(mount, check=True, stdout=subprocess.DEVNULL)
    target = Path(folder) / "a.pt"
    first, second = (read_checkpoint(Path(source)) for source in sources)
    write_checkpoint(target, first)
    before = target.read_bytes()
    outcome = error_of(lambda: write_checkpoint(target, second))
    say(**outcome, intact=target.read_bytes() == before, files=sorted(os.listdir(folder)))


def write_to_read_only_disk(folder: str, source: str) -> None:
    payload = read_checkpoint(Path(source))
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m,ro", "tmpfs", folder]
    subprocess.run(mount, check=True, stdout=subprocess.DEVNULL)
    answer_with_error(lambda: write_checkpoint(Path(folder) / "a.pt", payload))


def hold_lock(folder: str, stem: str, with_worker: bool) -> None:
    with CheckpointStore(Path(folder), stem).lock():
        worker_runs, tell = os.pipe()
        if with_worker:
            if (worker := os.fork()) == 0:
                os.write(tell, b"x")
                while True:
                    signal.pause()
            os.read(worker_runs, 1)  # until it runs, it has not let go of the lock it was born with
        say(paused=os.getpid(), worker=worker if with_worker else None)
        while True:
            signal.pause()


def error_of(action: Callable[[], None]) -> dict[str, Any]:
    try:
        action()
    except NanoThinkError as error:
        return {"error": type(error).__name__, "message": str(error)}
    return {"error": None}


def answer_with_error(action: Callable[[], None]) -> None:
    say(**error_of(action))


TASKS: dict[str, Callable[..., None]] = {
    function.__name__: function
    for function in (
        write,
        write_slowly_for_ever,
        write_with_file_limit,
        write_as_nobody,
        write_to_small_disk,
        write_to_read_only_disk,
        hold_lock,
    )
}


def main() -> None:
    for line in sys.stdin:
        arguments = json.loads(line)
        task = TASKS[arguments.pop("task")]
        pid = os.fork()
        if pid == 0:
            try:
                task(**arguments)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(0 if sys.exc_info()[0] is None else 70)
        _, status = os.waitpid(pid, 0)
        say(ended_by=os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status))


if __name__ == "__main__":
    main()
