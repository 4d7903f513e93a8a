"""A kind of expert that only this file knows: once it is registered, it does everything that experts do.

The model is in this file, and a fixture makes its entry in ``models.EXPERTS``. No other part of NanoThink has
heard of it.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import pytest
import torch
from struck_runs import assert_same_run, metrics
from torch import Tensor, nn

import nanothink
from nanothink.cli.app import run
from nanothink.config import Config
from nanothink.models import EXPERTS, ExpertKind
from nanothink.models.contract import Batch, Expert, LanguageModel, Loss, State

N_STEPS = 12


@dataclass
class Sums(State):
    """Sum of the embeddings read so far, (B, D), and their number."""

    total: Tensor
    n_read: int = 0


class Mean(Expert):
    """Predicts from the last token and the mean of all tokens up to it."""

    kind: ClassVar[str] = "toy"
    context_length = None
    interrupted_at: ClassVar[int | None] = None
    """Block position at whose loss a signal comes."""

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__()
        self.vocab_size, self.d_model = vocab_size, width
        self.table = nn.Embedding(vocab_size, width)
        self.head = nn.Linear(width, vocab_size, bias=False)

    @classmethod
    def build(cls, config: Config, vocab_size: int) -> Mean:
        return cls(vocab_size, config.model.d_model)

    @property
    def embedding(self) -> nn.Embedding:
        return self.table

    @property
    def head_weight(self) -> nn.Parameter:
        return cast(nn.Parameter, self.head.weight)

    def hidden(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)  # (B, T, D)
        counts = torch.arange(1, tokens.shape[1] + 1, device=tokens.device).view(1, -1, 1)
        states: Tensor = x + x.cumsum(1) / counts
        return states.float()

    def start(self, batch_size: int) -> Sums:
        return Sums(torch.zeros(batch_size, self.d_model))

    def read(self, tokens: Tensor, state: State, *, last_only: bool = False) -> Tensor:
        assert isinstance(state, Sums)
        with torch.no_grad():
            x = self.table(tokens)
            sums = state.total.unsqueeze(1) + x.cumsum(1)
            counts = torch.arange(state.n_read + 1, state.n_read + tokens.shape[1] + 1).view(1, -1, 1)
            state.total, state.n_read = sums[:, -1], state.n_read + tokens.shape[1]
            states: Tensor = x + sums / counts
        return states[:, -1:] if last_only else states

    def training_loss(
        self, batch: Batch, scale: float, *, seed: int, base: LanguageModel | None = None
    ) -> Loss:
        if batch.positions[0] == type(self).interrupted_at:
            signal.raise_signal(signal.SIGINT)
        loss = self.loss(batch.inputs, batch.targets, scale=scale)
        return Loss(loss, {"twice": 2 * loss.detach()})

    def activation_bytes(self, batch_size: int, length: int, value_bytes: int) -> int:
        return 8 * batch_size * length * self.d_model

    def reading_bytes(self, batch_size: int, length: int, value_bytes: int) -> int:
        return 8 * batch_size * length * self.d_model


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    EXPERTS["toy"] = ExpertKind(lambda: Mean, sections=())
    yield
    Mean.interrupted_at = None
    del EXPERTS["toy"]


@pytest.fixture
def typed(tiny_corpus: Path, tiny_tokenizer: Path) -> list[str]:
    """What to type after the command to train into a folder that follows."""
    section: dict[str, Any] = {
        "batch_size": 4,
        "amp_dtype": "float32",
        "sample_tokens": 4,
        "log_every_steps": 1,
    }
    section |= {"eval_every_steps": 4, "eval_max_tokens": 300}
    settings = {
        "model.d_model": 16,
        "model.max_seq_len": 16,
        "transformer.n_heads": 2,
        "transformer.n_layers": 1,
    }
    settings |= {
        f"train_{phase}.{name}": value for phase in ("expert", "mla") for name, value in section.items()
    }
    settings |= {"mla.n_heads": 2, "mla.n_layers": 1}
    options = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    data = ["--data-dir", str(tiny_corpus), "--tokenizer", str(tiny_tokenizer)]
    return [*data, "--max-steps", str(N_STEPS), "--device", "cpu", *options, "--checkpoint-dir"]


def test_a_registered_kind_does_all_that_experts_do(
    typed: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trains, resumes to the bit, is scored, exported, asked for text, and combined with a transformer."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run(["pretrain", "toy", *typed, str(whole)]) == 0
    steps = [entry for entry in metrics(whole, "toy_expert") if entry["event"] == "train"]
    assert [entry["step"] for entry in steps] == list(range(1, N_STEPS + 1))
    assert all(entry["twice"] == pytest.approx(2 * entry["loss"]) for entry in steps)

    Mean.interrupted_at = 4 * (N_STEPS // 2)
    assert run(["pretrain", "toy", *typed, str(cut)]) == 130
    Mean.interrupted_at = None
    assert run(["resume", "--checkpoint-dir", str(cut)]) == 0
    assert_same_run(whole, cut, "toy_expert")

    checkpoint = whole / "toy_expert.pt"
    capsys.readouterr()
    assert run(["eval", str(checkpoint), "--json"]) == 0
    (scored,) = json.loads(capsys.readouterr().out)["checkpoints"]
    assert scored["kind"] == "toy"
    assert run(["generate", "The", "-c", str(checkpoint), "-n", "5"]) == 0
    assert run(["checkpoints", "export", str(checkpoint), "--to", str(tmp_path / "export")]) == 0
    tokens = torch.tensor([[1, 2, 3]])
    opened, exported = nanothink.load(checkpoint), nanothink.load(tmp_path / "export")
    assert torch.allclose(opened.logits(tokens), exported.logits(tokens), atol=1e-5)

    assert run(["pretrain", "transformer", *typed, str(whole)]) == 0
    experts = ["--expert", str(checkpoint), "--expert", str(whole / "transformer_expert.pt")]
    assert run(["train-mla", *experts, *typed, str(whole)]) == 0
    combined = nanothink.load(whole / "nanothink_mla.pt")
    weights = combined.routing(tokens)
    assert combined.model.components == ("toy", "transformer")
    assert torch.allclose(weights.sum(-1), torch.ones(1, 3))
    assert isinstance(combined.generate("The", max_new_tokens=3), str)


def test_an_unknown_kind_is_refused_with_those_that_there_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["pretrain", "toi", "--data-dir", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "transformer, state_space, diffuser, toy" in said
    assert "'toy'" in said
