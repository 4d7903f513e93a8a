"""Running out of memory ends a command with one clear error, however Python or PyTorch says it."""

from __future__ import annotations

import pytest

from nanothink.cli import app

SAID_BY_LIBRARIES = [
    MemoryError(),
    RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:75] DefaultCPUAllocator: not enough memory"),
    RuntimeError("std::bad_alloc"),
]


@pytest.mark.parametrize("raised", SAID_BY_LIBRARIES, ids=str)
@pytest.mark.parametrize(
    ("command", "remedy"),
    [
        (
            ["pretrain", "transformer"],
            "Lower train_expert.batch_size and raise",
        ),
        (["resume"], "Lower train_expert.batch_size"),
        (["eval"], "End other programs, or ask for less at a time"),
    ],
)
def test_lack_of_memory_is_one_error_that_says_what_to_do(
    raised: Exception,
    command: list[str],
    remedy: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def exhaust(**_: object) -> None:
        raise raised

    monkeypatch.setattr(app, "command_tree", lambda: exhaust)
    assert app.run(command) == 1
    said, out = capsys.readouterr().err, capsys.readouterr().out
    assert said.startswith("error: Out of memory. ")
    assert remedy in " ".join(said.split())
    assert "Traceback" not in said
    assert out == ""


def test_any_other_failure_of_a_library_stays_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: object) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(app, "command_tree", lambda: fail)
    with pytest.raises(RuntimeError, match="shapes"):
        app.run(["eval"])
