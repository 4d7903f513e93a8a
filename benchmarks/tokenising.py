"""Tokenising a corpus, everything included, against ``datasets.map`` and a plain loop over the tokenizer.

NanoThink's side reads and validates the JSON lines, tokenises, writes the tokens and syncs them to disk, in
a fresh cache each time. ``datasets`` reads the same files and maps ``transformers``' tokenizer over them in
batches, on as many processes as there are processors, into a cache of its own, as the examples of
transformers do; it checks no record, splits and packs nothing. The plain side only encodes texts that are
already in memory. Needs the packages of ``'.[bench]'``.

    python benchmarks/tokenising.py --data-dir DATA --tokenizer TOKENIZER
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import tokenizers

from nanothink.data.corpus import find_corpus
from nanothink.data.records import iter_records
from nanothink.data.split import SplitRule
from nanothink.data.tokenizer import load_tokenizer, save_tokenizer
from nanothink.data.tokens import tokenise


def map_with_datasets(paths: list[str], tokenizer_folder: Path, cache: Path) -> None:
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, trust_remote_code=False)
    records = datasets.load_dataset("json", data_files=paths, split="train", cache_dir=str(cache))

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {"input_ids": tokenizer(batch["text"])["input_ids"]}

    records.map(encode, batched=True, num_proc=os.cpu_count(), remove_columns=records.column_names)


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
    ours, mapped, plain = "nanothink, whole pipeline", "datasets.map", "tokenizers.encode_batch_fast"
    seconds: dict[str, list[float]] = {ours: [], mapped: [], plain: []}
    with tempfile.TemporaryDirectory() as folder:
        for round_number in range(options.rounds):
            copy = Path(folder) / str(round_number)
            shutil.copytree(corpus.root, copy, ignore=shutil.ignore_patterns(".nanothink"))
            start = time.perf_counter()
            tokenise(find_corpus(copy), load_tokenizer(options.tokenizer), split=SplitRule(0.1))
            seconds[ours].append(time.perf_counter() - start)
            export = save_tokenizer(load_tokenizer(options.tokenizer), Path(folder) / "tokenizer")
            start = time.perf_counter()
            map_with_datasets([str(path) for path in paths], export, Path(folder) / f"cache-{round_number}")
            seconds[mapped].append(time.perf_counter() - start)
            backend = tokenizers.Tokenizer.from_str(
                load_tokenizer(options.tokenizer).to_state()["tokenizer_json"]
            )
            start = time.perf_counter()
            for first in range(0, len(texts), 256):
                for encoding in backend.encode_batch_fast(
                    texts[first : first + 256], add_special_tokens=False
                ):
                    encoding.ids  # noqa: B018  reading the ids is part of the work
            seconds[plain].append(time.perf_counter() - start)
    print(f"{n_bytes / 1e6:.1f} MB of text in {len(texts):,} records\n")
    print("| | MB/s (median) | min | max |\n|---|---:|---:|---:|")
    for name, values in seconds.items():
        speeds = sorted(n_bytes / 1e6 / value for value in values)
        print(f"| {name} | {statistics.median(speeds):.1f} | {speeds[0]:.1f} | {speeds[-1]:.1f} |")


if __name__ == "__main__":
    main()
