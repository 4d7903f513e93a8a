"""Tokenising a corpus, everything included, against a plain loop over the same tokenizer.

NanoThink's side reads and validates the JSON lines, tokenises, writes the tokens and syncs them to disk, in
a fresh cache each time. The plain side only encodes texts that are already in memory.

    python benchmarks/tokenising.py --data-dir DATA --tokenizer TOKENIZER
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import tokenizers

from nanothink.data.corpus import find_corpus
from nanothink.data.records import iter_records
from nanothink.data.tokenizer import load_tokenizer
from nanothink.data.tokens import tokenise


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    corpus = find_corpus(options.data_dir)
    paths = [path for _, path in corpus.files]
    texts = [record.text for path in paths for _, record in iter_records(path, on_problem=print)]
    n_bytes = sum(len(text.encode()) for text in texts)
    seconds: dict[str, list[float]] = {"nanothink, whole pipeline": [], "tokenizers.encode_batch_fast": []}
    with tempfile.TemporaryDirectory() as folder:
        for round_number in range(options.rounds):
            copy = Path(folder) / str(round_number)
            shutil.copytree(corpus.root, copy, ignore=shutil.ignore_patterns(".nanothink"))
            start = time.perf_counter()
            tokenise(find_corpus(copy), load_tokenizer(options.tokenizer), val_split=0.1)
            seconds["nanothink, whole pipeline"].append(time.perf_counter() - start)
            backend = tokenizers.Tokenizer.from_str(
                load_tokenizer(options.tokenizer).to_state()["tokenizer_json"]
            )
            start = time.perf_counter()
            for first in range(0, len(texts), 256):
                for encoding in backend.encode_batch_fast(
                    texts[first : first + 256], add_special_tokens=False
                ):
                    encoding.ids  # noqa: B018  reading the ids is part of the work
            seconds["tokenizers.encode_batch_fast"].append(time.perf_counter() - start)
    print(f"{n_bytes / 1e6:.1f} MB of text in {len(texts):,} records\n")
    print("| | MB/s (median) | min | max |\n|---|---:|---:|---:|")
    for name, values in seconds.items():
        speeds = sorted(n_bytes / 1e6 / value for value in values)
        print(f"| {name} | {statistics.median(speeds):.1f} | {speeds[0]:.1f} | {speeds[-1]:.1f} |")


if __name__ == "__main__":
    main()
