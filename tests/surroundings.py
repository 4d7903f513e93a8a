"""What an example of the documentation finds around it: a clone, an interrupted run, a second machine.

``<!-- run: in a clone -->`` before a block names one of ``SURROUNDINGS``, each a function that runs the words
of the block there. What is put in the place of a documented word stands in a call of ``replaced``.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from documentation import ROOT, blocks, shell_lines
from forking_shell import ForkingShell


@dataclass(frozen=True)
class Place:
    """Where a block runs; ``own_text`` is what somebody has before the first command."""

    folder: Path
    own_text: Path
    shell: ForkingShell

    def run(self, script: str, **environment: str) -> None:
        done = self.shell.run(script, self.folder, **environment)
        assert done.returncode == 0, f"{script}\n{done.stdout}{done.stderr}"


def replaced(script: str, words: dict[str, str]) -> str:
    for word, other in words.items():
        assert word in script, f"the example no longer says {word}"
        script = script.replace(word, other)
    return script


def as_it_is(script: str, place: Place) -> None:
    place.run(script)


def in_a_clone(script: str, place: Place) -> None:
    """The words of README, with which those of other pages begin: they are run once, for README."""
    (longest,) = (
        "\n".join(shell_lines(block)) for block in blocks(ROOT / "README.md") if block.note == "in a clone"
    )
    if script == longest:
        _install(script, place.shell)
    else:
        assert longest.startswith(f"{script}\n"), f"README installs in another way than {script}"


def _install(script: str, shell: ForkingShell) -> None:
    """In a copy of the source tree, by a Python that knows nothing of the tests' environment.

    What would be downloaded is taken from there instead: pip installs NanoThink alone, by the setuptools of
    the tests, and the rest is found at the very end of its path.
    """
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder, "clone")
        shutil.copytree(ROOT / "nanothink", clone / "nanothink", ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "constraints.txt", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, clone)
        packages = Path(folder, "packages")
        packages.mkdir()
        installed = sysconfig.get_path("purelib")
        (packages / "setuptools").symlink_to(Path(installed, "setuptools"))  # before one that venv may bring
        (packages / "sitecustomize.py").write_text(f"import sys\nsys.path.append({installed!r})\n")
        environment = {
            "PATH": f"{sys.base_prefix}/bin:{os.defpath}",
            "PYTHONPATH": str(packages),
            "PIP_NO_INDEX": "1",
            "PIP_NO_DEPS": "1",
            "PIP_NO_BUILD_ISOLATION": "0",  # which turns isolation off: pip negates it
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        }
        there = Place(clone, clone, shell)
        there.run(script, **environment)
        there.run(
            "source .venv/bin/activate\n"
            'test "$(command -v nanothink)" = "$PWD/.venv/bin/nanothink"\n'
            'nanothink --version | grep "^nanothink "\n'
            'test "$(python -c "import nanothink as n; print(n.__file__)")" = "$PWD/nanothink/__init__.py"',
            **environment,
        )


def with_an_interrupted_run(script: str, place: Place) -> None:
    """In a new folder, where Ctrl-C stopped a run; at the end it is finished."""
    with tempfile.TemporaryDirectory() as folder:
        there = replace(place, folder=Path(shutil.copytree(place.own_text, Path(folder, "work"))))
        checkpoints = there.folder / "checkpoints"
        # Few steps, for those who resume it, which last long enough to be interrupted.
        steps = "--max-steps 40 --set train_expert.batch_size=64"
        command = f"nanothink pretrain transformer --preset tiny --name stopped {steps}"
        process = there.shell.start(command, there.folder)
        deadline = time.monotonic() + 120
        while not (checkpoints / "runs" / "stopped_expert" / "config.json").exists():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=120)
        assert process.returncode == 130, said
        assert (checkpoints / "stopped_expert_interrupted.pt").exists(), said
        there.run(script)
        assert (checkpoints / "runs" / "stopped_expert" / "finished.json").exists()
        assert not (checkpoints / "stopped_expert_interrupted.pt").exists()


def on_two_machines(script: str, place: Place) -> None:
    """Two folders of this one, at the same time; what they share is below the folder of both."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(place.own_text / "data", Path(folder, "shared", "data"))
        with socket.socket() as free:
            free.bind(("localhost", 0))
            endpoint = f"localhost:{free.getsockname()[1]}"
        words = {
            "first-machine:29400": endpoint,
            "--nproc-per-node=8": "--nproc-per-node=1",
            "/shared/": f"{folder}/shared/",
        }
        typed = replaced(script, words)
        machines = [replace(place, folder=Path(folder, name)) for name in ("first", "second")]
        for machine in machines:
            machine.folder.mkdir()
        with ThreadPoolExecutor(len(machines)) as both:
            list(both.map(lambda machine: machine.run(typed), machines))
        run = Path(folder, "shared", "checkpoints", "runs", "transformer_expert")
        assert json.loads((run / "config.json").read_text())["machine"]["processes"] == 2


def with_a_browser_and_more_runs(script: str, place: Place) -> None:
    """A second expert, a run that another has replaced, and a browser that writes down what it is to open."""
    train = "nanothink pretrain transformer --preset tiny --tokenizer tokenizer"
    place.run(f"{train} --name code\n{train} --overwrite")
    (records,) = place.folder.glob("checkpoints/replaced/transformer_expert-*-records")
    (documented,) = re.findall(r"transformer_expert-\S+-records", script)
    opened, browser = place.folder / "opened", place.folder / "browser"
    browser.write_text(f'#!/bin/sh\necho "$1" >> {shlex.quote(str(opened))}\n')
    browser.chmod(0o755)
    place.run(replaced(script, {documented: records.name}), BROWSER=str(browser))
    assert opened.read_text().splitlines() == [(place.folder / "report.html").as_uri()]


def with_lm_eval(script: str, place: Place) -> None:
    """With more text, and some of it held out."""
    _with_held_out_text(place)
    place.run(script, HF_DATASETS_OFFLINE="1", HF_DATASETS_CACHE=str(place.folder / "cache"))


def _with_held_out_text(place: Place) -> None:
    place.run("nanothink data sample\nnanothink pretrain transformer --preset tiny")
    task = Path("benchmarks", "lm_eval")
    shutil.copytree(ROOT / task, place.folder / task)
    text = (place.folder / "data" / "code" / "starter.jsonl").read_text().splitlines(keepends=True)
    (place.folder / "held_out.jsonl").write_text("".join(text[:20]))


def with_a_server(script: str, place: Place, **environment: str) -> None:
    """``nanothink serve`` goes on until the rest is done; Ctrl-C then ends it in order."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = place.shell.start(f"nanothink serve --port {port}", place.folder)
    assert process.stdout is not None
    said = process.stdout.readline()
    assert f":{port}/v1" in said, said + process.communicate()[0]
    try:
        rest = script.removeprefix("nanothink serve\n").replace("curl ", "curl --fail ")
        place.run(replaced(rest, {":8000/": f":{port}/"}), **environment)
    finally:
        process.send_signal(signal.SIGINT)
        ended, _ = process.communicate(timeout=120)
    assert process.returncode == 0, ended


def with_a_server_and_lm_eval(script: str, place: Place) -> None:
    """The same beside ``with_lm_eval``, whose models have a tiny context."""
    typed = replaced(script, {"max_length=512": "max_length=32"})
    _with_held_out_text(place)
    offline = {"HF_DATASETS_OFFLINE": "1", "HF_DATASETS_CACHE": str(place.folder / "cache")}
    with_a_server(typed, place, **offline)


SURROUNDINGS: dict[str, Callable[[str, Place], None]] = {
    "": as_it_is,
    "in a clone": in_a_clone,
    "with an interrupted run": with_an_interrupted_run,
    "on two machines": on_two_machines,
    "with a browser, and more runs": with_a_browser_and_more_runs,
    "with lm-eval": with_lm_eval,
    "with a server": with_a_server,
    "with a server and lm-eval": with_a_server_and_lm_eval,
}
