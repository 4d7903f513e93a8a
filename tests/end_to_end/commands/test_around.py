"""Listings, settings, the doctor, and words."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from reports import Told
from small_run import Said, as_json

from nanothink.cli.app import run


def test_checkpoints_are_listed_shown_verified_and_pruned(copied: Path, said: Said) -> None:
    where = ["--checkpoint-dir", str(copied)]
    shutil.copy(copied / "transformer_expert.pt", copied / "transformer_expert_epoch1.pt")
    shutil.copy(copied / "transformer_expert.pt", copied / "transformer_expert_epoch2.pt")
    assert run(["checkpoints", "ls", *where]) == 0
    assert "transformer_expert_epoch2.pt" in said()[0]
    assert run(["checkpoints", "show", str(copied / "transformer_expert.pt")]) == 0
    shown = said()[0]
    assert "model.layers.0" in shown
    assert "completed, 80 blocks read in all" in shown
    assert run(["checkpoints", "verify", *where]) == 0
    damaged = copied / "transformer_expert_epoch2.pt"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    said()
    assert run(["checkpoints", "verify", *where, "--json"]) == 1
    assert [f["ok"] for f in as_json(said)["files"]].count(False) == 1
    assert run(["checkpoints", "ls", *where]) == 0
    assert "damaged" in said()[0]
    damaged.unlink()
    shutil.copy(copied / "transformer_expert.pt", damaged)
    assert run(["checkpoints", "prune", *where, "--json"]) == 0
    assert as_json(said)["removed"] == [str(copied / "transformer_expert_epoch1.pt")]


def test_settings_and_where_they_come_from(
    said: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nanothink.toml").write_text("[train_expert]\nlr = 0.001\n")
    monkeypatch.setenv("NANOTHINK_TRAIN_EXPERT__SEED", "7")
    assert run(["config", "show", "--preset", "tiny", "--json"]) == 0
    shown = as_json(said)
    assert shown["train_expert.lr"]["source"].endswith("nanothink.toml")
    assert shown["train_expert.seed"] == shown["train_expert.seed"] | {
        "value": 7,
        "source": "NANOTHINK_TRAIN_EXPERT__SEED",
    }
    assert shown["model.d_model"]["source"] == "preset tiny"
    assert run(["config", "presets"]) == 0
    assert "tiny" in said()[0]


def test_underscores_of_older_scripts_are_understood(tiny_corpus: Path, said: Said) -> None:
    assert run(["data", "validate", "--data_dir", str(tiny_corpus)]) == 0
    assert "110 records in 3 files: all valid" in said()[0]


def test_one_of_something_is_singular(said: Said, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.jsonl").write_text('{"text": "one"}\n{"text": 1}\n')
    assert run(["data", "validate", str(tmp_path)]) == 1
    assert "1 record in 1 file: 1 error." in said()[0]


def test_the_doctor_answers(said: Said, tmp_path: Path) -> None:
    assert run(["doctor", "--json", "--checkpoint-dir", str(tmp_path)]) == 0
    found = as_json(said)
    assert {"device", "precision", "torch", "C++ compiler", "disk"} <= set(found)
    assert "HF_HUB_OFFLINE" in found["tokenizer"] or "cache" in found["tokenizer"]


def test_doctor_tells_how_far_it_is(tmp_path: Path) -> None:
    from nanothink.runs.doctor import examine

    told: list[tuple[str, int, int]] = []
    examine(None, tmp_path, Told(progress=lambda *at: told.append(at)))
    assert told == [("examining", done, 3) for done in range(3)]
