"""Programs for shell lines in tests that start at once: forks of a process that has imported it all.

They are ``nanothink``, ``torchrun``, whose own processes are forks too, and ``forked-python``, which executes
its argument. Run as a program this file is that process. ``python forking_shell.py SOCKET`` listens; whoever
connects hands over its standard streams, then program, arguments, folder and environment, and gets back a
process id, then an exit code.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pkgutil
import shlex
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from copy import copy
from pathlib import Path

_CLIENT = """\
import json, os, signal, socket, sys
program, *args = sys.argv[2:]
asked = json.dumps({"program": program, "args": args, "cwd": os.getcwd(), "env": dict(os.environ)})
with socket.socket(socket.AF_UNIX) as server:
    server.connect(sys.argv[1])
    socket.send_fds(server, [b"."], [0, 1, 2])
    server.sendall(asked.encode())
    server.shutdown(socket.SHUT_WR)
    said = server.makefile()
    pid = int(said.readline())
    signal.signal(signal.SIGINT, lambda number, _: os.kill(pid, number))
    code = said.readline()
sys.exit(int(code) if code else "the command died")
"""


def quick(steps: int, max_keys: int) -> dict[str, str]:
    """Variables of the environment that keep models, runs and memories tiny, whatever a command line says."""
    small = {
        "MODEL__D_MODEL": "16",
        "MODEL__MAX_SEQ_LEN": "32",
        "TRANSFORMER__N_LAYERS": "1",
        "TRANSFORMER__N_HEADS": "2",
        "STATE_SPACE__N_LAYERS": "1",
        "STATE_SPACE__SCAN": "plain",
        "DIFFUSER__N_LAYERS": "1",
        "MLA__N_LAYERS": "1",
        "MLA__N_HEADS": "2",
        "VECTOR_STORE__MAX_KEYS": str(max_keys),
    }
    for phase in ("TRAIN_EXPERT", "TRAIN_DIFFUSER", "TRAIN_MLA"):
        small |= {f"{phase}__MAX_STEPS": str(steps), f"{phase}__SAMPLE_TOKENS": str(steps)}
        small[f"{phase}__AMP_DTYPE"] = "float32"
    return {f"NANOTHINK_{name}": value for name, value in small.items()}


class ForkingShell:
    """Runs lines of bash in which the programs above are such forks.

    Args:
        folder: for the command and its socket; its path should be short.
        environment: of every line.
    """

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        listening, client = folder / "socket", folder / "client.py"
        client.write_text(_CLIENT)
        self._client = [sys.executable, "-I", "-S", str(client), str(listening)]
        for program in ("nanothink", "torchrun", "forked-python"):
            _write_script(folder / program, f'exec {shlex.join(self._client)} {program} "$@"')
        # What torchrun starts instead of Python, with ``-u -m nanothink`` before the arguments.
        worker = folder / "worker"
        _write_script(worker, f'shift 3\nexec {folder / "nanothink"} "$@"')
        path = f"{folder}:{environment['PATH']}"
        self.environment = {**environment, "PATH": path, "PYTHON_EXEC": str(worker)}
        self._server = subprocess.Popen(
            [sys.executable, __file__, str(listening)], env=environment, stdout=subprocess.PIPE
        )
        assert self._server.stdout is not None
        assert self._server.stdout.readline() == b"listening\n"

    def with_environment(self, **environment: str) -> ForkingShell:
        """The same shell, whose lines have these variables too."""
        other = copy(self)
        other.environment = {**self.environment, **environment}
        return other

    def run(self, script: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
        """Up to the first line that fails, which the end of standard error names."""
        return subprocess.run(
            ["bash", "-euo", "pipefail", "-c", f"trap 'echo \"failed: $BASH_COMMAND\" >&2' ERR\n{script}"],
            cwd=cwd,
            env={**self.environment, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )

    def python(self, code: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
        """``code`` in a process of its own; ``environment`` goes before the shell's."""
        return subprocess.run(
            [*self._client, "forked-python", code],
            cwd=cwd,
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )

    def start(self, command: str, cwd: Path) -> subprocess.Popen[str]:
        """One command, which SIGINT reaches."""
        return subprocess.Popen(
            ["bash", "-c", f"exec {command}"],
            cwd=cwd,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def close(self) -> None:
        self._server.kill()
        self._server.communicate()


def _write_script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def _serve(path: str) -> None:
    import nanothink

    for module in pkgutil.walk_packages(nanothink.__path__, "nanothink."):
        if not module.name.endswith("__main__"):
            with contextlib.suppress(ModuleNotFoundError):  # of an extra
                importlib.import_module(module.name)
    importlib.import_module("nanothink.cli.app").command_tree()
    importlib.import_module("torch._dynamo")  # which the first optimizer would import, for seconds
    importlib.import_module("torch.distributed.run")
    for name in [name for name in sys.modules if name.startswith("nanothink.cli.render")]:
        del sys.modules[name]  # its consoles look at the streams as they are imported
    del nanothink.cli.render
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        print("listening", flush=True)
        while True:
            connection, _ = server.accept()
            if os.fork() == 0:
                _answer(connection)
            connection.close()


def _answer(connection: socket.socket) -> None:
    """In the fork: be the program that was asked for, and say how it ended."""
    code: object = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        _, streams, _, _ = socket.recv_fds(connection, 1, 3)
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1)  # noqa: SIM115
        with connection.makefile("rb") as file:
            asked = json.load(file)
        os.chdir(asked["cwd"])
        os.environ.clear()
        os.environ.update(asked["env"])
        connection.sendall(f"{os.getpid()}\n".encode())
        _main_of(asked["program"])(asked["args"])
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    connection.sendall(str(code).encode())
    os._exit(0)


def _main_of(program: str) -> Callable[[list[str]], object]:
    if program == "torchrun":
        return importlib.import_module("torch.distributed.run").main
    if program == "nanothink":
        return importlib.import_module("nanothink.cli.app").main
    return lambda arguments: exec(arguments[0], {"__name__": "__main__"})


if __name__ == "__main__":
    _serve(sys.argv[1])
