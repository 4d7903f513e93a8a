"""``pretrain`` and ``resume``: what a run says, keeps, refuses to replace, and goes on with."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_run import Said, as_json, best_loss

from nanothink.checkpoints import archive, read_checkpoint, write_checkpoint
from nanothink.cli.app import run
from nanothink.data.corpus import find_corpus
from nanothink.data.split import SplitRule
from nanothink.data.tokenizer import load_tokenizer
from nanothink.data.tokens import tokenise
from nanothink.errors import UsageError
from nanothink.inference.evaluate import DocumentScores, Evaluation, Score
from nanothink.runs.evaluating import CheckpointEvaluation, above_best


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
