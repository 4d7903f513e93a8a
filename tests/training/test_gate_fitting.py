"""Fitting the joint gate helps, repeats itself, is linear on little text, and changes nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nanothink.config import Config, ModelConfig, StateSpaceConfig, TransformerConfig
from nanothink.data.corpus import find_corpus
from nanothink.data.split import SplitRule
from nanothink.data.tokenizer import load_tokenizer
from nanothink.data.tokens import TokenisedCorpus, tokenise
from nanothink.inference.evaluate import evaluate_model
from nanothink.inference.gated import Reading, evaluate_gated
from nanothink.models import build_model
from nanothink.models.contract import LanguageModel
from nanothink.models.joint_gate import DOCUMENT_CACHE, JointGate
from nanothink.models.precision import Precision
from nanothink.training.gate_fitting import fit_joint_gate, unigram_log_frequencies

READING = Reading(16, Precision(torch.device("cpu"), torch.float32, "test"), window=200, n_neighbours=8)


@pytest.fixture(scope="module")
def tokens(tiny_corpus: Path, tiny_tokenizer: Path) -> TokenisedCorpus:
    tokenizer = load_tokenizer(str(tiny_tokenizer))
    return tokenise(find_corpus(tiny_corpus), tokenizer, split=SplitRule(0.5))


@pytest.fixture(scope="module")
def model(tokens: TokenisedCorpus, tiny_tokenizer: Path) -> LanguageModel:
    vocab_size = load_tokenizer(str(tiny_tokenizer)).vocab_size
    config = Config(
        model=ModelConfig(d_model=16, max_seq_len=16),
        transformer=TransformerConfig(n_heads=2),
        state_space=StateSpaceConfig(n_layers=1),
    )
    torch.manual_seed(0)
    model = build_model("state_space", config, vocab_size)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def test_the_gate_lowers_the_loss_of_other_text_and_is_the_same_each_time(
    model: LanguageModel, tokens: TokenisedCorpus
) -> None:
    to_fit = {name: stream.part_to_fit(2000) for name, stream in tokens.val.items()}
    rest = {name: stream.without(to_fit[name].documents().keys) for name, stream in tokens.val.items()}
    assert all(0 < to_fit[name].n_tokens <= stream.n_tokens // 2 for name, stream in tokens.val.items())
    assert all(to_fit[n].n_tokens + rest[n].n_tokens == stream.n_tokens for n, stream in tokens.val.items())
    unigram = unigram_log_frequencies(tokens.train, model.vocab_size)
    assert float(unigram.exp().sum()) == pytest.approx(1.0, abs=1e-4)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    one, other = (
        fit_joint_gate(model, to_fit, (DOCUMENT_CACHE,), unigram, READING, steps=120, seed=3)
        for _ in range(2)
    )
    assert all(torch.equal(one.weights[name], weight) for name, weight in other.weights.items())
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    model.joint_gate = one
    arguments = {"length": 16, "batch_size": 8, "precision": READING.precision}
    plain = evaluate_model(model, rest, **arguments).overall  # type: ignore[arg-type]
    assert evaluate_gated(model, rest, READING).overall.loss < plain.loss - 0.1
    empty = evaluate_gated(model, rest, READING, with_cache=False).overall
    assert empty.loss == pytest.approx(plain.loss, abs=1e-4)


def test_little_text_moves_a_linear_gate_from_its_usual_weights_and_none_leaves_them(
    model: LanguageModel, tokens: TokenisedCorpus
) -> None:
    unigram = unigram_log_frequencies(tokens.train, model.vocab_size)
    usual = JointGate.usual((DOCUMENT_CACHE,), 1, unigram)
    parts = {"whole": None, "some": 500, "one document": 1}
    moved = {}
    for name, most in parts.items():
        streams = {domain: stream.sample(most) for domain, stream in tokens.val.items()}
        gate = fit_joint_gate(model, streams, (DOCUMENT_CACHE,), unigram, READING, steps=20, seed=3)
        assert ("hidden" in gate.weights) == (name == "whole")
        if name != "whole":
            moved[name] = float((gate.weights["out"] - usual.weights["out"]).norm())
    assert moved["some"] > moved["one document"] > 0
    without = fit_joint_gate(model, {}, (DOCUMENT_CACHE,), unigram, READING, steps=20, seed=3)
    assert all(torch.equal(without.weights[name], weight) for name, weight in usual.weights.items())
    model.joint_gate = usual
    arguments = {"length": 16, "batch_size": 8, "precision": READING.precision}
    plain = evaluate_model(model, tokens.val, **arguments).overall  # type: ignore[arg-type]
    assert evaluate_gated(model, tokens.val, READING).overall.loss < plain.loss - 0.1
