"""Output that nobody gets: training goes on without it, and a result that is lost is an error."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from struck_runs import Ground, assert_same, assert_same_run, metrics

from nanothink.checkpoints import read_checkpoint

STEM = "transformer_expert"


@pytest.mark.parametrize("how", ["full2", "closed2", "gone2", "hung up2"])
def test_a_run_outlives_all_its_output(
    how: str, ground: Ground, uninterrupted: Callable[[str], Path], tmp_path: Path
) -> None:
    ended = ground.server.run(ground.typed("transformer", tmp_path), output=how, TERM="xterm")
    assert ended.code == 0
    assert_same_run(uninterrupted("transformer"), tmp_path, STEM)


def test_a_run_whose_summary_is_lost_is_complete(ground: Ground, tmp_path: Path) -> None:
    """It is no failure, unless it was asked for in JSON."""
    asked = ground.typed("transformer", tmp_path, max_epochs=1)
    ended = ground.server.run(asked, output="full")
    assert ended.code == 0
    assert f"No space left on device. The run is complete and saved in {tmp_path / STEM}.pt" in ended.stderr
    for output, code in (("full", 1), ("closed", 1), ("gone", 141)):
        ended = ground.server.run([*asked, "--resume", "--json"], output=output)
        assert (ended.code, "Traceback" in ended.stderr) == (code, False)
        assert ended.stderr.count("error: ") == (code == 1)


@pytest.fixture(scope="module")
def commands(ground: Ground, uninterrupted: Callable[[str], Path]) -> dict[str, list[str]]:
    folder = uninterrupted("transformer")
    best, at, data = str(folder / f"{STEM}.pt"), ["--checkpoint-dir", str(folder)], str(ground.corpus)
    return {
        "help": ["--help"],
        "help of a group": ["data"],
        "help of a command": ["pretrain", "--help"],
        "version": ["--version"],
        "settings": ["config", "show"],
        "settings as JSON": ["config", "show", "--json"],
        "list": ["checkpoints", "ls", *at],
        "list as JSON": ["checkpoints", "ls", *at, "--json"],
        "verify": ["checkpoints", "verify", *at],
        "validate": ["data", "validate", data],
        "inspect": ["data", "inspect", data, "--tokenizer", str(ground.tokenizer)],
        "dry run": [*ground.typed("transformer", folder), "--dry-run"],
        "generate": ["generate", "time", "-c", best, "-n", "2000", "--seed", "1"],
        "eval": ["eval", best, "--max-tokens", "100"],
        "report": ["report", "--out", "{tmp}/report.html", *at],
        "tokenizer": ["tokenizer", "train", "--data-dir", data, "--vocab-size", "300", "--out", "{tmp}/tok"],
        "demo": ["demo", "--out", "{tmp}/demo"],
    }


@pytest.mark.parametrize("how", ["full", "closed", "gone"])
def test_a_lost_result_is_one_error_and_a_reader_that_left_is_none(
    how: str, commands: dict[str, list[str]], ground: Ground, tmp_path: Path
) -> None:
    shorter = {"help", "settings", "list as JSON", "generate", "demo"}
    for name, words in commands.items():
        if how != "full" and name not in shorter:
            continue
        ended = ground.server.run([word.format(tmp=tmp_path) for word in words], output=how)
        assert ended.code == (141 if how == "gone" else 1), (name, ended.stderr)
        said = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
        assert len(said) == (how != "gone"), (name, ended.stderr)
        assert "Traceback" not in ended.stderr, name
        assert "ignored" not in ended.stderr, name
        for line in said:
            reason = "it is closed" if how == "closed" else "No space left on device"
            assert line.startswith(f"error: Standard output cannot be written: {reason}. "), name


def test_nothing_is_said_as_the_interpreter_ends(tmp_path: Path) -> None:
    """By real processes: what Python does with closed descriptors, and with what it could not write."""
    command = f"{sys.executable} -m nanothink"
    script = f"""
    {command} config show | head -1; echo "${{PIPESTATUS[0]}}"
    {command} --help > /dev/full; echo $?
    {command} config show 2>&- >&- <&-; echo $?
    """
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.stdout.splitlines()[1:] == ["141", "1", "1"]
    (said,) = done.stderr.splitlines()
    assert said.startswith("error: Standard output cannot be written: No space left on device.")


@pytest.mark.usefixtures("own_disks")
def test_records_on_a_full_disk_do_not_end_a_run(
    ground: Ground, uninterrupted: Callable[[str], Path], tmp_path: Path
) -> None:
    records, kept = tmp_path / "runs", tmp_path / "kept"
    records.mkdir()
    small = {"folder": str(records), "options": "size=20k", "kept_in": str(kept)}
    ended = ground.server.run(ground.typed("transformer", tmp_path), disk=small)
    assert ended.code == 0, ended.stderr
    assert ended.stderr.count("records cannot be written") == 1
    assert ended.stderr.count("of the run's records could not be written") == 1
    lines = (kept / STEM / "metrics.jsonl").read_text().splitlines()
    assert all(isinstance(json.loads(line), dict) for line in lines)
    whole = uninterrupted("transformer")
    assert 0 < len(lines) < len(metrics(whole, STEM))
    assert_same(dict(read_checkpoint(whole / f"{STEM}.pt")), dict(read_checkpoint(tmp_path / f"{STEM}.pt")))
    # How it ended could not be recorded, so the rolling file stays: a resume sees that all is done.
    assert not (kept / STEM / "finished.json").exists()
    assert (tmp_path / f"{STEM}_interrupted.pt").exists()
    ended = ground.server.run([*ground.typed("transformer", tmp_path), "--resume"])
    assert ended.code == 0, ended.stderr
    assert not (tmp_path / f"{STEM}_interrupted.pt").exists()


def test_a_terminal_that_hangs_up_under_the_live_view(
    ground: Ground, uninterrupted: Callable[[str], Path], tmp_path: Path
) -> None:
    ours, theirs = os.openpty()
    name = os.ttyname(theirs)
    process = ground.server.start(ground.typed("transformer", tmp_path), output=name, TERM="xterm")
    seen = b""
    while b"\x1b[?25l" not in seen:  # the view hides the cursor
        seen += os.read(ours, 4096)
    os.close(theirs)
    os.close(ours)
    assert process.wait().code == 0
    assert_same_run(uninterrupted("transformer"), tmp_path, STEM)
