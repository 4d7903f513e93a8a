"""Many small files in many domains, with few descriptors: time and peak memory of each command.

    python benchmarks/many_files.py
    python benchmarks/many_files.py --files 2000 --domains 500

Writes files of a few records each into a temporary folder and runs ``data validate``, ``tokenizer train``,
``data inspect`` (which tokenises), ``data inspect`` again (everything kept by then) and a few steps of
``pretrain transformer``, each in a process of its own that may open ``--descriptors`` files. The model is
tiny and computes in one thread, so that the figures are those of reading. Its validation reads a document of
each domain at least.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TINY = (
    *("model.d_model=32", "model.max_seq_len=64", "transformer.n_layers=1", "transformer.n_heads=1"),
    *("train_expert.eval_max_tokens=1", "train_expert.sample_tokens=1", "train_expert.batch_size=16"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--files", type=int, default=20_000)
    parser.add_argument("--domains", type=int, default=5_000)
    parser.add_argument("--records", type=int, default=5, help="in each file")
    parser.add_argument("--descriptors", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        n_bytes = write_corpus(Path(folder) / "data", options.files, options.domains, options.records)
        print(
            f"{options.files:,} files in {options.domains:,} domains, {n_bytes / 1e6:.1f} MB, "
            f"{options.descriptors:,} descriptors\n"
        )
        tokenizer = train_tokenizer(Path(folder))
        train = ["pretrain", "transformer", "--max-steps", str(options.steps), "--tokenizer", tokenizer]
        commands = {
            "data validate": ["data", "validate"],
            "tokenizer train": ["tokenizer", "train", "--vocab-size", "512", "--out", "other"],
            "data inspect, nothing kept": ["data", "inspect", "--tokenizer", tokenizer],
            "data inspect, again": ["data", "inspect", "--tokenizer", tokenizer],
            f"pretrain, {options.steps} steps": [*train, *(f"--set={setting}" for setting in TINY)],
        }
        print("| command | seconds | of CPU | peak MB |\n|---|---:|---:|---:|")
        for name, command in commands.items():
            seconds, cpu_seconds, peak_mb = measured(command, folder, options.descriptors)
            print(f"| {name} | {seconds:.1f} | {cpu_seconds:.1f} | {peak_mb:.0f} |", flush=True)


def write_corpus(root: Path, n_files: int, n_domains: int, n_records: int) -> int:
    n_bytes = 0
    for number in range(n_files):
        path = root / f"domain-{number % n_domains:05}" / f"part-{number:05}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        texts = (
            f"File {number} tells of boat {record} on lake {(7919 * number + record) % 99_991}, and of the "
            f"weather there on day {number % 365}."
            for record in range(n_records)
        )
        n_bytes += path.write_bytes(b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts))
    return n_bytes


def train_tokenizer(folder: Path) -> str:
    """A tokenizer learnt from few of the files, so that its training is not what is measured."""
    few = write_corpus(folder / "few", 100, 10, 5)
    assert few
    command = ["tokenizer", "train", "--data-dir", "few", "--vocab-size", "512", "--out", "tokenizer"]
    run(command, folder, None).check_returncode()
    return str(folder / "tokenizer")


def measured(command: list[str], folder: str, descriptors: int) -> tuple[float, float, float]:
    """Seconds, seconds of CPU and peak megabytes of one command."""
    began, cpu_began = time.perf_counter(), used_cpu()
    done = run(command, folder, descriptors)
    seconds = time.perf_counter() - began
    if done.returncode:
        sys.exit(f"nanothink {' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return seconds, used_cpu() - cpu_began, float((Path(folder) / "peak").read_text()) / 1000


def used_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def run(command: list[str], folder: str | Path, descriptors: int | None) -> subprocess.CompletedProcess[str]:
    code = (
        "import resource, sys; from nanothink.cli.app import run; code = run(sys.argv[1:]);"
        "open('peak', 'w').write(str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)); sys.exit(code)"
    )

    def limit() -> None:
        if descriptors is not None:
            resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, descriptors))

    return subprocess.run(
        [sys.executable, "-c", code, *command],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        preexec_fn=limit,
    )


if __name__ == "__main__":
    main()
