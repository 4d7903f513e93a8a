"""Tiny runs of every kind of model in real processes, struck where a test says, and compared bit by bit."""

from __future__ import annotations

import json
import os
import random
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from nanothink.checkpoints import CheckpointStore, read_checkpoint

KINDS = ("transformer", "state_space", "diffuser", "nanothink_mla")
EXPERTS = KINDS[:3]
LAST_EPOCH = 2
SHAPE = {
    "model.d_model": 16,
    "model.max_seq_len": 32,
    "transformer.n_layers": 1,
    "transformer.n_heads": 2,
    "state_space.n_layers": 1,
    "state_space.scan": "plain",
    "diffuser.n_layers": 1,
    "diffuser.training_steps": 20,
    "mla.n_heads": 2,
}
TRAINING = {
    "lr": 1e-2,  # so high that not every validation is the best so far
    "lr_min_fraction": 0.5,
    "batch_size": 2,
    "grad_accum_steps": 2,
    "max_epochs": LAST_EPOCH,
    "amp_dtype": "float32",
    "dropout": 0.2,
    "weight_decay_tables": 0.1,
    "warmup_steps": 3,
    "log_every_steps": 1,
    "eval_every_steps": 4,
    "eval_max_tokens": 100,
    "early_stopping_patience": 100,
    "snapshot_every_epochs": 1,
    "sample_tokens": 3,
}
SECTIONS = {
    "transformer": "train_expert",
    "state_space": "train_expert",
    "diffuser": "train_diffuser",
    "nanothink_mla": "train_mla",
}


WORDS = ("time", "light", "stone", "water", "letter", "garden", "river", "wind", "moon", "house")


def make_corpus(root: Path) -> None:
    """Three domains of made-up sentences; an epoch of a run is 12 steps."""
    chance = random.Random(0)
    for domain, n_texts in {"letters": 6, "manuals": 5, "tales": 4}.items():
        (root / domain).mkdir(parents=True)
        texts = [" ".join(chance.choices(WORDS, k=125)) + f" {n}." for n in range(n_texts)]
        lines = [json.dumps({"text": text, "id": n}) + "\n" for n, text in enumerate(texts)]
        (root / domain / "texts.jsonl").write_text("".join(lines), "utf-8")


def stem(kind: str) -> str:
    return kind if kind == "nanothink_mla" else f"{kind}_expert"


def typed(kind: str, corpus: Path, tokenizer: Path, experts: Path, folder: Path, **changed: Any) -> list[str]:
    """What to type after ``nanothink`` to train a ``kind`` into ``folder``."""
    shape = {} if kind == "nanothink_mla" else SHAPE
    if kind == "nanothink_mla":
        changed = {"fit": "full", "lr": 1e-4, **changed}  # low enough to gain on the ensemble
    if kind == "transformer":  # it alone would learn smoothly
        changed = {"lr_min_fraction": 0.9, **changed}
    settings = {**shape, **{f"{SECTIONS[kind]}.{k}": v for k, v in {**TRAINING, **changed}.items()}}
    words = ["train-mla"] if kind == "nanothink_mla" else ["pretrain", kind]
    words += ["--data-dir", str(corpus), "--checkpoint-dir", str(folder)]
    if kind in ("transformer", "state_space"):
        words += ["--tokenizer", str(tokenizer)]
    elif kind == "diffuser":
        words += ["--transformer", str(experts / "transformer_expert.pt")]
    else:
        words += [part for e in EXPERTS for part in ("--expert", str(experts / f"{e}_expert.pt"))]
        words += ["--set", f"mla.n_heads={SHAPE['mla.n_heads']}"]
    return words + [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]


@dataclass(frozen=True)
class Ground:
    """What such runs stand on."""

    server: CommandServer
    corpus: Path
    tokenizer: Path
    experts: Path
    """Folder of the three trained experts."""

    def typed(self, kind: str, folder: Path, **changed: Any) -> list[str]:
        return typed(kind, self.corpus, self.tokenizer, self.experts, folder, **changed)

    @classmethod
    def make(cls, server: CommandServer, folder: Path) -> Ground:
        """A corpus, a tokenizer and three experts, made by the commands themselves."""
        ground = cls(server, folder / "corpus", folder / "tokenizer", folder / "experts")
        make_corpus(ground.corpus)
        trained = ["--data-dir", str(ground.corpus), "--vocab-size", "320", "--out", str(ground.tokenizer)]
        for arguments in (
            ["tokenizer", "train", *trained],
            *(ground.typed(kind, ground.experts, max_epochs=1) for kind in EXPERTS),
        ):
            ended = server.run(arguments)
            assert ended.code == 0, ended.stderr
        return ground


# ---------------------------------------------------------------------------------------------------
# Processes


@dataclass(frozen=True)
class Ended:
    code: int
    """Exit code; -N when signal N ended it."""
    stdout: str
    stderr: str
    seconds_to_end: float | None = None
    """From the moment at which it struck itself."""
    codes: tuple[int, ...] = ()
    """Exit codes of all processes, by rank."""
    said_by_others: str = ""
    """Both outputs of every process but the first."""


class Running(Protocol):
    """A command under way."""

    pid: int

    def send(self, sent: signal.Signals) -> None: ...
    def has_ended(self, within_seconds: float = 0.0) -> bool: ...
    def wait(self, seconds: float = 600.0) -> Ended: ...


class FreshProcess:
    """``python -m nanothink`` as a person starts it."""

    def __init__(self, arguments: list[str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "nanothink", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )
        self.pid = self._process.pid

    def send(self, sent: signal.Signals) -> None:
        self._process.send_signal(sent)

    def has_ended(self, within_seconds: float = 0.0) -> bool:
        try:
            self._process.wait(within_seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def wait(self, seconds: float = 600.0) -> Ended:
        out, err = self._process.communicate(timeout=seconds)
        return Ended(self._process.returncode, out, err)


class Process:
    """One command under way in a fork."""

    def __init__(self, server: CommandServer, pid: int, files: tuple[Path, Path]) -> None:
        self.pid = pid
        self._server, self._files = server, files
        self._code: int | None = None

    def send(self, sent: signal.Signals) -> None:
        if self._code is None:
            os.kill(self.pid, sent)

    def has_ended(self, within_seconds: float = 0.0) -> bool:
        if self._code is None and (answer := self._server.answer(within_seconds)) is not None:
            self._code, self._codes, self._ended = answer["code"], answer["codes"], time.monotonic()
        return self._code is not None

    def wait(self, seconds: float = 600.0) -> Ended:
        if not self.has_ended(seconds):
            self.send(signal.SIGKILL)
            self.has_ended(10)
            raise AssertionError(f"the command did not end within {seconds} s: {self._files[1].read_text()}")
        assert self._code is not None
        struck = Path(f"{self._files[1]}.struck")
        to_end = self._ended - float(struck.read_text()) if struck.exists() else None
        stdout, stderr = (file.read_text(errors="replace") for file in self._files)
        ranks = range(1, len(self._codes))
        others = [
            Path(f"{file}.{rank}").read_text(errors="replace") for rank in ranks for file in self._files
        ]
        return Ended(self._code, stdout, stderr, to_end, tuple(self._codes), "".join(others))


class CommandServer:
    """Starts commands, one at a time, by way of command_server.py."""

    def __init__(self, *before: str) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="commands-")
        self._process = subprocess.Popen(
            [*before, sys.executable, str(Path(__file__).with_name("command_server.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )
        self._current: Process | None = None
        started = time.monotonic()
        assert self.answer(240) == {"ready": True}
        self.start_up_seconds = time.monotonic() - started
        """What a fresh process takes to import everything."""

    def start(
        self,
        arguments: list[str],
        *,
        strike: Mapping[str, Any] | None = None,
        write_seconds: float = 0.0,
        file_bytes: int | None = None,
        cwd: Path | None = None,
        user: int | None = None,
        disk: Mapping[str, Any] | None = None,
        ignored: Sequence[str] = (),
        output: str = "",
        processes: int = 1,
        **environment: str,
    ) -> Process:
        """``strike``: see ``strike_at``; ``write_seconds``: what each write of up to 4 KiB takes longer;
        ``file_bytes``: a longer file ends the process, by SIGXFSZ, in the middle of the write;
        ``user``: run as that user id, which only root may ask for; ``disk``: a small file system over
        ``folder``, with ``options`` of tmpfs, beginning with a copy of ``content``, perhaps full (``fill``)
        or ``read_only``, and copied to ``kept_in`` at the end; ``ignored``: signals that are; ``output``:
        "full", "closed", "gone", "hung up" or, with a "2" after it, standard error too: ``lose_output``;
        ``processes``: that train together, of which the first one's output is kept."""
        assert self._current is None or self._current.has_ended(), "one command at a time"
        files = (Path(self._folder.name) / "stdout", Path(self._folder.name) / "stderr")
        for file in files:
            file.write_bytes(b"")
        Path(f"{files[1]}.struck").unlink(missing_ok=True)
        task = {
            "arguments": arguments,
            "strike": strike,
            "write_seconds": write_seconds,
            "file_bytes": file_bytes,
            "stdout": str(files[0]),
            "stderr": str(files[1]),
            "cwd": str(cwd or self._folder.name),
            "user": user,
            "disk": disk,
            "ignored": list(ignored),
            "output": output,
            "processes": processes,
            "environment": environment,
        }
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(task).encode() + b"\n")
        self._process.stdin.flush()
        answer = self.answer(30)
        assert answer is not None
        self._current = Process(self, answer["pid"], files)
        return self._current

    def run(self, arguments: list[str], **options: Any) -> Ended:
        return self.start(arguments, **options).wait()

    def answer(self, within_seconds: float) -> dict[str, Any] | None:
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], within_seconds)[0]:
            return None
        line = self._process.stdout.readline()
        assert line, "the server of commands has died"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        if self._current is not None and not self._current.has_ended():
            self._current.send(signal.SIGKILL)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._folder.cleanup()


def wait_for(condition: Callable[[], bool], process: Running, seconds: float = 300.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert not process.has_ended(), f"the run ended too early: {process.wait().stderr}"
        assert time.monotonic() < deadline, "the moment to strike never came"
        time.sleep(0.0005)


# ---------------------------------------------------------------------------------------------------
# Comparing


def assert_same(left: Any, right: Any, where: str = "") -> None:
    """Bit-equal, all the way down."""
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype, where
        assert torch.equal(left, right), where
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for key in left:
            assert_same(left[key], right[key], f"{where}.{key}")
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right), where
        for i, (a, b) in enumerate(zip(left, right, strict=True)):
            assert_same(a, b, f"{where}[{i}]")
    else:
        assert left == right, where


def metrics(folder: Path, run: str) -> list[dict[str, Any]]:
    """What a run recorded, but for the times it took."""
    lines = (folder / "runs" / run / "metrics.jsonl").read_text().splitlines()
    timed = {"seconds", "tokens_per_second"}
    return [{k: v for k, v in json.loads(line).items() if k not in timed} for line in lines]


def steps_recorded(folder: Path, run: str) -> int:
    path = folder / "runs" / run / "metrics.jsonl"
    return path.read_bytes().count(b'"train"') if path.exists() else 0


def assert_same_run(one: Path, other: Path, run: str) -> None:
    """Two finished runs left the same: every checkpoint to the bit, all records but the times.

    How often they saved is a setting too, and the only one in which they may differ.
    """
    files, others = ([path.name for path in CheckpointStore(f, run).existing()] for f in (one, other))
    assert files == others
    assert f"{run}.pt" in files
    assert not CheckpointStore(one, run).rolling()
    for name in files:
        left, right = (read_checkpoint(folder / name) for folder in (one, other))
        for payload in (left, right):
            for section in payload["config"].values():
                section.pop("save_every_seconds", None)
        assert_same(left, right, name)
    assert metrics(one, run) == metrics(other, run)
    samples = f"runs/{run}/samples.jsonl"
    assert (one / samples).read_text("utf-8") == (other / samples).read_text("utf-8")
    assert not [path.name for path in other.iterdir() if path.name.endswith(".tmp")]
