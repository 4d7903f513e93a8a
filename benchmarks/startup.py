"""How long short commands take, against commands and imports of what people would use instead.

    python benchmarks/startup.py
    python benchmarks/startup.py --processor-time

``import typer`` is the floor of any command made with it, ``import torch`` that of one that computes;
``transformers --help`` and the last import are what training and generation scripts begin with. ``generate``
writes one token by a model of width 16, and ``checkpoints ls`` lists it. Sides take turns; one round warms
the disk cache.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from nanothink.data.starter import write_starter_corpus

CLI = "from transformers.cli.transformers import main; main()"
OURS = [sys.executable, "-m", "nanothink"]
SIDES = {
    "nanothink --help": [*OURS, "--help"],
    "import typer": [sys.executable, "-c", "import typer"],
    "nanothink checkpoints ls": [*OURS, "checkpoints", "ls"],
    "nanothink generate -n 1": [*OURS, "generate", "The", "-n", "1"],
    "import torch": [sys.executable, "-c", "import torch"],
    "transformers --help": [sys.executable, "-c", CLI, "--help"],
    "import Trainer of transformers": [sys.executable, "-c", "from transformers import Trainer"],
}
SMALL = ("model.d_model=16", "model.max_seq_len=16", "transformer.n_layers=1", "transformer.n_heads=2")


def train(folder: Path) -> None:
    """A model of width 16, after one step, in ``folder``/checkpoints."""
    settings = (part for setting in SMALL for part in ("--set", setting))
    data = ("--data-dir", str(folder / "data"), "--tokenizer", str(folder / "tokenizer"))
    for command in (
        ("tokenizer", "train", "--out", data[3], *data[:2], "--vocab-size", "320"),
        ("pretrain", "transformer", *data, "--max-steps", "1", *settings),
    ):
        subprocess.run([*OURS, *command], check=True, capture_output=True, cwd=folder)


def processor_seconds() -> float:
    """Of all children so far."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7, help="after one that warms the disk cache")
    parser.add_argument(
        "--processor-time", action="store_true", help="seconds of a processor that others use as well"
    )
    options = parser.parse_args()
    clock = processor_seconds if options.processor_time else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in SIDES}
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_starter_corpus(folder / "data")
        train(folder)
        for round_number in range(options.rounds + 1):
            for side, command in SIDES.items():
                start = clock()
                subprocess.run(command, check=True, capture_output=True, cwd=folder, env=one_thread)
                if round_number:  # the first round warms the disk cache
                    seconds[side].append(clock() - start)
    print("| command | seconds (median) | min | max | times import torch |\n|---|---:|---:|---:|---:|")
    for side, values in seconds.items():
        pairs = [its / torchs for torchs, its in zip(seconds["import torch"], values, strict=True)]
        spread = f"{min(values):.3f} | {max(values):.3f}"
        print(f"| {side} | {statistics.median(values):.3f} | {spread} | {statistics.median(pairs):.2f} |")


if __name__ == "__main__":
    main()
