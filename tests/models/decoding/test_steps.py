"""Compiled steps against the models' own: any shape, any cut of a text, rows that join, changed weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from forking_shell import ForkingShell
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from nanothink.config import Config
from nanothink.errors import UsageError
from nanothink.models import COMBINED, EXPERTS, ExpertDescription, build_model, decoding
from nanothink.models.contract import LanguageModel
from nanothink.models.decoding import MAX_ROWS, compiled, int8, large_pages

VOCABULARY = 67
needs_compiler = pytest.mark.skipif(bool(compiled.unavailable()), reason=compiled.unavailable() or "-")
KINDS = (*EXPERTS, COMBINED)


@pytest.fixture(params=[pytest.param("compiled", marks=needs_compiler), "plain"])
def by(request: pytest.FixtureRequest) -> Iterator[str]:
    """What runs the programs."""
    with decoding.steps_by(request.param):
        yield request.param


def model_of(kind: str, width: int = 24, **shape: Any) -> LanguageModel:
    """A model of two layers in which every weight counts."""
    sections: dict[str, dict[str, Any]] = {name: {"n_layers": 2} for name in EXPERTS}
    sections |= {"transformer": {"n_layers": 2, "n_heads": 1}, "mla": {"n_heads": 2}}
    sections[{COMBINED: "mla"}.get(kind, kind)] |= shape
    config = Config.model_validate({"model": {"d_model": width, "max_seq_len": 150}, **sections})
    torch.manual_seed(0)
    experts = [ExpertDescription(name, name, config) for name in EXPERTS] if kind == COMBINED else []
    model = build_model(kind, config, VOCABULARY, experts).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def text(batch: int, length: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))


def close(found: Tensor, expected: Tensor) -> None:
    expected = expected.detach()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


SHAPES = [
    ("transformer", 24, {}),
    ("transformer", 10, {"n_heads": 5, "n_layers": 1}),  # heads of two features: less than any vector
    ("transformer", 100, {"n_heads": 5, "ffn_mult": 1.3, "tie_embeddings": True}),
    ("transformer", 128, {"n_heads": 1}),
    ("state_space", 24, {}),
    ("state_space", 14, {"d_state": 3, "expand": 1, "conv_width": 2, "delta_rank": 1}),
    ("state_space", 50, {"d_state": 5, "conv_width": 7, "tie_embeddings": True}),
    ("state_space", 64, {"expand": 3, "delta_rank": 33}),
    ("diffuser", 24, {}),
    ("diffuser", 34, {"denoiser_layers": 1, "denoiser_mult": 1.4, "self_conditioning": 0.0}),
    (COMBINED, 24, {}),
    (COMBINED, 34, {"n_layers": 1, "router": "global", "n_heads": 3, "head_dim": 5, "rope_dim": 6}),
    (COMBINED, 24, {"n_layers": 0}),
]


@pytest.mark.parametrize(("kind", "width", "shape"), SHAPES)
@pytest.mark.parametrize("batch", [1, 3])
def test_steps_give_the_parallel_logits_for_any_shape(
    kind: str, width: int, shape: dict[str, Any], batch: int, by: str
) -> None:
    """From the first token, after a prompt, and past the first buffers of a cache."""
    model, tokens = model_of(kind, width, **shape), text(batch, 70)
    expected, state, at = model.logits(tokens), model.start(batch), 0
    for length in (1, 1, 56, *[1] * 10):
        at += length
        close(model.step(tokens[:, at - length : at], state), expected[:, at - 1])
    step = getattr(state, "latents", state).step
    assert step is not None
    assert step.program.run_by == by


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_may_be_cut_anywhere(kind: str, by: str) -> None:
    """Pieces short enough for a program, and others between them that are read in parallel."""
    model, tokens = model_of(kind), text(2, 70)
    states, state, found, at = model.hidden(tokens), model.start(2), [], 0
    for length in (1, 5, 25, 1, 8, 1, 1, 17, 3, 8):
        found.append(model.read(tokens[:, at : at + length], state))
        at += length
    close(torch.cat(found, 1), states)
    last = model.read(tokens[:, :4], model.start(2), last_only=True)
    close(last, states[:, 3:4])
    close(model.step(tokens[:, :4], model.start(2)), model.logits(tokens)[:, 3])


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_join_and_leave(kind: str, by: str) -> None:
    model, tokens = model_of(kind), text(3, 30)
    expected = model.logits(tokens)
    state, late = model.start(2), model.start(1)
    for t in range(20):
        model.step(tokens[:2, t : t + 1], state)
    for t in range(7):
        model.step(tokens[2:, t : t + 1], late)
    state.join(late)
    found = model.step(torch.stack([tokens[0, 20:21], tokens[1, 20:21], tokens[2, 7:8]]), state)
    close(found, torch.stack([expected[0, 20], expected[1, 20], expected[2, 7]]))
    state.drop(0)  # the last row takes its place
    found = model.step(torch.stack([tokens[2, 8:10], tokens[1, 21:23]]), state)
    close(found, torch.stack([expected[2, 9], expected[1, 22]]))


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_read_where_they_lie(kind: str, by: str) -> None:
    """Other weights loaded, or a model converted and back: nothing is out of date."""
    model, other, tokens = model_of(kind), model_of(kind), text(1, 4)
    for parameter in other.parameters():
        nn.init.normal_(parameter, std=0.2)
    state = model.start(1)
    model.step(tokens[:, :2], state)
    model.load_state_dict(other.state_dict())
    close(model.step(tokens, model.start(1)), other.logits(tokens)[:, -1])
    state = model.start(1)
    model.step(tokens[:, :2], state)
    model.double().float()
    close(model.step(tokens[:, 2:], state), other.logits(tokens)[:, -1])


def test_a_full_cache_is_an_error() -> None:
    model = model_of("transformer")
    state = model.start(1)
    model.step(text(1, 150), state)
    with pytest.raises(UsageError, match="context is 150"):
        model.step(text(1, 1), state)
    with pytest.raises(UsageError, match="for 1 sequences"):
        model.step(text(2, 1), model.start(1))


@pytest.mark.parametrize("rows", [1, 2])
def test_grouped_heads_share_their_keys(rows: int, by: str) -> None:
    heads, groups, width, room = 6, 2, 5, 12
    x, keys, values = (
        torch.randn(rows, heads * width),
        torch.randn(1, groups, room, width),
        torch.randn(1, groups, room, width),
    )
    program = decoding.new_program()
    y = program.attend(x, keys, values, 0.4)
    program.run(torch.zeros(1, rows, dtype=torch.int64), [8])
    for row in range(rows):
        for head in range(heads):
            g, seen = head // 3, 9 + row
            query = x[row, head * width : (head + 1) * width]
            weights = (0.4 * (keys[0, g, :seen] @ query)).softmax(0)
            close(y[row, head * width : (head + 1) * width], weights @ values[0, g, :seen])


@pytest.mark.parametrize("rows", [1, 2])
def test_a_gate_far_below_zero_is_shut(rows: int, by: str) -> None:
    program = decoding.new_program()
    y = program.gate(torch.full((rows, 3), -1000.0), torch.ones(rows, 3))
    program.run(torch.zeros(1, rows, dtype=torch.int64), [0])
    assert not y[:rows].any()


def test_what_programs_do_not_know_takes_the_models_own_step() -> None:
    model, tokens = model_of("transformer"), text(1, 6)
    expected = model.logits(tokens)
    model.get_submodule("model.layers.1.mlp").register_parameter("extra", nn.Parameter(torch.zeros(1)))
    state = model.start(1)
    for t in range(6):
        close(model.step(tokens[:, t : t + 1], state), expected[:, t])
    assert state.step is None
    with torch.autocast("cpu", torch.bfloat16):
        assert not decoding.suits(tokens, model.head_weight)
    assert not decoding.suits(text(1, MAX_ROWS + 1), model.head_weight)


def test_matrix_products_in_several_threads_come_sooner() -> None:
    head, before = torch.zeros(4, 4), torch.get_num_threads()
    try:
        found = {}
        for n_threads in (1, 2):
            torch.set_num_threads(n_threads)
            found[n_threads] = [decoding.suits(text(n, 1), head) for n in (16, 17, MAX_ROWS)]
    finally:
        torch.set_num_threads(before)
    assert found == {1: [True, True, True], 2: [True, False, False]}


def test_not_a_number_comes_out_as_such(by: str) -> None:
    for kind in KINDS:
        model = model_of(kind)
        with torch.no_grad():
            next(
                p
                for name, p in model.named_parameters()
                if name.endswith(("layers.0.norm.weight", "v_proj.weight"))
            ).view(-1)[0] = torch.nan
        assert model.step(text(1, 1), model.start(1)).isnan().any()


def test_without_a_compiler_programs_run_in_pytorch(shell: ForkingShell, tmp_path: Path) -> None:
    code = (
        "import torch\nfrom nanothink.config import Config\nfrom nanothink.models import build_model\n"
        "from nanothink.models.decoding import compiled\nprint(compiled.unavailable())\n"
        "model = build_model('transformer', Config.model_validate({'model': {'d_model': 16}, 'transformer': "
        "{'n_heads': 2}}), 9).eval()\nstate = model.start(1)\n"
        "print(model.step(torch.zeros(1, 1, dtype=torch.int64), state).shape, state.step.program.run_by)"
    )
    done = shell.python(code, tmp_path, PATH=str(tmp_path), XDG_CACHE_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "no C++ compiler found (g++, c++ or clang++)",
        "torch.Size([1, 9]) plain",
    ]


# --- weights of eight bits: steps read codes, everything else what they mean ---------------------


@needs_compiler
@pytest.mark.parametrize("kind", KINDS)
def test_steps_read_the_codes_and_agree_with_the_parallel_pass(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = model_of(kind, width=64)
    x = torch.randint(0, VOCABULARY, (2, 40))
    before = exact.logits(x)
    rounded = model_of(kind, width=64)
    assert int8.round_weights(rounded) > 5
    parallel = rounded.logits(x).detach()
    with torch.inference_mode():
        state = rounded.start(2)
        found = torch.stack([rounded.step(x[:, t : t + 1], state) for t in range(40)], dim=1)
    torch.testing.assert_close(found, parallel, rtol=1e-4, atol=1e-4)
    assert 1e-4 < (parallel - before).abs().max() < 0.3 * before.abs().max()
    # Had the steps not read the codes, codes of zero would change nothing.
    for codes in list(int8._known.values()):
        codes.numbers.zero_()
    with torch.inference_mode():
        state = rounded.start(2)
        for t in range(2):
            other = rounded.step(x[:, t : t + 1], state)
    assert (other - parallel[:, 1]).abs().max() > 1e-3


def test_codes_are_of_the_nearest_steps_and_go_with_the_rows() -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(48, 20, bias=False)
    weight = layer.weight.detach().clone()
    assert int8.round_weights(layer) == 1
    step = weight.abs().amax(1, keepdim=True) / 127
    assert ((layer.weight - weight).abs() <= step / 2 * 1.001).all()
    found = int8.codes_of(layer.weight[5:9])
    assert found is not None
    numbers, scales = found[0].view(torch.int8), found[1]
    torch.testing.assert_close(numbers * scales.unsqueeze(1), layer.weight[5:9].detach(), rtol=1e-6, atol=0)
    assert int8.codes_of(torch.randn(4, 48)) is None
    layer.weight.data = layer.weight.data.clone()  # as a move to another device does
    assert int8.codes_of(layer.weight) is None


def test_narrow_and_16_bit_matrices_stay() -> None:
    narrow, half = torch.nn.Linear(8, 64), torch.nn.Linear(64, 64).bfloat16()
    assert int8.round_weights(torch.nn.ModuleList([narrow, half])) == 0


def test_without_a_compiler_a_step_computes_the_same() -> None:
    model = model_of("transformer", width=64)
    int8.round_weights(model)
    x = torch.randint(0, VOCABULARY, (1, 5))
    with decoding.steps_by("plain"), torch.inference_mode():
        plain = model.step(x, model.start(1))
    torch.testing.assert_close(plain, model.logits(x)[:, -1].detach(), rtol=1e-4, atol=1e-4)
    if not compiled.unavailable():
        with torch.inference_mode():
            torch.testing.assert_close(model.step(x, model.start(1)), plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_lie_together_are_the_same_parameters(kind: str, tmp_path: Path) -> None:
    shape = {"tie_embeddings": True} if kind == "transformer" else {}
    model, tokens = model_of(kind, **shape).requires_grad_(False), text(1, 9)
    before, expected = dict(model.named_parameters()), model.logits(tokens)
    large_pages.lay_together(model)
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] for name in before)
    addresses = sorted(parameter.data_ptr() for parameter in after.values())
    assert addresses[-1] - addresses[0] < sum(parameter.nbytes + 64 for parameter in after.values())
    assert torch.equal(model.logits(tokens), expected)
    state = model.start(1)
    for t in range(9):
        close(model.step(tokens[:, t : t + 1], state), expected[:, t])
    save_model(model, str(tmp_path / "model.safetensors"))
    nn.init.zeros_(model.head_weight)
    load_model(model, tmp_path / "model.safetensors")
    assert torch.equal(model.logits(tokens), expected)


def test_the_largest_weights_stay_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = nn.Linear(8, 8, bias=False), nn.Linear(8, 100, bias=False)
    monkeypatch.setattr(large_pages, "_LARGE", large.weight.nbytes)
    before = small.weight.data_ptr(), large.weight.data_ptr()
    large_pages.lay_together(nn.Sequential(small, large))
    assert small.weight.data_ptr() != before[0]
    assert large.weight.data_ptr() == before[1]
