"""Training on conversations: every kind of model, resumed, scored, and answering."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from struck_runs import SHAPE, TRAINING

import nanothink
from nanothink.checkpoints import read_checkpoint
from nanothink.cli.app import run
from nanothink.data.batches import TrainingBatches
from nanothink.data.chat import PLAIN
from nanothink.data.corpus import find_corpus
from nanothink.data.tokens import IGNORE, TokenStream, tokenise
from nanothink.inference.evaluate import evaluate_model
from nanothink.inference.gated import Reading, evaluate_gated, positions
from nanothink.inference.generate import evaluating
from nanothink.models.joint_gate import DOCUMENT_CACHE, JointGate
from nanothink.models.precision import Precision
from nanothink.runs.trained_model import TrainedModel
from nanothink.vector_store.contents import VectorStore

EXACT = Precision(torch.device("cpu"), torch.float32, "test")
KINDS = ("transformer", "state_space", "diffuser", "nanothink_mla")


def conversations(n: int) -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                {"role": "user", "content": f"How far is the moon from house {i}?"},
                {"role": "assistant", "content": f"As far as {i} stones."},
                {"role": "user", "content": "Why?"},
                {"role": "assistant", "content": "Winter."},
            ]
        }
        for i in range(n)
    ]


@pytest.fixture(scope="module")
def data(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A domain of conversations, and one in which they stand beside texts."""
    root = tmp_path_factory.mktemp("talking")
    lines = [json.dumps(one) for one in conversations(24)]
    texts = (tiny_corpus / "tales" / "texts.jsonl").read_text().splitlines()[:8]
    for domain, own in (("talk", lines[:16]), ("mixed", [*lines[16:], *texts])):
        (root / domain).mkdir()
        (root / domain / "a.jsonl").write_text("\n".join(own) + "\n")
    return root


def words(kind: str, data: Path, tokenizer: Path, folder: Path, *more: str) -> list[str]:
    command = ["train-mla"] if kind == "nanothink_mla" else ["pretrain", kind]
    section = {"diffuser": "train_diffuser", "nanothink_mla": "train_mla"}.get(kind, "train_expert")
    few = TRAINING | {"max_epochs": 1, "max_steps": 8}
    settings = {**SHAPE, **{f"{section}.{name}": value for name, value in few.items()}}
    chosen = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    own = [] if kind == "nanothink_mla" else ["--tokenizer", str(tokenizer)]
    return [*command, "--data-dir", str(data), "--checkpoint-dir", str(folder), *own, *chosen, *more]


@pytest.fixture(scope="module")
def trained(data: Path, tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of every kind, a vector store with the last."""
    folder = tmp_path_factory.mktemp("answering")
    for kind in KINDS:
        more = ["--use-vector-store", "--set", "train_mla.fit=full"] if kind == "nanothink_mla" else []
        assert run(words(kind, data, tiny_tokenizer, folder, *more)) == 0
    return folder


def opened(trained: Path, kind: str) -> TrainedModel:
    return nanothink.load(trained / (f"{kind}.pt" if "_mla" in kind else f"{kind}_expert.pt"), device="cpu")


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_conversations_answers(
    kind: str, trained: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = opened(trained, kind)
    assert model.tokenizer.chat == PLAIN
    capsys.readouterr()
    assert run(["generate", "--chat", "Why?", "-c", str(model.path), "-n", "3", "--temperature", "0"]) == 0
    (answer,) = model.answer([[{"role": "user", "content": "Why?"}]], max_new_tokens=3, temperature=0)
    assert capsys.readouterr().out == answer + "\n"


def streams(model: TrainedModel, data: Path) -> dict[str, TokenStream]:
    return tokenise(find_corpus(data), model.tokenizer, split=None).train


@pytest.mark.parametrize("kind", KINDS[:2])
def test_a_score_is_of_the_answers_alone(kind: str, trained: Path, data: Path) -> None:
    """Against the log-likelihood of all tokens, of which those of answers are added up."""
    model = opened(trained, kind)
    for name, stream in streams(model, data).items():
        by_token = []
        with evaluating(model.model), torch.inference_mode():
            for index in range(stream.n_blocks(16)):
                inputs, wanted = map(torch.from_numpy, stream.block(index, 16))
                _, targets = map(torch.from_numpy, stream.with_all_targets().block(index, 16))
                own = model.model.log_likelihood(inputs[None], targets[None])[0].double()
                by_token.append(-own.masked_fill(wanted == IGNORE, 0.0).numpy())
        sizes = stream.documents().n_tokens
        by_document = np.add.reduceat(np.concatenate(by_token), np.cumsum(sizes) - sizes)
        options: Any = {"length": 16, "batch_size": 3, "precision": EXACT}
        evaluation = evaluate_model(model.model, {name: stream}, **options)
        found, nats = evaluation.overall, float(by_document.sum())
        assert found.tokens == stream.n_targets < stream.n_tokens
        assert evaluation.documents[name].nats == pytest.approx(by_document, rel=1e-5)
        assert found.bits_per_byte == pytest.approx(nats / math.log(2) / stream.n_bytes, rel=1e-5)


def test_a_gate_is_scored_on_answers_and_remembers_questions(trained: Path, data: Path) -> None:
    model = opened(trained, "transformer").model
    stream = streams(opened(trained, "transformer"), data)["talk"]
    reading = Reading(16, EXACT, 64, 4)
    unigram = torch.full((model.vocab_size,), -math.log(model.vocab_size))
    names = (DOCUMENT_CACHE,)
    with evaluating(model):
        read = list(positions(model, stream, names, unigram, reading))
        whole = list(positions(model, stream.with_all_targets(), names, unigram, reading))
    wanted = torch.from_numpy(stream.trained(0, stream.n_tokens))
    for part in ("targets", "log_likelihood"):
        own, every = (torch.cat([getattr(each, part) for each in found]) for found in (read, whole))
        assert torch.equal(own, every[wanted])
    own, every = (torch.cat([each.evidence.memories[0].tokens for each in found]) for found in (read, whole))
    assert torch.equal(own, every[wanted])  # what is recalled is of questions too
    features = torch.cat([each.evidence.features for each in read])
    gate = JointGate.start(names, features, unigram, n_hidden=0, generator=torch.Generator().manual_seed(0))
    model.joint_gate = gate
    assert (
        evaluate_gated(model, {"talk": stream}, reading).overall.tokens == stream.n_targets == len(features)
    )


def test_the_vector_store_holds_answers_alone(trained: Path) -> None:
    model = opened(trained, "nanothink_mla")
    store: Any = model.model.vector_store
    assert isinstance(store, VectorStore)
    held = model.tokenizer.decode(store.contents.tokens.tolist())
    assert "stones" in held
    assert "How far" not in held
    assert "User" not in held


def test_the_first_prompt_of_a_sample_is_a_whole_question(trained: Path) -> None:
    lines = (trained / "runs" / "transformer_expert" / "samples.jsonl").read_text().splitlines()
    prompts = [prompt for line in lines for prompt in json.loads(line)["samples"]]
    assert any(prompt.endswith("?<|endoftext|>Assistant:\n") for prompt in prompts)


def test_resumed_is_never_interrupted(
    data: Path,
    tiny_tokenizer: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    trained: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    read = TrainingBatches.read
    calls = []

    def struck(self: TrainingBatches, start: int, count: int) -> Any:
        calls.append(start)
        if len(calls) == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return read(self, start, count)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingBatches, "read", struck)
        assert run(words("transformer", data, tiny_tokenizer, tmp_path)) == 130
    capsys.readouterr()
    assert run(["resume", str(tmp_path / "transformer_expert_interrupted.pt")]) == 0
    shown = capsys.readouterr()
    assert "Try it: nanothink generate --chat 'Who are you?' --checkpoint" in shown.out + shown.err
    states = [read_checkpoint(f / "transformer_expert.pt") for f in (tmp_path, trained)]
    assert states[0]["tokenizer"] == states[1]["tokenizer"]
    assert states[0]["best_loss"] == states[1]["best_loss"]
    for name, tensor in states[1]["model_state"].items():
        assert torch.equal(states[0]["model_state"][name], tensor), name
