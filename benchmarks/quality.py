"""NanoThink against its experts, their ensembles, and its own ablations, in bits per byte by domain.

    python benchmarks/quality.py shared --data-dir DATA     three experts of all kinds that saw the same data
    python benchmarks/quality.py shared --data-dir DATA --single    and one transformer as large as NanoThink
    python benchmarks/quality.py domains --data-dir DATA    one expert a domain, kinds mixed

Everything is trained by the commands that a person would type, one tokenizer for all, and scored on the same
validation text. ``--expert-steps`` and ``--steps`` are the budgets of phase 1 (each expert) and phase 2, in
optimizer steps of ``--batch`` blocks (times ``--accumulate`` in phase 2): unless given 600 and 300 for shared
data, 300 and 200 for different domains; an hour on two cores at most. ``--single`` trains one transformer of
NanoThink's size, on as many tokens as experts and phase 2 together and in the same time.
``--seeds`` repeats all of it. What is already in ``--out`` is not trained again, so a benchmark that was
stopped goes on. ``--set`` goes to every command, after the settings of ``BUDGET``.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from nanothink.cli.app import run
from nanothink.config.run import resolve_config
from nanothink.data.corpus import find_corpus
from nanothink.data.tokens import IGNORE
from nanothink.errors import NanoThinkError
from nanothink.inference.evaluate import Evaluation, evaluate_model
from nanothink.models import EXPERTS, build_model
from nanothink.models.contract import LanguageModel
from nanothink.models.nanothink import NanoThink
from nanothink.runs.held_out import held_out
from nanothink.runs.trained_model import TrainedModel, load
from nanothink.training.records import read_run

Table = dict[str, dict[str, float]]
"""Bits per byte by row and domain."""

BUDGET = (
    *("transformer.n_layers=2", "state_space.n_layers=3", "diffuser.n_layers=2"),
    *(f"{phase}.schedule=trapezoid" for phase in ("train_expert", "train_diffuser", "train_mla")),
)
"""Half of the preset's layers, so that two seeds of a setting take less than an hour on two cores."""

STEPS = {"shared": (600, 300), "domains": (300, 200)}
"""Of an expert, and of phase 2."""

ABLATIONS = {
    "NanoThink": [],
    "  without MLA layers": ["mla.n_layers=0"],
    "  one global weight vector": ["mla.router=global"],
}


class Ensemble(nn.Module):
    """The uniform ensemble of language models: of their logits' distributions, linear or log-linear."""

    logit_scale = 1.0

    def __init__(self, members: Sequence[TrainedModel], *, linear: bool) -> None:
        super().__init__()
        self.members = list(members)
        self.experts = {m.path.stem: m.model for m in members}
        first = members[0]
        self.joined = NanoThink(
            first.tokenizer.vocab_size, first.config.model, first.config.mla, self.experts
        )  # untrained, it is the log-linear ensemble
        self.linear = linear

    def log_likelihood(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """See ``LanguageModel.log_likelihood``, which evaluation asks for."""
        if not self.linear:
            return self.joined.log_likelihood(inputs, targets)
        each = torch.stack([m.log_likelihood(inputs, targets) for m in self.experts.values()])  # (E, B, T)
        mixed = each.logsumexp(0) - torch.tensor(float(len(each))).log()
        return mixed.masked_fill(targets == IGNORE, 0.0)


class Bench:
    """One seed's models in one folder, trained where they are not there yet, and their scores."""

    def __init__(self, options: argparse.Namespace, seed: int) -> None:
        self.options, self.seed = options, seed
        self.folder = options.out / f"{options.setting}-{seed}"
        self.tokenizer = options.out / "tokenizer"
        if not self.tokenizer.exists():
            size = str(options.vocabulary)
            self.call("tokenizer", "train", "--vocab-size", size, "--out", str(self.tokenizer))
        self.corpus = find_corpus(options.data_dir, None)

    def call(self, *arguments: str) -> None:
        code = run([*arguments, "--data-dir", str(self.options.data_dir)])
        if code:
            raise SystemExit(code)

    def _settings(self, phase: str) -> list[str]:
        options = self.options
        values = [
            f"{phase}.batch_size={options.batch}",
            f"{phase}.sample_tokens=0",
            f"{phase}.eval_max_tokens={options.tokens}",
            f"{phase}.seed={self.seed}",
            f"{phase}.max_epochs=1000",
            *BUDGET,
            *options.set,
        ]
        preset = ["--preset", options.preset, "--checkpoint-dir", str(self.folder)]
        return [*preset, *(part for value in values for part in ("--set", value))]

    def expert(self, kind: str, name: str, domains: str | None = None, steps: int | None = None) -> Path:
        """Train an expert; a diffuser after the transformer that it learns from."""
        path = self.folder / f"{name}_expert.pt"
        if path.exists() and not (self.folder / f"{name}_expert_interrupted.pt").exists():
            return path
        if kind == "diffuser":
            base = self.folder / "transformer_expert.pt"
            base = base if domains is None else self.expert("transformer", f"{name}-base", domains)
            special, phase = ["--transformer", str(base)], "train_diffuser"
        else:
            special, phase = ["--tokenizer", str(self.tokenizer)], "train_expert"
        more = ["--domains", domains] if domains else []
        length = ["--max-steps", str(steps or self.options.expert_steps)]
        self.call(
            "pretrain", kind, "--name", name, "--resume", *special, *more, *length, *self._settings(phase)
        )
        return path

    def longer(self, path: Path) -> Path:
        """The same expert trained on, for as many tokens as phase 2 uses."""
        folder = self.folder / "longer"
        folder.mkdir(exist_ok=True)
        copy = folder / path.name
        if not copy.exists():
            shutil.copy(path, copy)
            steps = self.options.expert_steps + self.options.steps * self.options.accumulate
            self.call("resume", str(copy), "--max-steps", str(steps))
        return copy

    def combine(self, name: str, experts: Sequence[Path], assignments: Sequence[str] = ()) -> Path:
        path = self.folder / f"{name}_nanothink_mla.pt"
        if not path.exists() or (self.folder / f"{name}_nanothink_mla_interrupted.pt").exists():
            named = [part for expert in experts for part in ("--expert", str(expert))]
            accumulate = f"train_mla.grad_accum_steps={self.options.accumulate}"
            more = [part for value in (accumulate, *assignments) for part in ("--set", value)]
            length = ["--max-steps", str(self.options.steps)]
            settings = self._settings("train_mla")
            self.call("train-mla", "--name", name, "--resume", *named, *length, *settings, *more)
        return path

    def seconds(self, path: Path) -> float:
        """What training a model took, by the median speed of its steps: pauses and validation don't count."""
        records = read_run(path.parent / "runs" / path.stem)
        a_step, speed = (
            statistics.median(records.training[name].values) for name in ("tokens", "tokens_per_second")
        )
        return records.last_step * a_step / speed

    def score(self, model: TrainedModel | Ensemble) -> dict[str, float]:
        """Bits per byte by domain, and over all."""
        loaded = model if isinstance(model, TrainedModel) else load(self.any_expert)
        members = [model] if isinstance(model, TrainedModel) else model.members
        tokens = held_out(self.corpus, members, loaded.tokenizer)
        length = loaded.config.model.max_seq_len
        scored: LanguageModel = model.model if isinstance(model, TrainedModel) else model  # type: ignore[assignment]
        found: Evaluation = evaluate_model(
            scored,
            tokens.val,
            length=length,
            batch_size=max(1, 8192 // length),
            precision=loaded.precision,
            max_tokens=self.options.tokens,
        )
        return {
            **{name: score.bits_per_byte for name, score in found.domains.items()},
            "all": found.overall.bits_per_byte,
        }

    any_expert: Path


def shared(bench: Bench) -> Table:
    """Experts that saw the same data."""
    options = bench.options
    experts = {kind: bench.expert(kind, kind) for kind in EXPERTS}
    bench.any_expert = experts["transformer"]
    table = {kind: bench.score(load(path)) for kind, path in experts.items()}
    best = min(table, key=lambda kind: table[kind]["all"])
    table[f"{best}, trained on"] = bench.score(load(bench.longer(experts[best])))
    members = [load(path) for path in experts.values()]
    table["uniform ensemble, log-linear"] = bench.score(Ensemble(members, linear=False))
    for row, assignments in ABLATIONS.items():
        path = bench.combine(_file_name(row), list(experts.values()), assignments)
        table[row] = bench.score(load(path))
    two = [path for kind, path in experts.items() if kind != "diffuser"]
    table["  without its diffuser"] = bench.score(load(bench.combine("no-diffuser", two)))
    if options.single:
        size = sum(p.numel() for p in load(bench.folder / "NanoThink_nanothink_mla.pt").model.parameters())
        shape = shape_of_size(bench, size)
        steps = 3 * options.expert_steps + options.steps * options.accumulate
        options.set += shape
        path = bench.expert("transformer", "single", steps=steps)
        table["one transformer of its size, on all tokens"] = bench.score(load(path))
        spent = sum(
            bench.seconds(p) for p in (*experts.values(), bench.folder / "NanoThink_nanothink_mla.pt")
        )
        steps = round(steps * spent / bench.seconds(path))
        path = bench.expert("transformer", f"single-{steps}-steps", steps=steps)
        table["one transformer of its size, in the same time"] = bench.score(load(path))
        del options.set[-len(shape) :]
    return table


def shape_of_size(bench: Bench, size: int) -> list[str]:
    """Settings of a transformer with about as many parameters: twice as wide, and as deep as it takes."""
    config = resolve_config(preset=bench.options.preset, assignments=[*BUDGET, *bench.options.set]).config
    vocabulary = load(bench.any_expert).tokenizer.vocab_size
    model = config.model.model_copy(update={"d_model": 2 * config.model.d_model})
    heads = 2 * config.transformer.n_heads

    def parameters(layers: int) -> int:
        shape = config.transformer.model_copy(update={"n_layers": layers, "n_heads": heads})
        wide = config.model_copy(update={"model": model, "transformer": shape})
        return sum(p.numel() for p in build_model("transformer", wide, vocabulary).parameters())

    one, two = parameters(1), parameters(2)
    layers = max(1, 1 + round((size - one) / (two - one)))
    return [
        f"model.d_model={model.d_model}",
        f"transformer.n_heads={heads}",
        f"transformer.n_layers={layers}",
    ]


def domains(bench: Bench) -> Table:
    """One expert a domain."""
    kinds = bench.options.kinds.split(",")
    names = list(bench.corpus.domains)
    experts = [bench.expert(kinds[i % len(kinds)], name, name) for i, name in enumerate(names)]
    bench.any_expert = experts[0]
    table: Table = {
        f"{name} ({kinds[i % len(kinds)]})": bench.score(load(path))
        for i, (name, path) in enumerate(zip(names, experts, strict=True))
    }
    members = [load(path) for path in experts]
    table["uniform ensemble, log-linear"] = bench.score(Ensemble(members, linear=False))
    table["uniform ensemble, linear"] = bench.score(Ensemble(members, linear=True))
    table["oracle: the expert of the domain"] = oracle(list(table.values())[: len(names)], names, bench)
    for row, assignments in ABLATIONS.items():
        table[row] = bench.score(load(bench.combine(_file_name(row), experts, assignments)))
    return table


def oracle(scores: Sequence[Mapping[str, float]], names: Sequence[str], bench: Bench) -> dict[str, float]:
    """Each domain by its own expert; over all, by the bytes of each domain."""
    loaded = load(bench.any_expert)
    tokens = held_out(bench.corpus, [loaded], loaded.tokenizer)
    sizes = {name: tokens.val[name].sample(bench.options.tokens).n_bytes for name in names}
    own = {name: score[name] for name, score in zip(names, scores, strict=True)}
    return own | {"all": sum(own[name] * sizes[name] for name in names) / sum(sizes.values())}


def _file_name(row: str) -> str:
    return row.strip().replace(" ", "-")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("setting", choices=["shared", "domains"])
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("quality"))
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--expert-steps", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=20_000, help="validation tokens of each domain")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--kinds", default="transformer,state_space", help="of the experts of single domains")
    parser.add_argument("--single", action="store_true", help="one large transformer too: 1 1/4 hours a seed")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    options = parser.parse_args()
    expert_steps, steps = STEPS[options.setting]
    options.expert_steps = options.expert_steps or expert_steps
    options.steps = options.steps or steps
    setting = {"shared": shared, "domains": domains}[options.setting]
    try:
        tables = [setting(Bench(options, seed)) for seed in options.seeds]
    except NanoThinkError as error:
        raise SystemExit(str(error)) from None
    columns = list(next(iter(tables[0].values())))
    print(f"\nBits per byte, mean over seeds {options.seeds}; 'seeds' are the overall figures of each.\n")
    print(f"| model | {' | '.join(columns)} | seeds |")
    print(f"|---|{'---:|' * len(columns)}---|")
    for row in tables[0]:
        values = [sum(t[row][column] for t in tables) / len(tables) for column in columns]
        each = ", ".join(f"{table[row]['all']:.4f}" for table in tables)
        print(f"| {row} | {' | '.join(f'{value:.4f}' for value in values)} | {each} |")


if __name__ == "__main__":
    main()
