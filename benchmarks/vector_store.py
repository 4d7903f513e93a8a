"""The vector store: what it earns, what it finds, what it costs.

    python benchmarks/vector_store.py quality --experts DIR --data-dir DATA
                                        NanoThink trained with and without it
    python benchmarks/vector_store.py recall --checkpoint checkpoints/nanothink_mla.pt
                                        recall and speed against exact search
    python benchmarks/vector_store.py scale   a million made-up keys: time, size, recall
    add --checkpoint FILE --data-dir DIR --domains NAME
                                        text it was never trained on, before and after
    python benchmarks/vector_store.py compact --checkpoint checkpoints/nanothink_mla.pt
                                        size and bits per byte by similarity

Everything goes through the commands that a person would type. ``quality`` trains what is not in ``--out``
yet: ``with_nanothink_mla.pt`` and ``without_nanothink_mla.pt``, of the same experts, seed and budget;
``--set`` goes to both. ``add`` and ``compact`` work on a copy. Times are the process's own (CPU seconds)
beside what a clock on the wall showed, so that a busy machine does not change them.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from side_by_side import call

from nanothink.config import VectorStoreConfig
from nanothink.data.corpus import find_corpus
from nanothink.data.tokens import IGNORE
from nanothink.models.contract import LanguageModel
from nanothink.models.nanothink import NanoThink
from nanothink.runs.held_out import held_out
from nanothink.runs.trained_model import load
from nanothink.vector_store.contents import VectorStore
from nanothink.vector_store.index import Float32, Int64, Kind, NeighbourIndex, import_faiss, sample_size

K = 32
PROBES = (4, 8, 16, 32, 64)  # lists to look into


def score(checkpoint: Path, tokens: int, *more: str) -> dict[str, Any]:
    (found,) = call("eval", checkpoint, "--max-tokens", str(tokens), *more)["checkpoints"]
    return found


@contextlib.contextmanager
def timed(label: str) -> Iterator[None]:
    wall, own = time.perf_counter(), time.process_time()
    yield
    print(f"{label}: {time.process_time() - own:.1f} CPU s, {time.perf_counter() - wall:.1f} s on the wall")


def table(columns: list[str], rows: list[list[str]]) -> None:
    print(f"| {' | '.join(columns)} |\n|---|{'---:|' * (len(columns) - 1)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    print()


def by_domain(found: dict[str, Any]) -> list[str]:
    scores = [*(s["bits_per_byte"] for s in found["domains"].values()), found["overall"]["bits_per_byte"]]
    return [f"{value:.4f}" for value in scores]


def quality(options: argparse.Namespace) -> None:
    experts = [
        part for path in sorted(options.experts.glob("*_expert.pt")) for part in ("--expert", str(path))
    ]
    paths = {}
    for name, flags in (("without", []), ("with", ["--use-vector-store"])):
        paths[name] = options.out / f"{name}_nanothink_mla.pt"
        done = (
            paths[name].exists() and not paths[name].with_stem(f"{name}_nanothink_mla_interrupted").exists()
        )
        if not done:
            values = [f"train_mla.batch_size={options.batch}", f"train_mla.seed={options.seed}", *options.set]
            values += [f"train_mla.eval_max_tokens={options.tokens}", "train_mla.grad_accum_steps=1"]
            values += ["train_mla.sample_tokens=0", "train_mla.max_epochs=1000"]
            told = [part for value in values for part in ("--set", value)]
            where = ["--data-dir", str(options.data_dir), "--checkpoint-dir", str(options.out)]
            length = ["--max-steps", str(options.steps)]
            call(
                "train-mla",
                "--name",
                name,
                "--resume",
                *flags,
                *experts,
                *where,
                *length,
                "--preset",
                "tiny",
                *told,
            )
    found = {
        "trained without a memory": score(paths["without"], options.tokens),
        "trained with one, asked without": score(paths["with"], options.tokens, "--no-vector-store"),
        "trained and asked with it": score(paths["with"], options.tokens),
    }
    last = found["trained and asked with it"]
    print(f"\nBits per byte, {last['overall']['tokens']:,} validation tokens\n")
    table(["model", *last["domains"], "all"], [[name, *by_domain(one)] for name, one in found.items()])
    shares = [f"{routing['weights']['vector_store']:.3f}" for routing in last["routing"].values()]
    table(["", *last["routing"]], [["share of the gate", *shares]])
    for name in list(found)[:2]:
        gain = 1 - last["overall"]["bits_per_byte"] / found[name]["overall"]["bits_per_byte"]
        print(f"lower than '{name}' by {100 * gain:.1f} %")


def measured(index: NeighbourIndex, keys: Float32, numbers: Int64, queries: Float32) -> list[list[str]]:
    """Recall@32 against exact search over the keys as they were before coding, and queries a second."""
    exact = NeighbourIndex.create("exact", keys.shape[1], len(keys), 0)
    exact.add(keys, numbers)
    begun = time.process_time()
    truth = exact.search(queries, K)[1]
    exact_rate = len(queries) / (time.process_time() - begun)
    rows = [["exact", "1.000", f"{exact_rate:,.0f}", "1.0"]]
    for n in PROBES:
        if n > index.n_lists:  # an exact index has none
            break
        index._index.nprobe = n
        begun = time.process_time()
        found = index.search(queries, K)[1]
        rate = len(queries) / (time.process_time() - begun)
        recall = np.mean([len(set(a) & set(b)) / K for a, b in zip(found, truth, strict=True)])
        rows.append([f"{n} lists", f"{recall:.3f}", f"{rate:,.0f}", f"{rate / exact_rate:.1f}"])
    return rows


def recall(options: argparse.Namespace) -> None:
    loaded = load(options.checkpoint)
    model = loaded.model
    assert isinstance(model, NanoThink)
    store = model.vector_store
    assert isinstance(store, VectorStore)
    data = options.data_dir or loaded.config.data.data_dir
    tokens = held_out(find_corpus(data, loaded.config.data.domains), [loaded], loaded.tokenizer)
    length = loaded.config.model.max_seq_len
    asked = []
    for stream in tokens.val.values():
        for block in range(min(stream.n_blocks(length), options.blocks)):
            inputs, targets = stream.block(block, length)
            with torch.inference_mode():
                expert = cast(LanguageModel, model.experts[model.key_expert])
                states = expert.hidden(torch.from_numpy(inputs[None]))[0]
            asked.append(torch.nn.functional.normalize(states, dim=-1)[torch.from_numpy(targets != IGNORE)])
    queries = torch.cat(asked).numpy()
    # Keys as the index has them: what the codes lose is not in this figure (see `scale` for that).
    groups = list(store.index.groups())
    numbers, keys = (np.concatenate(part) for part in zip(*groups, strict=True))
    facts = call("memory", "info", "-c", options.checkpoint)
    print(
        f"{len(keys):,} keys of width {keys.shape[1]}, {store.index.n_lists} lists, {len(queries):,} queries"
    )
    print(f"{facts['n_bytes'] / facts['n_keys']:.1f} bytes a key, {facts['n_bytes'] / 1e6:.1f} MB\n")
    rows = measured(store.index, keys, numbers, queries)
    table(["looking into", "recall@32", "queries a CPU second", "against exact"], rows)


def scale(options: argparse.Namespace) -> None:
    """Keys in clumps along a low-dimensional manifold, as states of a model are."""
    import_faiss()
    rng = np.random.default_rng(0)
    basis = rng.standard_normal((24, options.width)).astype(np.float32)
    centres = rng.standard_normal((20_000, 24)).astype(np.float32)

    def drawn(n: int) -> Float32:
        inner = centres[rng.integers(len(centres), size=n)] + 0.5 * rng.standard_normal((n, 24), np.float32)
        keys = inner @ basis + 0.5 * rng.standard_normal((n, options.width), np.float32)
        unit: Float32 = keys / np.linalg.norm(keys, axis=1, keepdims=True)
        return unit

    keys, numbers = drawn(options.keys), np.arange(options.keys)
    kind: Kind = options.index
    index = NeighbourIndex.create(kind, options.width, options.keys, VectorStoreConfig().n_probe)
    print(f"{options.keys:,} keys of width {options.width}, {index.n_lists} lists")
    with timed("lists and codes"):
        index.train(keys[:: max(1, options.keys // sample_size(kind, options.keys))])
    with timed("adding"):
        for first in range(0, options.keys, 8192):
            index.add(keys[first : first + 8192], numbers[first : first + 8192])
    with tempfile.TemporaryDirectory() as folder:
        with timed("writing"):
            index.write(Path(folder) / "index")
        print(f"{(Path(folder) / 'index').stat().st_size / options.keys:.1f} bytes a key\n")
    rows = measured(index, keys, numbers, drawn(1000))
    table(["looking into", "recall@32", "queries a CPU second", "against exact"], rows)


@contextlib.contextmanager
def copy_of(checkpoint: Path) -> Iterator[Path]:
    """A checkpoint and its memory, to be changed."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copy(checkpoint, folder)
        store = checkpoint.with_suffix(".store")
        ignored = shutil.ignore_patterns("neighbours-*", "lock")
        shutil.copytree(store, folder / store.name, ignore=ignored)
        yield folder / checkpoint.name


def add(options: argparse.Namespace) -> None:
    text = ["--data-dir", str(options.data_dir), "--domains", options.domains]
    with copy_of(options.checkpoint) as path:
        found = {"without a memory": score(path, options.tokens, *text, "--no-vector-store")}
        found["with the memory of its training"] = score(path, options.tokens, *text)
        with timed("store add"):
            facts = call("memory", "add", options.data_dir, "--domains", options.domains, "-c", path)
        found["once the domain is in it"] = score(path, options.tokens, *text)
    last = found["once the domain is in it"]
    print({name: facts["keys_by_domain"].get(name) for name in last["domains"]}, "keys added")
    table(
        ["bits per byte", *last["domains"], "all", "share of the gate"],
        [
            [
                name,
                *by_domain(one),
                ", ".join(f"{r['weights'].get('vector_store', 0):.3f}" for r in one["routing"].values()),
            ]
            for name, one in found.items()
        ],
    )


def compact(options: argparse.Namespace) -> None:
    rows: list[list[str]] = []
    for similarity in options.similarity:
        with copy_of(options.checkpoint) as path, timed(f"compact {similarity}"):
            told = ["--similarity", str(similarity), "--max-tokens", str(options.tokens)]
            done = call("memory", "compact", "-c", path, *told)
        for when in ("before", "after") if not rows else ("after",):
            facts = done[when]
            rows.append(
                [
                    "as built" if when == "before" else f"{similarity}",
                    f"{facts['n_keys']:,}",
                    f"{facts['n_bytes'] / 1e6:.1f} MB",
                    f"{done['bits_per_byte'][when]:.4f}",
                ]
            )
    table(["merged from similarity", "keys", "size", "bits per byte"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = parser.add_subparsers(dest="part", required=True)
    for name in ("quality", "recall", "scale", "add", "compact"):
        own = parts.add_parser(name)
        own.add_argument("--tokens", type=int, default=20_000, help="validation tokens of each domain")
        own.add_argument("--data-dir", type=Path, required=name in ("quality", "add"))
        if name in ("recall", "add", "compact"):
            own.add_argument("--checkpoint", type=Path, required=True)
    choices = parts.choices
    choices["quality"].add_argument("--experts", type=Path, required=True, help="folder of *_expert.pt")
    choices["quality"].add_argument("--out", type=Path, default=Path("memory"))
    choices["quality"].add_argument("--steps", type=int, default=300)
    choices["quality"].add_argument("--batch", type=int, default=8)
    choices["quality"].add_argument("--seed", type=int, default=0)
    choices["quality"].add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    choices["recall"].add_argument("--blocks", type=int, default=4, help="validation blocks of each domain")
    choices["scale"].add_argument("--keys", type=int, default=1_000_000)
    choices["scale"].add_argument("--width", type=int, default=128)
    choices["scale"].add_argument("--index", choices=["sq8", "pq"], default="sq8")
    choices["add"].add_argument("--domains", required=True)
    choices["compact"].add_argument("--similarity", type=float, nargs="+", default=[0.99, 0.95, 0.9])
    options = parser.parse_args()
    {"quality": quality, "recall": recall, "scale": scale, "add": add, "compact": compact}[options.part](
        options
    )


if __name__ == "__main__":
    main()
