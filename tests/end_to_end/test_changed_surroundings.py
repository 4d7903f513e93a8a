"""What may change between the end of one process and the start of the next, and what the run makes of it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from struck_runs import Ground, assert_same_run, stem

from nanothink.vector_store.store import store_folder

MODEL = stem("nanothink_mla")
STOPPED = {"event": "StepDone", "having": {"step": 6}, "signals": ["SIGTERM"]}


def of_another_corpus(arguments: list[str], corpus: Path) -> list[str]:
    arguments = list(arguments)
    arguments[arguments.index("--data-dir") + 1] = str(corpus)
    return arguments


@pytest.fixture
def corpus(ground: Ground, tmp_path: Path) -> Path:
    """A copy of the corpus of which nothing was tokenised and no expert's state is known."""
    folder = tmp_path / "corpus"
    return Path(shutil.copytree(ground.corpus, folder, ignore=shutil.ignore_patterns(".nanothink")))


@pytest.mark.parametrize(
    ("moment", "damage"),
    [
        ("before a block", None),
        ("between a block and its mark", None),
        ("between a block and its mark", "flipped"),
        ("before a block", "cut"),
        ("before a block", "gone"),
    ],
)
def test_killed_while_the_experts_states_are_written(
    moment: str, damage: str | None, ground: Ground, corpus: Path, tmp_path: Path
) -> None:
    """NanoThink keeps them in its first epoch; whatever is left of them, the run ends in the same bits."""
    calls = {"before a block": "BlockFile.write", "between a block and its mark": "os.pwrite"}
    struck, whole = tmp_path / "struck", tmp_path / "whole"
    arguments = of_another_corpus(ground.typed("nanothink_mla", struck), corpus)
    strike = {"call": f"nanothink.disk.block_file:{calls[moment]}", "nth": 19, "signals": ["SIGKILL"]}
    assert ground.server.run(arguments, strike=strike).code == -9
    (states,) = (corpus / ".nanothink" / "states").iterdir()
    if damage == "flipped":
        content = bytearray((states / "states.f32").read_bytes())
        for place in range(50, len(content), 997):
            content[place] ^= 1
        (states / "states.f32").write_bytes(content)
    elif damage == "cut":
        os.truncate(states / "states.f32", 5000)
    elif damage == "gone":
        (states / "marks.u64").unlink()
    ended = ground.server.run([*arguments, "--resume"])
    assert ended.code == 0, ended.stderr
    assert ("damaged" in ended.stderr) == (damage is not None)
    shutil.rmtree(corpus / ".nanothink" / "states")
    assert ground.server.run(of_another_corpus(ground.typed("nanothink_mla", whole), corpus)).code == 0
    assert_same_run(whole, struck, MODEL)


def test_a_folder_of_checkpoints_that_moved_and_lost_its_times(
    ground: Ground, uninterrupted: Callable[[str], Path], tmp_path: Path
) -> None:
    there, here = tmp_path / "there", tmp_path / "far" / "away" / "here"
    assert ground.server.run(ground.typed("transformer", there), strike=STOPPED).code == 130
    here.parent.mkdir(parents=True)
    there.rename(here)
    for n, path in enumerate(here.rglob("*")):  # a copy from elsewhere, or a clock that jumped
        os.utime(path, (n % 2 * 4e9, n % 2 * 4e9))
    ended = ground.server.run(["resume", "--checkpoint-dir", str(here)])
    assert ended.code == 0, ended.stderr
    assert_same_run(uninterrupted("transformer"), here, stem("transformer"))
    assert not there.exists()


def test_a_vector_store_moves_with_its_checkpoints(ground: Ground, tmp_path: Path) -> None:
    whole, there, here = tmp_path / "whole", tmp_path / "there", tmp_path / "here"
    source = ["--use-vector-store", "--set", "vector_store.n_neighbours=4"]
    assert ground.server.run([*ground.typed("nanothink_mla", whole), *source]).code == 0
    struck = ground.server.run([*ground.typed("nanothink_mla", there), *source], strike=STOPPED)
    assert struck.code == 130
    there.rename(here)
    before = sorted(path.name for path in store_folder(here, MODEL).iterdir())
    ended = ground.server.run(["resume", "--checkpoint-dir", str(here)])
    assert ended.code == 0, ended.stderr
    assert "Building the vector store" not in ended.stderr
    assert "Looking up" not in ended.stderr
    assert sorted(path.name for path in store_folder(here, MODEL).iterdir()) == before
    assert_same_run(whole, here, MODEL)


@pytest.mark.parametrize("change", ["gone", "another"])
def test_the_tokenizer_is_the_checkpoints_own(change: str, ground: Ground, tmp_path: Path) -> None:
    tokenizer, whole, struck = tmp_path / "tokenizer", tmp_path / "whole", tmp_path / "struck"
    shutil.copytree(ground.tokenizer, tokenizer)

    def typed(folder: Path) -> list[str]:
        arguments = ground.typed("transformer", folder)
        arguments[arguments.index("--tokenizer") + 1] = str(tokenizer)
        return arguments

    assert ground.server.run(typed(whole)).code == 0
    assert ground.server.run(typed(struck), strike=STOPPED).code == 130
    shutil.rmtree(tokenizer)
    if change == "another":
        trained = ["--data-dir", str(ground.corpus), "--vocab-size", "270", "--out", str(tokenizer)]
        assert ground.server.run(["tokenizer", "train", *trained]).code == 0
    ended = ground.server.run([*typed(struck), "--resume"])
    assert ended.code == 0, ended.stderr
    assert_same_run(whole, struck, stem("transformer"))


def test_data_that_changed_is_said_and_trained_on(ground: Ground, corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    arguments = of_another_corpus(ground.typed("transformer", folder), corpus)
    assert ground.server.run(arguments, strike=STOPPED).code == 130
    with open(corpus / "tales" / "texts.jsonl", "a") as file:
        file.write('{"text": "' + "a tale of stone and water " * 20 + '"}\n')
    ended = ground.server.run([*arguments, "--resume"])
    assert ended.code == 0, ended.stderr
    assert "The training data is not what this run began with" in " ".join(ended.stderr.split())
    assert "Resuming from" in ended.stderr
    with open(corpus / "tales" / "texts.jsonl", "a") as file:
        file.write("no record\n")
    ended = ground.server.run([*arguments, "--resume", "--max-epochs", "3"])
    assert ended.code == 1
    assert "texts.jsonl:6:1" in ended.stderr
