"""A bare machine: no compiler, no GPU, no FAISS, no terminal, no home folder, no network, read-only data."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SMALL = [
    *("--set", "model.d_model=24", "--set", "model.max_seq_len=16", "--set", "state_space.n_layers=1"),
    *("--set", "train_expert.batch_size=2", "--set", "train_expert.eval_max_tokens=64"),
    *("--set", "train_expert.sample_tokens=2", "--max-steps", "1"),
]
BLOCKED = ("faiss", "pyarrow", "datasets", "triton", "matplotlib")


@pytest.fixture
def bare(tmp_path: Path) -> dict[str, str]:
    """An environment with as little in it as there can be."""
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    for name in BLOCKED:
        (blocked / f"{name}.py").write_text("raise ImportError('not on this machine')\n")
    kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    package = Path(__file__).parents[2]
    return kept | {
        "PATH": "/nowhere",
        "TERM": "dumb",
        "PYTHONPATH": f"{blocked}:{package}",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "XDG_CACHE_HOME": "/proc/nowhere",
        "PYTHONIOENCODING": "ascii",
    }


def test_everything_missing_at_once(
    bare: dict[str, str], tiny_corpus: Path, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    def call(*command: str | Path) -> subprocess.CompletedProcess[str]:
        ended = subprocess.run(
            [sys.executable, "-m", "nanothink", *map(str, command)],
            env=bare,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        assert ended.returncode == 0, ended.stderr
        said = ended.stderr if command[0] == "generate" else ended.stdout + ended.stderr
        assert "\x1b" not in said
        assert said.isascii()
        return ended

    where = ("--data-dir", tiny_corpus, "--checkpoint-dir", tmp_path / "checkpoints")
    trained = call("pretrain", "state_space", *where, "--tokenizer", tiny_tokenizer, *SMALL)
    assert "no C++ compiler found" in trained.stderr
    path = tmp_path / "checkpoints" / "state_space_expert.pt"
    assert call("generate", "hello", "-n", "2", "--checkpoint", path).stdout.startswith("hello")
