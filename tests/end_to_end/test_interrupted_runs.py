"""Real processes, really killed: the resumed run ends bit-equal to the one that was never interrupted."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from nanothink.checkpoints.file import read_checkpoint
from nanothink.models.selective_scan import compiled

STEM = "transformer_expert"
LAST_EPOCH = 4
SETTINGS = {
    "model.d_model": 32,
    "model.max_seq_len": 32,
    "transformer.n_layers": 2,
    "transformer.n_heads": 2,
    "state_space.n_layers": 2,
    "train_expert.batch_size": 4,
    "train_expert.grad_accum_steps": 2,
    "train_expert.max_epochs": LAST_EPOCH,
    "train_expert.amp_dtype": "float32",
    "train_expert.log_every_steps": 1,
    "train_expert.snapshot_every_epochs": 1,
    "train_expert.sample_tokens": 8,
    "train_expert.warmup_steps": 5,
}


def command(
    corpus: Path, tokenizer: Path, folder: Path, *more: str, kind: str = "transformer", **changed: Any
) -> list[str]:
    settings = SETTINGS | {f"train_expert.{key}": value for key, value in changed.items()}
    return [
        sys.executable,
        "-m",
        "nanothink",
        "pretrain",
        kind,
        *("--data-dir", str(corpus), "--tokenizer", str(tokenizer), "--checkpoint-dir", str(folder)),
        *(part for name, value in settings.items() for part in ("--set", f"{name}={value}")),
        *more,
    ]


def start(arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(arguments: list[str]) -> str:
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None:
            raise AssertionError(f"the run ended too early: {process.communicate()[1][-2000:]}")
        assert time.monotonic() < deadline, "the moment to strike never came"
        time.sleep(0.0005)


def steps_logged(folder: Path, stem: str = STEM) -> int:
    path = folder / "runs" / stem / "metrics.jsonl"
    return path.read_bytes().count(b'"train"') if path.exists() else 0


def comparable_metrics(folder: Path, stem: str = STEM) -> list[dict[str, Any]]:
    lines = (folder / "runs" / stem / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if k not in {"seconds", "tokens_per_second"}}
        for line in lines
    ]


def assert_same(left: Any, right: Any, where: str = "") -> None:
    """Bit-equal, all the way down."""
    if isinstance(left, torch.Tensor):
        assert torch.equal(left, right), where
        assert left.dtype == right.dtype, where
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


def assert_same_run(one: Path, other: Path, stem: str = STEM) -> None:
    for name in [f"{stem}.pt", *(f"{stem}_epoch{n}.pt" for n in range(1, LAST_EPOCH + 1))]:
        assert_same(dict(read_checkpoint(one / name)), dict(read_checkpoint(other / name)), name)
    assert comparable_metrics(one, stem) == comparable_metrics(other, stem)
    samples = f"runs/{stem}/samples.jsonl"
    assert (one / samples).read_text() == (other / samples).read_text()
    assert not (other / f"{stem}_interrupted.pt").exists()


@pytest.fixture(scope="module")
def uninterrupted(tiny_corpus: Path, tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    finish(command(tiny_corpus, tiny_tokenizer, folder))
    return folder


def test_the_reference_run_is_long_enough_to_be_struck(uninterrupted: Path) -> None:
    metrics = comparable_metrics(uninterrupted)
    assert sum(m["event"] == "train" for m in metrics) >= 40
    assert sum(m["event"] == "validation" for m in metrics) == LAST_EPOCH


def test_two_runs_are_the_same_run(
    uninterrupted: Path, tiny_corpus: Path, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    finish(command(tiny_corpus, tiny_tokenizer, tmp_path))
    assert_same_run(uninterrupted, tmp_path)


@pytest.mark.parametrize("after_steps", [1, 7, 25])
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_killed_while_training(
    sent: signal.Signals,
    after_steps: int,
    uninterrupted: Path,
    tiny_corpus: Path,
    tiny_tokenizer: Path,
    tmp_path: Path,
) -> None:
    arguments = command(tiny_corpus, tiny_tokenizer, tmp_path, save_every_seconds=0.2)
    process = start(arguments)
    wait_until(lambda: steps_logged(tmp_path) >= after_steps, process)
    process.send_signal(sent)
    _, errors = process.communicate(timeout=60)
    if sent is signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 130
        assert "nanothink resume" in errors
        assert "Traceback" not in errors
        assert (tmp_path / f"{STEM}_interrupted.pt").exists()
    finish([*command(tiny_corpus, tiny_tokenizer, tmp_path), "--resume"])
    _forget_save_interval(uninterrupted, tmp_path)


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("nth_save", [1, 4, 12])
def test_killed_during_a_save(
    sent: signal.Signals,
    nth_save: int,
    uninterrupted: Path,
    tiny_corpus: Path,
    tiny_tokenizer: Path,
    tmp_path: Path,
) -> None:
    """Struck while a temporary file is being written; whatever was saved before it is still there."""
    process = start(command(tiny_corpus, tiny_tokenizer, tmp_path, save_every_seconds=1e-6))
    seen: set[tuple[str, int]] = set()

    def saving_again() -> bool:
        with os.scandir(tmp_path) as entries:
            under_way = [e for e in entries if e.name.endswith(".tmp") and STEM in e.name]
            for entry in under_way:
                with suppress(FileNotFoundError):
                    seen.add((entry.name, entry.stat().st_ino))
        return bool(under_way) and len(seen) >= nth_save

    wait_until(saving_again, process)
    process.send_signal(sent)
    process.communicate(timeout=60)
    assert process.returncode == (130 if sent is signal.SIGTERM else -signal.SIGKILL)
    for path in tmp_path.glob(f"{STEM}*.pt"):
        read_checkpoint(path)  # raises if a single byte is not as it was written
    finish([*command(tiny_corpus, tiny_tokenizer, tmp_path), "--resume"])
    _forget_save_interval(uninterrupted, tmp_path)
    assert not [p for p in tmp_path.iterdir() if p.name.endswith(".tmp")]


def _forget_save_interval(uninterrupted: Path, folder: Path) -> None:
    """How often it is saved is a setting too, and the only one in which the two runs may differ."""

    def without_interval(path: Path) -> dict[str, Any]:
        payload = dict(read_checkpoint(path))
        payload["config"]["train_expert"].pop("save_every_seconds")
        return payload

    for name in [f"{STEM}.pt", *(f"{STEM}_epoch{n}.pt" for n in range(1, LAST_EPOCH + 1))]:
        assert_same(without_interval(uninterrupted / name), without_interval(folder / name), name)
    assert comparable_metrics(uninterrupted) == comparable_metrics(folder)
    samples = f"runs/{STEM}/samples.jsonl"
    assert (uninterrupted / samples).read_text() == (folder / samples).read_text()
    assert not (folder / f"{STEM}_interrupted.pt").exists()


def test_interrupted_again_and_again(
    uninterrupted: Path, tiny_corpus: Path, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    """Killed and resumed by ``nanothink resume``, three times in a row."""
    process = start(command(tiny_corpus, tiny_tokenizer, tmp_path))
    resume = [sys.executable, "-m", "nanothink", "resume", "--checkpoint-dir", str(tmp_path)]
    for target in (5, 15, 30):
        wait_until(lambda target=target: steps_logged(tmp_path) >= target, process)  # type: ignore[misc]
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
        assert process.returncode == 130
        process = start(resume)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert_same_run(uninterrupted, tmp_path)


def test_resuming_from_a_snapshot_begins_with_the_next_epoch(
    uninterrupted: Path, tiny_corpus: Path, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    shutil.copy(uninterrupted / f"{STEM}_epoch2.pt", tmp_path)
    said = finish([*command(tiny_corpus, tiny_tokenizer, tmp_path), "--resume"])
    assert f"Going on from {tmp_path / f'{STEM}_epoch2.pt'}: epoch 2" in said
    for n in (3, 4):
        name = f"{STEM}_epoch{n}.pt"
        assert_same(dict(read_checkpoint(uninterrupted / name)), dict(read_checkpoint(tmp_path / name)), name)


def test_a_damaged_rolling_checkpoint_is_passed_over(
    uninterrupted: Path, tiny_corpus: Path, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    shutil.copy(uninterrupted / f"{STEM}_epoch3.pt", tmp_path)
    whole = (uninterrupted / f"{STEM}_epoch4.pt").read_bytes()
    (tmp_path / f"{STEM}_interrupted.pt").write_bytes(whole[: len(whole) // 2])
    said = finish([*command(tiny_corpus, tiny_tokenizer, tmp_path), "--resume"])
    assert f"Passing over {tmp_path / f'{STEM}_interrupted.pt'}" in said
    name = f"{STEM}_epoch4.pt"
    assert_same(dict(read_checkpoint(uninterrupted / name)), dict(read_checkpoint(tmp_path / name)), name)


@pytest.fixture
def running(tiny_corpus: Path, tiny_tokenizer: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    process = start(command(tiny_corpus, tiny_tokenizer, tmp_path, max_epochs=1000))
    wait_until(lambda: steps_logged(tmp_path) >= 1, process)
    yield process
    process.kill()
    process.communicate()


def test_a_second_run_of_the_same_name_is_refused(
    running: subprocess.Popen[str], tiny_corpus: Path, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    for more in ([], ["--resume"], ["--overwrite"]):
        done = subprocess.run(
            [*command(tiny_corpus, tiny_tokenizer, tmp_path), *more],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 1
        assert str(running.pid) in done.stderr
        assert "Traceback" not in done.stderr
    assert running.poll() is None


@pytest.mark.parametrize("scan", ["plain", "auto"])
def test_the_state_space_expert_is_resumed_as_exactly(
    scan: str, tiny_corpus: Path, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    """Killed, interrupted, killed again: the same bits as without, whichever scan computes."""
    stem, whole, struck = "state_space_expert", tmp_path / "whole", tmp_path / "struck"
    scanning = ["--set", f"state_space.scan={scan}"]
    finish([*command(tiny_corpus, tiny_tokenizer, whole, kind="state_space"), *scanning])
    process = start([*command(tiny_corpus, tiny_tokenizer, struck, kind="state_space"), *scanning])
    resume = [sys.executable, "-m", "nanothink", "resume", "--checkpoint-dir", str(struck)]
    for target, sent in ((6, signal.SIGINT), (17, signal.SIGKILL), (29, signal.SIGTERM)):
        wait_until(lambda target=target: steps_logged(struck, stem) >= target, process)  # type: ignore[misc]
        process.send_signal(sent)
        process.communicate(timeout=60)
        assert process.returncode == (-signal.SIGKILL if sent is signal.SIGKILL else 130)
        process = start(resume)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert_same_run(whole, struck, stem)
    settled = read_checkpoint(struck / f"{stem}.pt")["config"]["state_space"]["scan"]
    assert settled in ({"plain"} if scan == "plain" else {"plain", "compiled", "triton"})


def test_a_scan_that_is_gone_ends_the_resume_but_not_the_model(
    tiny_corpus: Path, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    """Trained with the compiled scan, then no compiler: resuming would change bits, so it is refused."""
    if compiled.unavailable():
        pytest.skip("no compiler")
    folder = tmp_path / "checkpoints"
    finish(command(tiny_corpus, tiny_tokenizer, folder, kind="state_space", max_epochs=1))
    best = str(folder / "state_space_expert.pt")
    nanothink = [sys.executable, "-m", "nanothink"]
    bare = {**os.environ, "PATH": str(tmp_path)}
    more = [*nanothink, "resume", best, "--max-epochs", "2"]

    refused = subprocess.run(more, capture_output=True, text=True, check=False, env=bare)
    assert refused.returncode == 2
    assert "scan=compiled cannot be had here: no C++ compiler found" in refused.stderr
    assert "--set state_space.scan=auto" in refused.stderr
    used = [*nanothink, "generate", "The", "-n", "3", "--checkpoint", best]
    assert subprocess.run(used, capture_output=True, check=False, env=bare).returncode == 0
    gone_on = [*more, "--set", "state_space.scan=auto"]
    done = subprocess.run(gone_on, capture_output=True, text=True, check=False, env=bare)
    assert done.returncode == 0, done.stderr
    assert "Selective scan: plain (no compiled scan: no C++ compiler found" in done.stderr
