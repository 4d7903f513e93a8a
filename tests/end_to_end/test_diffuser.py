"""The diffuser as a person uses it: refused or trained, gone on with, used without its transformer."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from struck_runs import metrics

import nanothink
from nanothink.checkpoints.file import read_checkpoint
from nanothink.cli.app import run
from nanothink.errors import UsageError

STEM = "diffuser_expert"
SHAPE = {
    "model.d_model": 32,
    "model.max_seq_len": 32,
    "transformer.n_layers": 1,
    "transformer.n_heads": 2,
    "diffuser.n_layers": 1,
    "diffuser.training_steps": 20,
    "train_expert.batch_size": 4,
    "train_expert.sample_tokens": 0,
    "train_expert.amp_dtype": "float32",
    "train_diffuser.batch_size": 4,
    "train_diffuser.grad_accum_steps": 2,
    "train_diffuser.warmup_steps": 5,
    "train_diffuser.lr": 5e-4,
    "train_diffuser.sample_tokens": 4,
    "train_diffuser.amp_dtype": "float32",
    "train_diffuser.log_every_steps": 1,
    "train_diffuser.eval_every_steps": 12,
    "train_diffuser.eval_max_tokens": 200,
}
N_STEPS = 36


def settings(**changed: Any) -> list[str]:
    values = SHAPE | {name.replace("__", "."): value for name, value in changed.items()}
    return [part for name, value in values.items() for part in ("--set", f"{name}={value}")]


@pytest.fixture(scope="module")
def transformer(tiny_corpus: Path, tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a transformer trained for a few steps. Read only: copy it to change it."""
    folder = tmp_path_factory.mktemp("transformer")
    where = ("--data-dir", tiny_corpus, "--tokenizer", tiny_tokenizer, "--checkpoint-dir", folder)
    assert run(["pretrain", "transformer", *map(str, where), *settings(), "--max-steps", "30"]) == 0
    return folder / "transformer_expert.pt"


@pytest.fixture(scope="module")
def arguments(tiny_corpus: Path, transformer: Path) -> Callable[..., list[str]]:
    """What to type to train a diffuser into a folder."""

    def typed(folder: Path, *more: str | Path, **changed: Any) -> list[str]:
        where = ("--data-dir", tiny_corpus, "--checkpoint-dir", folder, "--transformer", transformer)
        steps = ("--max-steps", N_STEPS)
        return ["pretrain", "diffuser", *map(str, (*where, *steps)), *settings(**changed), *map(str, more)]

    return typed


@pytest.fixture(scope="module")
def trained(
    arguments: Callable[..., list[str]], transformer: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder of a run that was never interrupted. Its transformer is the same to the byte afterwards."""
    folder, before = tmp_path_factory.mktemp("diffuser"), transformer.read_bytes()
    assert run(arguments(folder)) == 0
    assert transformer.read_bytes() == before
    return folder


# ---------------------------------------------------------------------------------------------------
# Going on


def test_with_hidden_states_as_targets_it_goes_on_with_the_same_transformer_only(
    arguments: Callable[..., list[str]],
    transformer: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    own = tmp_path / "transformer_expert.pt"
    shutil.copy(transformer, own)
    more = {"diffuser__target": "hidden_state", "train_diffuser__sample_tokens": 0}
    assert run([*arguments(tmp_path, "--transformer", own, **more), "--max-steps", "6"]) == 0
    path = str(tmp_path / f"{STEM}.pt")
    payload = read_checkpoint(own)
    next(iter(payload["model_state"].values())).add_(1.0)
    from nanothink.checkpoints import write_checkpoint

    write_checkpoint(own, payload)
    capsys.readouterr()
    assert run(["resume", path, "--max-steps", "8"]) == 1
    assert "was trained against another transformer" in " ".join(capsys.readouterr().err.split())
    shutil.copy(transformer, own)
    assert run(["resume", path, "--max-steps", "8"]) == 0
    assert read_checkpoint(Path(path))["step"] >= 6


# ---------------------------------------------------------------------------------------------------
# What it learns from


def refused(capsys: pytest.CaptureFixture[str], typed: list[str]) -> str:
    assert run(typed) == 1
    return " ".join(capsys.readouterr().err.split())


def test_a_missing_transformer_is_refused_with_the_command_to_run(
    tiny_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--data-dir", str(tiny_corpus), "--checkpoint-dir", str(tmp_path)]
    said = refused(capsys, ["pretrain", "diffuser", *where, *settings()])
    assert f"{tmp_path / 'transformer_expert.pt'} is not there" in said
    assert f"`nanothink pretrain transformer --data-dir {tiny_corpus} --checkpoint-dir {tmp_path}" in said
    assert "--set model.d_model=32" in said
    assert not list(tmp_path.glob("*.pt"))


def test_another_width_is_refused_with_the_command_to_run(
    arguments: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, arguments(tmp_path, model__d_model=48))
    assert "has width 32, and this one would have 48" in said
    assert re.search("Give it the same: `nanothink pretrain diffuser .*--set model.d_model=32", said)


def test_another_tokenizer_is_refused_with_the_command_to_run(
    arguments: Callable[..., list[str]],
    tiny_corpus: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = str(tmp_path / "other")
    typed = ["--data-dir", str(tiny_corpus), "--vocab-size", "270", "--out", other]
    assert run(["tokenizer", "train", *typed]) == 0
    capsys.readouterr()
    said = refused(capsys, arguments(tmp_path, "--tokenizer", other))
    assert "not with" in said
    assert "Leave --tokenizer out" in said
    assert f"nanothink pretrain transformer --tokenizer {other}" in said


def test_a_checkpoint_of_another_kind_is_refused(
    arguments: Callable[..., list[str]], trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, arguments(tmp_path, "--transformer", trained / f"{STEM}.pt"))
    assert "holds a diffuser, and a diffuser learns from a transformer" in said
    assert run(["pretrain", "transformer", "--transformer", "x.pt"]) == 2


def test_the_transformer_is_found_beside_it_and_lends_its_tokenizer(
    tiny_corpus: Path, transformer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(transformer, tmp_path)
    where = ["--data-dir", str(tiny_corpus), "--checkpoint-dir", str(tmp_path), "--seed", "7"]
    assert run(["pretrain", "diffuser", *where, *settings(), "--max-epochs", "3", "--dry-run", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["epochs"] == pytest.approx(3, abs=0.2)
    assert run(["pretrain", "diffuser", *where, *settings(), "--max-steps", "2"]) == 0
    made, theirs = (read_checkpoint(tmp_path / f"{kind}_expert.pt") for kind in ("diffuser", "transformer"))
    assert made["tokenizer"] == theirs["tokenizer"]
    assert made["config"]["data"]["tokenizer"] == theirs["config"]["data"]["tokenizer"]
    assert made["config"]["train_diffuser"]["seed"] == 7
    assert made["config"]["train_expert"]["seed"] == 42
    assert made["step"] == 2


# ---------------------------------------------------------------------------------------------------
# A language model, and a diffusion model, without its transformer


@pytest.fixture
def alone(trained: Path, tmp_path: Path) -> Path:
    """Its checkpoint in a folder of its own."""
    return Path(shutil.copy(trained / f"{STEM}.pt", tmp_path))


def test_records_show_what_the_loss_is_made_of_and_the_error_by_noise_level(trained: Path) -> None:
    entries = metrics(trained, STEM)
    steps = [e for e in entries if e["event"] == "train"]
    assert len(steps) == N_STEPS
    for e in steps:
        made_of = e["mse_pure"] + e["mse_noised"] + e["cross_entropy"] + e["rounding"] / 4
        assert e["loss"] == pytest.approx(made_of, rel=1e-5)
    validations = [e for e in entries if e["event"] == "validation"]
    assert len(validations) >= 3
    first, last = validations[0]["denoising_mse"], validations[-1]["denoising_mse"]
    assert list(first) == ["1", "2", "5", "10", "15", "18", "20"]
    assert sum(last.values()) < sum(first.values())
    assert validations[-1]["loss"] < validations[0]["loss"]


def test_it_is_loaded_scored_and_trained_on_by_itself(
    alone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = nanothink.load(alone)
    assert model.kind == "diffuser"
    assert model.notes == ()
    x = torch.tensor([model.tokenizer.encode("time light stone water")])
    logits = model.logits(x)
    assert logits.shape == (*x.shape, model.tokenizer.vocab_size)
    assert run(["eval", str(alone), "--json"]) == 0
    (scored,) = json.loads(capsys.readouterr().out)["checkpoints"]
    assert scored["overall"]["loss"] < torch.tensor(model.tokenizer.vocab_size).log()
    assert scored["denoising_mse"]["1"] < scored["denoising_mse"]["20"]
    assert run(["resume", str(alone), "--max-steps", str(N_STEPS + 2)]) == 0


def test_it_writes_by_its_head_and_by_ddim(alone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = nanothink.load(alone)
    told: dict[str, Any] = {"max_new_tokens": 30, "seed": 3}
    by_head = model.generate("time light", **told)
    assert by_head == model.generate("time light", **told)
    by_ddim = {n: model.generate("time light", ddim_steps=n, **told) for n in (1, 5, 20)}
    assert by_ddim[5] == model.generate("time light", ddim_steps=5, **told)
    assert len({by_head, *by_ddim.values()}) > 1
    assert by_ddim[5] == model.generate("time light", ddim_steps=5, temperature=0, **told)
    together = model.generate(["a garden", "time light"], ddim_steps=5, max_new_tokens=30, seed=2)
    assert together[1] == by_ddim[5]  # row 1 has seed 2 + 1
    assert model.generate("time light", ddim_steps=0, **told) == model.generate(
        "time light", ddim_steps=10, **told
    )
    with pytest.raises(UsageError, match="DDIM in 21 steps"):
        model.generate("time", ddim_steps=21)
    typed = ["generate", "time light", "-c", str(alone), "-n", "30", "--seed", "3", "--json"]
    for more, expected in (([], by_head), (["--ddim-steps", "5"], by_ddim[5])):
        capsys.readouterr()
        assert run([*typed, *more]) == 0
        assert json.loads(capsys.readouterr().out)["samples"][0]["text"] == expected


def test_a_passage_is_rebuilt_from_noise(
    alone: Path, transformer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    passage = "the morning of the river was a question of light"
    assert run(["generate", "--denoise", passage, "-c", str(alone), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [entry["level"] for entry in found["levels"]] == [1, 2, 5, 10, 15, 18, 20]
    assert all(0 <= entry["right"] <= 1 for entry in found["levels"])
    model = nanothink.load(alone)
    last = model.denoise(passage, [20], ddim_steps=1)[0]
    tokens = torch.tensor([model.tokenizer.encode(passage)])
    assert len(last.tokens) == tokens.shape[1] - 1
    assert run(["generate", "--denoise", passage, "--level", "3", "-c", str(alone)]) == 0
    assert "level 3: " in capsys.readouterr().out
    for typed in (
        ["generate", "--denoise", "-c", str(alone)],
        ["generate", "--denoise", passage, "--level", "21", "-c", str(alone)],
        ["generate", "--denoise", passage, "-c", str(transformer)],
        ["generate", passage, "--ddim", "-c", str(transformer)],
        ["generate", passage, "--level", "3", "-c", str(alone)],
    ):
        assert run(typed) == 2


@pytest.mark.parametrize("asked", [["--denoise"], ["--ddim"], ["--ddim-steps", "2"]])
def test_what_a_diffuser_alone_can_do_is_asked_of_it_though_another_is_newer(
    asked: list[str], trained: Path, transformer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(trained / f"{STEM}.pt", tmp_path)
    newer = Path(shutil.copy(transformer, tmp_path))
    os.utime(newer, (4e9, 4e9))
    where = ["--checkpoint-dir", str(tmp_path), "--json", "-n", "2"]
    assert run(["generate", "the morning", *where]) == 0
    assert json.loads(capsys.readouterr().out)["checkpoint"] == str(newer)
    assert run(["generate", "the morning", *asked, *where]) == 0
    assert json.loads(capsys.readouterr().out)["checkpoint"] == str(tmp_path / f"{STEM}.pt")
