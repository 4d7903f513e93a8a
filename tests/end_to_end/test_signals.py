"""A signal at any moment: what there is to save is saved, and the process is soon gone."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from struck_runs import Ended, Ground, assert_same_run

from nanothink.checkpoints import read_checkpoint

STEM = "transformer_expert"
BOTH = ("SIGINT", "SIGTERM")
OTHERS = ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
SOON_SECONDS = 20.0
"""For a step, a validation batch or a token of these runs, and one save, on a machine that is busy."""

WHILE_TRAINING: dict[str, dict[str, Any]] = {
    "the first checkpoint": {"call": "nanothink.checkpoints.archive:DigestingWriter.seal"},
    "the very first step": {"call": "torch:Tensor.backward"},
    "training": {"event": "StepDone", "having": {"step": 6}},
    "evaluation": {"stage": "validating", "nth": 4},
    "sampling": {"call": "nanothink.models.transformer:Transformer.step", "nth": 5},
    "the last save": {"event": "CheckpointSaved", "having": {"role": "epoch"}, "nth": 2},
}


def check_left(ended: Ended, code: int = 130) -> None:
    assert ended.code == code, ended.stderr
    assert ended.seconds_to_end is not None
    assert ended.seconds_to_end < SOON_SECONDS
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(("during", "sent"), list(zip(WHILE_TRAINING, BOTH * 3, strict=True)))
def test_a_run_is_saved_leaves_and_resumes_to_the_same_bits(
    during: str, sent: str, ground: Ground, uninterrupted: Callable[[str], Path], tmp_path: Path
) -> None:
    arguments = ground.typed("transformer", tmp_path)
    ended = ground.server.run(arguments, strike={**WHILE_TRAINING[during], "signals": [sent]})
    check_left(ended)
    path = tmp_path / f"{STEM}_interrupted.pt"
    said = ended.stderr.splitlines()[-1]
    assert said.startswith(f"Stopped by {sent} after step ")
    assert said.endswith(f". Paused and saved. Resume with: nanothink resume {path}")
    assert ground.server.run([*arguments, "--resume"]).code == 0
    assert_same_run(uninterrupted("transformer"), tmp_path, STEM)


@pytest.mark.parametrize("sent", OTHERS)
def test_a_closed_terminal_and_a_scheduler_save_too(sent: str, ground: Ground, tmp_path: Path) -> None:
    """Each may come twice for one reason."""
    striking = {**WHILE_TRAINING["training"], "signals": [sent, sent]}
    check_left(ended := ground.server.run(ground.typed("transformer", tmp_path), strike=striking))
    path = tmp_path / f"{STEM}_interrupted.pt"
    assert f"Stopping: {sent} came." in ended.stderr
    assert ended.stderr.endswith(f". Paused and saved. Resume with: nanothink resume {path}\n")
    assert read_checkpoint(path)["step"] == 6


def test_signals_that_are_ignored_stay_so(ground: Ground, tmp_path: Path) -> None:
    """As nohup leaves SIGHUP for a run, or a shell SIGINT for one behind an ampersand."""
    striking = {**WHILE_TRAINING["training"], "signals": ["SIGHUP", "SIGINT"]}
    ended = ground.server.run(
        ground.typed("transformer", tmp_path, max_epochs=1), strike=striking, ignored=striking["signals"]
    )
    assert ended.code == 0, ended.stderr
    assert "Stopping" not in ended.stderr


def test_a_signal_before_the_command_line_is_there_ends_the_process_without_a_word() -> None:
    script = (
        "import os, signal, sys\n"
        "from nanothink.__main__ import main\n"
        "class Strike:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'nanothink.cli.app': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Strike())\n"
        "main()"
    )
    ended = subprocess.run([sys.executable, "-c", script, "--help"], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (-signal.SIGINT, "", "")


@pytest.mark.parametrize("during", ["training", "sampling"])
def test_the_second_signal_leaves_at_once(during: str, ground: Ground, tmp_path: Path) -> None:
    arguments = ground.typed("transformer", tmp_path)
    ended = ground.server.run(arguments, strike={**WHILE_TRAINING[during], "signals": ["SIGINT", "SIGINT"]})
    check_left(ended)
    assert "Stopped at once" in ended.stderr
    read_checkpoint(tmp_path / f"{STEM}_interrupted.pt")  # of before, whole


def test_the_second_signal_during_a_save_leaves_the_file_of_before(ground: Ground, tmp_path: Path) -> None:
    arguments = ground.typed("transformer", tmp_path)
    # The first file is the state before the first step; the second comes with the first validation.
    sealing = {"call": "nanothink.checkpoints.archive:DigestingWriter.seal", "nth": 2}
    ended = ground.server.run(arguments, strike={**sealing, "signals": ["SIGTERM", "SIGINT"]})
    check_left(ended)
    assert read_checkpoint(tmp_path / f"{STEM}_interrupted.pt")["step"] == 0
    assert not (tmp_path / f"{STEM}.pt").exists()


@pytest.mark.parametrize("sent", ["SIGINT", "SIGUSR1"])
def test_nothing_is_left_of_tokenising(sent: str, ground: Ground, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    shutil.copytree(ground.corpus, corpus, ignore=shutil.ignore_patterns(".nanothink"))
    arguments = ground.typed("transformer", tmp_path / "checkpoints", max_steps=1)
    arguments[arguments.index("--data-dir") + 1] = str(corpus)
    encoding = {"call": "nanothink.data.tokenizer:Tokenizer.encode_batch", "nth": 2, "after": True}
    ended = ground.server.run(arguments, strike={**encoding, "signals": [sent]})
    check_left(ended)
    assert "there was nothing to save" in ended.stderr
    assert not list((tmp_path / "checkpoints").glob("*.pt"))
    assert not [path for path in (corpus / ".nanothink").rglob("*") if "tmp" in path.name]
    assert ground.server.run(arguments).code == 0


@pytest.mark.parametrize(("during", "sent"), [("_send", "SIGINT"), ("_follow", "SIGTERM")])
def test_nothing_is_left_of_a_tokenizer(during: str, sent: str, ground: Ground, tmp_path: Path) -> None:
    out = tmp_path / "tokenizer"
    arguments = ["tokenizer", "train", "--data-dir", str(ground.corpus), "--out", str(out)]
    strike = {"call": f"nanothink.data.bpe_process:{during}", "signals": [sent]}
    ended = ground.server.run(arguments, strike=strike)
    check_left(ended)
    assert ended.stderr.splitlines() == ["error: Interrupted; there was nothing to save."]
    assert not list(out.glob("*"))
    assert ground.server.run(arguments).code == 0


@pytest.mark.parametrize(("command", "sent"), [("eval", "SIGTERM"), ("generate", "SIGINT")])
def test_reading_commands_leave_too(
    command: str, sent: str, ground: Ground, uninterrupted: Callable[[str], Path]
) -> None:
    path = str(uninterrupted("transformer") / f"{STEM}.pt")
    arguments = ["eval", path] if command == "eval" else ["generate", "time", "-c", path, "-n", "500"]
    called = "log_likelihood" if command == "eval" else "step"
    strike = {"call": f"nanothink.models.transformer:Transformer.{called}", "signals": [sent]}
    ended = ground.server.run(arguments, strike=strike)
    check_left(ended)
    assert "there was nothing to save" in ended.stderr


def test_a_second_signal_does_not_wait_for_a_command_that_unwinds() -> None:
    code = (
        "import os, signal, time\n"
        "from nanothink.cli import app\n"
        "def run(args):\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        time.sleep(60)\n"
        "    finally:\n"
        "        print('unwinding', flush=True)\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "        time.sleep(60)\n"
        "app.run = run\n"
        "app.main([])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=50, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "unwinding\n", "")
