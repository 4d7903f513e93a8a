"""One story about the types to compute in, by processor: run, checkpoint, resume, evaluation and doctor."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nanothink.checkpoints import read_checkpoint
from nanothink.cli.app import run
from nanothink.config import Config
from nanothink.config.run import resolve_config
from nanothink.runs.preparing import prepare
from nanothink.runs.resuming import RunSpec
from nanothink.training import matmul_speed

Said = Callable[[], str]
Processor = Callable[[float, float], None]


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Processor:
    """Go on as on another processor, by the speeds that a measurement finds there."""
    (tmp_path / "cache").mkdir()
    monkeypatch.setattr(matmul_speed, "private_folder", lambda *_: tmp_path / "cache")
    muon = matmul_speed._muon

    def marked(width: int) -> matmul_speed.Work:
        work = muon(width)
        of_muon.append(work)
        return work

    of_muon: list[matmul_speed.Work] = []
    monkeypatch.setattr(matmul_speed, "_muon", marked)

    def go_on(step_speed: float, muon_speed: float) -> None:
        monkeypatch.setattr(matmul_speed, "_KNOWN", {})
        monkeypatch.setattr(matmul_speed, "processor", lambda: f"{step_speed} {muon_speed}")
        monkeypatch.setattr(
            matmul_speed, "ratio", lambda work, _: muon_speed if work in of_muon else step_speed
        )

    return go_on


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Said:
    return lambda: "".join(capsys.readouterr())


@pytest.fixture
def train(tiny_corpus: Path, tiny_tokenizer: Path, tmp_path: Path) -> Callable[..., None]:
    known = ("--data-dir", tiny_corpus, "--tokenizer", tiny_tokenizer, "--checkpoint-dir", tmp_path / "runs")
    shape = ("model.d_model=32", "model.max_seq_len=32", "transformer.n_layers=1", "transformer.n_heads=2")
    small = (*shape, "train_expert.batch_size=4", "train_expert.sample_tokens=0")

    def call(*more: str | Path, settings: tuple[str, ...] = small) -> None:
        sets = (part for setting in settings for part in ("--set", setting))
        assert run(["pretrain", "transformer", *map(str, (*known, *sets, *more))]) == 0

    return call


def types(path: Path) -> dict[str, str]:
    train = read_checkpoint(path)["config"]["train_expert"]
    return {name: train[name] for name in ("amp_dtype", "muon_dtype")}


def test_every_command_goes_by_one_measurement(
    processor: Processor, train: Callable[..., None], said: Said, tmp_path: Path
) -> None:
    best = tmp_path / "runs" / "transformer_expert.pt"
    processor(9.2, 0.8)
    train("--max-steps", "2")
    story = (
        "measured at 9.20 times the speed of float32; in Muon's steps at 0.80 times, so they are in float32"
    )
    assert f"Computing in bfloat16 on cpu: {story}." in said()
    assert types(best) == {"amp_dtype": "bfloat16", "muon_dtype": "float32"}
    assert run(["doctor", "--device", "cpu", "--json"]) == 0
    found = json.loads(said())
    assert found["precision"] == f"bfloat16: {story}"
    assert found["bfloat16 on this CPU"].startswith("9.20 times the speed of float32 in a step's products")
    assert "0.80 in Muon's" in found["bfloat16 on this CPU"]
    assert str(tmp_path / "cache") in found["bfloat16 on this CPU"]

    assert run(["eval", str(best), "--json"]) == 0
    quick = said()
    assert "computing in" not in quick

    processor(0.5, 0.5)  # the same folder on a machine that is slow at it
    assert run(["eval", str(best), "--json"]) == 0
    slow = said()
    why = "computing in float32: bfloat16, as trained, is 0.50 times as fast as float32 here"
    assert f"{best.name}: {why}." in slow
    bits = [
        json.loads(text[: text.rindex("}") + 1])["checkpoints"][0]["overall"]["bits_per_byte"]
        for text in (quick, slow)
    ]
    assert bits[0] != bits[1]
    assert bits[0] == pytest.approx(bits[1], rel=2e-3)
    train("--resume", str(best), "--max-steps", "3", settings=())
    assert "Computing in bfloat16 on cpu: as configured; 0.50 times as fast" in said()
    assert types(best) == {"amp_dtype": "bfloat16", "muon_dtype": "float32"}

    train("--max-steps", "1", "--overwrite")
    assert "float32 on cpu: bfloat16 was measured at 0.50 times its speed; 1.2 is needed." in said()
    assert types(best) == {"amp_dtype": "float32", "muon_dtype": "float32"}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_named_type_is_trained_in(
    dtype: str, processor: Processor, train: Callable[..., None], said: Said, tmp_path: Path
) -> None:
    processor(0.1, 0.1)
    named = ("--set", f"train_expert.amp_dtype={dtype}", "--set", f"train_expert.muon_dtype={dtype}")
    train("--max-steps", "3", *named)
    assert f"Computing in {dtype} on cpu: as configured; 0.10 times as fast as float32 here." in said()
    path = tmp_path / "runs" / "transformer_expert.pt"
    assert types(path) == {"amp_dtype": dtype, "muon_dtype": dtype}
    payload = read_checkpoint(path)
    assert payload["step"] == 3
    assert bool(payload["amp_scaler"]) == (dtype == "float16")
    assert all(torch.isfinite(weight).all() for weight in payload["model_state"].values())


def test_other_processes_take_the_types_of_the_first(
    processor: Processor, tiny_corpus: Path, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    """Their own measurement could fall differently."""
    processor(0.1, 0.1)
    flags: dict[str, tuple[str, Any]] = {
        "data.data_dir": ("--data-dir", str(tiny_corpus)),
        "data.tokenizer": ("--tokenizer", str(tiny_tokenizer)),
    }
    spec = RunSpec("transformer", tmp_path)

    def setup(types: dict[str, str] | None) -> Config:
        return prepare(spec, lambda base: resolve_config(base=base, flags=flags), types=types).config

    assert setup(None).train_expert.amp_dtype == "float32"
    told = {"amp_dtype": "bfloat16", "muon_dtype": "bfloat16"}
    assert setup(told).train_expert.model_dump(include=set(told)) == told
