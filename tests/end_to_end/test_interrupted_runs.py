"""Runs as a person starts them: fresh processes, stopped, resumed by name, refused; scans that come and go.

Every kind and moment of an exact resume stands in test_exact_resume.py.
"""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from struck_runs import (
    LAST_EPOCH,
    FreshProcess,
    Ground,
    assert_same,
    assert_same_run,
    stem,
    steps_recorded,
    wait_for,
)

from nanothink.checkpoints.file import read_checkpoint
from nanothink.models.selective_scan import compiled

STEM = "transformer_expert"
ANY_SCAN = ("--set", "state_space.scan=auto")


def test_fresh_processes_from_ctrl_c_to_the_end(
    ground: Ground, uninterrupted: Callable[[str], Path], tmp_path: Path
) -> None:
    process = FreshProcess(ground.typed("transformer", tmp_path))
    wait_for(lambda: steps_recorded(tmp_path, STEM) >= 3, process)
    process.send(signal.SIGINT)
    ended = process.wait()
    assert ended.code == 130
    assert f"nanothink resume {tmp_path / STEM}_interrupted.pt" in " ".join(ended.stderr.split())
    assert "Traceback" not in ended.stderr
    ended = FreshProcess(["resume", "--checkpoint-dir", str(tmp_path)]).wait()
    assert ended.code == 0, ended.stderr
    assert_same_run(uninterrupted("transformer"), tmp_path, STEM)


def test_resuming_from_a_snapshot_begins_with_the_next_epoch(
    ground: Ground, uninterrupted: Callable[[str], Path], tmp_path: Path
) -> None:
    whole = uninterrupted("transformer")
    shutil.copy(whole / f"{STEM}_epoch1.pt", tmp_path)
    ended = ground.server.run([*ground.typed("transformer", tmp_path), "--resume"])
    assert ended.code == 0, ended.stderr
    assert f"Resuming from {tmp_path / f'{STEM}_epoch1.pt'}: epoch 1" in ended.stderr
    name = f"{STEM}_epoch{LAST_EPOCH}.pt"
    assert_same(dict(read_checkpoint(whole / name)), dict(read_checkpoint(tmp_path / name)), name)


@pytest.fixture
def running(ground: Ground, tmp_path: Path) -> Iterator[FreshProcess]:
    process = FreshProcess(ground.typed("transformer", tmp_path, max_epochs=1000))
    wait_for(lambda: steps_recorded(tmp_path, STEM) >= 1, process)
    yield process
    process.send(signal.SIGKILL)
    process.wait()


def test_a_second_run_of_the_same_name_is_refused(
    running: FreshProcess, ground: Ground, tmp_path: Path
) -> None:
    for more in ([], ["--resume"], ["--overwrite"]):
        ended = ground.server.run([*ground.typed("transformer", tmp_path), *more])
        assert ended.code == 1
        assert f"process {running.pid}" in ended.stderr
        assert "--name" in ended.stderr
        assert "Traceback" not in ended.stderr
    assert not running.has_ended()


def test_the_state_space_expert_is_resumed_as_exactly_with_the_fastest_scan(
    ground: Ground, tmp_path: Path
) -> None:
    """Killed, interrupted, killed again: the same bits as without, whichever scan computes here."""
    name, whole, struck = stem("state_space"), tmp_path / "whole", tmp_path / "struck"
    assert ground.server.run([*ground.typed("state_space", whole), *ANY_SCAN]).code == 0
    arguments = [*ground.typed("state_space", struck), *ANY_SCAN]
    for step, sent in ((6, "SIGINT"), (17, "SIGKILL"), (19, "SIGTERM")):
        strike = {"event": "StepDone", "having": {"step": step}, "signals": [sent]}
        assert ground.server.run(arguments, strike=strike).code == (-9 if sent == "SIGKILL" else 130)
        arguments = ["resume", "--checkpoint-dir", str(struck)]
    assert ground.server.run(arguments).code == 0
    assert_same_run(whole, struck, name)
    settled = read_checkpoint(struck / f"{name}.pt")["config"]["state_space"]["scan"]
    assert settled in {"plain", "compiled", "triton"}


def test_a_scan_that_is_gone_ends_the_resume_but_not_the_model(ground: Ground, tmp_path: Path) -> None:
    """Trained with the compiled scan, then no compiler: resuming would change bits, so it is refused."""
    if compiled.unavailable():
        pytest.skip("no compiler")
    folder = tmp_path / "checkpoints"
    trained = ground.server.run([*ground.typed("state_space", folder, max_epochs=1), *ANY_SCAN])
    assert trained.code == 0, trained.stderr
    best = str(folder / "state_space_expert.pt")
    bare = {"PATH": str(tmp_path)}
    more = ["resume", best, "--max-epochs", "2"]

    refused = ground.server.run(more, **bare)
    assert refused.code == 2
    assert "scan=compiled is not available here: no C++ compiler found" in refused.stderr
    assert "--set state_space.scan=auto" in refused.stderr
    assert ground.server.run(["generate", "The", "-n", "3", "--checkpoint", best], **bare).code == 0
    done = ground.server.run([*more, "--set", "state_space.scan=auto"], **bare)
    assert done.code == 0, done.stderr
    assert "Selective scan: plain (no compiled scan: no C++ compiler found" in done.stderr
