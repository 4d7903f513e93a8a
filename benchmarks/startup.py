"""How long ``nanothink --help`` takes, against commands and imports of what people would use instead.

    python benchmarks/startup.py

``import typer`` is the floor of any command made with it; ``transformers --help`` and the imports are what
training and generation scripts begin with. The sides take turns; one round warms the disk cache.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

CLI = "from transformers.cli.transformers import main; main()"
OURS = "nanothink --help"
SIDES = {
    OURS: [sys.executable, "-m", "nanothink", "--help"],
    "import typer": [sys.executable, "-c", "import typer"],
    "transformers --help": [sys.executable, "-c", CLI, "--help"],
    "import torch": [sys.executable, "-c", "import torch"],
    "import Trainer of transformers": [sys.executable, "-c", "from transformers import Trainer"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Start-up of nanothink and of other commands and imports")
    parser.add_argument("--rounds", type=int, default=7, help="after one that warms the disk cache")
    rounds = parser.parse_args().rounds
    seconds: dict[str, list[float]] = {name: [] for name in SIDES}
    for round_number in range(rounds + 1):
        for name, command in SIDES.items():
            start = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            if round_number:  # the first round warms the disk cache
                seconds[name].append(time.perf_counter() - start)
    print("| command | seconds (median) | min | max | times nanothink --help |\n|---|---:|---:|---:|---:|")
    for name, values in seconds.items():
        pairs = [its / ours for ours, its in zip(seconds[OURS], values, strict=True)]
        median = statistics.median(values)
        spread = f"{min(values):.3f} | {max(values):.3f}"
        print(f"| {name} | {median:.3f} | {spread} | {statistics.median(pairs):.2f} |")


if __name__ == "__main__":
    main()
