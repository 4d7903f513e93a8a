"""How long NanoThink's transformer takes to the quality that GPT-2 reaches in ``transformers``' Trainer.

    python benchmarks/time_to_quality.py --data-dir DATA --tokenizer TOKENIZER

GPT-2 of the same depth, width, heads and context is trained twice by ``Trainer``, from the same tokens in
blocks of the same length and number: at settings tuned for training from scratch (warm-up and cosine, no
dropout, betas as in GPT-3, rate and weight decay by ``--sweep``: the best of eight settings, each trained for
as many steps as the race; else ``--tuned-rate`` and ``--tuned-decay``), and at the Trainer's own settings
(AdamW at 5e-5, linear decay, GPT-2's dropout of 0.1). NanoThink trains at its preset's settings for as many
steps, so that it has not even finished its schedule where it overtakes. Whatever each side reaches at the end
of its run is the mark; what is printed is when NanoThink was first there.

The sides take turns, ``--turn`` steps each, so that a slow moment of the machine hits all of them.
Evaluation, the same blocks and the same code for all, does not count. ``--cpu-time`` counts processor time
instead of the clock, for a machine that is busy; use it with ``--threads 1``. Needs the packages of
``'.[bench]'``.
"""

from __future__ import annotations

import argparse
import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import torch.nn.functional as F
from side_by_side import machine, wait_for
from torch import Tensor, nn

from nanothink.config import Config
from nanothink.config.run import resolve_config
from nanothink.data.batches import TrainingBatches
from nanothink.data.corpus import find_corpus
from nanothink.data.split import SplitRule
from nanothink.data.tokenizer import Tokenizer, load_tokenizer
from nanothink.data.tokens import IGNORE, TokenisedCorpus, tokenise
from nanothink.inference.evaluate import evaluate_model
from nanothink.models import build_model
from nanothink.models.precision import Precision
from nanothink.training.matmul_types import choose_precision
from nanothink.training.optimizer import GroupedOptimizer, learning_rate_fraction

SWEEP = tuple((rate, decay) for rate in (1e-3, 2e-3, 3e-3, 5e-3) for decay in (0.1, 0.01))
"""Peak rate and weight decay of each setting of the sweep."""

TUNED, USUAL, OURS = "GPT-2, tuned", "GPT-2, Trainer's settings", "nanothink"


class Turns:
    """Sides in threads of their own, of which one at a time runs."""

    def __init__(self, names: list[str]) -> None:
        self._order = list(names)
        self._mine = {name: threading.Event() for name in names}
        self._mine[names[0]].set()

    def wait(self, name: str) -> None:
        self._mine[name].wait()

    def pass_on(self, name: str, *, done: bool = False) -> None:
        """Let the next side run, and wait until it is this one's turn again."""
        place = self._order.index(name)
        following = self._order[(place + 1) % len(self._order)]
        if done:
            self._order.remove(name)
        self._mine[name].clear()
        self._mine[following].set()
        if not done:
            self.wait(name)


@dataclass
class Side:
    """One training, its clock, and what it had reached when."""

    name: str
    clock: Callable[[], float]
    n_parameters: int = 0
    seconds: float = 0.0
    curve: list[tuple[int, float, float]] = field(default_factory=list)
    """(tokens, seconds, bits per byte)."""
    _since: float = 0.0

    def go(self) -> None:
        self._since = self.clock()

    def stop(self) -> None:
        self.seconds += self.clock() - self._since

    @property
    def final(self) -> tuple[int, float, float]:
        return self.curve[-1]

    def first_at(self, mark: float) -> tuple[int, float, float] | None:
        """The first evaluation at ``mark`` or below."""
        return next((point for point in self.curve if point[2] <= mark), None)


class Scored(nn.Module):
    """A model of transformers, with what evaluation asks for."""

    logit_scale = 1.0

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def log_likelihood(self, inputs: Tensor, targets: Tensor) -> Tensor:
        logits = self.model(input_ids=inputs).logits.flatten(0, 1)
        nats = F.cross_entropy(logits, targets.flatten(), reduction="none", ignore_index=IGNORE)
        return -nats.view(targets.shape)


class Race:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.tokenizer: Tokenizer = load_tokenizer(options.tokenizer)
        self.config: Config = resolve_config(preset=options.preset, assignments=options.set).config
        corpus = find_corpus(options.data_dir, options.domains)
        self.tokens: TokenisedCorpus = tokenise(corpus, self.tokenizer, split=SplitRule.of(self.config.data))
        self.length = self.config.model.max_seq_len
        self.batch = self.config.train_expert.batch_size
        self.device = torch.device(options.device)
        self.turns: Turns

    def bits_per_byte(self, model: Any) -> float:
        found = evaluate_model(
            model,
            self.tokens.val,
            length=self.length,
            batch_size=8,
            precision=Precision(self.device, torch.float32, "for all sides"),
            max_tokens=self.options.eval_tokens,
        )
        return found.overall.bits_per_byte

    def reached(self, side: Side, model: Any, step: int) -> None:
        point = (step * self.batch * self.length, side.seconds, self.bits_per_byte(model))
        side.curve.append(point)
        print(f"{side.name}: step {step}, {point[1]:.1f} s, {point[2]:.4f} bits per byte", flush=True)

    def nanothink(self, side: Side) -> None:
        options, train = self.options, self.config.train_expert
        torch.manual_seed(options.seed)
        model = build_model("transformer", self.config, self.tokenizer.vocab_size)
        model.to(self.device).train()
        side.n_parameters = sum(p.numel() for p in model.parameters())
        precision = choose_precision(train, self.config.model, self.device)
        train = train.model_copy(update=precision.settled)
        optimizer = GroupedOptimizer(model.parameter_groups(), train)
        batches = TrainingBatches(self.tokens.train, self.length, options.seed)
        side.go()
        for step in range(options.steps):
            inputs, targets = (part.to(self.device) for part in batches.read(step * self.batch, self.batch))
            with precision.autocast():
                loss = model.loss(inputs, targets, scale=1 / int((targets != IGNORE).sum()))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(optimizer.parameters, train.grad_clip, foreach=True)
            optimizer.set_fraction(learning_rate_fraction(step, options.steps, train))
            optimizer.step()
            optimizer.zero_grad()
            if (step + 1) % options.turn == 0 or step + 1 == options.steps:
                wait_for(self.device)
                side.stop()
                self.reached(side, model, step + 1)
                self.turns.pass_on(side.name, done=step + 1 == options.steps)
                side.go()

    def sweep(self) -> None:
        """Train GPT-2 at every setting of SWEEP, and tune the race's by the best."""
        found: dict[tuple[float, float], float] = {}
        for rate, decay in SWEEP:
            self.options.tuned_rate, self.options.tuned_decay = rate, decay
            side = Side(f"GPT-2 at {rate:g}, decay {decay:g}", time.process_time)
            self.turns = Turns([side.name])
            self.gpt2(side, tuned=True, every=self.options.steps)
            found[rate, decay] = side.final[2]
        print("\n| rate | weight decay | bits per byte |\n|---:|---:|---:|")
        for (rate, decay), bits in found.items():
            print(f"| {rate:g} | {decay:g} | {bits:.4f} |")
        self.options.tuned_rate, self.options.tuned_decay = min(found, key=found.__getitem__)

    def gpt2(self, side: Side, *, tuned: bool, every: int | None = None) -> None:
        from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

        race, options = self, self.options
        torch.manual_seed(options.seed)
        eos = self.tokenizer.eos_id
        shape: dict[str, Any] = {"bos_token_id": eos, "eos_token_id": eos}
        if tuned:
            shape |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=self.tokenizer.vocab_size,
                n_positions=self.length,
                n_embd=self.config.model.d_model,
                n_layer=self.config.transformer.n_layers,
                n_head=self.config.transformer.n_heads,
                **shape,
            )
        )
        side.n_parameters = sum(p.numel() for p in model.parameters())
        scored = Scored(model)

        class TakesTurns(TrainerCallback):  # type: ignore[misc]
            def on_train_begin(self, *_: Any, **__: Any) -> None:
                side.go()

            def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
                step, last = state.global_step, state.global_step == options.steps
                if step % (every or options.turn) == 0 or last:
                    wait_for(race.device)
                    side.stop()
                    race.reached(side, scored, step)
                    model.train()
                    if not last:
                        race.turns.pass_on(side.name)
                        side.go()

        rates: dict[str, Any] = {}
        if tuned:
            rates = {
                "learning_rate": options.tuned_rate,
                "lr_scheduler_type": "cosine",
                "warmup_steps": options.steps // 10,
                "adam_beta2": 0.95,
                "weight_decay": options.tuned_decay,
            }
        arguments = TrainingArguments(
            output_dir=str(options.out / "trainer"),
            max_steps=options.steps,
            per_device_train_batch_size=self.batch,
            seed=options.seed,
            use_cpu=race.device.type == "cpu",
            bf16=race.device.type == "cuda",  # as NanoThink there
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            **rates,
        )
        blocks = Blocks(self.tokens, self.length)
        Trainer(model=model, args=arguments, train_dataset=blocks, callbacks=[TakesTurns()]).train()
        self.turns.pass_on(side.name, done=True)

    def run(self, names: list[str]) -> dict[str, Side]:
        """All sides, to the end."""
        self.turns = Turns(names)
        clock = time.process_time if self.options.cpu_time else time.perf_counter
        sides = {name: Side(name, clock) for name in names}
        failures: list[BaseException] = []

        def start(name: str, train: Callable[[Side], None]) -> threading.Thread:
            def call() -> None:
                self.turns.wait(name)
                try:
                    train(sides[name])
                except Exception as error:
                    failures.append(error)
                    raise

            return threading.Thread(target=call, daemon=True)

        trainings: dict[str, Callable[[Side], None]] = {
            OURS: self.nanothink,
            USUAL: lambda side: self.gpt2(side, tuned=False),
            TUNED: lambda side: self.gpt2(side, tuned=True),
        }
        threads = [start(name, trainings[name]) for name in names]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            time.sleep(0.2)
            if failures:
                raise SystemExit(f"A side failed: {failures[0]!r}")
        return sides


class Blocks(torch.utils.data.Dataset[dict[str, Tensor]]):
    """All full blocks of the training text, as ``transformers``' own example (run_clm.py) cuts it."""

    def __init__(self, tokens: TokenisedCorpus, length: int) -> None:
        self._streams, self._length = tokens.train, length
        self._places = [
            (domain, index)
            for domain, stream in sorted(tokens.train.items())
            for index in range(stream.n_tokens // length)
        ]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, place: int) -> dict[str, Tensor]:
        domain, index = self._places[place]
        block = torch.from_numpy(self._streams[domain].block(index, self._length)[1])
        return {"input_ids": block, "labels": block}


def table(sides: dict[str, Side]) -> None:
    ours = sides[OURS]
    print("\n| | parameters | tokens | seconds | bits per byte |\n|---|---:|---:|---:|---:|")
    for name, side in sides.items():
        tokens, seconds, bits = side.final
        print(f"| {name} | {side.n_parameters:,} | {tokens:,} | {seconds:.1f} | {bits:.4f} |")
    print(
        "\n| to the quality of | bits per byte | nanothink's tokens | of its | nanothink's seconds | of its |"
        "\n|---|---:|---:|---:|---:|---:|"
    )
    for name, side in sides.items():
        if name == OURS:
            continue
        tokens, seconds, mark = side.final
        at = ours.first_at(mark)
        if at is None:
            print(f"| {name} | {mark:.4f} | not reached | | | |")
        else:
            print(
                f"| {name} | {mark:.4f} | {at[0]:,} | {at[0] / tokens:.2f} | {at[1]:.1f} | "
                f"**{at[1] / seconds:.2f}** |"
            )


def draw(sides: dict[str, Side], figure: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    drawing, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for name, side in sides.items():
        tokens, seconds, bits = zip(*side.curve, strict=True)
        left.plot(seconds, bits, label=name)
        right.plot([n / 1e6 for n in tokens], bits, label=name)
    left.set(xlabel="seconds of training", ylabel="validation bits per byte")
    right.set(xlabel="million tokens")
    right.legend()
    figure.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--domains", nargs="+", default=None)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--turn", type=int, default=20, help="steps of a side at a time, then an evaluation")
    parser.add_argument("--eval-tokens", type=int, default=4_000, help="of each domain")
    parser.add_argument("--tuned-rate", type=float, default=3e-3)
    parser.add_argument("--tuned-decay", type=float, default=0.1)
    parser.add_argument("--sweep", action="store_true", help="find both among eight settings first")
    parser.add_argument("--sides", nargs="+", choices=("usual", "tuned", "nanothink"), default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("time_to_quality"))
    parser.add_argument("--figure", type=Path, default=None, help="where to draw the curves (SVG)")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    chosen = {"tuned": TUNED, "usual": USUAL, "nanothink": OURS}
    names = [chosen[name] for name in options.sides or chosen]
    race = Race(options)
    if options.sweep:
        race.sweep()
    sides = race.run(names)
    options.out.mkdir(parents=True, exist_ok=True)
    curves = {name: side.curve for name, side in sides.items()}
    (options.out / "curves.json").write_text(json.dumps(curves, indent=2))
    shape = f"{race.batch} x {race.length} tokens a step, {options.steps} steps"
    shape += ", seconds of processor time" if options.cpu_time else ""
    print(f"\n{shape}, vocabulary {race.tokenizer.vocab_size:,}, {machine(race.device)}")
    if OURS in sides:
        table(sides)
    if options.figure:
        draw(sides, options.figure)


if __name__ == "__main__":
    main()
