"""The commands as a person and a script use them, on one small trained model."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reports import Told

import nanothink
from nanothink.checkpoints import archive, read_checkpoint, write_checkpoint
from nanothink.cli.app import run
from nanothink.data.corpus import find_corpus
from nanothink.data.split import SplitRule
from nanothink.data.tokenizer import load_tokenizer
from nanothink.data.tokens import tokenise
from nanothink.errors import UsageError
from nanothink.inference.evaluate import DocumentScores, Evaluation, Score
from nanothink.runs.evaluating import CheckpointEvaluation, above_best

SMALL = [
    *("--set", "model.d_model=32", "--set", "model.max_seq_len=32", "--set", "transformer.n_layers=1"),
    *("--set", "transformer.n_heads=2", "--set", "train_expert.batch_size=4"),
    *("--set", "train_expert.amp_dtype=float32", "--set", "train_expert.sample_tokens=0"),
]


@pytest.fixture(scope="module")
def pretrain(tiny_corpus: Path, tiny_tokenizer: Path) -> Callable[..., int]:
    def call(folder: Path, *more: str | Path, data: Path = tiny_corpus) -> int:
        known = ("--data-dir", data, "--tokenizer", tiny_tokenizer, "--checkpoint-dir", folder)
        return run(["pretrain", "transformer", *map(str, known), *SMALL, *map(str, more)])

    return call


@pytest.fixture(scope="module")
def trained(pretrain: Callable[..., int], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model trained for 20 steps. Read only: copy it to change it."""
    folder = tmp_path_factory.mktemp("trained")
    assert pretrain(folder, "--max-steps", "20") == 0
    return folder


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


Said = Callable[[], tuple[str, str]]


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Said:
    return lambda: tuple(capsys.readouterr())  # type: ignore[return-value]


def best_loss(checkpoint: Path) -> float:
    found = read_checkpoint(checkpoint)["best_loss"]
    assert found is not None
    return found


def as_json(said: Said) -> dict[str, Any]:
    return dict(json.loads(said()[0]))


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


@pytest.mark.parametrize(
    ("steps", "remark"),
    [("2", "No warm-up: this run has 2 steps."), ("10", "Warming up over a tenth of this run")],
)
def test_a_short_run_says_how_it_warms_up(
    pretrain: Callable[..., int], tmp_path: Path, said: Said, steps: str, remark: str
) -> None:
    warm = ("--set", "train_expert.warmup_steps=5", "--set", "train_expert.sample_tokens=0")
    assert pretrain(tmp_path, "--max-steps", steps, *warm) == 0
    noted = said()[1]
    assert remark in noted
    assert " 0 " not in noted.partition("transformer_expert: from step")[0]


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


def test_samples_continue_held_out_texts_unless_prompts_are_given(
    pretrain: Callable[..., int], tiny_corpus: Path, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    def prompts_of(folder: Path) -> list[str]:
        line = (folder / "runs" / "transformer_expert" / "samples.jsonl").read_text("utf-8").splitlines()[-1]
        return list(json.loads(line)["samples"])

    sampled = ("--max-steps", "1", "--set", "train_expert.sample_tokens=2")
    assert pretrain(tmp_path / "own", *sampled) == 0
    domains = ("letters", "manuals", "tales")
    texts = {
        domain: [
            json.loads(line)["text"]
            for line in (tiny_corpus / domain / "texts.jsonl").read_bytes().splitlines()
        ]
        for domain in domains
    }
    tokens = tokenise(find_corpus(tiny_corpus), load_tokenizer(str(tiny_tokenizer)), split=SplitRule(0.1))
    for prompt, domain in zip(prompts_of(tmp_path / "own"), domains, strict=True):
        first_held_out = texts[domain][int(tokens.val[domain].documents().lines[0]) - 1]
        assert prompt
        assert first_held_out.startswith(prompt)
        assert len(prompt) < len(first_held_out)
    given = ("--set", 'train_expert.sample_prompts=["Es war", "einmal"]')
    assert pretrain(tmp_path / "given", *sampled, *given) == 0
    assert prompts_of(tmp_path / "given") == ["Es war", "einmal"]


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


def test_a_text_that_ends_at_once_is_no_riddle(
    pretrain: Callable[..., int], tmp_path: Path, said: Said
) -> None:
    (tmp_path / "data" / "letters").mkdir(parents=True)
    lines = "".join(json.dumps({"text": letter}) + "\n" for letter in "abcdefghij" * 20)
    (tmp_path / "data" / "letters" / "a.jsonl").write_text(lines)
    fast = ("--max-steps", "60", "--set", "train_expert.lr=0.003")
    assert pretrain(tmp_path, *fast, data=tmp_path / "data") == 0
    letters = list("abcdefghij")
    texts = nanothink.load(tmp_path / "transformer_expert.pt").generate(
        letters, temperature=0.0, max_new_tokens=2
    )
    ended = letters[texts.index("")]  # of the nine or so that it has read
    command = ["generate", ended, "-n", "2", "-t", "0", "--checkpoint-dir", str(tmp_path)]
    said()
    assert run(command) == 0
    printed, spoken = said()
    assert printed == f"{ended}\n"
    assert "--ignore-eos" in spoken
    assert run([*command, "--ignore-eos"]) == 0
    printed, spoken = said()
    assert printed != f"{ended}\n"
    assert "--ignore-eos" not in spoken


@pytest.fixture
def piped(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], None]:
    """Standard input holds these bytes from now on."""

    def pipe(given: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given), encoding="utf-8"))

    return pipe


def test_a_prompt_from_standard_input_is_taken_byte_for_byte(
    trained: Path, piped: Callable[[bytes], None], said: Said
) -> None:
    for mark in (b"", b"\xef\xbb\xbf"):  # a byte-order mark is no part of the text
        piped(mark + b"erste Zeile\r\nzweite\r\n")
        assert run(["generate", "-", "-n", "1", "--checkpoint-dir", str(trained), "--json"]) == 0
        assert as_json(said)["samples"][0]["prompt"] == "erste Zeile\r\nzweite\r\n"


def test_a_prompt_that_is_not_utf8_is_one_error(
    trained: Path, piped: Callable[[bytes], None], said: Said
) -> None:
    piped("café".encode("latin-1"))
    for prompt, where in (("-", "Standard input"), ("caf\udce9", "The prompt")):
        assert run(["generate", prompt, "-n", "1", "--checkpoint-dir", str(trained)]) == 2
        printed, spoken = said()
        assert printed == ""
        assert f"{where} is not UTF-8 at byte 4" in spoken


def test_evaluation_says_what_training_said(trained: Path, said: Said) -> None:
    assert run(["eval", "--checkpoint-dir", str(trained), "--json"]) == 0
    evaluated = as_json(said)["checkpoints"][0]["overall"]["loss"]
    lines = (trained / "runs" / "transformer_expert" / "metrics.jsonl").read_text().splitlines()
    assert evaluated == pytest.approx(json.loads(lines[-1])["loss"], rel=1e-6)


def test_the_best_is_found_anew_where_validation_text_has_changed(
    pretrain: Callable[..., int], tiny_corpus: Path, tmp_path: Path, said: Said
) -> None:
    """Added text may be harder: losses on it say nothing against those on the text before."""
    data = tmp_path / "data"
    shutil.copytree(tiny_corpus, data, ignore=shutil.ignore_patterns(".nanothink"))
    assert pretrain(tmp_path, "--max-steps", "10", data=data) == 0
    best = tmp_path / "transformer_expert.pt"
    (data / "hard").mkdir()
    hard = (hashlib.sha256(str(i).encode()).hexdigest() * 4 for i in range(40))
    (data / "hard" / "a.jsonl").write_text("".join(f'{{"text": "{text}"}}\n' for text in hard))
    before, old = best_loss(best), best.read_bytes()
    said()
    assert run(["resume", str(best), "--max-steps", "12"]) == 0
    assert "Best loss reset" in " ".join(said()[1].split())
    (kept,) = tmp_path.glob("replaced/*/transformer_expert.pt")
    assert kept.read_bytes() == old
    after = read_checkpoint(best)
    assert after["step"] == 12
    assert best_loss(best) > before

    assert run(["resume", str(best), "--max-steps", "13", "--set", "train_expert.eval_max_tokens=50"]) == 0
    assert "Best loss reset" in " ".join(said()[1].split())
    assert run(["resume", str(best), "--max-steps", "14"]) == 0
    assert "Best loss reset" not in " ".join(said()[1].split())
    assert run(["resume", str(best), "--max-steps", "15", "--set", "model.max_seq_len=16"]) == 0
    assert "Best loss reset" in " ".join(said()[1].split())


def test_a_run_that_goes_on_from_an_older_file_keeps_the_better_best(
    pretrain: Callable[..., int], tmp_path: Path, said: Said
) -> None:
    """It knows nothing of what came after that file, so all that it finds better than before is its best."""
    often = ("--set", "train_expert.snapshot_every_epochs=1", "--set", "train_expert.batch_size=64")
    assert pretrain(tmp_path, "--max-epochs", "3", *often) == 0
    best, old = tmp_path / "transformer_expert.pt", (tmp_path / "transformer_expert.pt").read_bytes()
    before = best_loss(best)
    said()
    slower = ("--max-epochs", "2", "--set", "train_expert.lr=0.00001")
    assert run(["resume", str(tmp_path / "transformer_expert_epoch1.pt"), *slower]) == 0
    assert "The best checkpoint so far is kept as" in " ".join(said()[1].split())
    assert best_loss(best) > before
    (kept,) = tmp_path.glob("replaced/*/transformer_expert.pt")
    assert kept.read_bytes() == old

    assert run(["resume", str(best), "--max-epochs", "3"]) == 0
    assert len(list(tmp_path.glob("replaced/*/transformer_expert.pt"))) == 1


def test_a_model_whose_score_is_not_a_number_is_not_the_best() -> None:
    good, bad = (
        CheckpointEvaluation(
            Path(name),
            "transformer",
            Evaluation(
                {"d": Score(nats, 1, 4)},
                documents={
                    "d": DocumentScores(
                        np.array([nats / 2] * 2), np.array([2, 2]), np.arange(2, dtype=np.uint64)
                    )
                },
            ),
            n_seen=0,
        )
        for name, nats in (("good", 2.0), ("bad", math.nan))
    )
    for order in ([good, bad], [bad, good]):
        assert above_best(order)[order.index(good)] is None
        assert above_best(order)[order.index(bad)] is not None


def test_fewer_steps_than_are_done(pretrain: Callable[..., int], tmp_path: Path, said: Said) -> None:
    assert pretrain(tmp_path, "--max-steps", "6") == 0
    said()
    assert run(["resume", str(tmp_path / "transformer_expert.pt"), "--max-steps", "3"]) == 0
    told = " ".join("".join(said()).split())
    assert "6 steps are done already, more than the 3 asked for" in told
    assert "all 6 steps done" in told


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


def test_generation_repeats_by_seed_and_works_anywhere(
    trained: Path, said: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command = [
        "generate",
        "time light",
        "-c",
        str(trained / "transformer_expert.pt"),
        "-n",
        "50",
        "--ignore-eos",
    ]
    texts = set()
    for _ in range(2):
        assert run([*command, "--seed", "3"]) == 0
        texts.add(said()[0])
    assert len(texts) == 1
    assert texts.pop().startswith("time light")  # 50 tokens reach past the context of 32
    assert run([*command, "--seed", "4", "moon", "--json"]) == 0
    samples = as_json(said)["samples"]
    assert [s["prompt"] for s in samples] == ["time light", "moon"]
    assert all(s["text"] for s in samples)


@pytest.mark.parametrize(
    "bad", [["--temperature", "-1"], ["--top-p", "2"], ["--top-k", "-3"], ["-n", "0"], ["--seed", "-1"]]
)
def test_a_bad_sampling_value_is_wrong_usage(bad: list[str], trained: Path, said: Said) -> None:
    assert run(["generate", "x", "--checkpoint-dir", str(trained), *bad]) == 2
    output, errors = said()
    assert output == ""
    assert errors.startswith("error: ")


def test_the_python_interface(trained: Path) -> None:
    loaded = nanothink.load(trained / "transformer_expert.pt")
    assert loaded.kind == "transformer"
    assert loaded.config.model.d_model == 32
    tokens = torch.tensor([loaded.tokenizer.encode("time light stone")])
    logits = loaded.logits(tokens)
    assert logits.shape == (1, tokens.shape[1], loaded.tokenizer.vocab_size)
    assert logits.dtype is torch.float32
    one = loaded.generate("moon", max_new_tokens=5, seed=1)
    assert loaded.generate(["moon"], max_new_tokens=5, seed=1) == [one]


def test_a_dry_run_says_what_it_would_take_and_writes_no_checkpoint(
    pretrain: Callable[..., int], said: Said, tmp_path: Path
) -> None:
    assert pretrain(tmp_path / "none", "--dry-run", "--json") == 0
    estimate = as_json(said)
    assert estimate["parameters"]["embeddings"] == estimate["parameters"]["head"] == 32 * 320
    assert estimate["tokens_per_step"] == 4 * 32
    assert estimate["peak_memory_bytes"] > 0
    assert not (tmp_path / "none").exists()
    assert pretrain(tmp_path / "none", "--dry-run") == 0
    assert "peak memory, about" in said()[0]


def test_a_dry_run_under_torchrun_is_of_each_process(
    pretrain: Callable[..., int], said: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert pretrain(tmp_path / "none", "--dry-run", "--json") == 0
    alone = as_json(said)
    launched = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "none", "MASTER_PORT": "1"}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    assert pretrain(tmp_path / "none", "--dry-run", "--json") == 0
    one_of_two = as_json(said)
    assert (alone["n_processes"], one_of_two["n_processes"]) == (1, 2)
    assert one_of_two["memory"]["activations"] < alone["memory"]["activations"]
    for use in ("weights", "optimizer"):  # shared out, and whole where every process keeps all
        assert one_of_two["memory"][use] == pytest.approx(alone["memory"][use] / 2, abs=4)
    assert pretrain(tmp_path / "none", "--dry-run", "--json", "--set", "distributed.shard=none") == 0
    replica = as_json(said)["memory"]
    assert (replica["weights"], replica["optimizer"]) == tuple(
        alone["memory"][use] for use in ("weights", "optimizer")
    )
    assert replica["gradients"] > alone["memory"]["gradients"]  # its own, and those under way
    assert pretrain(tmp_path / "none", "--dry-run", "--set", "train_expert.batch_size=1") == 2
    assert "less than one block each" in said()[1]
    monkeypatch.setenv("RANK", "1")
    assert pretrain(tmp_path / "none", "--dry-run") == 0
    assert said() == ("", "")


def test_a_new_run_refuses_to_replace_an_old_one(
    pretrain: Callable[..., int], copied: Path, said: Said
) -> None:
    before = {p: p.read_bytes() for p in copied.glob("*.pt")}
    assert pretrain(copied, "--max-steps", "3") == 2
    errors = said()[1]
    assert all(way in errors for way in ("--resume", "--name", "--overwrite"))
    assert {p: p.read_bytes() for p in copied.glob("*.pt")} == before
    assert pretrain(copied, "--max-steps", "3", "--overwrite") == 0
    (kept,) = copied.glob("replaced/*/transformer_expert.pt")
    assert kept.read_bytes() == before[copied / "transformer_expert.pt"]


def test_a_complete_run_stays_complete_until_more_is_asked_of_it(
    pretrain: Callable[..., int], copied: Path, said: Said
) -> None:
    best = copied / "transformer_expert.pt"
    before = best.read_bytes()
    assert pretrain(copied, "--max-steps", "20", "--resume") == 0
    assert "This run is complete" in said()[1]
    assert best.read_bytes() == before
    assert pretrain(copied, "--max-steps", "30", "--resume") == 0
    errors = said()[1]
    assert "train_expert.max_steps was 20, now 30" in errors
    assert "step 30/30" in errors
    assert "step 20/30" not in errors  # it went on from there, not from the beginning


def test_resuming_with_nothing_there_starts_anew(
    pretrain: Callable[..., int], said: Said, tmp_path: Path
) -> None:
    assert pretrain(tmp_path, "--max-steps", "2", "--resume") == 0
    assert "starting a new run" in said()[1]


def test_resuming_with_another_tokenizer_is_refused(
    pretrain: Callable[..., int], copied: Path, tiny_corpus: Path, said: Said, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    assert (
        run(
            ["tokenizer", "train", "--data-dir", str(tiny_corpus), "--vocab-size", "290", "--out", str(other)]
        )
        == 0
    )
    assert pretrain(copied, "--resume", "--max-steps", "30", "--tokenizer", other) == 1
    assert "was trained with the tokenizer" in said()[1]


def test_what_does_not_fit_is_listed_and_a_stranger_refused(
    pretrain: Callable[..., int], copied: Path, said: Said
) -> None:
    assert pretrain(copied, "--resume", "--max-steps", "25", "--set", "transformer.n_layers=2") == 0
    assert "model.layers.1" in said()[1]
    assert pretrain(copied, "--resume", "--max-steps", "35", "--set", "model.d_model=64") == 1
    assert "error:" in said()[1]


def test_an_older_state_does_not_quietly_replace_a_later_one(
    pretrain: Callable[..., int], copied: Path, said: Said
) -> None:
    best = copied / "transformer_expert.pt"
    later = torch.load(best, weights_only=True)
    later["step"] = 25
    write_checkpoint(copied / "transformer_expert_interrupted.pt", later)
    assert pretrain(copied, "--resume", best, "--max-steps", "22") == 2
    assert "further on (step 25)" in said()[1]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["pretrain", "transfomer"], 2, "Did you mean 'transformer'?"),
        (["pretrain", "transformer", "--data-dir", "nowhere"], 1, "nowhere"),
        (["pretrain", "transformer", "--preset", "tinny"], 2, "Did you mean 'tiny'?"),
        (["pretrain", "transformer", "--set", "train_expert.lrr=1"], 2, "Did you mean 'train_expert.lr'?"),
        (["pretrian", "transformer"], 2, "Did you mean 'pretrain'"),
        (["resume"], 1, "There is no checkpoint in"),
        (["resume", "no.pt"], 1, "no.pt"),
        (["eval"], 1, "nanothink pretrain"),
        (["eval", "--split", "vall"], 2, "Did you mean 'val'?"),
        (["generate", "x"], 1, "nanothink pretrain"),
        (["checkpoints", "show", "no.pt"], 1, "no.pt"),
        (["data", "validate", "nowhere"], 1, "nowhere"),
        (["config", "show", "modle"], 2, "Did you mean 'model'?"),
    ],
)
def test_mistakes_get_one_clear_line(
    arguments: list[str], code: int, words: str, said: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(arguments) == code
    errors = said()[1]
    assert words in errors
    assert errors.count("error:") == 1
    assert "Traceback" not in errors


def test_misspelt_domains_are_named(pretrain: Callable[..., int], said: Said, tmp_path: Path) -> None:
    assert pretrain(tmp_path, "--domains", "leters") == 2
    assert "Did you mean 'letters'?" in said()[1]


def test_bad_records_stop_training_unless_skipped(
    pretrain: Callable[..., int], tiny_corpus: Path, said: Said, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(tiny_corpus, data, ignore=shutil.ignore_patterns(".nanothink"))
    with (data / "tales" / "texts.jsonl").open("a") as file:
        file.write('{"text": ""}\n{"text": NaN}\n')
    assert pretrain(tmp_path / "a", "--max-steps", "2", data=data) == 1
    errors = said()[1]
    assert "texts.jsonl:21:" in errors
    assert "--skip-bad-records" in errors
    assert pretrain(tmp_path / "a", "--max-steps", "2", "--skip-bad-records", data=data) == 0
    assert "2 bad records left out" in said()[1]

    assert run(["data", "validate", str(data), "--json"]) == 1
    report = as_json(said)
    assert report["ok"] is False
    assert (report["n_files"], report["n_records"]) == (3, 110)
    assert [(e["line"], sorted(e)) for e in report["errors"]] == [
        (21, ["column", "file", "line", "reason"]),
        (22, ["column", "file", "line", "reason"]),
    ]


def test_every_command_says_which_bad_lines_it_left_out(
    tiny_corpus: Path, tiny_tokenizer: Path, said: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_corpus, "data", ignore=shutil.ignore_patterns(".nanothink"))
    with Path("data/tales/texts.jsonl").open("a") as file:
        file.write('{"text": ""}\n' * 3 + '{"text": NaN}\n')
    tokens, skip = ["--tokenizer", str(tiny_tokenizer)], "--skip-bad-records"
    train = ["pretrain", "transformer", *SMALL, *tokens, skip, "--max-steps", "2", "--json"]
    expert = "checkpoints/transformer_expert.pt"
    counts = {"`text` is empty; a record needs some text": 3}
    for command in (
        ["data", "inspect", *tokens, skip, "--json"],
        ["tokenizer", "train", "--json"],
        [*train, "--dry-run"],
        train,
        ["resume", expert, "--max-steps", "3", "--json"],
        ["eval", "--json"],
        ["eval", expert, expert, "--split", "all", "--allow-seen", "--json"],
        ["store", "build", "--expert", expert, "--dry-run", "--json"],
        ["store", "build", "--expert", expert, "--json"],
    ):
        assert run(command) == 0, command
        out, notes = said()
        found = json.loads(out)
        assert found["n_bad_lines"] == 4, command
        if "bad_lines" in found:
            groups = {group["reason"]: group["n_problems"] for group in found["bad_lines"]}
            assert len(groups) == 2
            assert groups.items() >= counts.items()
        (line,) = [line for line in notes.splitlines() if line.startswith("Left out: ")]
        assert line.startswith("Left out: 4 bad lines of ")
        assert "data/tales/texts.jsonl:21:10" in line
        assert "`text` is empty; a record needs some text (3, the first at " in line
        assert "(--skip-bad-records)" in notes or "pretrain" not in command or "--dry-run" in command
    assert run(["report", "--json"]) == 0
    assert "4 bad lines of the data left out" in Path(json.loads(said()[0])["report"]).read_text("utf-8")

    Path("rows.jsonl").write_text('{"text": "a"}\n' + "nonsense\n" * 30)
    assert run(["data", "import", "rows.jsonl", "--domain", "rows", "--json"]) == 1
    report = as_json(said)
    assert (report["n_records"], report["n_bad_rows"], len(report["bad_rows"])) == (1, 30, 20)
    assert report["bad_row_groups"][0]["lines"] == [["rows.jsonl", 2, 31]]
    assert run(["data", "import", "rows.jsonl", "--domain", "rows", "--overwrite"]) == 1
    errors = said()[1].splitlines()
    assert len(errors) == 2
    assert errors[0].startswith("error: rows.jsonl:2:1: `nonsense` is not a JSON value")
    assert errors[0].endswith("(30 times: rows.jsonl: 2-31)")
    assert errors[1] == "warning: 30 rows left out, as said above."


def test_bad_lines_are_grouped_or_all_named(said: Said, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    odd = '{"text": "\\u00e9"}\n{"text": "b"}\n'
    (tmp_path / "a" / "x.jsonl").write_text(
        odd + '{"text": ""}\n' * 300 + "{a: 1}\n{b: 2}\n" * 15 + odd + "[1]\n"
    )
    assert run(["data", "validate", str(tmp_path)]) == 1
    told = [line for line in said()[0].splitlines() if line.startswith("error: ")]
    where = f"error: {tmp_path}/a/x.jsonl"
    assert told[0] == (
        f"{where}:3:10: `text` is empty; a record needs some text (300 times: {tmp_path}/a/x.jsonl: 3-302)"
    )
    assert told[1].startswith(f"{where}:303:2: a key must stand in double quotes, found a")
    assert told[21].startswith(f"{where}:303:2: 10 more like this: ")
    assert told[22].startswith(f"{where}:335:1: a record must be a JSON object, not an array")
    assert len(told) == 23
    assert run(["data", "validate", str(tmp_path), "--all"]) == 1
    lines = said()[0].splitlines()
    named = [int(line.split(":")[2]) for line in lines if line.startswith("error: ")]
    assert named == [*range(3, 333), 335]
    assert lines[-1].startswith("4 records in 1 file: 331 errors.")

    assert run(["data", "validate", str(tmp_path), "--json"]) == 1
    report = as_json(said)
    assert (report["n_errors"], len(report["errors"])) == (331, 20 + 20 + 1)
    assert [group["n_problems"] for group in report["error_groups"]] == [300, 30, 1]
    assert report["error_groups"][0]["lines"] == [[f"{tmp_path}/a/x.jsonl", 3, 302]]
    assert run(["data", "validate", str(tmp_path), "--json", "--all"]) == 1
    every = as_json(said)
    assert [error["line"] for error in every["errors"]] == named
    assert every.keys() == report.keys()
    (tmp_path / "a" / "x.jsonl").write_text(odd)
    assert run(["data", "validate", str(tmp_path), "--json", "--all"]) == 0
    assert as_json(said)["errors"] == []


def test_checkpoints_are_listed_shown_verified_and_pruned(copied: Path, said: Said) -> None:
    where = ["--checkpoint-dir", str(copied)]
    shutil.copy(copied / "transformer_expert.pt", copied / "transformer_expert_epoch1.pt")
    shutil.copy(copied / "transformer_expert.pt", copied / "transformer_expert_epoch2.pt")
    assert run(["checkpoints", "ls", *where]) == 0
    assert "transformer_expert_epoch2.pt" in said()[0]
    assert run(["checkpoints", "show", str(copied / "transformer_expert.pt")]) == 0
    shown = said()[0]
    assert "model.layers.0" in shown
    assert "completed, 80 blocks read in all" in shown
    assert run(["checkpoints", "verify", *where]) == 0
    damaged = copied / "transformer_expert_epoch2.pt"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    said()
    assert run(["checkpoints", "verify", *where, "--json"]) == 1
    assert [f["ok"] for f in as_json(said)["files"]].count(False) == 1
    assert run(["checkpoints", "ls", *where]) == 0
    assert "damaged" in said()[0]
    damaged.unlink()
    shutil.copy(copied / "transformer_expert.pt", damaged)
    assert run(["checkpoints", "prune", *where, "--json"]) == 0
    assert as_json(said)["removed"] == [str(copied / "transformer_expert_epoch1.pt")]


def test_the_corpus_in_numbers(tiny_corpus: Path, tiny_tokenizer: Path, said: Said) -> None:
    command = ["data", "inspect", str(tiny_corpus), "--tokenizer", str(tiny_tokenizer)]
    assert run([*command, "--json"]) == 0
    summary = as_json(said)
    letters = summary["domains"]["letters"]
    assert (letters["n_files"], letters["n_records"], letters["n_duplicates"]) == (1, 60, 0)
    assert letters["n_train_tokens"] + letters["n_val_tokens"] == letters["n_tokens"]
    assert sum(summary["record_lengths"]["counts"]) == summary["total"]["n_records"] == 110
    assert run(command) == 0
    shown = said()[0]
    assert "letters" in shown
    assert "  test  " not in shown


def test_the_corpus_in_numbers_with_a_test_side_and_near_duplicates(
    tiny_corpus: Path, tiny_tokenizer: Path, said: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("datasketch")
    shutil.copytree(tiny_corpus, tmp_path / "data")
    near = tmp_path / "data" / "letters" / "again.jsonl"
    near.write_text((tiny_corpus / "letters" / "texts.jsonl").read_text().replace('."', '. The end."'))
    (tmp_path / "data" / "one").mkdir()
    (tmp_path / "data" / "one" / "a.jsonl").write_text('{"text": "A single text of some words."}\n')
    monkeypatch.chdir(tmp_path)  # settings of training hold here too: of a file, and by hand
    (tmp_path / "nanothink.toml").write_text(f"[data]\ntokenizer = '{tiny_tokenizer}'\ntest_split = 0.3\n")
    command = ["data", "inspect", "--near-duplicates"]
    assert run([*command, "--json"]) == 0
    summary = as_json(said)
    letters, one = summary["domains"]["letters"], summary["domains"]["one"]
    assert letters["n_tokens"] == sum(letters[f"n_{side}_tokens"] for side in ("train", "val", "test"))
    assert 0.15 < letters["n_test_tokens"] / letters["n_tokens"] < 0.45
    assert (one["n_records"], summary["total"]["n_records"]) == (1, 171)
    assert sum(summary["record_lengths"]["counts"]) == 171
    found = summary["near_duplicates"]
    assert (found["n_documents"], found["n_near_duplicates"]) == (171, 120)
    assert found["n_val"] >= found["n_val_in_training"] > 0
    assert run(command) == 0
    shown = " ".join(said()[0].split())
    assert "validation test blocks" in shown
    assert "120 of 171 texts have one" in shown
    assert f"{found['n_test_in_training']} of {found['n_test']} test texts have one in training" in shown
    assert "data/letters/again.jsonl:" in shown
    assert run(["data", "inspect", "--set", "data.test_split=0", "--json"]) == 0
    assert as_json(said)["total"]["n_test_tokens"] == 0
    assert run(["data", "inspect", "--set", "data.test_split=0.95"]) == 2
    assert "leave nothing to train on" in said()[1]


def test_settings_and_where_they_come_from(
    said: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nanothink.toml").write_text("[train_expert]\nlr = 0.001\n")
    monkeypatch.setenv("NANOTHINK_TRAIN_EXPERT__SEED", "7")
    assert run(["config", "show", "--preset", "tiny", "--json"]) == 0
    shown = as_json(said)
    assert shown["train_expert.lr"]["source"].endswith("nanothink.toml")
    assert shown["train_expert.seed"] == shown["train_expert.seed"] | {
        "value": 7,
        "source": "NANOTHINK_TRAIN_EXPERT__SEED",
    }
    assert shown["model.d_model"]["source"] == "preset tiny"
    assert run(["config", "presets"]) == 0
    assert "tiny" in said()[0]


def test_underscores_of_older_scripts_are_understood(tiny_corpus: Path, said: Said) -> None:
    assert run(["data", "validate", "--data_dir", str(tiny_corpus)]) == 0
    assert "110 records in 3 files: all valid" in said()[0]


def test_one_of_something_is_singular(said: Said, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.jsonl").write_text('{"text": "one"}\n{"text": 1}\n')
    assert run(["data", "validate", str(tmp_path)]) == 1
    assert "1 record in 1 file: 1 error." in said()[0]


def test_the_doctor_answers(said: Said, tmp_path: Path) -> None:
    assert run(["doctor", "--json", "--checkpoint-dir", str(tmp_path)]) == 0
    found = as_json(said)
    assert {"device", "precision", "torch", "C++ compiler", "disk"} <= set(found)
    assert "HF_HUB_OFFLINE" in found["tokenizer"] or "cache" in found["tokenizer"]


def test_a_resume_reads_its_checkpoint_once_and_lets_go_of_it(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mapped file would keep its place on the disk when the next save replaces it."""
    rolling, digests = copied / "transformer_expert_interrupted.pt", []
    shutil.copy(copied / "transformer_expert.pt", rolling)
    time.sleep(0.2)  # a file that has just changed might change again unnoticed, and is read again
    really = archive._digest_of

    def digest(file: Any, *rest: Any) -> bytes:
        digests.append(file.name)
        return really(file, *rest)

    def train(run: Any, callbacks: Any) -> Any:
        assert str(rolling) not in Path("/proc/self/maps").read_text()
        raise UsageError("far enough")

    monkeypatch.setattr(archive, "_digest_of", digest)
    monkeypatch.setattr("nanothink.runs.pretraining.train", train)
    assert run(["resume", "--checkpoint-dir", str(copied), "--max-steps", "30"]) == 2
    assert [Path(name) for name in digests] == [rolling]


def test_a_resumed_run_holds_the_rates_of_its_last_step(copied: Path) -> None:
    """A checkpoint written before the next step, as at an epoch's end, must not differ in them."""
    from nanothink.config.run import resolve_config
    from nanothink.runs.building import build_run
    from nanothink.runs.preparing import prepare
    from nanothink.runs.resuming import RunSpec
    from nanothink.training.optimizer import learning_rate_fraction

    where = RunSpec(kind="transformer", checkpoint_dir=copied, resume="newest")
    setup = prepare(where, lambda base: resolve_config(base=base, assignments=["train_expert.max_steps=30"]))
    resumed = build_run(setup)
    fraction = learning_rate_fraction(19, 30, setup.config.train_expert)
    groups = [g for o in resumed.optimizer.optimizers.values() for g in o.param_groups]
    assert resumed.state.step == 20
    assert [g["lr"] for g in groups] == pytest.approx([g["peak_lr"] * fraction for g in groups])


def test_doctor_tells_how_far_it_is(tmp_path: Path) -> None:
    from nanothink.runs.doctor import examine

    told: list[tuple[str, int, int]] = []
    examine(None, tmp_path, Told(progress=lambda *at: told.append(at)))
    assert told == [("examining", done, 3) for done in range(3)]
