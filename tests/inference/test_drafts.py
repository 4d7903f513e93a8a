"""Drafts change the time of a text and nothing else: its tokens and their weights are the plain ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanothink.config import Config, VectorStoreConfig
from nanothink.inference.engine import Drawn, Engine, Row
from nanothink.inference.generate import generate
from nanothink.inference.sampling import SamplingConfig
from nanothink.models import COMBINED, ExpertDescription, build_model, decoding, joint_decoding
from nanothink.models.contract import LanguageModel
from nanothink.models.decoding_states import JointState
from nanothink.models.document_cache import CachedModel
from nanothink.models.drafts import MOST_DRAFTS, Pace, no_drafts
from nanothink.models.joint_decoding import JointDecoding
from nanothink.models.joint_gate import DOCUMENT_CACHE, MEMORIES, JointGate, n_expert_features
from nanothink.models.nanothink import NanoThink
from nanothink.models.store_gate import Neighbours

VOCABULARY, WIDTH, EOS = 37, 16, 0
THREE = ("transformer", "state_space", "diffuser")


class Store:
    """Exact search among random keys."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        self.keys = F.normalize(torch.randn(200, WIDTH, generator=generator), dim=-1)
        self.tokens = torch.randint(1, VOCABULARY, (200,), generator=generator)

    def search(self, queries: Tensor) -> Neighbours:
        similarities, places = (queries @ self.keys.T).topk(4, -1)
        return Neighbours(similarities, self.tokens[places])


def combined(
    kinds: Sequence[str], layers: int = 1, memory: str = "", widths: Sequence[int] = (), context: int = 30
) -> LanguageModel:
    """Random weights, of which the drafter's count most, so that some drafts serve."""

    def config_of(width: int) -> Config:
        sections: dict[str, dict[str, Any]] = {kind: {"n_layers": 1} for kind in THREE}
        sections["model"] = {"d_model": width, "max_seq_len": context}
        sections["mla"] = {"n_layers": layers, "n_heads": 2}
        sections["transformer"] |= {"n_heads": 2}
        config = Config.model_validate(sections)
        return config.model_copy(update={"vector_store": VectorStoreConfig(enabled="store" in memory)})

    experts = [
        ExpertDescription(f"{kind}{i}", kind, config_of(widths[i] if widths else WIDTH))
        for i, kind in enumerate(kinds)
    ]
    config = config_of(WIDTH)
    torch.manual_seed(0)
    model = cast(NanoThink, build_model(COMBINED, config, VOCABULARY, experts)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    model.router.bias.data[model.drafter] += 1.0
    if "store" in memory:
        model.vector_store = Store()
    if "gate" not in memory:
        return model
    names = [name for name in MEMORIES if name != "vector_store" or "store" in memory]
    if "caches" in memory:
        names += [DOCUMENT_CACHE] * (len(kinds) - 1)
    features = torch.randn(20, n_expert_features(len(kinds)) + 6 * len(names))
    unigram = torch.zeros(VOCABULARY).log_softmax(-1)
    model.joint_gate = JointGate.start(
        names, features, unigram, n_hidden=3, generator=torch.Generator().manual_seed(0)
    )
    if "cache" not in memory:
        return model
    return cast(LanguageModel, CachedModel(model, eos_id=EOS, window=12, n_neighbours=4))


MODELS: dict[str, dict[str, Any]] = {
    "three experts": {"kinds": THREE},
    "no layers of its own": {"kinds": THREE, "layers": 0},
    "no state-space model": {"kinds": ("transformer", "diffuser")},
    "two state-space models": {"kinds": ("state_space", "transformer", "state_space")},
    "unequal widths": {"kinds": ("state_space", "transformer"), "widths": (8, WIDTH)},
    "vector store": {"kinds": THREE, "memory": "store"},
    "vector store under the joint gate": {"kinds": THREE, "memory": "store, gate"},
    "document cache": {"kinds": ("transformer", "state_space"), "memory": "gate, cache"},
    "both memories, a cache for each expert": {"kinds": THREE, "memory": "store, gate, caches"},
}
LAWS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0, "top_k": 0},
    {"temperature": 0.8, "top_k": 12, "top_p": 0.9, "repetition_penalty": 1.3},
    {"temperature": 1.0, "stop_at_eos": True},
]


@dataclass
class Passes:
    """The numbers of drafted tokens of the passes so far."""

    lengths: list[int] = field(default_factory=list)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Passes:
    seen, draft = Passes(), JointDecoding.draft

    def counted(*arguments: Any) -> list[int]:
        drafted = draft(*arguments)
        seen.lengths.append(len(drafted))
        return drafted

    monkeypatch.setattr(JointDecoding, "draft", counted)
    monkeypatch.setattr(joint_decoding, "_LARGE_HEAD", 0)  # in eight bits after the first drafts
    monkeypatch.setattr(joint_decoding, "_FEW_DRAFTS", 5)
    monkeypatch.setattr(JointDecoding, "_draft_cost", lambda *_, **__: 0.1)
    return seen


def plainly(model: LanguageModel, prompts: list[list[int]], config: SamplingConfig) -> list[list[int]]:
    with no_drafts():
        return generate(model, prompts, config, eos_id=EOS)


@pytest.mark.parametrize("name", MODELS)
def test_a_text_with_drafts_is_the_plain_text(name: str, passes: Passes) -> None:
    """Greedy and drawn, also past a context of 30 tokens and up to the end of a document."""
    model, n_tokens = combined(**MODELS[name]), 0
    for law in LAWS:
        config = SamplingConfig(**{"stop_at_eos": False, "max_new_tokens": 60, "seed": 0, **law})
        expected = plainly(model, [[1, 2, 3]], config)
        assert generate(model, [[1, 2, 3]], config, eos_id=EOS) == expected, law
        n_tokens += len(expected[0])
    assert 0.3 * n_tokens < len(passes.lengths) < 0.9 * n_tokens  # drafts served, and others failed
    assert max(passes.lengths) > 3


@pytest.mark.parametrize("by", ["compiled", "plain"])
def test_predictions_with_drafts_are_the_plain_ones(by: str, passes: Passes) -> None:
    """To the last bit by compiled steps, whatever the number of tokens that a pass reads."""
    model = combined(THREE, layers=2)
    with decoding.steps_by(cast(Any, by)), torch.inference_mode():
        plain, ahead = cast(JointState, model.start(1)), cast(JointState, model.start(1))
        ahead.choose = lambda logits, drafted: int(logits.argmax())
        text = torch.randint(1, VOCABULARY, (1, 25), generator=torch.Generator().manual_seed(0))
        for token in text.split(1, 1):
            expected = model.step(token, plain)
            found = model.step(token, ahead)
            rtol, atol = (0.0, 0.0) if by == "compiled" else (1e-4, 1e-5)
            torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)
            torch.testing.assert_close(ahead.weights, plain.weights, rtol=rtol, atol=atol)
    assert sum(passes.lengths) > 10


def finish(engine: Engine) -> list[Drawn]:
    drawn = []
    while engine.rows:
        drawn += engine.step()
    return drawn


@pytest.mark.parametrize("name", ["three experts", "document cache"])
def test_rows_that_join_and_leave_amid_drafts_give_the_text_that_they_give_alone(
    name: str, passes: Passes
) -> None:
    """One row drafts, another joins it, then leaves; one of them is taken out."""
    model = combined(**MODELS[name])
    config = SamplingConfig(temperature=1.0, max_new_tokens=40, stop_at_eos=False, seed=5)
    short = config.model_copy(update={"max_new_tokens": 9, "seed": 6})
    long, brief = plainly(model, [[1, 2]], config)[0], plainly(model, [[7, 8, 9]], short)[0]
    engine, first, second = Engine(model, eos_id=EOS), Row([1, 2], config), Row([7, 8, 9], short)
    engine.add(first)
    for _ in range(6):
        engine.step()
    engine.add(second)
    third = Row([4], config)
    engine.add(third)
    engine.step()
    engine.remove(third)
    drawn = finish(engine)
    assert first.tokens == [1, 2, *long]
    assert second.tokens == [7, 8, 9, *brief]
    assert all(abs(sum(one.weights) - 1) < 1e-4 for one in drawn)
    assert sum(passes.lengths) > 10


def test_several_texts_at_once_are_plain(passes: Passes) -> None:
    model, config = combined(THREE), SamplingConfig(max_new_tokens=20, stop_at_eos=False, seed=0)
    found = generate(model, [[1, 2], [3, 4]], config, eos_id=EOS)
    assert found == plainly(model, [[1, 2], [3, 4]], config)
    assert not passes.lengths


def test_the_number_of_drafts_follows_what_served() -> None:
    """None where drafts fail, but one now and then, so that it is noticed when they serve again."""
    pace = Pace()
    assert pace.length(0.3) in (1, 2)
    for _ in range(80):
        pace.saw(served=True)
    assert pace.length(0.3) == MOST_DRAFTS
    for _ in range(200):
        pace.saw(served=False)
    lengths = [pace.length(0.3) for _ in range(100)]
    assert set(lengths) == {0, 1}
    assert 2 <= sum(lengths) <= 10
    assert Pace().length(2.0) == 0
