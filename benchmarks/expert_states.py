"""Phase 2 with the experts' states from the disk, against computing them at every step.

All sides train the same NanoThink over three experts (transformer, state space, diffuser) on the same
blocks: the whole step, with clipping and optimizer. They take turns, so that a slow moment of the machine
hits all. In the first epoch states are computed and written; for the later ones they were written before.

    python benchmarks/expert_states.py                       the shapes of docs/benchmarks.md
    python benchmarks/expert_states.py --loss checkpoints/nanothink_mla.pt    what float16 does to the loss
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from side_by_side import machine, rows, take_turns
from torch import Tensor

from nanothink.config import Config
from nanothink.config.run import resolve_config
from nanothink.models import COMBINED, EXPERTS, ExpertDescription, build_model
from nanothink.models.contract import Batch
from nanothink.models.nanothink import NanoThink
from nanothink.training.expert_states import open_states
from nanothink.training.objectives import Objective, Routed
from nanothink.training.optimizer import GroupedOptimizer


@dataclass(frozen=True)
class Size:
    name: str
    preset: str
    vocabulary: int
    settings: tuple[str, ...] = ()


SIZES = (
    Size(
        "width 64",
        "tiny",
        1024,
        (
            "model.d_model=64",
            "model.max_seq_len=128",
            *("transformer.n_layers=3", "state_space.n_layers=3", "diffuser.n_layers=2"),
        ),
    ),
    Size("width 128 (tiny)", "tiny", 1024),
    Size("width 128 (tiny)", "tiny", 2048),
    Size("width 128 (tiny)", "tiny", 4096),
    Size("width 384 (default), 2 blocks of 512", "default", 50_257, ("train_mla.batch_size=2",)),
)


def built(config: Config, vocabulary: int) -> NanoThink:
    torch.manual_seed(0)
    experts = [ExpertDescription(kind, kind, config) for kind in EXPERTS]
    model = build_model(COMBINED, config, vocabulary, experts)
    assert isinstance(model, NanoThink)
    return model.train()


def stepping(
    config: Config, vocabulary: int, objective: Objective, batches: Sequence[Batch]
) -> Callable[[], None]:
    """One optimizer step of one batch a call, from batch to batch."""
    model = built(config, vocabulary)
    optimizer = GroupedOptimizer(model.parameter_groups(), config.train_mla)
    n_done = 0

    def step() -> None:
        nonlocal n_done
        batch = batches[n_done % len(batches)]
        n_done += 1
        objective(model, batch, 1 / batch.targets.numel()).total.backward()
        torch.nn.utils.clip_grad_norm_(optimizer.parameters, 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(size: Size, rounds: int, clock: Callable[[], float]) -> str:
    config = resolve_config(preset=size.preset, assignments=list(size.settings)).config
    count, length = config.train_mla.batch_size, config.model.max_seq_len
    batches = []
    for first in range(0, count * (rounds + 1), count):
        tokens = torch.randint(0, size.vocabulary, (count, length + 1))
        positions = range(first, first + count)
        batches.append(Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), positions))
    n_blocks = count * len(batches)
    shape = (n_blocks, len(EXPERTS), length, config.model.d_model)
    with tempfile.TemporaryDirectory() as folder:

        def states(name: str) -> Any:
            options: dict[str, Any] = {"budget_bytes": 10**11, "begin": True, "number": int}
            return open_states(Path(folder), {"for": name}, shape, **options)

        kept = states("kept")
        model = built(config, size.vocabulary)
        with torch.no_grad():
            for batch in batches:
                kept.of(model, batch.inputs, batch.positions)
        sides = {
            "computed": Routed(0.01),
            "first epoch": Routed(0.01, states("first")),
            "later epochs": Routed(0.01, kept),
        }
        seconds = take_turns(
            {name: stepping(config, size.vocabulary, side, batches) for name, side in sides.items()},
            rounds,
            clock,
        )
    return rows(seconds, "computed", tokens=count * length)


def losses(checkpoint: Path, max_tokens: int) -> str:
    """Validation loss of a trained NanoThink, and with its experts' states rounded to 16 bits."""
    import nanothink
    from nanothink.data.corpus import find_corpus
    from nanothink.inference.evaluate import evaluate_model
    from nanothink.runs.held_out import held_out

    loaded = nanothink.load(checkpoint, device="cpu")
    model, data = loaded.model, loaded.config.data
    assert isinstance(model, NanoThink)
    corpus = find_corpus(data.data_dir, data.domains)
    streams = held_out(corpus, [loaded], loaded.tokenizer).val
    exact = model.expert_states
    lines = []
    for dtype in (torch.float32, torch.float16, torch.bfloat16):

        def rounded(tokens: Tensor, dtype: torch.dtype = dtype) -> list[Tensor]:
            return [states.to(dtype).float() for states in exact(tokens)]

        model.expert_states = rounded  # type: ignore[method-assign]
        score = evaluate_model(
            model,
            streams,
            length=loaded.config.model.max_seq_len,
            batch_size=8,
            precision=loaded.precision,
            max_tokens=max_tokens,
        ).overall
        lines.append(f"| {dtype} | {score.loss:.7f} | {score.bits_per_byte:.7f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--cpu-time", action="store_true", help="count the processor's time: where others use it too"
    )
    parser.add_argument("--only", help="sizes whose name holds this")
    parser.add_argument("--loss", type=Path, metavar="CHECKPOINT", help="of a trained NanoThink")
    options = parser.parse_args()
    if options.loss:
        print("| states in | validation loss | bits per byte |\n|---|---:|---:|")
        print(losses(options.loss, max_tokens=4000))
        return
    clock = time.process_time if options.cpu_time else time.perf_counter
    print(f"a step of phase 2, {machine()}{', time of the processor' if options.cpu_time else ''}")
    for size in SIZES:
        if options.only and options.only not in f"{size.name}, {size.vocabulary}":
            continue
        print(
            f"\n| {size.name}, vocabulary {size.vocabulary:,} | s | min | max | tokens/s | speed-up | range |"
        )
        print("|---|---:|---:|---:|---:|---:|---|")
        print(measure(size, options.rounds, clock), flush=True)


if __name__ == "__main__":
    main()
