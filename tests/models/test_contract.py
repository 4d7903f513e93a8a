"""Parameter groups, the builder, and what a model inherits."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from nanothink.config import Config, ModelConfig, TransformerConfig
from nanothink.errors import UsageError
from nanothink.models import EXPERTS, build_model
from nanothink.models.contract import LanguageModel
from nanothink.models.decoding_states import Ddim
from nanothink.models.diffuser import Diffuser
from nanothink.models.transformer import Transformer


def config(*, tied: bool = False) -> Config:
    shape = TransformerConfig(n_layers=2, n_heads=2, tie_embeddings=tied)
    return Config(model=ModelConfig(d_model=16, max_seq_len=8), transformer=shape)


@pytest.mark.parametrize("kind", EXPERTS)
@pytest.mark.parametrize("tied", [False, True])
def test_groups_hold_each_parameter_once(kind: str, tied: bool) -> None:
    model = build_model(kind, config(tied=tied), 50)
    groups = model.parameter_groups()
    assert set(groups) == {"adapters", "matrices", "embeddings", "head", "other"}
    named = [item for group in groups.values() for item in group]
    assert sorted(name for name, _ in named) == sorted(name for name, _ in model.named_parameters())
    assert {id(p) for _, p in named} == {id(p) for p in model.parameters()}


@pytest.mark.parametrize("tied", [False, True])
def test_roles_of_the_transformer(tied: bool) -> None:
    groups = build_model("transformer", config(tied=tied), 50).parameter_groups()
    assert [name for name, _ in groups["embeddings"]] == ["model.embed_tokens.weight"]
    assert [name for name, _ in groups["head"]] == ([] if tied else ["lm_head.weight"])
    assert all(p.ndim == 2 and name.startswith("model.layers.") for name, p in groups["matrices"])
    assert len(groups["matrices"]) == 2 * 7
    assert all(p.ndim == 1 for _, p in groups["other"])


def test_frozen_parameters_are_in_no_group() -> None:
    model = build_model("transformer", config(), 50)
    model.head_weight.requires_grad_(False)
    model.get_parameter("model.layers.0.self_attn.q_proj.weight").requires_grad_(False)
    names = [name for group in model.parameter_groups().values() for name, _ in group]
    assert "lm_head.weight" not in names
    assert "model.layers.0.self_attn.q_proj.weight" not in names
    assert len(names) == len(list(model.named_parameters())) - 2


def test_the_builder_follows_the_config_and_the_seed() -> None:
    models = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        models.append(build_model("transformer", config(), 50))
    first, same, other = models
    assert isinstance(first, Transformer)
    assert (first.kind, first.vocab_size, first.d_model, first.context_length) == ("transformer", 50, 16, 8)
    assert len(first.model.layers) == 2
    weights = [model.get_parameter("model.embed_tokens.weight") for model in (first, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_an_unknown_kind_gets_a_suggestion() -> None:
    with pytest.raises(UsageError, match="Did you mean 'transformer'"):
        build_model("transfromer", config(), 50)


def test_calling_a_model_gives_logits() -> None:
    model = build_model("transformer", config(), 50)
    tokens = torch.arange(6).view(1, 6)
    assert isinstance(model, LanguageModel)
    assert torch.equal(model(tokens), model.logits(tokens))
    assert model(tokens).shape == (1, 6, 50)


@pytest.mark.parametrize("kind", EXPERTS)
def test_reading_gives_the_states_of_the_parallel_pass(kind: str) -> None:
    torch.manual_seed(3)
    model = build_model(kind, config(), 50).eval()
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    tokens = torch.arange(14).view(2, 7)
    states = model.hidden(tokens).detach()
    state = model.start(2)
    found = [model.read(tokens[:, a:b], state) for a, b in ((0, 3), (3, 4), (4, 7))]
    torch.testing.assert_close(torch.cat(found, 1), states, rtol=1e-4, atol=1e-5)
    last = model.read(tokens, model.start(2), last_only=True)
    assert last.shape == (2, 1, 16)
    torch.testing.assert_close(last, states[:, -1:], rtol=1e-4, atol=1e-5)
    assert not last.requires_grad


def test_a_diffuser_reads_by_ddim_the_same_however_it_is_cut() -> None:
    torch.manual_seed(3)
    model = build_model("diffuser", config(), 50).eval()
    assert isinstance(model, Diffuser)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    tokens, ddim = torch.arange(14).view(2, 7), Ddim(4, (5, 6))
    whole = model.read(tokens, model.start(2, ddim))
    state = model.start(2, ddim)
    found = [model.read(tokens[:, t : t + 1], state, last_only=True) for t in range(7)]
    torch.testing.assert_close(torch.cat(found, 1), whole, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(whole, model.hidden(tokens), atol=1e-2)


def test_naming_the_kinds_does_not_import_torch() -> None:
    code = "import sys, nanothink.models; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
