"""Continuous batching: rows that come and go give what they would give alone."""

from __future__ import annotations

import random

import pytest
import torch

from nanothink.config import Config
from nanothink.errors import UsageError
from nanothink.inference.engine import Drawn, Engine, Row
from nanothink.inference.generate import generate
from nanothink.inference.sampling import SamplingConfig
from nanothink.models import ExpertDescription, build_model
from nanothink.models.contract import LanguageModel
from nanothink.models.decoding_states import Ddim
from nanothink.models.diffuser import Diffuser

VOCAB, EOS = 37, 36
KINDS = ("transformer", "state_space", "diffuser", "nanothink_mla")


def build(kind: str, *, context: int = 24) -> LanguageModel:
    """A model whose weights are all of some size: a fresh one would predict every token alike."""
    torch.manual_seed(0)
    settings = {
        "model": {"d_model": 16, "max_seq_len": context},
        "transformer": {"n_layers": 2, "n_heads": 2},
        "state_space": {"n_layers": 2, "d_state": 4},
        "diffuser": {"n_layers": 1, "training_steps": 10},
        "mla": {"n_heads": 2},
    }
    config = Config.model_validate(settings)
    experts = [ExpertDescription(name, name, config) for name in KINDS[:3]]
    model = build_model(kind, config, VOCAB, experts if kind == "nanothink_mla" else ())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "A_log" not in name:
                parameter.copy_(torch.randn_like(parameter) * 0.4)
    return model.requires_grad_(False)


def prompt(length: int, seed: int) -> list[int]:
    return torch.randint(EOS, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def alone(model: LanguageModel, row: Row, text: list[int]) -> list[int]:
    return generate(model, [text], row.config, eos_id=EOS)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_come_and_go_give_the_text_that_they_give_alone(kind: str) -> None:
    """Of many lengths, past the context too, with settings of their own, some of them taken out."""
    model, chance = build(kind), random.Random(1)
    engine = Engine(model, eos_id=EOS)
    prompts: dict[Row, list[int]] = {}
    texts: dict[Row, list[int]] = {}
    removed: list[Row] = []
    for turn in range(60):
        for _ in range(chance.choice((0, 0, 1, 3)) if len(prompts) < 20 else 0):
            settings = SamplingConfig(
                max_new_tokens=chance.randint(1, 40), seed=turn, temperature=chance.choice((0.0, 0.7, 1.0))
            )
            text = prompt(chance.choice((0, 1, 3, 3, 11, 24, 30, 300)), turn)
            row = Row(text, settings)
            prompts[row], texts[row] = text, []
            engine.add(row)
        if turn % 9 == 8 and engine.rows:
            removed.append(chance.choice(engine.rows))
            engine.remove(removed[-1])
        for drawn in engine.step():
            texts[drawn.row] += [] if drawn.token is None else [drawn.token]
    while engine.rows:
        for drawn in engine.step():
            texts[drawn.row] += [] if drawn.token is None else [drawn.token]
    assert len(prompts) == 20
    assert len(removed) > 3
    for row, text in prompts.items():
        expected = alone(model, row, text)
        assert texts[row] == expected[: len(texts[row])]
        assert row in removed or len(texts[row]) == len(expected)


def finish(engine: Engine) -> list[Drawn]:
    drawn = []
    while engine.rows:
        drawn += engine.step()
    return drawn


def test_a_row_says_how_it_ended() -> None:
    model = build("transformer")
    with torch.no_grad():
        model.head_weight.zero_()
        model.head_weight[EOS] = torch.randn(16)
    engine = Engine(model, eos_id=EOS)
    rows = [
        Row([1], SamplingConfig(max_new_tokens=3, stop_at_eos=stop, temperature=1.0, top_k=0, seed=seed))
        for stop in (True, False)
        for seed in range(40)
    ]
    for row in rows:
        engine.add(row)
    drawn = finish(engine)
    ends = {one.row: one for one in drawn if one.finished}
    assert set(ends) == set(rows)
    stopped = [row for row in rows if ends[row].finished == "stop"]
    assert stopped
    assert all(row.config.stop_at_eos and ends[row].token is None for row in stopped)
    assert all(len(row.tokens) == 4 for row in rows if row not in stopped)


def test_scores_are_of_the_model_itself() -> None:
    """Whatever the temperature, and beside a row that asks for none."""
    model = build("nanothink_mla")
    engine = Engine(model, eos_id=EOS)
    text = prompt(5, 3)
    row = Row(
        text, SamplingConfig(max_new_tokens=4, temperature=0.3, seed=1, stop_at_eos=False), n_likeliest=2
    )
    silent = Row(text, SamplingConfig(max_new_tokens=4))
    engine.add(silent)
    engine.add(row)
    drawn = finish(engine)
    assert all(one.score is None for one in drawn if one.row is silent)
    own = [one for one in drawn if one.row is row]
    expected = model.logits(torch.tensor([row.tokens]))[0].log_softmax(-1)
    for place, one in enumerate(own, start=4):
        assert one.score is not None
        assert one.token is not None
        assert one.score.log_probability == pytest.approx(float(expected[place, one.token]), abs=1e-4)
        best = expected[place].topk(2)
        assert [token for token, _ in one.score.likeliest] == best.indices.tolist()
        assert sum(one.weights) == pytest.approx(1)
        assert len(one.weights) == 3


def test_a_diffuser_draws_its_noise_by_row() -> None:
    model = build("diffuser")
    assert isinstance(model, Diffuser)

    def start(seeds):
        return model.start(len(seeds), Ddim(3, tuple(seeds)))

    settings = [
        SamplingConfig(max_new_tokens=n, temperature=0, seed=n, stop_at_eos=False) for n in (3, 40, 6)
    ]
    texts = [prompt(n, n) for n in (4, 9, 30)]
    engine = Engine(model, eos_id=EOS, start=start)
    rows = [Row(text, own) for text, own in zip(texts, settings, strict=True)]
    for row in rows:
        engine.add(row)
        engine.step()
    finish(engine)
    for row, text in zip(rows, texts, strict=True):
        expected = generate(model, [text], row.config, eos_id=EOS, start=start)[0]
        assert row.tokens[len(text) :] == expected


def test_a_token_of_another_vocabulary_is_refused() -> None:
    engine = Engine(build("transformer"), eos_id=EOS)
    with pytest.raises(UsageError, match="token 37, but the model knows tokens 0 to 36"):
        engine.add(Row([1, 37], SamplingConfig()))
    assert engine.rows == []
    assert engine.step() == []


def test_a_text_goes_on_from_its_own_beginning_as_it_went() -> None:
    """With the same seed: a draw depends on the position, and not on how many were drawn before it."""
    model, text = build("transformer"), prompt(5, 1)
    config = SamplingConfig(max_new_tokens=20, seed=3, top_k=0, stop_at_eos=False)
    whole = text + alone(model, Row(text, config), text)
    assert whole[:12] + alone(model, Row(text, config), whole[:12])[:13] == whole
