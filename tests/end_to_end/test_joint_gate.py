"""Phase 2 on held-out text, the joint gate and the document cache, as commands and from Python."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from repeating_corpus import repeating_corpus
from struck_runs import assert_same
from tiny import SHAPE, settings

import nanothink as package
from nanothink.checkpoints import CheckpointPayload, read_summary
from nanothink.checkpoints.file import read_checkpoint
from nanothink.checkpoints.split_record import SplitRecord
from nanothink.cli.app import run
from nanothink.errors import UsageError
from nanothink.models.joint_gate import DOCUMENT_CACHE
from nanothink.models.nanothink import NanoThink

SETTINGS = {
    **SHAPE,
    "data.val_split": 0.3,
    "train_expert.batch_size": 4,
    "train_expert.sample_tokens": 0,
    "train_expert.amp_dtype": "float32",
    "document_cache.fit_steps": 60,
}
OF_PHASE_2 = {
    "mla.n_heads": 2,
    "train_mla.sample_tokens": 0,
    "train_mla.amp_dtype": "float32",
    "document_cache.fit_steps": 60,
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return repeating_corpus(tmp_path_factory.mktemp("corpus"), n_texts=60)


@pytest.fixture(scope="module")
def experts(corpus: Path, tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experts")
    for kind in ("transformer", "state_space"):
        where = [
            "--data-dir",
            str(corpus),
            "--checkpoint-dir",
            str(folder),
            "--tokenizer",
            str(tiny_tokenizer),
        ]
        assert run(["pretrain", kind, *where, "--max-steps", "40", *settings(SETTINGS)]) == 0
    return folder


def combined(corpus: Path, experts: Path, folder: Path, *more: str, **changed: Any) -> list[str]:
    named = [part for path in sorted(experts.glob("*_expert.pt")) for part in ("--expert", str(path))]
    where = ["--data-dir", str(corpus), "--checkpoint-dir", str(folder)]
    values = OF_PHASE_2 | {f"train_mla.{name}": value for name, value in changed.items()}
    return ["train-mla", *where, *named, *settings(values), *more]


@pytest.fixture(scope="module")
def gated(corpus: Path, experts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A NanoThink of gate mode, with a vector store; beside it ``result.json``, what ``--json`` printed."""
    folder = tmp_path_factory.mktemp("gated")
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        assert run(combined(corpus, experts, folder, "--use-vector-store", "--json", fit="gate")) == 0
    (folder / "result.json").write_text(told.getvalue())
    return folder / "nanothink_mla.pt"


def scores(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert run(["eval", *arguments, "--json"]) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["checkpoints"]
    return found


def gate_keys(payload: CheckpointPayload) -> set[int]:
    return set(payload["run"]["gate_documents"])


def test_every_run_ends_with_a_gate_fitted_on_held_out_documents(experts: Path, gated: Path) -> None:
    for path in (*experts.glob("*_expert.pt"), gated):
        payload = read_checkpoint(path)
        held_out = SplitRecord.from_state(payload["split"], path)
        keys = np.array(sorted(gate_keys(payload)), dtype=np.uint64)
        assert len(keys)
        assert np.isin(keys, held_out.held_out.val).all()
        assert not held_out.trained.holds(keys).any()
        assert "joint_gate.out" in payload["model_state"]
    assert gate_keys(read_checkpoint(gated)) == gate_keys(read_checkpoint(experts / "transformer_expert.pt"))


def test_gate_mode_trains_no_step_and_keeps_heads_and_experts(experts: Path, gated: Path) -> None:
    payload = read_checkpoint(gated)
    assert (payload["step"], payload["config"]["mla"]["n_layers"]) == (0, 0)
    assert payload["config"]["train_mla"]["fit"] == "gate"
    state = payload["model_state"]
    heads = []
    for i, name in enumerate(("state_space", "transformer")):
        expert = read_checkpoint(experts / f"{name}_expert.pt")
        for key, weight in expert["model_state"].items():
            if not key.startswith("joint_gate."):
                assert torch.equal(state[f"experts.{i}.{key}"], weight)
        heads.append(expert["model_state"]["lm_head.weight"] * expert["run"]["logit_scale"])
    assert torch.equal(state["lm_head.weight"][:, :64], torch.cat(heads, 1))
    assert not state["lm_head.weight"][:, 64:].any()


def test_the_ensemble_is_never_worse_for_phase_2(
    corpus: Path, experts: Path, gated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both modes; full with a rate so high that every step makes it worse."""
    assert run(combined(corpus, experts, tmp_path, fit="full", lr=1.0, max_steps=6, eval_every_steps=3)) == 0
    recorded = (tmp_path / "runs" / "nanothink_mla" / "metrics.jsonl").read_text().splitlines()
    losses = {e["step"]: e["loss"] for e in map(json.loads, recorded) if e["event"] == "validation"}
    assert losses[3] > losses[0] < losses[6]
    assert read_checkpoint(tmp_path / "nanothink_mla.pt")["step"] == 0
    worse, better = scores(capsys, str(tmp_path / "nanothink_mla.pt"), str(gated))
    assert better["overall"]["loss"] <= worse["overall"]["loss"] + 1e-6


def test_the_score_that_a_fitted_run_leaves_is_that_of_what_it_fitted(
    gated: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In its result, its records, the listing and the report; not that of the equal weights before."""
    best, folder = gated, gated.parent
    result = json.loads((folder / "result.json").read_text())
    (scored,) = scores(capsys, str(best))
    assert result["best_loss"] == pytest.approx(scored["overall"]["loss"], rel=1e-6)
    assert result["validation"]["overall"]["loss"] == result["best_loss"]
    weights = result["validation"]["routing"]["tales"]["weights"]
    assert weights["vector_store"] != pytest.approx(0.1824, abs=1e-3)  # where the gate begins
    assert read_summary(best).best_loss == result["best_loss"]
    recorded = (folder / "runs" / "nanothink_mla" / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, recorded) if row["event"] == "validation"]
    assert [row.get("fitted", False) for row in rows] == [False, True]
    assert rows[-1]["loss"] == result["best_loss"] < rows[0]["loss"]
    assert (
        json.loads((folder / "runs" / "nanothink_mla" / "finished.json").read_text())["best_loss"]
        == (result["best_loss"])
    )
    assert run(["checkpoints", "show", str(best)]) == 0
    shown = capsys.readouterr().out
    assert "over the model and its vector store and 2 document caches" in shown
    assert "logits times" in shown


def test_the_same_command_gives_the_same_bits(
    corpus: Path, experts: Path, gated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(combined(corpus, experts, tmp_path, "--use-vector-store", fit="gate")) == 0
    results, said = capsys.readouterr()
    assert "fitted, not trained" in results + said
    assert "No warm-up" not in said
    assert_same(
        read_checkpoint(tmp_path / "nanothink_mla.pt")["model_state"], read_checkpoint(gated)["model_state"]
    )


def test_auto_says_what_it_takes_and_the_end_of_a_run_what_became_of_its_gate(
    corpus: Path, experts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(combined(corpus, experts, tmp_path, max_epochs=1, batch_size=64)) == 0
    said = capsys.readouterr().err
    assert "Gate of the document cache fitted on" in said
    chosen = read_checkpoint(tmp_path / "nanothink_mla.pt")["config"]["train_mla"]["fit"]
    assert f"train_mla.fit=auto takes '{chosen}'" in said
    assert chosen in ("gate", "full")


@pytest.mark.parametrize("kind", ["transformer", "state_space", "nanothink_mla"])
def test_the_cache_lowers_the_score_of_texts_that_repeat_themselves(
    kind: str, experts: Path, gated: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = gated if kind == "nanothink_mla" else experts / f"{kind}_expert.pt"
    (found,) = scores(capsys, str(path), "--document-cache")
    cached = found["with_document_cache"]
    assert cached["overall"]["tokens"] == found["overall"]["tokens"]
    assert cached["overall"]["bits_per_byte"] < 0.8 * found["overall"]["bits_per_byte"]
    assert cached["domains"].keys() == found["domains"].keys()
    loaded = package.load(path)
    with_gate_documents = scores(capsys, str(path), "--document-cache", "--allow-seen")[0]
    assert with_gate_documents["overall"]["tokens"] > found["overall"]["tokens"]
    assert len(loaded.gate_documents) > 0


def test_text_is_written_with_the_cache_and_the_routing_shows_it(
    gated: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, cached = package.load(gated), package.load(gated, document_cache=True)
    tokens = torch.randint(1, 200, (1, 15), generator=torch.Generator().manual_seed(0)).repeat(1, 2)
    assert not torch.allclose(plain.logits(tokens), cached.logits(tokens))
    torch.testing.assert_close(cached.logits(tokens).exp().sum(-1), torch.ones(1, 30), rtol=1e-3, atol=1e-3)
    words = ["generate", "some words of a letter", "--checkpoint", str(gated), "--document-cache"]
    capsys.readouterr()
    assert run([*words, "-n", "70", "--seed", "1", "--show-routing", "--ignore-eos", "--json"]) == 0
    (sample,) = json.loads(capsys.readouterr().out)["samples"]
    assert len(sample["tokens"]) == 70  # past the context of 32 tokens
    for token in sample["tokens"]:
        assert DOCUMENT_CACHE in token["weights"]
        assert sum(token["weights"].values()) == pytest.approx(1.0, abs=1e-3)


def test_a_gate_for_the_cache_alone_leaves_other_predictions_to_the_store_gate(gated: Path) -> None:
    model = package.load(gated).model
    assert isinstance(model, NanoThink)
    tokens = torch.randint(1, 200, (1, 30), generator=torch.Generator().manual_seed(0))
    gate = model.joint_gate
    assert gate is not None
    found = {}
    for name, used in (("both", gate), ("cache alone", gate.for_cache_alone()), ("none", None)):
        model.joint_gate = used
        found[name] = [model.logits(tokens), model.step(tokens, model.start(1)), model.routing(tokens)]
    for alone, none in zip(found["cache alone"], found["none"], strict=True):
        torch.testing.assert_close(alone, none)
    assert not torch.allclose(found["both"][0], found["none"][0])


def test_a_stop_text_leaves_the_document_cache_in_use(gated: Path) -> None:
    plain, cached = package.load(gated), package.load(gated, document_cache=True)
    prompt = "some words of a letter " * 4
    sampling: dict[str, Any] = {"max_new_tokens": 40, "stop_at_eos": False}
    never = ["no model writes this"]
    texts = [cached.generate(prompt, stop=never, seed=seed, **sampling) for seed in range(4)]
    assert texts == [cached.generate(prompt, seed=seed, **sampling) for seed in range(4)]
    assert texts != [plain.generate(prompt, seed=seed, **sampling) for seed in range(4)]


def test_a_model_without_a_gate_says_that_it_has_none(
    corpus: Path, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    where = ["--data-dir", str(corpus), "--checkpoint-dir", str(tmp_path), "--tokenizer", str(tiny_tokenizer)]
    typed = [*where, "--max-steps", "2", *settings({**SETTINGS, "document_cache.fit_steps": 0})]
    assert run(["pretrain", "transformer", *typed]) == 0
    with pytest.raises(UsageError, match="no gate for a document cache"):
        package.load(tmp_path / "transformer_expert.pt", document_cache=True)


def test_one_held_out_document_is_enough_for_weights_and_a_document_cache(
    tiny_tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing can be set aside to fit on; an expert that has learnt nothing must not spoil the other."""
    (tmp_path / "data").mkdir()
    data = repeating_corpus(tmp_path / "data", n_texts=3)
    place = ["--data-dir", str(data), "--checkpoint-dir", str(tmp_path)]
    for kind, n_steps in (("transformer", 20), ("state_space", 1)):
        words = ["pretrain", kind, "--tokenizer", str(tiny_tokenizer), *place, "--max-steps", str(n_steps)]
        assert run([*words, *settings(SETTINGS)]) == 0
    experts = [str(tmp_path / f"{kind}_expert.pt") for kind in ("transformer", "state_space")]
    named = [part for path in experts for part in ("--expert", path)]
    fitted = settings(OF_PHASE_2 | {"train_mla.fit": "gate"})
    assert run(["train-mla", *named, *place, *fitted]) == 0
    assert "with its usual weights" in capsys.readouterr().err
    best, *_ = scores(capsys, experts[0])
    (combined,) = scores(capsys, str(tmp_path / "nanothink_mla.pt"), "--document-cache")
    assert combined["overall"]["loss"] <= best["overall"]["loss"] + 1e-3
    assert combined["with_document_cache"]["overall"]["loss"] < combined["overall"]["loss"]
    assert not gate_keys(read_checkpoint(tmp_path / "nanothink_mla.pt"))
