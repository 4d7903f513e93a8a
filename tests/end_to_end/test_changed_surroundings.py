"""What may change between the end of one process and the start of the next, and what the run makes of it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from struck_runs import Ground, assert_same_run, stem

from nanothink.vector_store.manifest import store_folder

MODEL = stem("nanothink_mla")
STOPPED = {"event": "StepDone", "having": {"step": 6}, "signals": ["SIGTERM"]}


@pytest.mark.parametrize("damage", ["none", "flipped bits"])
def test_killed_while_the_experts_states_are_written(
    damage: str, ground: Ground, uninterrupted: Callable[[str], Path], tmp_path: Path
) -> None:
    """Killed between a block and its mark; whatever is left of the states, the run ends in the same bits.

    tests/training/test_expert_states.py has every other moment and damage.
    """
    whole, all_states = uninterrupted("nanothink_mla"), ground.corpus / ".nanothink" / "states"
    shutil.rmtree(all_states)
    arguments = ground.typed("nanothink_mla", tmp_path)
    strike = {"call": "nanothink.disk.block_file:os.pwrite", "nth": 19, "signals": ["SIGKILL"]}
    assert ground.server.run(arguments, strike=strike).code == -9
    (states,) = all_states.iterdir()
    if damage == "flipped bits":
        content = bytearray((states / "states.f32").read_bytes())
        for place in range(50, len(content), 997):
            content[place] ^= 1
        (states / "states.f32").write_bytes(content)
    ended = ground.server.run([*arguments, "--resume"])
    assert ended.code == 0, ended.stderr
    assert ("damaged" in ended.stderr) == (damage == "flipped bits")
    assert_same_run(whole, tmp_path, MODEL)


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


def test_the_tokenizer_is_the_checkpoints_own(ground: Ground, tmp_path: Path) -> None:
    """Also when the folder that it came from is gone, or holds another."""
    tokenizer, whole, struck = tmp_path / "tokenizer", tmp_path / "whole", tmp_path / "struck"
    shutil.copytree(ground.tokenizer, tokenizer)

    def typed(folder: Path) -> list[str]:
        arguments = ground.typed("transformer", folder)
        arguments[arguments.index("--tokenizer") + 1] = str(tokenizer)
        return arguments

    assert ground.server.run(typed(whole)).code == 0
    assert ground.server.run(typed(struck), strike=STOPPED).code == 130
    shutil.rmtree(tokenizer)
    again = {**STOPPED, "having": {"step": 10}}
    assert ground.server.run([*typed(struck), "--resume"], strike=again).code == 130
    trained = ["--data-dir", str(ground.corpus), "--vocab-size", "270", "--out", str(tokenizer)]
    assert ground.server.run(["tokenizer", "train", *trained]).code == 0
    ended = ground.server.run([*typed(struck), "--resume"])
    assert ended.code == 0, ended.stderr
    assert_same_run(whole, struck, stem("transformer"))


def test_data_that_changed_is_said_and_trained_on(ground: Ground, tmp_path: Path) -> None:
    corpus = Path(shutil.copytree(ground.corpus, tmp_path / "corpus"))
    arguments = ground.typed("transformer", tmp_path / "checkpoints")
    arguments[arguments.index("--data-dir") + 1] = str(corpus)
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
