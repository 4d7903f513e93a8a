"""Little text: the best single model of a sweep against NanoThink, both with the same memories and gate.

    python benchmarks/small_text.py --data-dir DATA --out small_text --megabytes 1 4 --seeds 0 1

For each size and seed it trains the settings of a sweep (shapes times dropout, decay and epochs), NanoThinks
of its best models by shape, and the recipe that the first version had. ``--settings N`` stops the sweep after
N of them, which makes all tables of a part of it. Every model is calibrated; the best few of
the sweep by validation loss, ``--finalists``, get what NanoThink has: a vector store of the training text, a
document cache and the joint gate (train-mla over one expert).

Models are chosen by the validation text and scored on other documents of the same sources, on which nothing
is fitted. Documents go to either by a hash. Training runs are the commands that a person would type, and each
that has ended is a line of ``--out``/results.jsonl: the same command started again continues, also with more
settings, sizes or seeds. Times are CPU seconds of training; a NanoThink's include those of its members.

The claims: (i) NanoThink with both memories is 22 % below the recipe of the first version, (ii) 3 % below the
best single model with the same memories and gate, at equal text and within that model's time, (iii) phase 2
never ends above the ensemble that it starts from.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from side_by_side import call, machine, plain_environment

import nanothink

SHAPES = (
    ("state_space", 128, 3),
    ("transformer", 128, 2),
    ("state_space", 256, 3),
    ("transformer", 256, 4),
    ("state_space", 128, 6),
    ("transformer", 128, 6),
)
"""Kind, width, layers."""

# Dropout, decay of embeddings and head, epochs: for texts up to so many megabytes.
RECIPES = {
    0.5: ((0.3, 0.1, 16), (0.3, 0.1, 32), (0.3, 0.1, 64), (0.4, 0.1, 32), (0.2, 0.0, 16)),
    2.0: ((0.3, 0.1, 16), (0.3, 0.1, 8), (0.3, 0.1, 32), (0.4, 0.1, 32), (0.2, 0.0, 16)),
    8.0: ((0.2, 0.0, 8), (0.1, 0.0, 4), (0.2, 0.0, 16), (0.3, 0.1, 16), (0.1, 0.0, 8)),
    1e9: ((0.05, 0.0, 3), (0.0, 0.0, 2), (0.1, 0.0, 4), (0.1, 0.0, 6), (0.0, 0.0, 1)),
}
FIRST_VERSION = (0.0, 0.0, 3)
"""At its best number of epochs for a megabyte; the product of then had no dropout and no decay of tables."""

TO_THE_END = 1000  # evaluations: early stopping would end long schedules at a high rate
TWIN = 1000  # added to the seed of a second model of the same settings

Rows = dict[str, dict[str, Any]]  # scores of models, by what they are called


@dataclass(frozen=True)
class Setting:
    """One model of the sweep."""

    kind: str
    width: int
    layers: int
    dropout: float
    decay: float
    epochs: int
    twin: bool = False

    @property
    def name(self) -> str:
        name = f"{self.kind}-{self.width}x{self.layers}-d{self.dropout:g}-w{self.decay:g}-e{self.epochs}"
        return f"{name}-twin" if self.twin else name

    @property
    def shown(self) -> str:
        kind = self.kind.replace("_", "-") + (" (twin)" if self.twin else "")
        return f"{kind} {self.width} x {self.layers}, {self.dropout:g}, {self.decay:g}, {self.epochs}"


def sweep_of(megabytes: float) -> list[Setting]:
    """All settings for a text of this size, in the order in which they are trained."""
    recipes = next(recipes for most, recipes in RECIPES.items() if megabytes <= most)
    return [Setting(*shape, *recipe) for recipe in recipes for shape in SHAPES]


def write_text(source: Path, folder: Path, megabytes: float, held_out: float, longest: float) -> None:
    """``folder/train`` and ``folder/other``: whole documents of each domain, in the order of a hash.

    Args:
        megabytes: of training text over all domains, beside a tenth for validation.
        held_out: kilobytes of other text, a domain.
        longest: document that is taken, in kilobytes.
    """
    domains = [path for path in sorted(source.iterdir()) if any(path.glob("*.jsonl"))]
    if not domains:
        raise SystemExit(f"{source} has no domains: folders with .jsonl files")
    for domain in domains:
        lines = [line for path in sorted(domain.glob("*.jsonl")) for line in path.open(encoding="utf-8")]
        texts = {text for line in lines if len((text := json.loads(line)["text"]).encode()) < 1000 * longest}
        left = sorted(texts, key=lambda text: hashlib.blake2b(text.encode(), digest_size=8).digest())
        for part, wanted in (("other", 1e3 * held_out), ("train", 1e6 * megabytes / 0.9 / len(domains))):
            taken, size = [], 0
            while left and size < wanted:
                taken.append(left.pop(0))
                size += len(taken[-1].encode())
            (folder / part / domain.name).mkdir(parents=True, exist_ok=True)
            records = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in taken)
            (folder / part / domain.name / "text.jsonl").write_text(records, "utf-8")


def cpu_seconds() -> float:
    """CPU seconds of this process and the children that it waited for."""
    return sum(os.times()[:4])


def bits(checkpoint: Path, *where: str | Path, cache: bool = False) -> list[float]:
    """Bits per byte of a checkpoint; with ``cache`` also those with a document cache."""
    option = ("--document-cache",) if cache else ()
    (found,) = call("eval", checkpoint, *where, *option)["checkpoints"]
    scores = [found, found["with_document_cache"]] if cache else [found]
    return [float(score["overall"]["bits_per_byte"]) for score in scores]


class Measurement:
    """The models of one size and seed: trained and scored once, then read from the results."""

    def __init__(self, options: argparse.Namespace, megabytes: float, seed: int) -> None:
        self.megabytes, self.seed, self.settings = megabytes, seed, options.set
        self.results = options.out / "results.jsonl"
        self.folder = options.out / f"{megabytes:g}MB"
        self.checkpoints = self.folder / f"seed{seed}"
        if not (self.folder / "tokenizer").exists():
            write_text(options.data_dir, self.folder, megabytes, options.held_out, options.longest)
            where = ("--data-dir", self.folder / "train", "--out", self.folder / "tokenizer")
            call("tokenizer", "train", *where, "--vocab-size", str(options.vocabulary))
        self.only_read = options.tables
        self.rows: dict[str, dict[str, Any]] = {}
        self.spent: dict[str, float] = {}  # on trainings that ended, or were interrupted, without a score
        if self.results.exists():
            for line in self.results.read_text("utf-8").splitlines():
                row = json.loads(line)
                if (row["megabytes"], row["seed"]) == (megabytes, seed):
                    if "bits" in row:
                        self.rows[row["name"]] = row
                    else:
                        self.spent[row["name"]] = row["cpu_seconds"]

    def expert(self, setting: Setting) -> dict[str, Any] | None:
        """A model of the sweep, calibrated; None if it is missing and only what is there is read."""
        if setting.name not in self.rows and not self.only_read:
            given = {
                f"{setting.kind}.n_layers": setting.layers,
                "model.d_model": setting.width,
                "transformer.n_heads": setting.width // 32,
                "train_expert.dropout": setting.dropout,
                "train_expert.weight_decay_tables": setting.decay,
                "train_expert.max_epochs": setting.epochs,
                "train_expert.early_stopping_patience": TO_THE_END,
            }
            tokenizer = ("--tokenizer", self.folder / "tokenizer")
            seed = self.seed + TWIN * setting.twin
            checkpoint, trained = self._train(
                setting.name, "expert", seed, given, "pretrain", setting.kind, *tokenizer
            )
            text = trained["validation"]["overall"]  # of the last evaluation, not the best
            best = trained["best_loss"] * text["tokens"] / math.log(2) / text["bytes"]
            self._add(setting.name, checkpoint, validation=[best])
        return self.rows.get(setting.name)

    def combined(self, members: Sequence[Setting], mode: str) -> dict[str, Any] | None:
        """A NanoThink over members.

        ``memories``: fitted on held-out text, with vector store, document cache and joint gate. ``gate``: the
        same without a store. ``full``: trained on the training text. ``ensemble``: step 0 of that, equal
        weights.
        """
        name = f"{mode}({'+'.join(sorted(member.name for member in members))})"
        if name not in self.rows and not self.only_read:
            costs = [row["cpu_seconds"] for member in members if (row := self.expert(member)) is not None]
            given: dict[str, Any] = {"train_mla.fit": "gate" if mode in ("memories", "gate") else "full"}
            if mode == "ensemble":  # a step that moves nothing: the best is step 0
                given |= {"train_mla.max_steps": 1, "train_mla.lr": 1e-12}
            if mode == "memories":
                given["vector_store.enabled"] = True
            short = f"{mode}-{hashlib.sha1(name.encode()).hexdigest()[:10]}"
            experts = [
                part
                for member in members
                for part in ("--expert", self.checkpoints / f"{member.name}_expert.pt")
            ]
            checkpoint, _ = self._train(short, "nanothink_mla", self.seed, given, "train-mla", *experts)
            # Where the validation text is too little to fit a gate on, there is no document cache.
            cache = mode == "memories" and nanothink.load(checkpoint).model.joint_gate is not None
            validation = bits(checkpoint, cache=cache) if mode == "memories" else []
            self.spent[name] = self.spent.get(short, 0.0)
            self._add(name, checkpoint, validation=validation, cache=cache, seconds=sum(costs))
        return self.rows.get(name)

    def _train(
        self, name: str, ending: str, seed: int, given: dict[str, Any], *command: str | Path
    ) -> tuple[Path, dict[str, Any]]:
        """Run a training command, resumed where it was interrupted; the checkpoint and what it printed."""
        where = ["--data-dir", self.folder / "train", "--checkpoint-dir", self.checkpoints, "--name", name]
        unfinished = (self.checkpoints / f"{name}_{ending}_interrupted.pt").exists()
        if unfinished and command[0] == "train-mla":
            command = command[:1]  # its checkpoint carries the experts
        section = "train_mla" if command[0] == "train-mla" else "train_expert"
        given = {f"{section}.sample_tokens": 0, **given}
        sets = [part for key, value in given.items() for part in ("--set", f"{key}={value}")]
        sets += [part for assignment in self.settings for part in ("--set", assignment)]
        how = ("--preset", "tiny", "--seed", str(seed), "--resume" if unfinished else "--overwrite")
        start = cpu_seconds()
        try:
            trained = call(*command, *where, *how, *sets)
        finally:  # a line even if it was interrupted: its time counts
            spent = cpu_seconds() - start
            self.spent[name] = spent + (self.spent.get(name, 0.0) if unfinished else 0.0)
            self._write({"name": name, "cpu_seconds": self.spent[name]})
        return self.checkpoints / f"{name}_{ending}.pt", trained

    def _add(
        self, name: str, checkpoint: Path, validation: list[float], cache: bool = False, seconds: float = 0.0
    ) -> None:
        other = bits(checkpoint, "--data-dir", self.folder / "other", "--split", "all", cache=cache)
        spent = seconds + self.spent[name]  # those of members, too
        found = {"validation": validation, "other": other}
        self.rows[name] = {"name": name, "checkpoint": str(checkpoint), "cpu_seconds": spent, "bits": found}
        self._write(self.rows[name])
        print(f"{self.megabytes:g} MB, seed {self.seed}: {name}: {other[-1]:.4f}", file=sys.stderr)

    def _write(self, row: dict[str, Any]) -> None:
        with self.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"megabytes": self.megabytes, "seed": self.seed, **row}) + "\n")


def validated(row: dict[str, Any]) -> float:
    return float(row["bits"]["validation"][-1])


def scored(row: dict[str, Any]) -> float:
    return float(row["bits"]["other"][-1])


def compositions(best: dict[tuple[str, int, int], Setting]) -> list[list[Setting]]:
    """NanoThinks to try, of the best setting of each shape that the sweep has come to.

    A twin costs as much as the next setting, so there are none before each shape has had its turn.
    """
    narrow, small, wide, second, deep, other = (best.get(shape) for shape in SHAPES)

    def twin(setting: Setting | None) -> Setting | None:
        return replace(setting, twin=True) if setting and len(best) == len(SHAPES) else None

    wanted = (
        (narrow, small),
        (wide, narrow, small),
        (deep, other),
        (deep, other, wide),
        (deep, other, narrow, small),
        (deep, other, wide, second),
        (deep, other, wide, second, narrow, small),
        (deep, other, twin(deep)),
        (deep, other, wide, twin(deep), twin(other)),
    )
    return [[m for m in each if m is not None] for each in wanted if None not in each]


def quick_pair(swept: Sequence[tuple[Setting, dict[str, Any]]]) -> list[list[Setting]]:
    """The best model of each kind that together take less time than the best one, which comes first."""
    pairs = [
        (validated(row) + validated(other), [one, two])
        for (one, row), (two, other) in itertools.combinations(swept, 2)
        if one.kind != two.kind
        and row["cpu_seconds"] + other["cpu_seconds"] < 0.9 * swept[0][1]["cpu_seconds"]
    ]
    return [min(pairs, key=lambda pair: pair[0])[1]] if pairs else []


def measure(options: argparse.Namespace, megabytes: float, seed: int) -> list[list[str]]:
    """Train what is missing and print the tables of one size and seed. Returns the rows of the claims."""
    runs = Measurement(options, megabytes, seed)
    whole = sweep_of(megabytes)
    swept = {s.shown: (s, row) for s in whole[: options.settings] if (row := runs.expert(s)) is not None}
    by_validation = sorted(swept.values(), key=lambda each: validated(each[1]))
    best: dict[tuple[str, int, int], Setting] = {}
    for setting, _ in by_validation:
        best.setdefault((setting.kind, setting.width, setting.layers), setting)
    narrow = SHAPES[:2]
    first = [Setting(*shape, *FIRST_VERSION) for shape in narrow]
    pair = [best[shape] for shape in narrow if shape in best]
    finalists = [setting for setting, _ in by_validation[: options.finalists]]
    old = present({s.shown: runs.expert(s) for s in first})
    old |= present({"NanoThink of both, fit=full": runs.combined(first, "full")})
    phases = present({mode: runs.combined(pair, mode) for mode in ("ensemble", "gate", "full")})
    singles = present({s.shown: runs.combined([s], "memories") for s in finalists})
    combined = [*compositions(best), *quick_pair(by_validation)]
    nanothinks = present({shown(each): runs.combined(each, "memories") for each in combined})

    size = sum(path.stat().st_size for path in runs.folder.glob("train/*/*.jsonl"))
    print(f"\n{size / 1e6:.2f} MB with validation, seed {seed}: {len(swept)} of {len(whole)} settings\n")
    print("| kind, width x layers, dropout, table decay, epochs | CPU seconds | validation | other text |")
    print("|---|---:|---:|---:|")
    for setting, row in by_validation:
        print(f"| {setting.shown} | {row['cpu_seconds']:,.0f} | {validated(row):.4f} | {scored(row):.4f} |")
    print("\n| the first version's recipe | CPU seconds | other text |\n|---|---:|---:|")
    for name, row in old.items():
        print(f"| {name} | {row['cpu_seconds']:,.0f} | {scored(row):.4f} |")
    print(f"\n| phase 2 of {shown(pair)} | other text |\n|---|---:|")
    for name, row in phases.items():
        print(f"| {name} | {scored(row):.4f} |")
    print("\n| vector store, joint gate | CPU seconds | validation | other text | and document cache |")
    print("|---|---:|---:|---:|---:|")
    for name, row in (singles | nanothinks).items():
        stored, *cached = row["bits"]["other"]
        last = f"{cached[0]:.4f}" if cached else "no gate"
        print(f"| {name} | {row['cpu_seconds']:,.0f} | {validated(row):.4f} | {stored:.4f} | {last} |")
    where = [f"{megabytes:g}", str(seed), f"{len(swept)} of {len(whole)}"]
    return [where + row for row in claims(old, singles, nanothinks, phases)]


def present(rows: dict[str, dict[str, Any] | None]) -> Rows:
    """Those that there are."""
    return {name: row for name, row in rows.items() if row is not None}


def shown(members: Sequence[Setting]) -> str:
    return "; ".join(member.shown for member in members)


def claims(old: Rows, singles: Rows, nanothinks: Rows, phases: Rows) -> Iterator[list[str]]:
    """Those that the models which are there allow."""
    if nanothinks:
        best = min(nanothinks.values(), key=validated)
        if old:  # the lowest, which does not flatter
            first = min(map(scored, old.values()))
            yield claim("(i) below the first version", first, scored(best), 22.0)
        if singles:
            single = min(singles.values(), key=validated)
            name = "(ii) below the best single model"
            yield claim(f"{name}, equal text", scored(single), scored(best), 3.0)
            quick = [row for row in nanothinks.values() if row["cpu_seconds"] <= single["cpu_seconds"]]
            if quick:
                found = scored(min(quick, key=validated))
                yield claim(f"{name}, within its time", scored(single), found, 3.0)
            else:
                yield [f"{name}, within its time", f"{scored(single):.4f}", "none is as quick", "", "", "no"]
    for mode in ("gate", "full"):
        if "ensemble" in phases and mode in phases:
            name = f"(iii) fit={mode} not above its ensemble"
            yield claim(name, scored(phases["ensemble"]), scored(phases[mode]), 0.0)


def claim(name: str, base: float, found: float, goal: float) -> list[str]:
    """Cells: claim, base, found, percent below, goal, whether it is met."""
    below = 100 * (1 - found / base)
    met = "yes" if below >= goal else "no"
    return [name, f"{base:.4f}", f"{found:.4f}", f"{below:.2f} %", f"{goal:g} %", met]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, required=True, help="domains with text enough for all sizes")
    parser.add_argument("--out", type=Path, required=True, help="folder that is kept, to continue there")
    parser.add_argument("--megabytes", type=float, nargs="+", default=[1.0, 4.0], help="of training text")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--settings", type=int, default=30, help="of the sweep; all are 30")
    parser.add_argument("--finalists", type=int, default=3, help="of the sweep that get both memories")
    parser.add_argument("--held-out", type=float, default=40.0, help="kilobytes of other text, a domain")
    parser.add_argument("--longest", type=float, default=20.0, help="document that is taken, in kilobytes")
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--tables", action="store_true", help="train nothing: the tables of what is there")
    parser.add_argument("--set", action="append", default=[], help="a setting of every training")
    options = parser.parse_args()
    for name in os.environ.keys() - plain_environment().keys():
        del os.environ[name]
    options.out.mkdir(parents=True, exist_ok=True)
    rows = [row for m in options.megabytes for seed in options.seeds for row in measure(options, m, seed)]
    print(f"\n{machine()}\n")
    print("| MB | seed | settings | claim | base | NanoThink | below by | goal | met |")
    print("|---:|---:|---:|---|---:|---:|---:|---:|---|")
    for row in rows:
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
