"""How cost grows with the context, the batch, the size of the model and the corpus, as tables and plots.

    python benchmarks/growth.py                       all four, and docs/figures/growth_*.svg
    python benchmarks/growth.py context batch
    python benchmarks/growth.py --device cuda --figures docs/figures/gpu

A training step of each kind, optimizer included, float32, at the default preset's shapes with a vocabulary of
8,192 and 2,048 tokens in a step, one dial turned at a time; every point is a process of its own, which takes
two steps and says the seconds of the second and its peak memory. ``nanothink_mla`` combines an expert of each
kind. Qwen3 of ``transformers``, the transformer's own shape, stands beside them. ``corpus`` tokenises made-up
text of growing size from nothing, then once more with everything cached.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

VOCABULARY = 8192
PEER = "Qwen3, transformers"
KINDS = ("transformer", "state_space", "diffuser", "nanothink_mla", PEER)
Point = dict[str, float]
"""What a child prints: seconds, bytes, and parameters where there is a model."""

DIALS: dict[str, tuple[str, Sequence[int]]] = {
    "context": ("tokens in a block", (256, 512, 1024, 2048)),
    "batch": ("blocks of 256 tokens in a step", (1, 4, 8, 16)),
    "size": ("million parameters", (128, 256, 384, 512)),  # widths; drawn over what they come to
}


def step_of(kind: str, device: str, width: int, batch: int, length: int) -> tuple[Callable[[], None], int]:
    """A training step of a fresh model, and its number of parameters."""
    import torch
    from side_by_side import wait_for

    from nanothink.config.run import resolve_config
    from nanothink.models import COMBINED, EXPERTS, ExpertDescription, build_model, training_of
    from nanothink.models.contract import Batch
    from nanothink.training.objectives import ExpertObjective, Routed, next_token
    from nanothink.training.optimizer import GroupedOptimizer

    heads = width // 64
    config = resolve_config(
        assignments=[
            *(f"model.d_model={width}", f"model.max_seq_len={length}"),
            *(f"transformer.n_heads={heads}", f"mla.n_heads={heads}"),
        ]
    ).config
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(VOCABULARY, (batch, length + 1), generator=generator).to(device)
    inputs, targets = drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous()
    torch.manual_seed(0)
    if kind == PEER:
        from transformers import Qwen3Config, Qwen3ForCausalLM

        from nanothink.models.transformer import Transformer, to_qwen3_config

        same = build_model("transformer", config, VOCABULARY)
        assert isinstance(same, Transformer)
        theirs: Any = Qwen3ForCausalLM(Qwen3Config(**to_qwen3_config(same))).to(device).train()
        adamw = torch.optim.AdamW(theirs.parameters(), lr=3e-4)

        def their_step() -> None:
            theirs(inputs, labels=inputs).loss.backward()
            torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
            adamw.step()
            adamw.zero_grad(set_to_none=True)
            wait_for(device)

        return their_step, sum(p.numel() for p in theirs.parameters())

    parts = [ExpertDescription(k, k, config) for k in EXPERTS] if kind == COMBINED else []
    model = build_model(kind, config, VOCABULARY, parts).to(device).train()
    optimizer = GroupedOptimizer(model.parameter_groups(), training_of(kind, config))
    objective: Any = next_token
    if kind == "diffuser":
        objective = ExpertObjective(0)
    elif kind == COMBINED:
        objective = Routed(config.train_mla.entropy_reg)
    shown = Batch(inputs, targets, range(batch))

    def step() -> None:
        objective(model, shown, 1 / targets.numel()).total.backward()
        torch.nn.utils.clip_grad_norm_(optimizer.parameters, 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad()
        wait_for(device)

    return step, sum(p.numel() for p in model.parameters())


def measure_step(kind: str, device: str, width: int, batch: int, length: int) -> Point:
    """In a fresh process: two steps."""
    from side_by_side import peak

    step, n_parameters = step_of(kind, device, width, batch, length)
    step()
    start = time.perf_counter()
    step()
    return {"seconds": time.perf_counter() - start, "bytes": peak(device), "parameters": n_parameters}


def measure_corpus(megabytes: int) -> Point:
    """In a fresh process: a corpus of that size tokenised from nothing, and again from the cache."""
    from side_by_side import peak

    from nanothink.data.corpus import find_corpus
    from nanothink.data.split import SplitRule
    from nanothink.data.tokenizer import train_tokenizer
    from nanothink.data.tokens import tokenise

    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 9))) for _ in range(20_000)]
    common = [1 / rank for rank in range(1, len(words) + 1)]  # as words come in a language (Zipf)
    texts = [" ".join(rng.choices(words, common, k=400)) for _ in range(200)]
    tokenizer = train_tokenizer(texts, 4096, n_bytes=sum(map(len, texts)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "words" / "words.jsonl"
        path.parent.mkdir()
        with path.open("w") as file:
            while file.tell() < megabytes * 1e6:
                file.write(json.dumps({"text": " ".join(rng.choices(words, common, k=400))}) + "\n")
        before = peak()
        start = time.perf_counter()
        tokenise(find_corpus(folder), tokenizer, split=SplitRule(0.1))
        first = time.perf_counter() - start
        start = time.perf_counter()
        tokenise(find_corpus(folder), tokenizer, split=SplitRule(0.1))
        again = time.perf_counter() - start
    return {"seconds": first, "again": again, "bytes": peak() - before}


def in_a_fresh_process(*arguments: object) -> Point:
    done = subprocess.run(
        [sys.executable, __file__, "child", *map(str, arguments)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    found: Point = json.loads(done.stdout.splitlines()[-1])
    return found


def by_dial(
    dial: str, values: Sequence[int], kinds: Sequence[str], device: str, n_tokens: int
) -> dict[str, list[Point]]:
    """Points by kind, one for each value of a dial; prints them as rows."""
    label, _ = DIALS[dial]
    print(f"\n| {dial} ({label}) | model | parameters | seconds a step | tokens/s | peak memory |")
    print("|---:|---|---:|---:|---:|---:|")
    found: dict[str, list[Point]] = {kind: [] for kind in kinds}
    for value in values:
        width = value if dial == "size" else 384
        length = value if dial == "context" else 256
        batch = value if dial == "batch" else max(1, n_tokens // length)
        for kind, points in found.items():
            point = in_a_fresh_process("step", kind, device, width, batch, length)
            point["tokens"] = batch * length
            point["x"] = point["parameters"] / 1e6 if dial == "size" else value
            points.append(point)
            speed = point["tokens"] / point["seconds"]
            shown = f"{point['parameters']:,.0f} | {point['seconds']:.3g} | {speed:,.0f}"
            print(f"| {value:,} | {kind} | {shown} | {point['bytes'] / 1e9:.2f} GB |", flush=True)
    return found


def by_corpus(sizes: Sequence[int]) -> dict[str, list[Point]]:
    print("\n| corpus | tokenised in | again, cached | memory beyond the start |\n|---:|---:|---:|---:|")
    points = []
    for size in sizes:
        point = in_a_fresh_process("corpus", size)
        points.append({**point, "x": size})
        shown = f"{point['seconds']:.2f} s | {point['again']:.3f} s | {point['bytes'] / 1e6:.0f} MB"
        print(f"| {size} MB | {shown} |", flush=True)
    return {"tokenise": points}


def draw(dial: str, label: str, found: dict[str, list[Point]], folder: Path) -> None:
    """Time on the left, memory on the right."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "nanothink"  # equal figures make equal files
    from matplotlib import pyplot

    drawing, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for name, points in found.items():
        across = [point["x"] for point in points]
        if dial == "corpus":
            left.plot(across, [p["seconds"] for p in points], marker="o", label="from nothing")
            left.plot(across, [p["again"] for p in points], marker="o", label="cached")
            right.plot(across, [p["bytes"] / 1e6 for p in points], marker="o")
        else:
            left.plot(across, [1e3 * p["seconds"] / p["tokens"] for p in points], marker="o", label=name)
            right.plot(across, [p["bytes"] / 1e9 for p in points], marker="o")
    corpus = dial == "corpus"
    left.set(xlabel=label, ylabel="seconds" if corpus else "milliseconds a token", ylim=(0, None))
    right.set(xlabel=label, ylabel="memory, MB" if corpus else "peak memory, GB", ylim=(0, None))
    left.legend(fontsize="small")
    folder.mkdir(parents=True, exist_ok=True)
    drawing.savefig(folder / f"growth_{dial}.svg", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="*", default=[])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--values", type=int, nargs="+", default=None, help="of the one dial that is named")
    parser.add_argument("--points", type=int, default=None, help="of each dial, the smallest ones (all)")
    parser.add_argument("--tokens", type=int, default=2048, help="in a step, but where the batch is the dial")
    parser.add_argument("--megabytes", type=int, nargs="+", default=[2, 8, 32, 64])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--figures", type=Path, default=Path("docs/figures"))
    options = parser.parse_args()
    if options.what[:1] == ["child"]:
        what, *rest = options.what[1:]
        if what == "corpus":
            print(json.dumps(measure_corpus(int(rest[0]))))
        else:
            print(json.dumps(measure_step(rest[0], rest[1], *map(int, rest[2:]))))
        return
    known = (*DIALS, "corpus")
    if unknown := set(options.what) - set(known):
        parser.error(f"there is no dial {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    for dial in options.what or known:
        if dial == "corpus":
            draw(dial, "megabytes of text", by_corpus(options.megabytes), options.figures)
        else:
            label, values = DIALS[dial]
            values = (options.values or values)[: options.points]
            found = by_dial(dial, values, options.kinds, options.device, options.tokens)
            draw(dial, label, found, options.figures)
    print(f"\nplots: {options.figures}/growth_*.svg")


if __name__ == "__main__":
    main()
