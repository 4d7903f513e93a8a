"""Blocks that are recomputed or compiled: the same loss and gradients, under the same names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from nanothink.config import TrainExpertConfig
from nanothink.config.run import resolve_config
from nanothink.data.tokens import IGNORE
from nanothink.models import build_model
from nanothink.models.contract import Batch, Expert, LanguageModel
from nanothink.models.low_rank import add_adapters
from nanothink.models.mamba_mixer import Mixer
from nanothink.models.nanothink import NanoThink
from nanothink.training.blocks import compiles, set_up_blocks

VOCABULARY, CPU = 19, torch.device("cpu")
ADAPTED = ["transformer with adapters", "state_space with adapters"]
KINDS = ["transformer", "state_space", "diffuser", "nanothink_mla", *ADAPTED]


def made(kind: str, **settings: Any) -> LanguageModel:
    """A tiny model, no weight of which is zero, with its blocks set up for training."""
    config = resolve_config(
        assignments=[
            "model.d_model=16",
            "model.max_seq_len=8",
            "transformer.n_layers=2",
            "transformer.n_heads=2",
            "state_space.n_layers=2",
            "state_space.scan=plain",
            "diffuser.n_layers=2",
            "mla.n_layers=2",
            "mla.n_heads=2",
        ]
    ).config
    torch.manual_seed(0)
    if kind == "nanothink_mla":
        expert = build_model("transformer", config, VOCABULARY)
        model: LanguageModel = NanoThink(VOCABULARY, config.model, config.mla, {"transformer": expert})
    else:
        model = build_model(kind.split()[0], config, VOCABULARY)
    if kind in ADAPTED:
        add_adapters(model, 3, 2.0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.dropout.rate = settings.get("dropout", 0.0)
    set_up_blocks(model.train(), TrainExpertConfig(**settings), CPU)
    return model


def step(model: LanguageModel) -> tuple[float, Mapping[str, torch.Tensor]]:
    """Loss and gradients of one batch."""
    tokens = torch.randint(0, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))
    batch = Batch(tokens[:, :-1], tokens[:, 1:], range(5, 7))
    with model.dropout.masks(3, batch.positions, CPU):
        if isinstance(model, Expert):
            loss = model.training_loss(batch, 0.1, seed=3).total
        else:
            loss = model.loss(batch.inputs, batch.targets, scale=0.1)
    loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
def test_recomputed_activations_change_no_bit(kind: str) -> None:
    """With dropout: the second pass draws the masks of the first."""
    plain, recomputed = made(kind, dropout=0.2), made(kind, dropout=0.2, recompute_activations=True)
    kept: list[int] = [0, 0]
    results = []
    for i, model in enumerate((plain, recomputed)):

        def keep(tensor: torch.Tensor, i: int = i) -> torch.Tensor:
            kept[i] += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            results.append(step(model))
    assert kept[1] < 0.6 * kept[0], "bytes kept for the backward pass"
    assert results[0][0] == results[1][0]
    assert results[0][1].keys() == results[1][1].keys()
    for name, gradient in results[0][1].items():
        assert torch.equal(gradient, results[1][1][name]), name
    assert plain.state_dict().keys() == recomputed.state_dict().keys()


@pytest.mark.bench
@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's compiler looks at .grad
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("settings", [{}, {"dropout": 0.2, "recompute_activations": True}])
def test_compiled_blocks_agree_and_keep_their_names(kind: str, settings: dict[str, Any]) -> None:
    plain, compiled = made(kind, **settings), made(kind, compile="on", **settings)
    assert plain.state_dict().keys() == compiled.state_dict().keys()
    (loss, gradients), (other, others) = step(plain), step(compiled)
    assert other == pytest.approx(loss, rel=1e-6)
    assert gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's compiler looks at .grad
@pytest.mark.parametrize(
    "kind", ["transformer", *(pytest.param(k, marks=pytest.mark.bench) for k in KINDS[1:])]
)
def test_all_from_tokens_to_loss_is_one_graph(kind: str) -> None:
    """Nothing looks at a value, which would wait for the device. A scan, itself a kernel, stands aside."""
    model = made(kind)
    for module in model.modules():
        if isinstance(module, Mixer):
            module.scanned = lambda u, *_: (u, None)  # type: ignore[assignment, method-assign]
    tokens = torch.randint(0, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))
    inputs, targets = tokens[:, :-1], tokens[:, 1:].clone()
    targets[0, 2:5] = IGNORE
    in_one = torch.compile(model.loss, fullgraph=True, backend="eager")
    losses = [in_one(inputs, targets, scale=0.1), model.loss(inputs, targets, scale=0.1)]
    torch.testing.assert_close(*losses)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for compiled, plain in zip(
        *(torch.autograd.grad(loss, trained, allow_unused=True) for loss in losses), strict=True
    ):
        assert (compiled is None) == (plain is None)
        if plain is not None:
            torch.testing.assert_close(compiled, plain)


def test_auto_compiles_on_cuda_alone() -> None:
    for device, auto in (("cpu", False), ("cuda", True)):
        assert compiles(TrainExpertConfig(), torch.device(device)) is auto
        assert compiles(TrainExpertConfig(compile="on"), torch.device(device))
        assert not compiles(TrainExpertConfig(compile="off"), torch.device(device))
