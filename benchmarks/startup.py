"""How long ``nanothink --help`` takes, against a Python that only imports typer.

python benchmarks/startup.py
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

SIDES = {
    "import typer": [sys.executable, "-c", "import typer"],
    "nanothink --help": [sys.executable, "-m", "nanothink", "--help"],
}


def main(rounds: int = 15) -> None:
    seconds: dict[str, list[float]] = {name: [] for name in SIDES}
    for round_number in range(rounds + 1):
        for name, command in SIDES.items():
            start = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            if round_number:  # the first round warms the disk cache
                seconds[name].append(time.perf_counter() - start)
    print("| command | seconds (median) | min | max |\n|---|---:|---:|---:|")
    for name, values in seconds.items():
        print(f"| {name} | {statistics.median(values):.3f} | {min(values):.3f} | {max(values):.3f} |")
    pairs = [b / a for a, b in zip(*seconds.values(), strict=True)]
    print(f"\nratio, pair by pair: median {statistics.median(pairs):.2f}")


if __name__ == "__main__":
    main()
