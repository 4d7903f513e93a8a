"""Payloads to write, and real processes to kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nanothink.checkpoints import FORMAT_VERSION, CheckpointPayload, write_checkpoint
from nanothink.checkpoints.split_record import SplitRecord
from nanothink.data.split import HeldOutText, SplitRule, TrainedText


def build_payload(seed: int = 0, **changes: Any) -> CheckpointPayload:
    """A small payload with everything a real one has; ``changes`` replace entries."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(24, 16, generator=generator)
    payload: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "kind": "transformer",
        "model_state": {"embedding.weight": weight, "head.weight": torch.randn(24, 16, generator=generator)},
        "optimizer_state": {
            "state": {0: {"step": torch.tensor(7.0), "exp_avg": torch.randn(24, 16, generator=generator)}},
            "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.95), "foreach": None, "params": [0]}],
        },
        "step": 7 + seed,
        "epoch": 2,
        "position": 224,
        "amp_scaler": None,
        "rng": {"torch": torch.arange(64, dtype=torch.uint8), "cuda": [], "python": [3, [1, 2], None]},
        "early_stopping": {"best_loss": 3.25, "evals_without_improvement": 1},
        "best_loss": 3.25,
        "config": {"model": {"d_model": 16}, "data": {"domains": ["a", "b"]}},
        "tokenizer": {"tokenizer.json": "{}"},
        "data_fingerprint": "abc",
        "split": SplitRecord(
            SplitRule(0.1), ("a", "b"), TrainedText(np.arange(3, dtype=np.uint64)), HeldOutText()
        ).to_state(),
        "run": {"name": "first", "n_skipped_steps": 0},
    }
    return {**payload, **changes}  # type: ignore[typeddict-item]


@pytest.fixture
def make_payload() -> Callable[..., CheckpointPayload]:
    return build_payload


class CrashServer:
    """One process that forks another per task, so that each is real and none pays for importing torch."""

    def __init__(self, *before: str) -> None:
        script = Path(__file__).with_name("crash_child.py")
        self._process = subprocess.Popen(
            [*before, sys.executable, str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def start(self, task: str, **arguments: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"task": task, **arguments}) + "\n")
        self._process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the child ended without an answer"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def kill(self, pid: int) -> None:
        """SIGKILL, and wait until the process is gone and reaped."""
        os.kill(pid, signal.SIGKILL)
        assert self.answer() == {"ended_by": signal.SIGKILL}

    def run(self, task: str, **arguments: Any) -> dict[str, Any]:
        """A task that answers once and then ends by itself."""
        self.start(task, **arguments)
        answer = self.answer()
        assert self.answer() == {"ended_by": 0}
        return answer

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


@pytest.fixture
def written(tmp_path: Path, make_payload: Callable[..., CheckpointPayload]) -> Path:
    """A small checkpoint."""
    path = tmp_path / "transformer_expert.pt"
    write_checkpoint(path, make_payload())
    return path


@pytest.fixture(scope="session")
def crash_server() -> Iterator[CrashServer]:
    server = CrashServer()
    yield server
    server.close()


@pytest.fixture(scope="session")
def server_in_own_mounts() -> Iterator[CrashServer]:
    """A server that may mount file systems which nobody else sees and which go with it."""
    wrapper = ("unshare", "--user", "--map-root-user", "--mount")
    try:
        usable = subprocess.run([*wrapper, "true"], capture_output=True, timeout=20).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        usable = False
    if not usable:
        pytest.skip("this machine lets no one but root's own namespace mount anything")
    server = CrashServer(*wrapper)
    yield server
    server.close()


@pytest.fixture
def published(tiny_tokenizer: Path, tmp_path: Path) -> Callable[..., tuple[Path, Any]]:
    """Writes a random model of a family as ``transformers`` does; gives its folder and the model itself."""
    import transformers
    from published_models import randomise

    from nanothink.data.tokenizer import load_tokenizer, save_tokenizer

    def write(architecture: str, padding: int = 0, **settings: Any) -> tuple[Path, Any]:
        tokenizer = load_tokenizer(str(tiny_tokenizer))
        config = getattr(transformers, f"{architecture}Config")(
            vocab_size=tokenizer.vocab_size + padding,
            bos_token_id=tokenizer.eos_id,
            eos_token_id=tokenizer.eos_id,
            pad_token_id=None,
            **settings,
        )
        name = f"{architecture}LMHeadModel" if architecture == "GPT2" else f"{architecture}ForCausalLM"
        torch.manual_seed(0)
        model = getattr(transformers, name)(config).eval()
        randomise(model)
        folder = tmp_path / "published"
        model.save_pretrained(folder)
        save_tokenizer(tokenizer, folder)
        (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
        return folder, model

    return write
