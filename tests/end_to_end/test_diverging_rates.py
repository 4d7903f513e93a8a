"""A learning rate that diverges, for every kind: the run stops, says why, and leaves what was good."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from nanothink.checkpoints.file import read_checkpoint
from nanothink.cli.app import run

PHASE_OF = {
    "transformer": "train_expert",
    "state_space": "train_expert",
    "diffuser": "train_diffuser",
    "nanothink_mla": "train_mla",
}
N_GOOD, N_PATIENT = 8, 3
TRAINING = {
    "batch_size": 4,
    "warmup_steps": 0,
    "amp_dtype": "float32",
    "log_every_steps": 1,
    "sample_tokens": 0,
    "eval_max_tokens": 200,
    "max_skipped_steps": N_PATIENT,
}
SETTINGS = {
    "model.d_model": 16,
    "model.max_seq_len": 16,
    "transformer.n_layers": 1,
    "transformer.n_heads": 2,
    "state_space.n_layers": 1,
    "diffuser.n_layers": 1,
    "diffuser.training_steps": 10,
    "mla.n_layers": 1,
    "mla.n_heads": 2,
    **{f"{phase}.{name}": value for phase in set(PHASE_OF.values()) for name, value in TRAINING.items()},
}


def stem_of(kind: str) -> str:
    return kind if kind == "nanothink_mla" else f"{kind}_expert"


@pytest.fixture(scope="module")
def good(tiny_corpus: Path, tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All four kinds, a few steps trained as they should be. Read only."""
    folder = tmp_path_factory.mktemp("good")
    where = ["--data-dir", str(tiny_corpus), "--checkpoint-dir", str(folder), "--max-steps", str(N_GOOD)]
    shape = [part for name, value in SETTINGS.items() for part in ("--set", f"{name}={value}")]
    for kind in PHASE_OF:
        command = ["train-mla"] if kind == "nanothink_mla" else ["pretrain", kind]
        own = ["--tokenizer", str(tiny_tokenizer)] if kind != "nanothink_mla" else []
        assert run([*command, *where, *own, *shape]) == 0
    return folder


@pytest.mark.parametrize("kind", PHASE_OF)
@pytest.mark.parametrize("every_seconds", [180, 1e-6], ids=["saved by evaluations", "saved at every step"])
def test_it_stops_says_why_and_leaves_what_was_good(
    kind: str,
    every_seconds: float,
    good: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, stem, phase = tmp_path / "checkpoints", stem_of(kind), PHASE_OF[kind]
    shutil.copytree(good, folder)
    best = folder / f"{stem}.pt"
    before = best.read_bytes()
    rates = [f"--set={phase}.lr_{group}=1e38" for group in ("matrices", "embeddings", "head", "other")]
    saving = f"--set={phase}.save_every_seconds={every_seconds}"
    go_on = ["resume", str(best), "--checkpoint-dir", str(folder)]
    capsys.readouterr()

    assert run([*go_on, "--max-steps", "40", *rates, saving]) == 1
    said = capsys.readouterr().err
    assert "The last good checkpoint is untouched. Lower the learning rate" in said
    assert f"--set {phase}.lr=" in said
    if every_seconds > 1:
        assert f"not finite for {N_PATIENT} steps in a row" in said
        steps = trained(folder, stem)
        assert [step["skipped"] for step in steps[-N_PATIENT - 1 :]] == [False, *[True] * N_PATIENT]
    assert best.read_bytes() == before
    assert_finite(folder)
    assert run([*go_on, "--max-steps", "12", "--overwrite"]) == 0
    assert_finite(folder)
    assert trained(folder, stem)[-1]["step"] == 12


def trained(folder: Path, stem: str) -> list[dict[str, object]]:
    lines = (folder / "runs" / stem / "metrics.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if entry["event"] == "train"]


def assert_finite(folder: Path) -> None:
    for path in folder.glob("*.pt"):
        payload = read_checkpoint(path)
        moments = [
            value
            for state in payload["optimizer_state"].values()
            for of_one in state["state"].values()
            for value in of_one.values()
        ]
        for tensor in [*payload["model_state"].values(), *moments]:
            assert not tensor.is_floating_point() or bool(tensor.isfinite().all()), path.name
