"""Does a document cache make text repeat itself? Continuations with and without one.

    python benchmarks/repetition.py checkpoints/nanothink_mla.pt --data-dir more

The prompts are beginnings of documents, whose own continuations stand beside what the model writes. Words are
what white space divides. Shares are means over the texts, each taken by itself: distinct n-grams over all
n-grams, and words that end four words which stood earlier in the text or in its prompt.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path

from side_by_side import call


def distinct_share(texts: Sequence[list[str]], n: int) -> float:
    """Different n-grams over all n-grams, within each text."""
    grams = [[tuple(text[i : i + n]) for i in range(len(text) - n + 1)] for text in texts]
    return sum(len(set(own)) for own in grams) / max(1, sum(map(len, grams)))


def repeated(prompt: list[str], text: list[str], n: int = 4) -> int:
    """Words of ``text`` that end n words which stood earlier in it or in its prompt."""
    whole, seen, found = prompt + text, set(), 0
    for end in range(n, len(whole) + 1):
        gram = tuple(whole[end - n : end])
        found += end > len(prompt) and gram in seen
        seen.add(gram)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data-dir", type=Path, required=True, help="text that the model has not seen")
    parser.add_argument("--texts", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=160, help="that are written")
    parser.add_argument("--prompt", type=int, default=400, help="characters of each prompt")
    parser.add_argument("--continued", type=int, default=500, help="characters of the text itself after it")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.8])
    parser.add_argument("--repetition-penalty", type=float, default=1.0, help="of generate; 1 is none")
    parser.add_argument("--samples", type=int, default=0, help="texts of each that are shown")
    options = parser.parse_args()

    files = sorted(options.data_dir.glob("*/*.jsonl"))
    texts = [json.loads(line)["text"] for path in files for line in path.open(encoding="utf-8")]
    long_enough = [text for text in texts if len(text) >= options.prompt + options.continued]
    random.Random(0).shuffle(long_enough)
    chosen = long_enough[: options.texts]
    prompts = [text[: options.prompt] for text in chosen]
    written: dict[str, list[str]] = {}
    print(f"{len(chosen)} texts\n")
    print("| written | words | distinct 1 / 2 / 3-grams | end a 4-gram again |\n|---|---:|---:|---:|")

    def report(name: str, continuations: list[str]) -> None:
        written[name] = continuations
        words = [text.split() for text in continuations]
        shares = " / ".join(f"{distinct_share(words, n):.3f}" for n in (1, 2, 3))
        again = sum(repeated(prompt.split(), text) for prompt, text in zip(prompts, words, strict=True))
        total = sum(map(len, words))
        print(f"| {name} | {total:,} | {shares} | {100 * again / max(1, total):.1f} % |", flush=True)

    report("the text itself", [text[options.prompt :][: options.continued] for text in chosen])
    penalty = ["--repetition-penalty", str(options.repetition_penalty)]
    for temperature in options.temperatures:
        how = ["--max-new-tokens", str(options.tokens), "--temperature", str(temperature), "--seed", "0"]
        for name, cache in (("no cache", []), ("document cache", ["--document-cache"])):
            command = [
                "generate",
                *prompts,
                "--checkpoint",
                options.checkpoint,
                "--ignore-eos",
                *how,
                *penalty,
                *cache,
            ]
            samples = call(*command)["samples"]
            report(f"{name}, temperature {temperature:g}", [sample["text"] for sample in samples])
    for i in range(min(options.samples, len(chosen))):
        print(f"\nprompt {i + 1}: {prompts[i]!r}")
        for name, continuations in written.items():
            print(f"  {name}: {continuations[i]!r}")


if __name__ == "__main__":
    main()
