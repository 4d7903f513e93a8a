"""How fast `nanothink data validate` reads good data, beside loops that only parse it.

    python benchmarks/validate.py
    python benchmarks/validate.py --data-dir DATA

Without a data folder it makes lines of words, of 200 bytes to 10 KB, a fifth of them beyond ASCII. All three
readers get the same files, one after another in each round, on one core; best of the rounds. The loops
open the file in binary, iterate its lines and call the parser: no check of UTF-8, keys, types or
duplicates, and no line numbers, so they bound what any reader in Python can reach.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import orjson

from nanothink.data.corpus import Corpus, find_corpus, validate_corpus


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as folder:
        if options.data_dir is None:
            write_lines(Path(folder) / "made" / "lines.jsonl", options.megabytes * 10**6)
        corpus = find_corpus(options.data_dir or folder)
        readers: dict[str, Callable[[Corpus], int]] = {
            "nanothink data validate": validate,
            "json.loads loop": lambda corpus: parse(corpus, json.loads),
            "orjson.loads loop": lambda corpus: parse(corpus, orjson.loads),
        }
        seconds = dict.fromkeys(readers, float("inf"))
        counts = dict.fromkeys(readers, 0)
        for _ in range(options.repeats):
            for name, read in readers.items():
                began = time.process_time()
                counts[name] = read(corpus)
                seconds[name] = min(seconds[name], time.process_time() - began)
        assert len(set(counts.values())) == 1, counts
        peer = seconds["json.loads loop"]
        print(f"{corpus.n_bytes / 1e6:.0f} MB, {counts['json.loads loop']:,} records, one core, CPU time")
        print(f"{'reader':<26}{'MB/s':>8}{'of json.loads':>16}")
        for name, taken in seconds.items():
            print(f"{name:<26}{corpus.n_bytes / taken / 1e6:>8.0f}{peer / taken:>15.2f}x")


def validate(corpus: Corpus) -> int:
    report = validate_corpus(corpus)
    assert report.ok
    return report.records


def parse(corpus: Corpus, loads: Callable[[bytes], object]) -> int:
    count = 0
    for _, path in corpus.files:
        with path.open("rb") as file:
            for line in file:
                loads(line)
                count += 1
    return count


def write_lines(path: Path, n_bytes: int) -> None:
    chance = random.Random(0)
    plain = ["".join(chance.choices("etaoinshrdlucmfw", k=chance.randint(1, 11))) for _ in range(5000)]
    other = ["".join(chance.choices("éßжщ語水مرحبا", k=chance.randint(1, 6))) for _ in range(500)]
    path.parent.mkdir(parents=True)
    with path.open("wb") as file:
        while file.tell() < n_bytes:
            words = other if chance.random() < 0.2 else plain
            text = " ".join(chance.choices(words, k=int(10 ** chance.uniform(1.5, 3.2))))
            record = {"text": text + ' "quoted"\n', "source": "made up", "id": file.tell()}
            file.write(orjson.dumps(record) + b"\n")


if __name__ == "__main__":
    main()
