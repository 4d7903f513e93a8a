"""One scale of the logits: the most likely one, in every prediction, not in training, folded into exports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from reports import Told

from nanothink.config import Config, MLAConfig, ModelConfig, StateSpaceConfig, TransformerConfig
from nanothink.data.corpus import find_corpus
from nanothink.data.split import SplitRule
from nanothink.data.tokenizer import load_tokenizer
from nanothink.data.tokens import TokenisedCorpus, tokenise
from nanothink.inference.calibration import SMALLEST, fit_logit_scale, fit_scales
from nanothink.inference.evaluate import EvaluationStopped, evaluate_model
from nanothink.models import COMBINED, EXPERTS, ExpertDescription, build_model
from nanothink.models.contract import LanguageModel
from nanothink.models.precision import Precision

LENGTH = 16
EXACT = Precision(torch.device("cpu"), torch.float32, "test")


def built(kind: str, vocab_size: int = 40, *, tied: bool = False) -> LanguageModel:
    config = Config(
        model=ModelConfig(d_model=16, max_seq_len=LENGTH),
        transformer=TransformerConfig(n_layers=1, n_heads=2, tie_embeddings=tied),
        state_space=StateSpaceConfig(n_layers=1, tie_embeddings=tied),
        mla=MLAConfig(n_layers=1, n_heads=2),
    )
    experts = [ExpertDescription(name, name, config) for name in ("transformer", "state_space")]
    torch.manual_seed(0)
    model = build_model(kind, config, vocab_size, experts if kind == COMBINED else ())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


@pytest.fixture(scope="module")
def tokens(tiny_corpus: Path, tiny_tokenizer: Path) -> TokenisedCorpus:
    tokenizer = load_tokenizer(str(tiny_tokenizer))
    return tokenise(find_corpus(tiny_corpus), tokenizer, split=SplitRule(0.3))


@pytest.fixture
def model(tokens: TokenisedCorpus, tiny_tokenizer: Path) -> LanguageModel:
    """Trained on a few blocks again and again, so that it is too sure of what it has read."""
    model = built("transformer", load_tokenizer(str(tiny_tokenizer)).vocab_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    blocks = [torch.from_numpy(tokens.train["letters"].block(i, LENGTH)[0])[None] for i in range(8)]
    inputs = torch.cat(blocks)
    for _ in range(40):
        model.loss(inputs[:, :-1], inputs[:, 1:], scale=1 / inputs.numel()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def fitted(model: LanguageModel, tokens: TokenisedCorpus, **changed: Any) -> float:
    return fit_logit_scale(model, tokens.val, **{"length": LENGTH, "precision": EXACT, **changed})


def test_no_other_scale_gives_the_text_a_greater_likelihood(
    model: LanguageModel, tokens: TokenisedCorpus
) -> None:
    found = fitted(model, tokens)
    assert SMALLEST < found < 0.8

    def loss(scale: float) -> float:
        model.logit_scale = scale
        evaluation = evaluate_model(model, tokens.val, length=LENGTH, batch_size=4, precision=EXACT)
        assert evaluation.logit_scale == scale
        return evaluation.overall.loss

    best = loss(found)
    assert best < loss(1.0) - 0.01
    assert best < min(loss(0.97 * found), loss(1.03 * found))


def test_a_surer_model_gets_a_smaller_scale(model: LanguageModel, tokens: TokenisedCorpus) -> None:
    before = fitted(model, tokens)
    with torch.no_grad():
        model.head_weight.mul_(1.5)
    assert fitted(model, tokens) == pytest.approx(before / 1.5, rel=1e-3)


def test_a_model_that_prefers_nothing_keeps_its_scale(model: LanguageModel, tokens: TokenisedCorpus) -> None:
    with torch.no_grad():
        model.head_weight.zero_()
    assert fitted(model, tokens) == 1.0
    with torch.no_grad():
        model.head_weight.fill_(torch.nan)
    assert fitted(model, tokens) == 1.0


def test_the_steps_of_the_fit_are_foretold(model: LanguageModel, tokens: TokenisedCorpus) -> None:
    told: dict[str, list[tuple[int, int]]] = {}
    fitted(
        model,
        tokens,
        reporter=Told(progress=lambda stage, *at: told.setdefault(stage, []).append(at)),
    )
    *steps, end = told["calibrating: fitting"]
    assert end[0] == end[1]
    assert [done for done, _ in steps] == list(range(len(steps)))
    assert all(abs(total - len(steps)) <= 2 for _, total in steps)
    read = told["calibrating: reading"]
    assert read[0][0] == 0
    assert read[-1][0] == read[-1][1]


def test_it_stops_when_told_and_leaves_the_training_flag(
    model: LanguageModel, tokens: TokenisedCorpus
) -> None:
    model.train()
    with pytest.raises(EvaluationStopped):
        fitted(model, tokens, should_stop=lambda: True)
    assert model.training


@pytest.mark.parametrize("kind", [*EXPERTS, COMBINED])
def test_every_prediction_is_scaled_and_the_training_loss_is_not(kind: str) -> None:
    model = built(kind).eval()
    inputs = torch.randint(40, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    targets = inputs.roll(1, 1)
    with torch.no_grad():
        raw, loss = model.logits(inputs), model.loss(inputs, targets)
        model.logit_scale = 0.7
        scaled = model.logits(inputs)
        torch.testing.assert_close(scaled, 0.7 * raw, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model.step(inputs, model.start(2)), scaled[:, -1], rtol=1e-4, atol=1e-4)
        expected = scaled.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
        torch.testing.assert_close(model.log_likelihood(inputs, targets), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model.loss(inputs, targets), loss)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", [*EXPERTS, COMBINED])
def test_folding_moves_it_into_the_weights(kind: str, tied: bool) -> None:
    model, inputs = built(kind, tied=tied).eval(), torch.arange(LENGTH)[None]
    model.logit_scale = 0.7
    with torch.no_grad():
        before = model.logits(inputs)
        model.fold_logit_scale()
        torch.testing.assert_close(model.logits(inputs), before, rtol=1e-4, atol=1e-5)
    assert model.logit_scale == 1.0


def test_the_ensemble_starts_from_calibrated_experts() -> None:
    from nanothink.models.nanothink import NanoThink

    parts = {"one": built("transformer").eval(), "other": built("state_space").eval()}
    parts["one"].logit_scale, parts["other"].logit_scale = 0.5, 0.8
    model = NanoThink(40, ModelConfig(d_model=16, max_seq_len=LENGTH), MLAConfig(n_heads=2), parts).eval()
    inputs = torch.arange(LENGTH)[None]
    with torch.no_grad():
        mean = sum(part.logits(inputs) for part in parts.values()) / 2
        torch.testing.assert_close(model.logits(inputs), mean, rtol=1e-4, atol=1e-5)


def test_scales_of_nearly_equal_experts_do_not_run_away() -> None:
    """Their sum alone is well determined."""
    generator = torch.Generator().manual_seed(0)
    states, head = torch.randn(600, 8, generator=generator), torch.randn(30, 8, generator=generator)
    other = states + 1e-3 * torch.randn(600, 8, generator=generator)
    torch.manual_seed(0)
    targets = torch.distributions.Categorical(logits=0.8 * states @ head.T).sample()
    found = fit_scales([states, other], targets, [head, head], [0.5, 0.5])
    assert sum(found) == pytest.approx(0.8, abs=0.1)
    assert min(found) > 0

    def likelihood(a: list[float]) -> float:
        z = a[0] * states @ head.T + a[1] * other @ head.T
        return float(z.log_softmax(-1).gather(-1, targets[:, None]).sum())

    assert likelihood(found) >= likelihood([0.5, 0.5])
    assert likelihood(found) >= likelihood([0.4, 0.4]) - 0.5


def test_the_better_expert_gets_the_greater_scale() -> None:
    generator = torch.Generator().manual_seed(0)
    states, head = torch.randn(600, 8, generator=generator), torch.randn(30, 8, generator=generator)
    noise = torch.randn(600, 8, generator=generator)
    torch.manual_seed(0)
    targets = torch.distributions.Categorical(logits=states @ head.T).sample()
    good, bad = fit_scales([states, noise], targets, [head, head], [0.5, 0.5])
    assert good == pytest.approx(1.0, abs=0.15)
    assert bad < 0.15
