"""Learning rates that diverge: what each kind of model does with them, and what is left on the disk.

Each kind is trained for eight steps as it should be. Then the run goes on from its best checkpoint at a rate
that is far too high, and ends by itself or is stopped. Prints the table of docs/reliability.md.

    python benchmarks/diverging_rates.py --data-dir DATA --tokenizer TOKENIZER
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from nanothink.checkpoints.file import read_checkpoint
from nanothink.cli.app import run

PHASE_OF = {
    "transformer": "train_expert",
    "state_space": "train_expert",
    "diffuser": "train_diffuser",
    "nanothink_mla": "train_mla",
}
GROUPS = ("matrices", "embeddings", "head", "other")
RATES: dict[str, dict[str, float]] = {
    "lr 10, the largest there is": {"lr": 10},
    "lr 10, all multipliers 1e6": {"lr": 10, **{f"lr_{group}": 1e6 for group in GROUPS}},
    "all multipliers 1e38": {f"lr_{group}": 1e38 for group in GROUPS},
    "the head's multiplier 1e38": {"lr_head": 1e38},
    "the multiplier of norms and the rest 1e38": {"lr_other": 1e38},
}
TRAINING = {
    "batch_size": 4,
    "warmup_steps": 0,
    "amp_dtype": "float32",
    "log_every_steps": 1,
    "sample_tokens": 0,
    "eval_max_tokens": 200,
    "eval_every_steps": 8,
    "max_skipped_steps": 3,
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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--tokenizer", required=True)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        good = Path(scratch) / "good"
        where = ["--data-dir", asked.data_dir, "--checkpoint-dir", str(good), "--max-steps", "8"]
        shape = [part for name, value in SETTINGS.items() for part in ("--set", f"{name}={value}")]
        for kind in PHASE_OF:
            combined = kind == "nanothink_mla"
            command = ["train-mla"] if combined else ["pretrain", kind, "--tokenizer", asked.tokenizer]
            assert quietly([*command, *where, *shape]) == 0, kind
        print("| kind | rate | ends | exit code | steps skipped | best checkpoint | all numbers on disk |")
        print("|---|---|---|---:|---:|---|---|")
        for kind in PHASE_OF:
            for name, changed in RATES.items():
                folder = Path(scratch) / "diverging"
                shutil.copytree(good, folder)
                print(f"| {kind} | {name} | {' | '.join(diverge(kind, changed, folder))} |", flush=True)
                shutil.rmtree(folder)


def diverge(kind: str, changed: dict[str, float], folder: Path) -> list[str]:
    """Go on at these rates; the cells of the table."""
    stem = kind if kind == "nanothink_mla" else f"{kind}_expert"
    best = folder / f"{stem}.pt"
    before = best.read_bytes()
    rates = [f"--set={PHASE_OF[kind]}.{name}={value:g}" for name, value in changed.items()]
    code = quietly(["resume", str(best), "--checkpoint-dir", str(folder), "--max-steps", "40", *rates])
    lines = map(json.loads, (folder / "runs" / stem / "metrics.jsonl").read_text().splitlines())
    steps = [line for line in lines if line["event"] == "train"]
    finite = all(
        bool(tensor.isfinite().all())
        for path in folder.glob("*.pt")
        for tensor in read_checkpoint(path)["model_state"].values()
        if tensor.is_floating_point()
    )
    return [
        f"{'stopped' if code else 'by itself'} at step {steps[-1]['step']}",
        str(code),
        str(sum(step["skipped"] for step in steps)),
        "unchanged" if best.read_bytes() == before else "replaced",
        "finite" if finite else "NOT FINITE",
    ]


def quietly(arguments: list[str]) -> Any:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return run(arguments)


if __name__ == "__main__":
    main()
