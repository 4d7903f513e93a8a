"""``eval``: scores as a table and as JSON, side by side, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from small_run import SMALL, Said, as_json

import nanothink
from nanothink.checkpoints import read_checkpoint, write_checkpoint
from nanothink.cli.app import run


def test_evaluation_as_json(trained: Path, said: Said) -> None:
    path = trained / "transformer_expert.pt"
    assert run(["eval", str(path), str(path), "--json"]) == 0
    one, two = as_json(said)["checkpoints"]
    assert two.pop("above_best") == {"bits_per_byte": 0.0, "bits_per_byte_stderr": 0.0}
    assert one.pop("above_best") is None
    assert one == two
    assert (one["path"], one["kind"]) == (str(path), "transformer")
    assert set(one["domains"]) == {"letters", "manuals", "tales"}
    for scores in (one["overall"], *one["domains"].values()):
        assert set(scores) == {
            "loss",
            "perplexity",
            "bits_per_byte",
            "bits_per_byte_stderr",
            "tokens",
            "bytes",
        }
        assert 0 < scores["bits_per_byte_stderr"] < scores["bits_per_byte"]
    assert one["overall"]["tokens"] == sum(d["tokens"] for d in one["domains"].values())


def test_how_far_each_is_above_the_best(trained: Path, copied: Path, said: Said) -> None:
    """With an error by pairs, far below that of either."""
    worse = copied / "worse_expert.pt"
    payload = read_checkpoint(copied / "transformer_expert.pt")
    payload["model_state"] = {k: v * 1.01 for k, v in payload["model_state"].items()}
    write_checkpoint(worse, payload)
    paths = [str(worse), str(trained / "transformer_expert.pt")]
    assert run(["eval", *paths, "--json"]) == 0
    checkpoints = as_json(said)["checkpoints"]
    bits = [checkpoint["overall"]["bits_per_byte"] for checkpoint in checkpoints]
    best = bits.index(min(bits))
    assert checkpoints[best]["above_best"] is None
    above = checkpoints[1 - best]["above_best"]
    assert above["bits_per_byte"] == pytest.approx(bits[1 - best] - bits[best], rel=1e-6)
    assert 0 < above["bits_per_byte_stderr"] < checkpoints[0]["overall"]["bits_per_byte_stderr"] / 2
    assert run(["eval", *paths]) == 0
    assert f"{above['bits_per_byte']:.4f} ± {above['bits_per_byte_stderr']:.4f}" in said()[0]
    assert run(["eval", paths[0]]) == 0
    assert f"{checkpoints[0]['overall']['bits_per_byte_stderr']:.4f}" in said()[0]


def test_the_newest_sound_checkpoint_is_taken(copied: Path, said: Said) -> None:
    other = copied / "other_expert.pt"
    shutil.copy(copied / "transformer_expert.pt", other)
    for when, path in enumerate((copied / "transformer_expert.pt", other), start=1_700_000_000):
        os.utime(path, (when, when))
    asked = ["generate", "The", "-n", "1", "--checkpoint-dir", str(copied), "--json"]
    assert run(asked) == 0
    assert as_json(said)["checkpoint"] == str(other)
    other.write_bytes(other.read_bytes()[:-1000])
    os.utime(other, (1_700_000_009, 1_700_000_009))
    assert run(asked) == 0
    out, noted = said()
    assert json.loads(out)["checkpoint"] == str(copied / "transformer_expert.pt")
    assert f"Passing over {other}" in noted


@pytest.mark.parametrize(
    ("asked", "wanted"),
    [
        (["--denoise"], "diffuser in {}. Train one (`nanothink "),
        (["--ddim-steps", "2"], "diffuser in {}. Train one (`nanothink "),
        (["--show-routing"], "nanothink_mla in {}. Train one (`nanothink train-mla"),
    ],
)
def test_what_only_one_kind_can_do_looks_for_that_kind(
    asked: list[str], wanted: str, trained: Path, said: Said
) -> None:
    """Here is a transformer alone; with a diffuser beside it see test_diffuser.py."""
    assert run(["generate", "The", *asked, "--checkpoint-dir", str(trained)]) == 1
    assert "No trained " + wanted.format(trained) in " ".join(said()[1].split())


def test_the_parts_of_the_split_add_up(trained: Path, said: Said) -> None:
    path, sizes = trained / "transformer_expert.pt", {}
    for split in ("train", "val", "all"):
        assert run(["eval", str(path), "--json", "--split", split, "--allow-seen"]) == 0
        sizes[split] = as_json(said)["checkpoints"][0]["overall"]
    for unit in ("tokens", "bytes"):
        assert sizes["train"][unit] + sizes["val"][unit] == sizes["all"][unit]


def test_all_of_a_text_is_scored_as_it_stands(trained: Path, tmp_path: Path, said: Said) -> None:
    """A domain of one text is cut for training; to score all of it, it must not be."""
    texts = {"one": ["Der Garten blüht. " * 9], "two": ["first text", "second", "third one"], "short": ["é"]}
    for domain, own in texts.items():
        (tmp_path / "held" / domain).mkdir(parents=True)
        lines = "".join(json.dumps({"text": text}) + "\n" for text in own)
        (tmp_path / "held" / domain / "a.jsonl").write_text(lines)
    command = ["eval", str(trained / "transformer_expert.pt"), "--data-dir", str(tmp_path / "held"), "--json"]
    assert run([*command, "--split", "all"]) == 0
    scored = as_json(said)["checkpoints"][0]["domains"]
    model = nanothink.load(trained / "transformer_expert.pt")
    eos, length = model.tokenizer.eos_id, model.config.model.max_seq_len
    for domain, own in texts.items():
        stream = [eos, *(t for text in own for t in [*model.tokenizer.encode(text), eos])]
        nats = 0.0
        for start in range(0, len(stream) - 1, length):
            block = torch.tensor(stream[start : start + length + 1])
            log_p = model.logits(block[None, :-1])[0].double().log_softmax(-1)
            nats -= float(log_p.gather(1, block[1:, None]).sum())
        n_bytes = sum(len(text.encode()) for text in own)
        assert (scored[domain]["tokens"], scored[domain]["bytes"]) == (len(stream) - 1, n_bytes)
        assert scored[domain]["bits_per_byte"] == pytest.approx(nats / np.log(2) / n_bytes, rel=1e-5)
    assert run([*command, "--split", "all", "--domains", "two", "--max-tokens", "1"]) == 0
    assert as_json(said)["checkpoints"][0]["overall"]["bytes"] in map(len, texts["two"])
    assert run([*command, "--domains", "two"]) == 0
    assert "--split all scores all of it" in " ".join(said()[1].split())


def test_checkpoints_side_by_side_are_scored_on_the_same_text(
    trained: Path, pretrain: Callable[..., int], tmp_path: Path, said: Said
) -> None:
    """Also where they held out different fractions: on what was held out from all of them."""
    assert pretrain(tmp_path, "--max-steps", "1", "--set", "data.val_split=0.4") == 0
    paths = [str(folder / "transformer_expert.pt") for folder in (trained, tmp_path)]
    said()
    for split in ("val", "train"):
        told = ["--split", split, *(["--allow-seen"] if split == "train" else [])]
        assert run(["eval", *paths, *told, "--json"]) == 0
        printed, spoken = said()
        first, second = json.loads(printed)["checkpoints"]
        assert first["overall"]["bytes"] == second["overall"]["bytes"]
        assert ("held out different fractions" in spoken) == (split == "val")
        alone = 0 if split == "val" else 1
        assert run(["eval", paths[alone], *told, "--json"]) == 0
        assert as_json(said)["checkpoints"][0]["overall"]["bytes"] == first["overall"]["bytes"]


def test_perplexities_of_two_tokenizers_are_not_to_be_compared(
    trained: Path, tiny_corpus: Path, tmp_path: Path, said: Said
) -> None:
    data, tokenizer = ("--data-dir", str(tiny_corpus)), str(tmp_path / "tokenizer")
    assert run(["tokenizer", "train", *data, "--vocab-size", "270", "--out", tokenizer]) == 0
    where = ("--tokenizer", tokenizer, "--checkpoint-dir", str(tmp_path))
    assert run(["pretrain", "transformer", *data, *where, *SMALL, "--max-steps", "1"]) == 0
    paths = [str(folder / "transformer_expert.pt") for folder in (trained, tmp_path)]
    said()
    assert run(["eval", *paths]) == 0
    assert "have different tokenizers" in said()[1]
    assert run(["eval", paths[0], paths[0]]) == 0
    assert "have different tokenizers" not in said()[1]


def test_evaluation_says_what_training_said(trained: Path, said: Said) -> None:
    assert run(["eval", "--checkpoint-dir", str(trained), "--json"]) == 0
    evaluated = as_json(said)["checkpoints"][0]["overall"]["loss"]
    lines = (trained / "runs" / "transformer_expert" / "metrics.jsonl").read_text().splitlines()
    assert evaluated == pytest.approx(json.loads(lines[-1])["loss"], rel=1e-6)


def test_evaluation_as_a_table(trained: Path, said: Said) -> None:
    path = str(trained / "transformer_expert.pt")
    assert run(["eval", path]) == 0
    single = said()[0]
    assert "bits per byte" in single
    assert "tales" in single
    assert run(["eval", path, path, "--domains", "tales"]) == 0
    several = said()[0]
    assert several.count("transformer_expert.pt") == 2
    assert "letters" not in several
