"""What the tests with struck processes share: one server of commands, one ground, finished runs."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
from struck_runs import CommandServer, Ground


@pytest.fixture(scope="session")
def server() -> Iterator[CommandServer]:
    server = CommandServer()
    yield server
    server.close()


@pytest.fixture(scope="session")
def ground(server: CommandServer, tmp_path_factory: pytest.TempPathFactory) -> Ground:
    return Ground.make(server, tmp_path_factory.mktemp("ground"))


@pytest.fixture(scope="session")
def uninterrupted(ground: Ground, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of the run of a kind that was never interrupted. Read only."""

    @cache
    def folder_of(kind: str) -> Path:
        folder = tmp_path_factory.mktemp(f"uninterrupted-{kind}")
        ended = ground.server.run(ground.typed(kind, folder))
        assert ended.code == 0, ended.stderr
        return folder

    return folder_of


@pytest.fixture(scope="session")
def own_disks() -> None:
    """Skips where no process may have a file system of its own."""
    wrapper = ("unshare", "--user", "--map-root-user", "--mount", "true")
    try:
        usable = subprocess.run(wrapper, capture_output=True, timeout=20).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        usable = False
    if not usable:
        pytest.skip("this machine lets no one but root's own namespace mount anything")


@pytest.fixture(scope="session")
def experts(tiny_corpus: Path, tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one of each kind. Read only: copy it to change it."""
    from combined_runs import KINDS, pretrain

    folder = tmp_path_factory.mktemp("experts")
    for kind in KINDS:
        pretrain(tiny_corpus, tiny_tokenizer, folder, kind)
    return folder
