from __future__ import annotations

from pathlib import Path

import pytest

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


def test_a_file_without_an_ending_is_a_path_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "saved").touch()
    monkeypatch.chdir(tmp_path)
    assert fill_bare_resume(["--resume", "saved"]) == ["--resume", "saved"]
