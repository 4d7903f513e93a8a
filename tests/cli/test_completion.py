"""What Tab offers, asked for as bash asks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from nanothink.cli import app


def _offered(cwd: Path, *words: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-m", "nanothink"],
        cwd=cwd,
        env={
            "COMP_WORDS": "\n".join(["nanothink", *words]),
            "COMP_CWORD": str(len(words)),
            "_NANOTHINK_COMPLETE": "complete_bash",
            "PYTHONPATH": ":".join(sys.path),
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.stderr == ""
    return done.stdout.split()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A working folder with two domains, two checkpoints and a run."""
    for folder in ("data/code", "data/tales", "data/.nanothink", "checkpoints/runs/mine_expert", "other"):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("checkpoints/mine_expert.pt", "checkpoints/.mine_expert.lock", "other/yours_expert.pt"):
        (tmp_path / file).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("pretr", ["pretrain"]),
        ("pretrain st", ["state_space"]),
        ("pretrain transformer --preset t", ["tiny"]),
        ("pretrain transformer --domains ", ["code", "tales"]),
        ("pretrain transformer --domains code,", ["code,tales"]),
        ("pretrain transformer --data-dir nowhere --domains ", []),
        ("eval ch", ["checkpoints/mine_expert.pt"]),
        ("eval other/y", ["other/yours_expert.pt"]),
        ("generate -c other/", ["other/yours_expert.pt"]),
        ("eval --split v", ["val"]),
        ("report ", ["mine_expert"]),
        ("config show va", []),
        ("config show vec", ["vector_store"]),
        ("pretrain transformer --set model.d", ["model.d_model="]),
        ("data validate --checkpoint-dir x --domains ", ["code", "tales"]),
    ],
)
def test_tab_offers(place: Path, typed: str, offered: list[str]) -> None:
    assert _offered(place, *typed.split(" ")) == offered


def test_nothing_is_said_about_a_line_that_is_being_typed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C while the shell waits for an answer."""

    def interrupted(**_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(app, "command_tree", lambda: interrupted)
    assert app.run([]) == 130
    assert "Interrupted" in capsys.readouterr().err
    monkeypatch.setenv("_NANOTHINK_COMPLETE", "complete_bash")
    assert app.run([]) == 130
    assert capsys.readouterr().err == ""
