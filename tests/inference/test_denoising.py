"""The error by noise level and reconstruction, against what they say they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from reports import Told
from torch import Tensor

from nanothink.config.run import resolve_config
from nanothink.data.batches import validation_batches
from nanothink.data.corpus import find_corpus
from nanothink.data.split import SplitRule
from nanothink.data.tokenizer import load_tokenizer
from nanothink.data.tokens import IGNORE, TokenisedCorpus, tokenise
from nanothink.errors import UsageError
from nanothink.inference.denoising import denoising_errors, measured_levels, reconstruct
from nanothink.models import build_model
from nanothink.models.diffuser import Diffuser
from nanothink.models.precision import Precision
from nanothink.wording import counted

LENGTH, LEVELS = 16, 10
EXACT = Precision(torch.device("cpu"), torch.float32, "test")


@pytest.fixture(scope="module")
def tokens(tiny_corpus: Path, tiny_tokenizer: Path) -> TokenisedCorpus:
    return tokenise(find_corpus(tiny_corpus), load_tokenizer(str(tiny_tokenizer)), split=SplitRule(0.1))


@pytest.fixture
def model(tiny_tokenizer: Path) -> Diffuser:
    shape = ["model.d_model=16", f"model.max_seq_len={LENGTH}", "transformer.n_layers=1"]
    shape += ["transformer.n_heads=2", f"diffuser.training_steps={LEVELS}", "diffuser.n_layers=1"]
    torch.manual_seed(1)
    made = build_model(
        "diffuser", resolve_config(assignments=shape).config, load_tokenizer(str(tiny_tokenizer)).vocab_size
    )
    assert isinstance(made, Diffuser)
    for tensor in (*made.parameters(), made.target_table):
        torch.nn.init.normal_(tensor, std=0.5)
    return made


def errors(model: Diffuser, tokens: TokenisedCorpus, **more: Any) -> dict[int, float]:
    return denoising_errors(model, tokens.val, length=LENGTH, precision=EXACT, **more)


def test_the_error_is_the_mean_over_valid_targets_and_features(
    model: Diffuser, tokens: TokenisedCorpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guess of zero everywhere leaves the mean square of the targets, at every level."""
    monkeypatch.setattr(model, "denoise", lambda _c, noisy, _t: (torch.zeros_like(noisy), noisy))
    rows: list[Tensor] = []
    for stream in tokens.val.values():
        for _, targets in validation_batches(stream, LENGTH, 3):
            rows.append(model.target_table[targets[targets != IGNORE]])
    expected = float(torch.cat(rows).square().mean())
    found = errors(model, tokens, n_tokens=1 << 30)
    assert list(found) == measured_levels(LEVELS) == [1, 2, 5, 8, 9, 10]
    assert list(found.values()) == pytest.approx([expected] * 6, rel=1e-5)


def test_measuring_says_how_far_it_is(model: Diffuser, tokens: TokenisedCorpus) -> None:
    heard: list[tuple[int, int]] = []
    errors(model, tokens, reporter=Told(progress=lambda _, *at: heard.append(at)))
    total = heard[-1][1]
    assert heard == [(done, total) for done in range(1, total + 1)]
    assert total % len(measured_levels(LEVELS)) == 0


def test_what_is_handed_to_the_denoiser_gets_noisier_by_level(
    model: Diffuser, tokens: TokenisedCorpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guess that is x_t itself has an error that only grows with the level."""
    monkeypatch.setattr(model, "denoise", lambda _c, noisy, _t: (noisy, noisy))
    found = list(errors(model, tokens).values())
    assert found == sorted(found)
    assert found[-1] > 10 * found[0]


def test_measuring_repeats_and_leaves_the_model_and_the_generator_alone(
    model: Diffuser, tokens: TokenisedCorpus
) -> None:
    model.train()
    model.denoiser.eval()
    state = torch.get_rng_state()
    assert errors(model, tokens) == errors(model, tokens)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert not model.denoiser.training


def test_a_perfect_head_finds_every_token_again(model: Diffuser, monkeypatch: pytest.MonkeyPatch) -> None:
    passage = list(range(40, 40 + LENGTH + 1))
    with torch.no_grad():  # rows of length 1: each is nearest to itself
        model.head_weight.copy_(torch.nn.functional.normalize(model.head_weight))
    states = model.head_weight.detach()[torch.tensor([passage[1:]])]
    monkeypatch.setattr(model, "denoise", lambda _c, noisy, _t, _g: (noisy, states))
    found = reconstruct(model, passage, [1, 7, LEVELS], n_steps=3)
    assert [r.level for r in found] == [1, 7, LEVELS]
    assert all(r.tokens == passage[1:] for r in found)
    assert all(r.right == 1.0 for r in found)


def test_reconstruction_says_what_it_cannot_take(model: Diffuser) -> None:
    for passage in ([1], list(range(LENGTH + 2))):
        with pytest.raises(UsageError, match=rf"has {counted(len(passage), 'token')}; 2 to {LENGTH + 1}"):
            reconstruct(model, passage, [1])
    for level in (0, LEVELS + 1):
        with pytest.raises(UsageError, match=rf"Noise level {level}: this diffuser has levels 1 to 10"):
            reconstruct(model, [1, 2, 3], [level])
