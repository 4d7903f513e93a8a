"""`pretrain --init`: a new run that starts from the weights of a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from random_checkpoints import write_random_checkpoint

import nanothink as package
from nanothink.checkpoints import read_checkpoint
from nanothink.checkpoints.split_record import UNKNOWN_TEXT
from nanothink.cli.app import run
from nanothink.data.tokenizer import load_tokenizer

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
    assert started("transformer", path) == 0
    trained = package.load(tmp_path / "runs" / "transformer_expert.pt")
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


@pytest.mark.parametrize(
    ("kind", "options", "what"),
    [
        ("state_space", [], "holds a transformer, not a state_space"),
        ("diffuser", [], "--transformer names"),
        ("transformer", ["--set", "transformer.n_layers=3"], "transformer.n_layers is 2"),
        ("transformer", ["--set", "model.max_seq_len=4096"], "beyond the context"),
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
