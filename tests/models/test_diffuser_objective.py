"""The diffuser's loss and all its gradients are those of its equations, however a batch is cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_diffuser import (
    CONTEXT,
    LEVELS,
    TARGETS,
    WIDTH,
    batch_of,
    build,
    draws,
    teacher,
    tokens,
)
from torch import Tensor

from nanothink.data.tokens import IGNORE
from nanothink.models.contract import Batch, Loss
from nanothink.models.diffuser import Diffuser
from nanothink.models.noise import Draws, clean_from_velocity, diffuse
from nanothink.training.objectives import ExpertObjective


@pytest.mark.parametrize("target", TARGETS)
def test_training_leaves_the_transformer_as_it_was(target: str) -> None:
    frozen = teacher()
    before = {name: tensor.clone() for name, tensor in frozen.state_dict().items()}
    model = build(target=target, trained=False)
    model.adopt(frozen, tokens(8, CONTEXT, seed=11))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    table = model.target_table.clone()
    objective = ExpertObjective(5, frozen if target == "hidden_state" else None)
    weights = model.head_weight.detach().clone()
    for step in range(4):
        objective(model, batch_of(2, first=2 * step), 1.0).total.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(model.head_weight, weights)
    assert torch.equal(model.target_table, table)
    assert all(torch.equal(tensor, before[name]) for name, tensor in frozen.state_dict().items())
    assert all(parameter.grad is None for parameter in frozen.parameters())
    shared = {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in frozen.parameters()}
    assert not shared


def by_hand(model: Diffuser, batch: Batch, chance: Draws) -> dict[str, Tensor]:
    """The parts of the loss for two evaluations, one position at a time, from the equations."""
    clean, n_levels = model.clean_targets(batch.targets), model.shape.training_steps
    states = model.encoder(batch.inputs)
    every = model.shape.rounding_every
    sums = {name: torch.zeros(()) for name in ("cross_entropy", "mse_pure", "mse_noised", "rounding")}
    for b in range(len(states)):
        chosen = {int(chance.offset[b] + i) % states.shape[1] for i in range(0, states.shape[1], every)}
        for t in range(states.shape[1]):
            y = batch.targets[b, t]
            if y == IGNORE:
                continue
            condition = model.condition(states[b, t : t + 1])  # (1, D)
            guess, hidden = model.denoise(condition, chance.pure[b, t : t + 1], n_levels)
            level = int(chance.levels[b, t])
            alpha_bar = model.alpha_bars[level]
            noisy = alpha_bar.sqrt() * clean[b, t] + (1 - alpha_bar).sqrt() * chance.noise[b, t]
            earlier = guess.detach() if chance.guided[b] else torch.zeros(1, WIDTH)
            second, rounded = model.denoise(condition, noisy.unsqueeze(0), level, earlier)
            sums["mse_pure"] += F.mse_loss(guess[0], clean[b, t])
            sums["mse_noised"] += noised_error(model, second[0], noisy, clean[b, t], alpha_bar)
            sums["cross_entropy"] += F.cross_entropy(model.lm_head(hidden)[0], y)
            if t in chosen:
                sums["rounding"] += (
                    states.shape[1] / len(chosen) * F.cross_entropy(model.lm_head(rounded)[0], y)
                )
    return sums


def noised_error(model: Diffuser, guess: Tensor, noisy: Tensor, clean: Tensor, alpha_bar: Tensor) -> Tensor:
    """Of what the network predicts: the squared error of the velocity behind this guess, or of the guess."""
    if model.shape.prediction == "clean":
        return F.mse_loss(guess, clean)
    true = (alpha_bar.sqrt() * noisy - clean) / (1 - alpha_bar).sqrt()
    return F.mse_loss((alpha_bar.sqrt() * noisy - guess) / (1 - alpha_bar).sqrt(), true)


@pytest.mark.parametrize("prediction", ["clean", "velocity"])
@pytest.mark.parametrize("every", [1, 4, 5])
def test_the_loss_and_all_its_gradients_are_those_of_the_equations(prediction: str, every: int) -> None:
    shape: dict[str, Any] = {
        "mse_weight": 0.7,
        "cross_entropy_weight": 1.3,
        "prediction": prediction,
        "rounding_every": every,
    }
    model, batch = build(**shape), batch_of(3, first=1)
    chance = draws(model, 3, 16, first=1)
    null = (chance.pure == 0).flatten(1).all(1)
    assert 0 < int(null.sum()) < 3
    assert 0 < int(chance.guided.sum()) < 3
    found = ExpertObjective(5)(model, batch, 0.25)
    found.total.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    parts = by_hand(model, batch, chance)
    total = 0.7 * (parts["mse_pure"] + parts["mse_noised"])
    total = total + 1.3 * (parts["cross_entropy"] + parts["rounding"] / every)
    (0.25 * total).backward()
    torch.testing.assert_close(found.total, 0.25 * total, rtol=1e-4, atol=1e-4)
    for name, part in parts.items():
        torch.testing.assert_close(found.parts[name], 0.25 * part.detach(), rtol=1e-4, atol=1e-4)
    for name, parameter in model.named_parameters():
        expected, gradient = parameter.grad, gradients[name]
        assert expected is not None, name
        assert gradient is not None, name
        assert expected.any(), f"{name}: a gradient of zero compares nothing"
        tolerance = 1e-4 * float(expected.abs().max())
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=tolerance, msg=f"{name}: {{}}".format)


def test_with_one_evaluation_each_block_is_either_pure_or_noised_and_counts_twice() -> None:
    model, batch = build(evaluations=1, rounding_every=1), batch_of(6)
    chance = draws(model, 6, 16)
    assert 0 < int(chance.split.sum()) < 6
    clean = model.clean_targets(batch.targets)
    found = ExpertObjective(5)(model, batch, 1.0).parts
    condition = model.condition(model.encoder(batch.inputs))
    valid = batch.targets != IGNORE
    noisy = diffuse(clean, chance.noise, model.alpha_bars[chance.levels].unsqueeze(-1))
    for part, rows, x, levels in (
        ("mse_pure", chance.split, chance.pure, torch.full_like(chance.levels, LEVELS)),
        ("mse_noised", ~chance.split, noisy, chance.levels),
    ):
        guess, hidden = model.denoise(condition, x, levels)
        weight = 1.0 if part == "mse_pure" else 1 / (1 - model.alpha_bars[levels])
        error = ((guess - clean).square().mean(-1) * valid * weight)[rows].sum()
        torch.testing.assert_close(found[part], 2 * error.detach(), rtol=1e-4, atol=1e-4)
        nats = F.cross_entropy(
            model.lm_head(hidden[rows]).flatten(0, 1), batch.targets[rows].flatten(), reduction="sum"
        )
        head = "cross_entropy" if part == "mse_pure" else "rounding"
        torch.testing.assert_close(found[head], 2 * nats.detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("evaluations", [1, 2])
def test_a_batch_can_be_cut_into_micro_batches(evaluations: int) -> None:
    model, objective = build(evaluations=evaluations), ExpertObjective(5)
    whole = batch_of(4)
    losses: list[Loss] = [objective(model, whole, 0.5)]
    losses += [
        objective(model, Batch(whole.inputs[i : i + 1], whole.targets[i : i + 1], [i]), 0.5) for i in range(4)
    ]
    for name in losses[0].parts:
        summed = sum(loss.parts[name] for loss in losses[1:])
        torch.testing.assert_close(losses[0].parts[name], summed, rtol=1e-4, atol=1e-4)


def test_by_mse_alone_the_head_learns_and_nothing_below_it_does_by_it() -> None:
    model = build(cross_entropy_weight=0.0, mse_weight=0.0)
    ExpertObjective(5)(model, batch_of(3), 1.0).total.backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert moved == {"lm_head.weight"}


def test_velocity_is_turned_into_the_clean_target() -> None:
    model = build(prediction="velocity")
    condition = model.condition(model.encoder(tokens(2, 6)))
    noisy, level = torch.randn(2, 6, WIDTH), 5
    predicted, _ = model.denoiser(condition, noisy, level, None)
    guess, _ = model.denoise(condition, noisy, level)
    torch.testing.assert_close(guess, clean_from_velocity(noisy, predicted, model.alpha_bars[level]))
