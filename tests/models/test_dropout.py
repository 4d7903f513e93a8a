"""Dropout: the same masks however blocks are batched, none in evaluation, in every kind of model; causal."""

from __future__ import annotations

import pytest
import torch

from nanothink.config import Config, MLAConfig, ModelConfig, TransformerConfig
from nanothink.models import COMBINED, EXPERTS, ExpertDescription, build_model
from nanothink.models.contract import LanguageModel
from nanothink.models.dropout import Dropout

CPU = torch.device("cpu")
CONFIG = Config(
    model=ModelConfig(d_model=16, max_seq_len=8),
    transformer=TransformerConfig(n_layers=1, n_heads=2),
    mla=MLAConfig(n_layers=1, n_heads=2),
)


def built(kind: str) -> LanguageModel:
    torch.manual_seed(0)
    experts = [ExpertDescription(name, name, CONFIG) for name in ("transformer", "state_space")]
    model = build_model(kind, CONFIG, 30, experts if kind == COMBINED else ())
    with torch.no_grad():
        for parameter in model.parameters():  # nothing is zero as at the start
            parameter.add_(0.1 * torch.randn(parameter.shape))
    model.dropout.rate = 0.5
    return model


def hidden(model: LanguageModel, tokens: torch.Tensor, positions: list[int], seed: int = 7) -> torch.Tensor:
    with model.dropout.masks(seed, positions, CPU):
        return model.hidden(tokens).detach()


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_the_fraction_is_zeroed_and_the_mean_stays(rate: float) -> None:
    dropout, x = Dropout(), torch.ones(4, 50, 100)
    dropout.rate = rate
    with dropout.masks(0, range(4), CPU):
        y, other_place = dropout(x), dropout(x)
    assert float((y == 0).float().mean()) == pytest.approx(rate, abs=0.01)
    assert float(y.mean()) == pytest.approx(1.0, abs=0.02)
    assert not torch.equal(y, other_place)
    assert torch.equal(dropout(x), x)


@pytest.mark.parametrize("kind", [*EXPERTS, COMBINED])
def test_a_blocks_masks_depend_on_seed_and_position_alone(kind: str) -> None:
    model, tokens = built(kind), torch.randint(30, (3, 8), generator=torch.Generator().manual_seed(1))
    together = hidden(model, tokens, [4, 5, 6])
    torch.rand(3)  # the global generator has no part in it
    alone = torch.cat([hidden(model, tokens[i : i + 1], [4 + i]) for i in (2, 0, 1)])[[1, 2, 0]]
    torch.testing.assert_close(together, alone)
    assert not torch.allclose(together, hidden(model, tokens, [5, 6, 7]))
    assert not torch.allclose(together, hidden(model, tokens, [4, 5, 6], seed=8))


@pytest.mark.parametrize("kind", [*EXPERTS, COMBINED])
def test_dropout_leaves_a_model_causal_and_evaluation_alone(kind: str) -> None:
    model, tokens = built(kind), torch.randint(30, (1, 8), generator=torch.Generator().manual_seed(1))
    changed = tokens.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 30
    before, after = hidden(model, tokens, [0]), hidden(model, changed, [0])
    torch.testing.assert_close(before[:, :5], after[:, :5], rtol=0, atol=0)
    assert not torch.allclose(before[:, 5:], after[:, 5:])
    evaluated = model.hidden(tokens).detach()
    assert not torch.allclose(before, evaluated)
    model.dropout.rate = 0.0
    torch.testing.assert_close(hidden(model, tokens, [0]), evaluated, rtol=0, atol=0)


@pytest.mark.parametrize("kind", [*EXPERTS, COMBINED])
def test_gradients_flow_through_the_masks(kind: str) -> None:
    model, tokens = built(kind), torch.zeros(1, 8, dtype=torch.int64)
    with model.dropout.masks(0, [0], CPU):
        model.loss(tokens, tokens).backward()
    trained = [p.grad for p in model.parameters() if p.requires_grad]
    assert any(grad is not None and grad.abs().sum() > 0 for grad in trained)
