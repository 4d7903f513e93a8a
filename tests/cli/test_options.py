from __future__ import annotations

import os
from pathlib import Path

import pytest

from nanothink.cli.app import run
from nanothink.cli.options import fill_bare_resume


@pytest.mark.parametrize(
    ("typed", "parsed"),
    [
        ("transformer --resume", "transformer --resume newest"),
        ("transformer --resume --max-steps 5", "transformer --resume newest --max-steps 5"),
        ("--resume transformer", "--resume newest transformer"),
        ("transformer --resume some/where.pt", "transformer --resume some/where.pt"),
        ("transformer --resume where.pt --seed 1", "transformer --resume where.pt --seed 1"),
        ("transformer --resume=where", "transformer --resume=where"),
        ("transformer --resume newest", "transformer --resume newest"),
        ("transformer --name x --resume -n", "transformer --name x --resume newest -n"),
        ("-- --resume", "-- --resume"),
        ("transformer", "transformer"),
    ],
)
def test_resume_may_stand_bare(typed: str, parsed: str) -> None:
    assert fill_bare_resume(typed.split()) == parsed.split()


@pytest.mark.parametrize("word", ["where", "where.pt"])
def test_a_word_that_may_not_be_looked_at_is_no_folder(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a folder of somebody else's; pathlib raises there."""

    def refuse(path: object, *more: object, **options: object) -> os.stat_result:
        if os.fspath(path) == word:  # type: ignore[call-overload]
            raise PermissionError(13, "Permission denied", word)
        return really(path, *more, **options)  # type: ignore[arg-type]

    really = os.stat
    monkeypatch.setattr(os, "stat", refuse)
    parsed = fill_bare_resume(["transformer", "--resume", word])
    assert parsed == ["transformer", "--resume", word]


def test_a_file_without_an_ending_is_a_path_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "saved").touch()
    monkeypatch.chdir(tmp_path)
    assert fill_bare_resume(["--resume", "saved"]) == ["--resume", "saved"]


def test_a_word_beside_the_kind_is_the_checkpoint() -> None:
    assert fill_bare_resume(["transformer", "--resume", "where"]) == ["transformer", "--resume", "where"]
    assert fill_bare_resume(["--resume", "where", "state-space"]) == ["--resume", "where", "state-space"]
    assert fill_bare_resume(["--resume", "where"], takes_kind=False) == ["--resume", "where"]


@pytest.mark.parametrize(
    "typed",
    [
        "pretrain transformer --resume kept",
        "pretrain --resume=kept diffuser",
        "train-mla --resume kept",
        "resume kept",
    ],
)
def test_a_folder_to_resume_from_is_one_clear_error(
    typed: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "kept").mkdir()
    monkeypatch.chdir(tmp_path)
    assert run(typed.split()) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "error: kept: is a folder; give one of the checkpoints in it." in err
    assert err.endswith(
        "To resume the latest run in it, name no checkpoint, and the folder by --checkpoint-dir kept\n"
    )
