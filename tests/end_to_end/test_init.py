"""`pretrain --init`: a new run that starts from the weights of a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from random_checkpoints import write_random_checkpoint
from torch import nn

import nanothink as package
from nanothink.checkpoints import read_checkpoint
from nanothink.checkpoints.split_record import UNKNOWN_TEXT
from nanothink.cli.app import run
from nanothink.data.tokenizer import load_tokenizer
from nanothink.models.joint_gate import GATE_PREFIX
from nanothink.models.low_rank import AdaptedLinear, add_adapters
from nanothink.training.optimizer import GroupedOptimizer

SMALL = [
    *("--set", "train_expert.batch_size=2", "--set", "train_expert.amp_dtype=float32"),
    *("--set", "train_expert.sample_tokens=0", "--set", "model.max_seq_len=32", "--max-steps", "2"),
    *("--set", "train_expert.eval_max_tokens=256"),
]


@pytest.fixture
def started(tiny_corpus: Path, tmp_path: Path) -> Callable[..., int]:
    """Starts a run from a checkpoint, in the folder ``runs``."""

    def start(kind: str, init: Path, *options: str) -> int:
        where = ["--data-dir", str(tiny_corpus), "--checkpoint-dir", str(tmp_path / "runs")]
        return run(["pretrain", kind, "--init", str(init), *where, *SMALL, *options])

    return start


@pytest.fixture
def base(tiny_tokenizer: Path, tmp_path: Path) -> Callable[..., Path]:
    def write(kind: str, **settings: object) -> Path:
        tokenizer = load_tokenizer(str(tiny_tokenizer))
        return write_random_checkpoint(tmp_path / "base.pt", tokenizer, kind, **settings)

    return write


SHAPES: dict[str, tuple[str, dict[str, object]]] = {
    "transformer": ("transformer", {"transformer__n_kv_heads": 1, "transformer__head_dim": 10}),
    "gpt2": (
        "transformer",
        {"transformer__norm": "layer", "transformer__rotary_fraction": 0.0, "transformer__qk_norm": False},
    ),
    "state_space": ("state_space", {"state_space__d_state": 3, "state_space__tie_embeddings": True}),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_it_starts_from_those_weights(
    shape: str, base: Callable[..., Path], started: Callable[..., int], tmp_path: Path
) -> None:
    kind, settings = SHAPES[shape]
    path = base(kind, **settings)
    assert started(kind, path, "--set", "train_expert.lr=1e-9") == 0
    ours, first = package.load(tmp_path / "runs" / f"{kind}_expert.pt"), package.load(path)
    assert ours.notes == ()
    assert ours.tokenizer.fingerprint == first.tokenizer.fingerprint
    assert ours.model.context_length in (None, 32)
    for name, weight in first.model.state_dict().items():
        own = ours.model.state_dict()[name]
        torch.testing.assert_close(own, weight[: own.shape[0]], rtol=0, atol=1e-6)


def test_a_published_model_stays_one_of_unknown_text(
    base: Callable[..., Path], started: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from nanothink.checkpoints import write_checkpoint

    path = base("transformer")
    payload = read_checkpoint(path)
    payload["split"] = UNKNOWN_TEXT.to_state()
    payload["run"] = {"name": "base_expert", "imported": {"source": "x", "licence": "mit"}}
    payload["step"] = 0
    write_checkpoint(path, payload)
    assert started("transformer", path, "--preset", "tiny", "--set", "train_expert.lr=2e-5") == 0
    notes = " ".join(capsys.readouterr().err.split())
    assert "Chosen for the weights of a published model: optimizer=adamw, lr_matrices=1.0" in notes
    trained = package.load(tmp_path / "runs" / "transformer_expert.pt")
    training = trained.config.train_expert
    assert (training.optimizer, training.lr, training.lr_embeddings, training.batch_size) == (
        "adamw",
        2e-5,
        1.0,
        2,
    )
    assert not trained.trained_text.complete
    assert len(trained.trained_text.keys) > 50
    assert trained.split.domains == ("letters", "manuals", "tales")
    payload = read_checkpoint(trained.path)
    assert payload["run"]["imported"]["licence"] == "mit"
    capsys.readouterr()
    assert run(["eval", str(trained.path), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["checkpoints"]
    assert (row["trained_text_known"], row["seen_documents"]) == (False, 0)
    assert run(["resume", str(path)]) == 2
    assert f"--init {path}" in capsys.readouterr().err
    more = ["resume", str(trained.path), "--max-steps", "3"]
    assert run(more) == 0
    assert not package.load(trained.path).trained_text.complete


def test_text_that_it_was_trained_on_is_not_validated_on(
    base: Callable[..., Path], started: Callable[..., int], tiny_corpus: Path, tmp_path: Path
) -> None:
    """The base holds out a fifth; the run that starts from it keeps to that, on the same documents."""
    del base
    where = ["--data-dir", str(tiny_corpus), "--checkpoint-dir", str(tmp_path / "first")]
    shape = ["--set", "model.d_model=32", "--set", "transformer.n_heads=2", "--set", "transformer.n_layers=1"]
    line = ["pretrain", "transformer", *where, *SMALL, *shape, "--set", "data.val_split=0.2"]
    assert run(line) == 0
    first = tmp_path / "first" / "transformer_expert.pt"
    assert started("transformer", first) == 0
    before, after = package.load(first).split, package.load(tmp_path / "runs" / "transformer_expert.pt").split
    assert after.rule == before.rule
    assert after.held_out == before.held_out or (
        after.held_out.to_state()["val"].tolist() == before.held_out.to_state()["val"].tolist()
    )


ADAPTED = ("--lora", "2", "--set", "train_expert.dropout=0.1", "--set", "train_expert.weight_decay=0.1")


@pytest.mark.parametrize("shape", SHAPES)
def test_adapters_leave_the_base_as_it_is_and_every_command_opens_them(
    shape: str, base: Callable[..., Path], started: Callable[..., int], tmp_path: Path
) -> None:
    """Interrupted or not, the run is the same to the bit; loaded are the base and the adapters in one."""
    kind, settings = SHAPES[shape]
    path, name = base(kind, **settings), f"{kind}_expert"
    assert started(kind, path, *ADAPTED, "--set", "train_expert.lr=0.05", "--max-steps", "4") == 0
    payload, before = read_checkpoint(tmp_path / "runs" / f"{name}.pt"), read_checkpoint(path)["model_state"]
    weights = {n: w for n, w in payload["model_state"].items() if not n.startswith(GATE_PREFIX)}
    factors = {name: weight for name, weight in weights.items() if ".lora_" in name}
    assert len(factors) > 6
    assert all(factor.abs().sum() > 0 for factor in factors.values())
    for own, weight in weights.items():
        assert own in factors or torch.equal(weight, before[own][: len(weight)]), own
    groups = payload["optimizer_state"]["adamw"]["param_groups"]
    assert sorted(n for group in groups for n in group["names"]) == sorted(factors)
    assert "muon" not in payload["optimizer_state"]

    loaded = package.load(tmp_path / "runs" / f"{name}.pt")
    assert loaded.notes == ()
    for own, weight in loaded.model.state_dict().items():
        layer = own.removesuffix(".weight")
        if f"{layer}.lora_A" in factors:
            change = 2 * factors[f"{layer}.lora_B"] @ factors[f"{layer}.lora_A"]  # alpha is twice the rank
            torch.testing.assert_close(weight, weights[own] + change, rtol=0, atol=1e-6)
        else:
            assert torch.equal(weight, weights[own])

    (tmp_path / "runs").rename(tmp_path / "whole")
    few = [*ADAPTED, "--set", "train_expert.lr=0.05", "--set", "train_expert.save_every_seconds=1e-9"]
    with pytest.MonkeyPatch.context() as patch:
        steps: list[object] = []

        def stop_after_two(self: GroupedOptimizer, scaler: object = None) -> None:
            steps.append(self)
            if len(steps) == 3:
                raise KeyboardInterrupt
            step(self, scaler)  # type: ignore[arg-type]

        step = GroupedOptimizer.step
        patch.setattr(GroupedOptimizer, "step", stop_after_two)
        assert started(kind, path, *few, "--max-steps", "4") != 0
    assert len(steps) == 3
    assert read_checkpoint(tmp_path / "runs" / f"{name}_interrupted.pt")["step"] == 2
    assert run(["resume", "--checkpoint-dir", str(tmp_path / "runs")]) == 0
    again = read_checkpoint(tmp_path / "runs" / f"{name}.pt")
    assert all(torch.equal(again["model_state"][own], weights[own]) for own in weights)


def test_adapters_start_as_the_base_and_give_the_outputs_and_gradients_of_merged_weights(
    base: Callable[..., Path],
) -> None:
    x = torch.randint(40, (2, 20), generator=torch.Generator().manual_seed(5))
    for kind, settings in SHAPES.values():
        model = package.load(base(kind, **settings)).model.float().train()
        with torch.no_grad():
            first = model.logits(x)
        add_adapters(model, 3, 0.5)
        torch.testing.assert_close(model.logits(x), first, rtol=0, atol=1e-5)
        layers = {name: m for name, m in model.named_modules() if isinstance(m, AdaptedLinear)}
        for layer in layers.values():
            nn.init.normal_(layer.lora_B, std=0.3)
        model.loss(x[:, :-1], x[:, 1:], scale=0.1).backward()
        with torch.no_grad():
            stepped, state = [], model.start(2)
            for token in x.T:
                stepped.append(model.step(token[:, None], state))
        torch.testing.assert_close(torch.stack(stepped, 1), model.logits(x), rtol=0, atol=1e-4)

        plain = package.load(base(kind, **settings)).model.float().train()
        own = dict(plain.named_parameters())
        for name, layer in layers.items():
            own[f"{name}.weight"].data.copy_(layer.merged())
            own[f"{name}.weight"].requires_grad_(True)
        torch.testing.assert_close(plain.logits(x), model.logits(x), rtol=0, atol=1e-4)
        plain.loss(x[:, :-1], x[:, 1:], scale=0.1).backward()
        for name, layer in layers.items():
            whole = own[f"{name}.weight"].grad
            assert whole is not None
            torch.testing.assert_close(layer.lora_A.grad, 0.5 * layer.lora_B.T @ whole, rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(layer.lora_B.grad, 0.5 * whole @ layer.lora_A.T, rtol=1e-3, atol=1e-5)
        trained = {name for name, p in model.named_parameters() if p.grad is not None}
        assert trained == {f"{name}.lora_{part}" for name in layers for part in "AB"}


def test_only_adapters_are_counted_as_trained(
    base: Callable[..., Path], started: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    found = []
    for options in ([], ["--lora", "2"]):
        assert started("transformer", base("transformer"), *options, "--dry-run", "--json") == 0
        found.append(json.loads(capsys.readouterr().out))
    whole, adapted = found
    assert set(adapted["parameters"]) == {"adapters"}
    assert adapted["frozen_parameters"] == sum(whole["parameters"].values())
    assert adapted["memory"]["gradients"] == 4 * adapted["parameters"]["adapters"]
    assert adapted["memory"]["optimizer"] < whole["memory"]["optimizer"]


@pytest.mark.parametrize(
    ("context", "preset", "note"),
    [
        ("48", "tiny", "Blocks of 48 tokens, not of 256"),
        ("300", "tiny", "Blocks of 256 tokens: the new model's context"),
        ("48", "default", "Blocks of 48 tokens, not of 512"),
    ],
)
def test_a_context_that_is_not_asked_for_gives_way(
    context: str,
    preset: str,
    note: str,
    base: Callable[..., Path],
    tiny_corpus: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = base("transformer", model__max_seq_len=int(context))
    line = ["pretrain", "transformer", "--init", str(path), "--preset", preset, "--dry-run", "--json"]
    assert run([*line, "--data-dir", str(tiny_corpus), "--checkpoint-dir", str(tmp_path / "runs")]) == 0
    shown = capsys.readouterr()
    assert note in shown.err
    assert json.loads(shown.out)["tokens_per_step"] % int(note.split()[2]) == 0


@pytest.mark.parametrize(
    ("kind", "options", "what"),
    [
        ("state_space", [], "holds a transformer, not a state_space"),
        ("diffuser", [], "--transformer names"),
        ("transformer", ["--set", "transformer.n_layers=3"], "transformer.n_layers is 2"),
        ("transformer", ["--set", "model.max_seq_len=4096"], "beyond the context"),
        ("transformer", ["--lora", "33"], "Use at most 32"),
        ("transformer", ["--lora", "0"], "greater than or equal to 1"),
        ("transformer", ["--set", "train_expert.lora_alpha=4"], "give their rank too"),
        ("diffuser", ["--lora", "2"], "--lora is for a transformer"),
    ],
)
def test_what_does_not_fit_is_refused(
    kind: str,
    options: list[str],
    what: str,
    base: Callable[..., Path],
    started: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert started(kind, base("transformer"), *options) != 0
    assert what in " ".join(capsys.readouterr().err.split())
    assert not list((tmp_path / "runs").glob("*.pt"))
