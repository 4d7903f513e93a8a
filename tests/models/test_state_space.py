"""The state-space expert: equal to MambaForCausalLM, causal, the same step by step, started as designed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from promises import (
    assert_causal,
    assert_every_token_matters,
    assert_steps_are_parallel,
    assert_steps_stay_close_under_autocast,
    plain_outputs,
)
from torch import Tensor, nn

from nanothink.config import ModelConfig, StateSpaceConfig
from nanothink.data.tokens import IGNORE
from nanothink.errors import UsageError
from nanothink.models import state_space
from nanothink.models.mamba_mixer import delta_rank
from nanothink.models.selective_scan import compiled
from nanothink.models.state_space import StateSpace, to_mamba_config

VOCAB = 61
SCANS = [
    "plain",
    pytest.param("compiled", marks=pytest.mark.skipif(bool(compiled.unavailable()), reason="no compiler")),
]


def build(
    *,
    width: int = 24,
    layers: int = 2,
    seed: int = 0,
    trained: bool = True,
    **shape: float | bool | str,
) -> StateSpace:
    """A small model; ``trained`` gives the weights that start at zero or one random values."""
    torch.manual_seed(seed)
    model = StateSpace(
        VOCAB,
        ModelConfig(d_model=width, max_seq_len=16),
        StateSpaceConfig(n_layers=layers, **shape),
    )
    if trained:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(("conv1d.bias", "out_proj.weight", "lm_head.weight")):
                    parameter.normal_(std=0.3)
                elif name.endswith(("norm.weight", "norm_f.weight", ".D", "A_log")):
                    parameter.add_(torch.randn_like(parameter), alpha=0.2)
                elif name.endswith("dt_proj.bias"):
                    parameter.add_(2.0)  # steps large enough that the state forgets within a test
    return model


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize(
    ("batch", "length", "tied", "shape"),
    [
        (3, 17, False, {}),
        (1, 1, False, {}),
        (1, 33, True, {"layers": 1}),
        (2, 70, False, {"width": 40, "layers": 3, "d_state": 5, "conv_width": 3}),
        (2, 3, False, {"width": 20, "expand": 3, "delta_rank": 7}),  # shorter than the convolution
        (2, 64, True, {"width": 32, "d_state": 1, "conv_width": 2}),
    ],
)
def test_logits_and_all_gradients_equal_mamba(
    batch: int, length: int, tied: bool, shape: dict[str, Any], scan: str
) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    model = build(tie_embeddings=tied, scan=scan, **shape)
    reference = MambaForCausalLM(MambaConfig(**to_mamba_config(model)))
    missing, unexpected = reference.load_state_dict(model.state_dict(), strict=False)
    reference.tie_weights()
    assert unexpected == []
    assert missing == (["lm_head.weight"] if tied else [])

    x, y = tokens(batch, length), tokens(batch, length, seed=1)
    expected = reference(input_ids=x).logits
    found = model.logits(x)
    assert float((found - expected).detach().norm() / expected.detach().norm()) < 1e-5

    nn.functional.cross_entropy(expected.flatten(0, 1), y.flatten()).backward()
    model.loss(x, y, scale=1 / y.numel()).backward()
    theirs = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    ours = {name: p.grad for name, p in model.named_parameters()}
    assert theirs.keys() == ours.keys()
    for name, gradient in ours.items():
        assert gradient is not None, name
        # A single step from a state of zero forgets nothing, so A has no say; more than two use every tap.
        assert gradient.any() or (length == 1 and name.endswith("A_log")), name
        error = float((gradient - theirs[name]).norm() / theirs[name].norm().clamp_min(1e-12))
        assert error < 1e-4, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("scan", SCANS)
def test_tokens_after_t_change_nothing_at_or_before_t(training: bool, autocast: bool, scan: str) -> None:
    model = build(layers=3, scan=scan).train(training)
    outputs = plain_outputs(model, tokens(4, 70, seed=9))
    assert_causal(outputs, tokens(4, 70), VOCAB, autocast=autocast)


def test_every_earlier_token_matters() -> None:
    assert_every_token_matters(build().hidden, tokens(1, 12), VOCAB)


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("cuts", [[1] * 48, [48], [5, 1, 1, 20, 2, 19], [1, 47], [33, 15]])
def test_however_a_text_is_cut_into_steps_the_logits_are_the_same(cuts: list[int], scan: str) -> None:
    assert_steps_are_parallel(build(layers=3, scan=scan).eval(), tokens(2, 48), cuts)


def test_steps_equal_the_parallel_pass_under_autocast_too() -> None:
    assert_steps_stay_close_under_autocast(build().eval(), tokens(2, 48))


def test_a_long_prompt_is_read_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = build().eval(), tokens(1, 50)
    expected = model.logits(x)[:, -1]
    monkeypatch.setattr(state_space, "_PIECE", 7)
    torch.testing.assert_close(model.step(x, model.start(1)), expected, rtol=1e-4, atol=1e-5)


def test_the_memory_has_one_size_and_no_end() -> None:
    """Far past max_seq_len, which is 16 here: nothing fills up, nothing grows."""
    model = build()
    assert model.context_length is None
    state = model.start(2)
    sizes = set()
    model.step(tokens(2, 3), state)
    for t in range(200):
        model.step(tokens(2, 1, seed=t), state)
        kept = [z for layer in state.layers if layer is not None for z in (layer.conv_state, layer.ssm_state)]
        sizes.add(sum(z.untyped_storage().nbytes() for z in kept))
    assert len(sizes) == 1
    assert model.hidden(tokens(1, 300)).shape == (1, 300, 24)
    model.loss(tokens(1, 300), tokens(1, 300, seed=1)).backward()


def test_what_was_read_long_ago_is_still_in_the_state() -> None:
    """Nothing is reset at max_seq_len: the state carries over, and so does the gradient."""
    model = build(trained=True)
    with torch.no_grad():
        for layer in model.backbone.layers:
            layer.get_parameter("mixer.A_log").fill_(
                -6.0
            )  # slow decay, so that 200 steps later something is left
    x = tokens(1, 200)
    embedded = model.embedding(x).detach().requires_grad_()
    y = embedded
    for layer in model.backbone.layers:
        y = layer(y)
    y[:, -1].square().sum().backward()
    assert embedded.grad is not None
    assert embedded.grad[0, 0].any()


def test_a_state_for_another_batch_is_refused() -> None:
    model = build()
    with pytest.raises(UsageError, match="for 2 sequences, but 3"):
        model.step(tokens(3, 1), model.start(2))


def test_it_starts_as_designed() -> None:
    model = build(width=96, layers=2, trained=False)
    for name, parameter in model.named_parameters():
        value = parameter.detach()
        if name.endswith(("out_proj.weight", "lm_head.weight", "conv1d.bias")):
            assert not value.any(), name
        elif name == "backbone.embeddings.weight":
            assert float(value.std()) == pytest.approx(1.0, rel=0.05)
        elif name.endswith("A_log"):  # S4D-Real: A = -(1 .. N) in every channel
            assert torch.allclose(value.exp(), torch.arange(1.0, 17).expand(192, -1))
        elif name.endswith((".D", "norm.weight", "norm_f.weight")):
            assert (value == 1).all(), name
        elif name.endswith("dt_proj.bias"):  # steps log-uniform between 0.001 and 0.1
            steps = nn.functional.softplus(value)
            assert 0.001 * 0.999 < float(steps.min()) < 0.0015
            assert 0.07 < float(steps.max()) < 0.1 * 1.001
            assert float(steps.log().mean()) == pytest.approx(math.log(0.01), abs=0.25)
        elif name.endswith("dt_proj.weight"):
            assert float(value.abs().max()) == pytest.approx(6**-0.5, rel=0.02)
        elif name.endswith("conv1d.weight"):
            assert float(value.abs().max()) == pytest.approx(0.5, rel=0.02)
        else:
            assert float(value.std()) == pytest.approx(0.6 * parameter.shape[1] ** -0.5, rel=0.05), name
    # The logarithm instead of the inverse of softplus would end at log(1.1) = 0.0953.
    biases = [layer.get_parameter("mixer.dt_proj.bias").detach() for layer in model.backbone.layers]
    steps = nn.functional.softplus(torch.cat(biases))
    assert 0.0955 < float(steps.max()) < 0.1 * 1.001
    x = tokens(2, 20)
    assert model.loss(x, x, scale=1 / x.numel()).item() == pytest.approx(math.log(VOCAB), rel=1e-5)


def test_roles_of_the_parameters() -> None:
    groups = build().parameter_groups()
    assert [name for name, _ in groups["embeddings"]] == ["backbone.embeddings.weight"]
    assert [name for name, _ in groups["head"]] == ["lm_head.weight"]
    matrices = {name.split("mixer.")[1] for name, _ in groups["matrices"]}
    assert matrices == {f"{part}.weight" for part in ("in_proj", "x_proj", "dt_proj", "out_proj")}
    others = {name.split("mixer.")[-1] for name, _ in groups["other"]}
    of_mixer = {"A_log", "D", "conv1d.weight", "conv1d.bias", "dt_proj.bias"}
    norms = {"backbone.norm_f.weight", *(f"backbone.layers.{i}.norm.weight" for i in range(2))}
    assert others == of_mixer | norms


def test_weights_stay_float32_and_outputs_come_in_float32_under_autocast() -> None:
    model, x = build(), tokens(2, 16)
    with torch.autocast("cpu", torch.bfloat16):
        states = model.hidden(x)
        loss = model.loss(x, x)
    loss.backward()
    assert states.dtype == loss.dtype == model.logits(x).dtype == torch.float32
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
    states, exact = states.detach(), model.hidden(x).detach()
    assert 0 < float((states - exact).norm() / exact.norm()) < 0.05  # it did compute in bfloat16


def test_the_state_is_float32_under_autocast() -> None:
    model = build()
    state = model.start(1)
    with torch.autocast("cpu", torch.bfloat16):
        model.step(tokens(1, 9), state)
        model.step(tokens(1, 1), state)
    assert [layer.ssm_state.dtype for layer in state.layers if layer is not None] == [torch.float32] * 2


def test_loss_and_log_likelihood_agree_with_the_logits() -> None:
    model, x, y = build(), tokens(3, 16), tokens(3, 16, seed=1)
    y[0, 3:9] = IGNORE
    nats = nn.functional.cross_entropy(model.logits(x).flatten(0, 1), y.flatten(), reduction="none")
    torch.testing.assert_close(model.log_likelihood(x, y), -nats.view(3, 16), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.loss(x, y, scale=0.5), 0.5 * nats.sum(), rtol=1e-5, atol=1e-5)


def test_the_plain_and_the_compiled_scan_train_alike() -> None:
    if compiled.unavailable():
        pytest.skip("no compiler")
    gradients = []
    for scan in ("plain", "compiled"):
        model = build(scan=scan)
        model.loss(tokens(2, 40), tokens(2, 40, seed=1)).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert float((gradients[0] - gradients[1]).norm() / gradients[0].norm()) < 1e-5


def test_the_state_dict_holds_weights_only() -> None:
    model = build()
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize(
    ("width", "asked", "rank"), [(384, None, 24), (24, None, 2), (8, None, 1), (384, 5, 5)]
)
def test_rank_of_the_steps(width: int, asked: int | None, rank: int) -> None:
    assert delta_rank(width, StateSpaceConfig(delta_rank=asked)) == rank
