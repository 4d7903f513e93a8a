"""Run by the tests as a process of its own: one ``nanothink`` command a line of stdin, each in a fork.

Everything is imported beforehand and nothing is computed, so a command is a real process, with memory,
files and a death of its own, that starts at once instead of in three seconds.

A task may name a moment at which the process strikes itself, and may make checkpoint writes slow. Both
are done from here, by wrapping what the command calls: the product knows nothing of it. A command may be
that of several processes too, as torchrun starts them.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any


def say(**answer: Any) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def strike_at(moment: dict[str, Any], note: str) -> None:
    """Send this process ``signals`` at the ``nth`` time that something happens.

    Either after an event of the run was recorded, ``{"event": class, "having": {attribute: value}}``; after
    a run reported progress, ``{"stage": name}``; when a function is called, ``{"call": "module:name"}``, or
    has returned, with ``"after"``; or before a change to the disk below a folder, ``{"change_below":
    folder}``. When it happened goes into the file ``note``. Of several processes it is the one of ``"rank"``.
    """
    remaining = moment.get("nth", 1)

    def happened() -> None:
        nonlocal remaining
        remaining -= 1
        if remaining == 0:
            with open(note, "w") as file:
                file.write(f"{time.monotonic()}")  # the same clock in every process
            for name in moment["signals"]:
                os.kill(os.getpid(), signal.Signals[name])

    if "change_below" in moment:
        sys.addaudithook(changes_below(moment["change_below"], happened))
        return
    if "event" in moment:
        from nanothink.training.recording import RunRecorder

        record = RunRecorder.event

        def recorded(self: Any, event: Any) -> None:
            record(self, event)
            expected = moment.get("having", {})
            if type(event).__name__ == moment["event"] and all(
                getattr(event, name) == value for name, value in expected.items()
            ):
                happened()

        RunRecorder.event = recorded  # type: ignore[method-assign]
        return
    if "stage" in moment:
        from nanothink.training.recording import RunRecorder

        report = RunRecorder.progress

        def reported(self: Any, stage: str, done: int, total: int) -> None:
            report(self, stage, done, total)
            if stage == moment["stage"]:
                happened()

        RunRecorder.progress = reported  # type: ignore[method-assign]
        return
    module, _, name = moment["call"].partition(":")
    *path, last = name.split(".")
    owner: Any = importlib.import_module(module)
    for part in path:
        owner = getattr(owner, part)
    really: Callable[..., Any] = getattr(owner, last)

    def called(*arguments: Any, **options: Any) -> Any:
        if not moment.get("after"):
            happened()
        result = really(*arguments, **options)
        if moment.get("after"):
            happened()
        return result

    setattr(owner, last, called)


def changes_below(folder: str, happened: Callable[[], None]) -> Callable[[str, tuple[Any, ...]], None]:
    """An audit hook: each file or folder about to be made, opened to write, renamed or removed."""
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            if not isinstance(arguments[2], int) or not arguments[2] & writing:
                return
        elif event not in {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate"}:
            return
        paths = [os.fsdecode(path) for path in arguments[:2] if isinstance(path, (str, bytes, os.PathLike))]
        # Taking a tree down names files within a folder that is open.
        if any(path.startswith(folder) or (event != "open" and not os.path.isabs(path)) for path in paths):
            happened()

    return hook


def write_slowly(seconds: float) -> None:
    """Every write to a descriptor is short and takes a while, as on a slow network disk."""
    really_write = os.write

    def write(descriptor: int, data: Any) -> int:
        time.sleep(seconds)
        return really_write(descriptor, bytes(data[:4096]))

    os.write = write


def mount(folder: str, options: str, content: str | None) -> None:
    """A small file system of this process's own, gone when it ends; it begins with a copy of ``content``."""
    user, group, libc = os.getuid(), os.getgid(), ctypes.CDLL(None, use_errno=True)
    new_user, new_mounts = 0x10000000, 0x00020000
    if libc.unshare(new_user | new_mounts):
        raise OSError(ctypes.get_errno(), "unshare")
    for name, content_of in (("uid_map", f"0 {user} 1"), ("setgroups", "deny"), ("gid_map", f"0 {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(content_of)
    mount = ["mount", "-t", "tmpfs", "-o"]
    subprocess.run([*mount, options, "tmpfs", folder], check=True)
    if content is not None:
        shutil.copytree(content, folder, dirs_exist_ok=True)


def execute(task: dict[str, Any], rank: int, port: int) -> int:
    os.chdir(task["cwd"])
    if (size := task["processes"]) > 1:
        os.environ.update(RANK=f"{rank}", LOCAL_RANK=f"{rank}", WORLD_SIZE=f"{size}")
        os.environ.update(LOCAL_WORLD_SIZE=f"{size}", MASTER_ADDR="127.0.0.1", MASTER_PORT=f"{port}")
    end = f".{rank}" if rank else ""
    for descriptor, name in ((0, os.devnull), (1, task["stdout"] + end), (2, task["stderr"] + end)):
        opened = os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.environ.update(task["environment"])
    if task["user"] is not None:
        os.setgroups([])
        os.setgid(task["user"])
        os.setuid(task["user"])
    disk = task["disk"]
    if disk is not None:
        mount(disk["folder"], disk["options"], disk.get("content"))
        if disk.get("fill"):
            fill(disk["folder"])
        if disk.get("read_only"):
            subprocess.run(["mount", "-o", "remount,ro", disk["folder"]], check=True)
    if task["write_seconds"]:
        write_slowly(task["write_seconds"])
    if task["file_bytes"] is not None:
        # The system ends a process in the middle of the write that makes a file longer than this.
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (task["file_bytes"], resource.RLIM_INFINITY))
    for name in task["ignored"]:
        signal.signal(signal.Signals[name], signal.SIG_IGN)
    if task["strike"] is not None and task["strike"].get("rank", 0) == rank:
        strike_at(task["strike"], task["stderr"] + ".struck")
    if task["output"]:
        lose_output(task["output"])
    from nanothink.cli.app import main

    try:
        main(task["arguments"])
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else 1
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        if disk is not None and disk.get("kept_in"):
            shutil.copytree(disk["folder"], disk["kept_in"], dirs_exist_ok=True)
    return 0


def lose_output(how: str) -> None:
    """Leave standard output as a shell, a full disk, a reader that has gone or a closed terminal does.

    With a 2 behind it standard error too. ``how`` may also be the path of a terminal, for both.
    """
    descriptors: tuple[int, ...] = (1,)
    if how.endswith("2") and not how.startswith("/"):
        how, descriptors = how.removesuffix("2"), (1, 2)
    if how == "closed":
        for descriptor in descriptors:
            os.close(descriptor)
            setattr(sys, {1: "stdout", 2: "stderr"}[descriptor], None)  # as Python does when it starts
        return
    if how.startswith("/"):
        lost, descriptors = os.open(how, os.O_WRONLY | os.O_NOCTTY), (1, 2)
    elif how == "full":
        lost = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, lost = os.openpty() if how == "hung up" else os.pipe()
        os.close(reader)
    for descriptor in descriptors:
        os.dup2(lost, descriptor)
    os.close(lost)


def fill(folder: str) -> None:
    """Leave no byte free."""
    with open(os.path.join(folder, "filler"), "wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(1 << 12)):
            pass


def warm_up() -> None:
    """Import what commands import late. No tensor is touched: a fork would inherit no threads."""
    for name in (
        "transformers",
        "tokenizers",
        "nanothink.cli.app",
        "nanothink.cli.render",
        "nanothink.cli.render.results",
        "nanothink.cli.render.training",
        "nanothink.runs.evaluating",
        "nanothink.runs.exporting",
        "nanothink.runs.trained_model",
        "nanothink.runs.pretraining",
        "nanothink.runs.vector_store",
        "nanothink.runs.store_commands",
        "nanothink.runs.reporting",
        "torch._dynamo",
        "torch.optim",
        "torch.distributed.checkpoint",
        "torch.distributed.fsdp",
    ):
        importlib.import_module(name)
    importlib.import_module("nanothink.cli.app").command_tree()


def main() -> None:
    # A shell that starts the tests in the background leaves SIGINT ignored, and forks inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    warm_up()
    say(ready=True)
    for line in sys.stdin:
        task = json.loads(line)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        pids = []
        for rank in range(task["processes"]):
            pids.append(os.fork())
            if pids[-1] == 0:
                code = execute(task, rank, port)
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        say(pid=pids[0])
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        say(code=codes[0], codes=codes)


if __name__ == "__main__":
    main()
