"""The diffuser: causal in use and in training, the same step by step, exact targets, a loss as written."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from promises import assert_causal, assert_steps_are_parallel, plain_outputs
from tiny_diffuser import (
    BLOCKS,
    CONTEXT,
    LEVELS,
    SIZES,
    TARGETS,
    VOCAB,
    WIDTH,
    batch_of,
    build,
    draws,
    teacher,
    tokens,
)
from torch import Tensor

from nanothink.data.tokens import IGNORE
from nanothink.errors import UsageError
from nanothink.models.contract import Batch
from nanothink.models.decoding_states import Ddim
from nanothink.models.diffuser import Diffuser
from nanothink.models.noise import Draws, diffuse
from nanothink.training.objectives import ExpertObjective

# ---------------------------------------------------------------------------------------------------
# Causality


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_in_use_tokens_after_t_change_nothing_at_or_before_t(training: bool, autocast: bool) -> None:
    outputs = plain_outputs(build().train(training), tokens(3, 30, seed=9))
    assert_causal(outputs, tokens(3, 30), VOCAB, autocast=autocast)


@pytest.mark.parametrize("evaluations", [1, 2])
@pytest.mark.parametrize("prediction", ["clean", "velocity"])
@pytest.mark.parametrize("training", [False, True])
def test_in_training_a_position_sees_neither_later_tokens_nor_targets_of_others(
    evaluations: int, prediction: str, training: bool
) -> None:
    """All parts of the loss, with position t as the only one that counts."""
    model = build(evaluations=evaluations, prediction=prediction, rounding_every=1).train(training)
    length, t = 20, 9
    x, y = tokens(4, length), tokens(4, length, seed=9)
    clean, chance = model.clean_targets(y), draws(model, 4, length)
    only = torch.full_like(y, IGNORE)
    only[:, t] = y[:, t]

    def parts(inputs: Tensor = x, clean: Tensor = clean, chance: Draws = chance) -> dict[str, float]:
        with torch.no_grad():
            return {
                name: float(part)
                for name, part in model.denoising_losses(inputs, only, clean, chance, 1.0).items()
            }

    before = parts()
    assert set(before) == {"cross_entropy", "mse_pure", "mse_noised", "rounding"}
    others = torch.arange(length) != t
    later = x.clone()
    later[:, t + 1 :] = (later[:, t + 1 :] + 1) % VOCAB
    elsewhere = torch.where(others.view(-1, 1), clean + 3.0, clean)
    noisier = replace(
        chance,
        noise=torch.where(others.view(-1, 1), chance.noise - 2.0, chance.noise),
        pure=torch.where(others.view(-1, 1), chance.pure + 2.0, chance.pure),
        levels=torch.where(others, LEVELS + 1 - chance.levels, chance.levels),
    )
    for changed in (parts(later), parts(clean=elsewhere), parts(chance=noisier)):
        assert changed == pytest.approx(before, rel=1e-5)

    # what it may see does matter, or nothing was tested
    earlier = x.clone()
    earlier[:, t - 3] = (earlier[:, t - 3] + 1) % VOCAB
    assert all(parts(earlier)[name] != pytest.approx(value, rel=1e-4) for name, value in before.items())
    own = parts(clean=torch.where(others.view(-1, 1), clean, clean + 3.0))
    assert own["cross_entropy"] == pytest.approx(before["cross_entropy"], rel=1e-6)
    for name in ("mse_pure", "mse_noised", "rounding"):
        assert own[name] != pytest.approx(before[name], rel=1e-4), name


# ---------------------------------------------------------------------------------------------------
# One model, two ways


@pytest.mark.parametrize("chunks", [(1,) * 40, (40,), (20, 1, 1, 7, 1, 10), (1, 39)])
@pytest.mark.parametrize("prediction", ["clean", "velocity"])
def test_stepwise_logits_equal_parallel_logits(chunks: tuple[int, ...], prediction: str) -> None:
    assert_steps_are_parallel(build(prediction=prediction).eval(), tokens(3, 40), chunks)


@pytest.mark.parametrize("n_steps", [1, 2, 5, LEVELS])
def test_ddim_by_steps_is_ddim_over_the_whole_text(n_steps: int) -> None:
    """Cut into steps or not, and alone or with others, a sequence has the noise of its seed."""
    model, x = build().eval(), tokens(2, 12)
    together = model.start(2, Ddim(n_steps, (3, 4)))
    model.step(x[:, :7], together)
    found = model.step(x[:, 7:], together)
    for row, seed in enumerate((3, 4)):
        alone = model.step(x[row : row + 1], model.start(1, Ddim(n_steps, (seed,))))
        torch.testing.assert_close(found[row : row + 1], alone, rtol=1e-4, atol=1e-4)
    other = model.step(x, model.start(2, Ddim(n_steps, (5, 4))))
    assert not torch.allclose(other[0], found[0], atol=1e-3)
    torch.testing.assert_close(other[1], found[1], rtol=1e-4, atol=1e-4)


def test_a_perfect_denoiser_is_recovered_by_the_model_s_sampler(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    clean = torch.randn(3, WIDTH)
    monkeypatch.setattr(model, "denoise", lambda *_: (clean, clean))
    condition = model.condition(model.encoder(tokens(3, 1))[:, 0])
    for level, n_steps in ((LEVELS, 5), (7, 100), (1, 1)):
        guess, _ = model.denoise_by_ddim(condition, torch.randn(3, WIDTH), level, n_steps)
        assert torch.equal(guess, clean)


def test_sampling_in_more_steps_than_there_are_levels_is_refused() -> None:
    for n_steps in (0, LEVELS + 1):
        with pytest.raises(UsageError, match=rf"DDIM in {n_steps} steps: this diffuser has {LEVELS}"):
            build().start(1, Ddim(n_steps, (0,)))


def test_a_full_state_says_what_to_do() -> None:
    model = build()
    state = model.start(1)
    model.step(tokens(1, CONTEXT), state)
    with pytest.raises(UsageError, match="start a new state"):
        model.step(tokens(1, 1), state)
    with pytest.raises(UsageError, match="41 tokens were given"):
        model.hidden(tokens(1, CONTEXT + 1))


# ---------------------------------------------------------------------------------------------------
# Targets


@pytest.mark.parametrize("target", TARGETS)
def test_targets_are_the_transformer_s_standardised_over_the_sample(target: str) -> None:
    model, frozen, sample = build(target=target, trained=False), teacher(), tokens(8, CONTEXT, seed=11)
    assert torch.equal(model.embedding.weight, frozen.embedding.weight)
    found = model.clean_targets(sample, frozen)
    assert not found.requires_grad
    torch.testing.assert_close(found.mean((0, 1)), torch.zeros(WIDTH), rtol=0, atol=1e-4)
    torch.testing.assert_close(found.flatten(0, 1).std(0), torch.ones(WIDTH), rtol=1e-3, atol=0)
    raw = {
        "input_embedding": F.rms_norm(frozen.embedding.weight, (WIDTH,))[sample],
        "head_row": F.rms_norm(frozen.head_weight - frozen.head_weight.mean(0), (WIDTH,))[sample],
        "hidden_state": frozen.hidden(sample),
    }[target]
    torch.testing.assert_close(found * model.target_scale + model.target_mean, raw, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("target", TARGETS)
def test_what_fills_up_a_block_counts_for_nothing_in_mean_and_spread(target: str) -> None:
    """A domain smaller than a block gives blocks that are mostly filling."""
    sample = tokens(6, CONTEXT, seed=11)
    filled = sample.clone()
    filled[:, 9:] = IGNORE
    model, frozen = build(target=target, trained=False), teacher()
    model.adopt(frozen, filled)
    mean, scale = model.target_mean.clone(), model.target_scale.clone()
    model.adopt(frozen, sample[:, :9])
    torch.testing.assert_close(mean, model.target_mean)
    torch.testing.assert_close(scale, model.target_scale)


@pytest.mark.parametrize(("length", "every"), [(16, 4), (10, 4), (5, 16)])
def test_the_tokens_that_are_rounded_stand_for_all(length: int, every: int) -> None:
    """Averaged over where they begin, their cross-entropy is that of every token."""
    model = build(rounding_every=every)
    x = tokens(1, length + 1)
    clean, chance = model.clean_targets(x[:, 1:]), draws(model, 1, length)

    def rounding(offset: int) -> float:
        begun = replace(chance, offset=torch.tensor([offset]))
        return float(model.denoising_losses(x[:, :-1], x[:, 1:], clean, begun, 1.0)["rounding"].detach())

    found = sum(map(rounding, range(length))) / length
    model.shape = model.shape.model_copy(update={"rounding_every": 1})
    assert found == pytest.approx(rounding(0), rel=1e-5)


def test_only_hidden_states_need_the_transformer_afterwards() -> None:
    for target in ("input_embedding", "head_row"):
        model = build(target=target)
        state = model.state_dict()
        assert not [name for name in state if "transformer" in name]
        again = Diffuser(VOCAB, SIZES, BLOCKS, model.shape)
        again.load_state_dict(state)
        x = tokens(2, 10)
        assert torch.equal(again.logits(x), model.logits(x))
        assert torch.equal(again.clean_targets(x), model.clean_targets(x))
    with pytest.raises(UsageError, match="hidden states of its transformer"):
        build(target="hidden_state").clean_targets(tokens(1, 4))


# ---------------------------------------------------------------------------------------------------
# The start, the roles, and that it learns


def test_without_self_conditioning_there_is_nothing_that_takes_a_guess() -> None:
    model = build(self_conditioning=0.0)
    assert not [name for name, _ in model.named_parameters() if "guess" in name]
    condition, noisy = model.condition(model.encoder(tokens(1, 5))), torch.randn(1, 5, WIDTH)
    alone, _ = model.denoise(condition, noisy, 3)
    assert torch.equal(model.denoise(condition, noisy, 3, torch.ones(1, 5, WIDTH))[0], alone)


def test_in_sampling_the_guess_is_the_one_from_pure_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    condition = model.condition(model.encoder(tokens(1, 5)))
    seen: list[tuple[int, Tensor | None]] = []
    given: list[Tensor] = []
    denoise = model.denoise

    def spy(condition: Any, noisy: Tensor, level: int, guess: Tensor | None) -> tuple[Tensor, Tensor]:
        seen.append((level, guess))
        given.append(denoise(condition, noisy, level, guess)[0])
        return given[-1], given[-1]

    monkeypatch.setattr(model, "denoise", spy)
    model.denoise_by_ddim(condition, torch.randn(1, 5, WIDTH), LEVELS, 3)
    assert [(level, guess is None) for level, guess in seen] == [(12, True), (8, False), (4, False)]
    assert seen[1][1] is given[0]
    assert seen[2][1] is given[0]
    seen.clear()
    model.denoise_by_ddim(condition, torch.randn(1, 5, WIDTH), 6, 2)
    assert [guess for _, guess in seen] == [None, None]


def test_it_starts_uniform_and_knowing_nothing() -> None:
    model, batch = build(trained=False), batch_of(4)
    n_targets = int((batch.targets != IGNORE).sum())
    found = ExpertObjective(5)(model, batch, 1 / n_targets).parts
    clean = model.clean_targets(batch.targets)
    variance = (clean.square().mean(-1) * (batch.targets != IGNORE)).sum() / n_targets
    assert float(found["cross_entropy"]) == pytest.approx(math.log(VOCAB), rel=1e-5)
    assert float(found["rounding"]) == pytest.approx(math.log(VOCAB), rel=0.5)  # some positions only
    # a velocity of zero leaves sqrt(alpha-bar) of the noise in the guess: nearly nothing at the last level
    assert float(found["mse_pure"]) == pytest.approx(float(variance), rel=1e-3)
    assert model.loss(batch.inputs, batch.targets, scale=1 / n_targets).item() == pytest.approx(
        math.log(VOCAB), rel=1e-5
    )


def test_every_parameter_has_the_role_it_should() -> None:
    groups = {role: [name for name, _ in named] for role, named in build().parameter_groups().items()}
    assert groups["embeddings"] == ["encoder.embed_tokens.weight"]
    assert groups["head"] == ["lm_head.weight"]
    assert all(name.endswith("norm.weight") or ".norms." in name for name in groups["other"])
    assert {name.rpartition(".")[0] for name in groups["matrices"] if name.startswith("denoiser.")} == {
        *(f"denoiser.{name}" for name in ("context_proj", "noisy_proj", "guess_proj", "context_modulation")),
        *(f"denoiser.{name}" for name in ("level_proj", "level_modulation", "out_proj")),
        *(f"denoiser.mlps.{i}.{name}" for i in (0, 1) for name in ("gate_proj", "up_proj", "down_proj")),
    }


@pytest.mark.parametrize("prediction", ["clean", "velocity"])
def test_it_learns_to_predict_and_to_denoise(prediction: str) -> None:
    """A text that repeats: cross-entropy falls, and so does the error wherever there is something to find."""
    model = build(trained=False, prediction=prediction)
    text = torch.arange(17).repeat(4, 1)
    text = (text * torch.tensor([[1], [2], [3], [5]])) % 23
    objective = ExpertObjective(5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def errors() -> list[float]:
        with torch.no_grad():
            clean = model.clean_targets(text[:, 1:])
            condition = model.condition(model.encoder(text[:, :-1]))
            noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
            return [
                float(F.mse_loss(model.denoise(condition, diffuse(clean, noise, a), level)[0], clean))
                for level in (1, 6, LEVELS)
                for a in [model.alpha_bars[level]]
            ]

    before = errors()
    for step in range(60):
        batch = Batch(text[:, :-1], text[:, 1:], range(4 * step, 4 * step + 4))
        objective(model, batch, 1 / 64).total.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert model.loss(text[:, :-1], text[:, 1:], scale=1 / 64).item() < 0.5 * math.log(VOCAB)
    after = errors()
    assert after[1] < 0.7 * before[1]
    assert after[2] < 0.7 * before[2]
    if prediction == "clean":
        assert after[0] < 0.6 * before[0]
    else:  # it begins as the noisy target itself, which is hardly noisy at level 1
        assert after[0] < 0.05
    assert after[0] < after[-1]


@pytest.mark.parametrize("evaluations", [1, 2])
@pytest.mark.parametrize("denoiser_layers", [1, 3])
def test_the_memory_estimate_covers_what_backward_keeps(evaluations: int, denoiser_layers: int) -> None:
    model = build(evaluations=evaluations, denoiser_layers=denoiser_layers)
    batch, kept = batch_of(8, length=CONTEXT), {}
    own = {t.untyped_storage().data_ptr() for t in model.state_dict().values()}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        ExpertObjective(5)(model, batch, 1.0)
    assert 1.0 < model.activation_bytes(8, CONTEXT, 4) / sum(kept.values()) < 1.8
