"""One small trained model, for all tests of the commands."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from small_run import SMALL, Said

from nanothink.cli.app import run


@pytest.fixture(scope="session")
def pretrain(tiny_corpus: Path, tiny_tokenizer: Path) -> Callable[..., int]:
    def call(folder: Path, *more: str | Path, data: Path = tiny_corpus) -> int:
        known = ("--data-dir", data, "--tokenizer", tiny_tokenizer, "--checkpoint-dir", folder)
        return run(["pretrain", "transformer", *map(str, known), *SMALL, *map(str, more)])

    return call


@pytest.fixture(scope="session")
def trained(pretrain: Callable[..., int], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model trained for 20 steps. Read only: copy it to change it."""
    folder = tmp_path_factory.mktemp("trained")
    assert pretrain(folder, "--max-steps", "20") == 0
    return folder


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Said:
    return lambda: tuple(capsys.readouterr())  # type: ignore[return-value]
