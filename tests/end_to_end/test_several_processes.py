"""Two processes train what one does; under torchrun they stop as one, and go on as one or two.

torchrun itself starts in the second suite, since each of its processes imports PyTorch, and in the example of
docs/distributed.md. That two which were killed or stopped resume to the bit: test_exact_resume_together.py.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from struck_runs import CommandServer
from tiny import SHAPE

from nanothink.checkpoints import CheckpointStore, read_checkpoint
from nanothink.cli.app import run

STEM = "transformer_expert"
KINDS = ("transformer", "state_space", "diffuser")
N_STEPS = 14
PATIENCE = 250  # seconds for a command; they take a few, but tests may share a machine
PHASE = {
    "batch_size": 5,  # two processes cannot share it equally
    "dropout": 0.1,
    "grad_accum_steps": 2,
    "warmup_steps": 3,
    "amp_dtype": "float32",
    "log_every_steps": 1,
    "eval_every_steps": 7,
    "eval_max_tokens": 400,
    "sample_tokens": 4,
}
STEMS = (*(f"{kind}_expert" for kind in KINDS), "nanothink_mla")
SETTINGS = {
    **SHAPE,
    "diffuser.n_layers": 1,
    "diffuser.training_steps": 20,
    "mla.n_heads": 2,
    **{f"train_{phase}.{k}": v for phase in ("expert", "diffuser", "mla") for k, v in PHASE.items()},
}


@pytest.fixture(scope="module")
def settings(tiny_corpus: Path, tiny_tokenizer: Path) -> list[str]:
    set_by = (part for name, value in SETTINGS.items() for part in ("--set", f"{name}={value}"))
    return ["--data-dir", str(tiny_corpus), "--tokenizer", str(tiny_tokenizer), *set_by]


def torchrun(*arguments: str | Path) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return [*launcher, "-m", "nanothink", *map(str, arguments)]


@contextmanager
def started(*arguments: str | Path) -> Iterator[subprocess.Popen[str]]:
    """Two processes under torchrun; whatever happens, gone at the end."""
    command = torchrun(*arguments)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()  # torchrun takes its processes with it
                process.communicate(timeout=60)


def finished(*arguments: str | Path) -> tuple[str, str]:
    with started(*arguments) as process:
        out, err = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, err
        return out, err


def metrics(folder: Path, stem: str = STEM) -> list[dict[str, Any]]:
    path = folder / "runs" / stem / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for_steps(n_steps: int, folder: Path, process: subprocess.Popen[str], stem: str = STEM) -> None:
    deadline = time.monotonic() + PATIENCE
    while sum(line["event"] == "train" for line in metrics(folder, stem)) < n_steps:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def assert_as_one(one: Path, other: Path, stem: str = STEM) -> None:
    """The same but for rounding: gradients of two processes are added in another order than those of one."""
    for left, right in zip(metrics(one, stem), metrics(other, stem), strict=True):
        assert {k: left[k] for k in ("event", "step", "epoch")} == {
            k: right[k] for k in ("event", "step", "epoch")
        }
        assert left["loss"] == pytest.approx(right["loss"], rel=2e-6)
        if left["event"] == "train":
            assert left["tokens"] == right["tokens"]
        else:
            for domain, score in left["domains"].items():
                assert score["loss"] == pytest.approx(right["domains"][domain]["loss"], rel=2e-6)
    samples = f"runs/{stem}/samples.jsonl"
    assert (one / samples).read_text() == (other / samples).read_text()
    payloads = [read_checkpoint(folder / f"{stem}.pt") for folder in (one, other)]
    for payload in payloads:  # how often it is saved may differ
        payload["config"]["train_expert"].pop("save_every_seconds")
    assert payloads[0]["config"] == payloads[1]["config"]
    states = [dict(payload["run"]["state"]) for payload in payloads]
    sums = [state.pop("epoch_parts") for state in states]
    assert states[0] == pytest.approx(states[1], rel=2e-6)
    assert sums[0] == pytest.approx(sums[1], rel=2e-6)
    for name, tensor in payloads[0]["model_state"].items():
        if name.startswith("joint_gate."):
            continue  # 250 steps of AdamW after training make much of a rounding
        torch.testing.assert_close(payloads[1]["model_state"][name], tensor, rtol=1e-3, atol=5e-5, msg=name)
    assert not CheckpointStore(other, stem).rolling()


def assert_bit_equal(whole: Path, resumed: Path, stem: str = STEM) -> None:
    one, other = (read_checkpoint(folder / f"{stem}.pt") for folder in (whole, resumed))
    assert one["run"]["state"] == other["run"]["state"]
    for name, tensor in one["model_state"].items():
        assert torch.equal(other["model_state"][name], tensor), name


@pytest.fixture(scope="module")
def by_one(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all four models, each trained by one process. Read only."""
    folder = tmp_path_factory.mktemp("one")
    for arguments in phases(settings, folder, experts=folder):
        assert run(arguments) == 0
    return folder


def phases(settings: list[str], folder: Path, *, experts: Path) -> list[list[str]]:
    """The four commands. Diffuser and NanoThink build on one folder's experts, so that they can agree."""
    more = [*settings, "--max-steps", str(N_STEPS), "--checkpoint-dir", str(folder)]
    combined = [part for k in KINDS for part in ("--expert", str(experts / f"{k}_expert.pt"))]
    return [
        ["pretrain", "transformer", *more],
        ["pretrain", "state_space", *more],
        ["pretrain", "diffuser", *more, "--transformer", str(experts / f"{STEM}.pt")],
        ["train-mla", *more, *combined],
    ]


@pytest.fixture(scope="module")
def by_two(
    by_one: Path, settings: list[str], server: CommandServer, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The same by two processes."""
    folder = tmp_path_factory.mktemp("two")
    ended = [server.run(command, processes=2) for command in phases(settings, folder, experts=by_one)]
    assert [done.codes for done in ended] == [(0, 0)] * 4, ended
    assert [done.said_by_others for done in ended] == [""] * 4, "one of the two speaks"
    assert all(f"step {N_STEPS}/{N_STEPS}" in done.stderr and "Best model:" in done.stdout for done in ended)
    return folder


@pytest.mark.parametrize("stem", STEMS)
def test_two_processes_train_every_kind_as_one_does(stem: str, by_one: Path, by_two: Path) -> None:
    assert_as_one(by_one, by_two, stem)


def test_two_processes_leave_what_one_does(by_two: Path) -> None:
    assert json.loads((by_two / "runs" / STEM / "config.json").read_text())["machine"]["processes"] == 2
    assert not list(by_two.rglob("*.tmp"))


@pytest.mark.bench
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_two_processes_stop_together_and_two_or_one_go_on(
    sent: signal.Signals, by_one: Path, by_two: Path, settings: list[str], tmp_path: Path
) -> None:
    """SIGINT to torchrun, which hands it on to both; SIGTERM to the second process alone."""
    command = phases(settings, tmp_path, experts=by_one)[0]
    with started(*command) as process:
        wait_for_steps(4, tmp_path, process)
        if sent is signal.SIGINT:
            process.send_signal(sent)
        else:
            os.kill(workers(process)[1], sent)
        _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode != 0
    (stopped,) = re.findall(r"Stopped by (.+) after step (\d+) of 14", said)
    assert stopped[0] == ("SIGINT" if sent is signal.SIGINT else "a signal to another process")
    (rolling,) = CheckpointStore(tmp_path, STEM).rolling()
    assert rolling.suffix == ".dcp"
    assert f"resume {rolling}" in said, "the command that is suggested works"
    payload = read_checkpoint(rolling)
    assert payload["step"] == int(stopped[1])
    assert payload["step"] < N_STEPS
    if sent is signal.SIGTERM:  # else torchrun tells of the signal, and of no exit code
        assert re.search(r"exitcode\s*: 130", said)
    assert "without saving" not in said
    assert "nanothink.errors" not in said
    if sent is signal.SIGTERM:
        assert run(["resume", "--checkpoint-dir", str(tmp_path)]) == 0
        assert_as_one(by_one, tmp_path)
        return
    finished("resume", "--checkpoint-dir", tmp_path)
    assert_bit_equal(by_two, tmp_path)  # as many processes


@pytest.mark.bench
def test_one_process_stops_and_two_go_on(by_one: Path, settings: list[str], tmp_path: Path) -> None:
    command = phases(settings, tmp_path, experts=by_one)[0]
    with subprocess.Popen(
        [sys.executable, "-m", "nanothink", *command], stderr=subprocess.PIPE, text=True
    ) as process:
        wait_for_steps(4, tmp_path, process)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert process.returncode == 130
    _, said = finished(*command, "--resume")
    assert said.count("Resuming from") == 1
    assert_as_one(by_one, tmp_path)


@pytest.mark.bench
@pytest.mark.parametrize(("stem", "rank"), [(STEM, 0), *((stem, 1) for stem in STEMS)])
def test_a_killed_process_ends_the_run_and_the_last_checkpoint_is_usable(
    stem: str, rank: int, by_one: Path, by_two: Path, settings: list[str], tmp_path: Path
) -> None:
    """Then one process goes on with it, or two, which end as two that were never killed, to the bit."""
    command = phases(settings, tmp_path, experts=by_one)[STEMS.index(stem)]
    phase = {"diffuser_expert": "train_diffuser", "nanothink_mla": "train_mla"}.get(stem, "train_expert")
    with started(*command, "--set", f"{phase}.save_every_seconds=1e-3") as process:
        wait_for_steps(4, tmp_path, process, stem)
        ranks = workers(process)
        os.kill(ranks[rank], signal.SIGKILL)
        struck = time.monotonic()
        _, said = process.communicate(timeout=PATIENCE)
    assert time.monotonic() - struck < 60  # torchrun kills what is left after 30 seconds
    assert process.returncode != 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)
    if rank == 1:
        assert "Another process of this run has ended" in said
        assert "nanothink.errors" not in said, "no traceback"
        finished(*command, "--resume")
        assert_bit_equal(by_two, tmp_path, stem)
    else:
        assert run([*command, "--resume"]) == 0
        assert_as_one(by_one, tmp_path)


def workers(process: subprocess.Popen[str]) -> list[int]:
    """Process ids by rank, of the processes that torchrun has started."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    found = {}
    for child in children:
        environment = Path(f"/proc/{child}/environ").read_bytes().decode().split("\0")
        ranks = [int(line.removeprefix("RANK=")) for line in environment if line.startswith("RANK=")]
        found.update(dict.fromkeys(ranks, int(child)))
    return [found[rank] for rank in sorted(found)]


@pytest.mark.bench
def test_what_cannot_be_shared_is_refused_once(settings: list[str], tmp_path: Path) -> None:
    """A batch of one block, and a run of the same name: the first process says it, no traceback."""
    command = ["pretrain", "transformer", *settings, "--checkpoint-dir", str(tmp_path), "--max-steps", "2"]
    with started(*command, "--set", "train_expert.batch_size=1") as process:
        _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode != 0
    assert said.count("train_expert.batch_size=1 gives 2 processes less than one block each") == 1
    assert re.search(r"exitcode\s*: 2", said)
    assert "nanothink.errors" not in said
    assert not list(tmp_path.glob("*.pt"))
