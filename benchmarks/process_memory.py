"""Memory of each process of a training run: computed for three models on 1, 8 and 64 GPUs, or measured here.

    python benchmarks/process_memory.py
    python benchmarks/process_memory.py --measured
    python benchmarks/process_memory.py --frozen-experts
    python benchmarks/process_memory.py --shard

Computed as by --dry-run: nothing is trained or allocated, models are built on the device "meta". Measured:
two processes on this CPU (gloo) begin, stop and resume a transformer of 38 M parameters and NanoThink over
it; the most resident memory of each until it trains or validates, in a validation with samples, while the
best model is written, in a step, and at the end, where the best model is read, fitted and written again;
there without the pages of its mapped file, which the system drops when it needs memory.

Frozen experts: the same NanoThink with its expert shared out, whole in each process, and whole in bfloat16;
memory, and processor time of a step in both processes together. Shard: processor time of a step of a small
transformer whose parameters are shared out, or replicated. All tables are in docs/distributed.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from side_by_side import plain_environment

from nanothink.config.run import resolve_config
from nanothink.models import build_model, training_of
from nanothink.models.low_rank import in_blocks
from nanothink.runs.memory import ModelSizes, with_recomputation

SHAPES = {
    "125 M": {"model.d_model": 768, "transformer.n_layers": 12, "transformer.n_heads": 12},
    "1 B": {"model.d_model": 2048, "transformer.n_layers": 18, "transformer.n_heads": 16},
    "7 B": {"model.d_model": 4096, "transformer.n_layers": 32, "transformer.n_heads": 32},
}
"""Transformers with a feed-forward of 8/3 of the width."""
VOCABULARY, LENGTH, BLOCKS = 32_000, 2048, 4  # blocks of text that a process computes at a time, in bfloat16
GPUS = (1, 8, 64)
_RAW = argparse.RawDescriptionHelpFormatter

MEASURED = {
    "model.d_model": 512,
    "model.max_seq_len": 32,
    "transformer.n_layers": 12,
    "transformer.n_heads": 8,
    "transformer.ffn_mult": 8 / 3,
}
PHASE = {
    "batch_size": 2,
    "grad_accum_steps": 1,
    "max_steps": 3,
    "eval_every_steps": 2,
    "eval_max_tokens": 100,
    "sample_tokens": 3,
    "amp_dtype": "float32",
    "log_every_steps": 1,
}
STOPPED_AFTER = 2  # steps: the resumed run validates before it trains
MOMENTS = ("when it begins", "validation and samples", "best model written", "a step", "the end")
SMALL = {
    "model.d_model": 128,
    "model.max_seq_len": 128,
    "transformer.n_layers": 4,
    "transformer.n_heads": 4,
    "train_expert.batch_size": 4,
    "train_expert.max_steps": 24,
}
KEPT = ("shared out", "whole", "whole, bfloat16")
"""Ways to keep frozen experts."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_RAW)
    for name in ("measured", "frozen-experts", "shard"):
        parser.add_argument(f"--{name}", action="store_true", help="run two processes here, for some minutes")
    options = parser.parse_args()
    for chosen, run in (
        (options.measured, measure),
        (options.frozen_experts, measure_frozen_experts),
        (options.shard, measure_shard),
    ):
        if chosen:
            with tempfile.TemporaryDirectory() as scratch:
                run(Ground.make(Path(scratch)))
            return
    print("| model | parameters | shard | " + " | ".join(f"{n} GPU{'s' * (n > 1)}" for n in GPUS) + " |")
    print("|---|---:|---|" + "---:|" * len(GPUS))
    for name, shape in SHAPES.items():
        settings = {**shape, "model.max_seq_len": LENGTH, "transformer.ffn_mult": 8 / 3}
        config = resolve_config(assignments=[f"{key}={value}" for key, value in settings.items()]).config
        with torch.device("meta"):
            model = build_model("transformer", config, VOCABULARY)
        sizes = ModelSizes.of(model, training_of("transformer", config))
        kept = with_recomputation(model, model.activation_bytes(BLOCKS, LENGTH, 2), BLOCKS * LENGTH)
        for shard in ("none", "full"):
            row = [sum(sizes.memory(n, shard, 1, kept).values()) / 2**30 for n in GPUS]
            cells = " | ".join(f"{gib:.1f}" for gib in row)
            print(f"| {name} | {sizes.trained / 1e9:.2f} B | `{shard}` | {cells} |")


@dataclasses.dataclass(frozen=True)
class Ground:
    """Text and a tokenizer for the models that are measured."""

    folder: Path

    @classmethod
    def make(cls, folder: Path) -> Ground:
        chance = random.Random(0)
        for domain in ("letters", "tales"):
            (folder / "data" / domain).mkdir(parents=True)
            texts = [" ".join(chance.choices(("time", "stone", "river"), k=120)) for _ in range(12)]
            lines = "".join(json.dumps({"text": f"{text} {n}."}) + "\n" for n, text in enumerate(texts))
            (folder / "data" / domain / "texts.jsonl").write_text(lines)
        command = [sys.executable, "-m", "nanothink", "tokenizer", "train", "--vocab-size", "320"]
        place = ["--data-dir", str(folder / "data"), "--out", str(folder / "tokenizer")]
        subprocess.run([*command, *place], env=plain_environment(), check=True)
        return cls(folder)

    def place(self, checkpoints: str = "checkpoints") -> list[str]:
        return ["--data-dir", str(self.folder / "data"), "--checkpoint-dir", str(self.folder / checkpoints)]

    def transformer(self, settings: dict[str, Any]) -> list[str]:
        phase = {f"train_expert.{name}": value for name, value in PHASE.items()}
        tokenizer = ["--tokenizer", str(self.folder / "tokenizer")]
        return ["pretrain", "transformer", *self.place(), *tokenizer, *_settings(phase | settings)]

    def nanothink(self, settings: dict[str, Any], checkpoints: str = "checkpoints") -> list[str]:
        phase = {f"train_mla.{name}": value for name, value in PHASE.items()}
        # no states on the disk: every step reads the expert
        shape = {"train_mla.fit": "full", "train_mla.states_disk_gb": 0, "mla.n_heads": 8}
        expert = str(self.folder / "checkpoints/transformer_expert.pt")
        return [
            *("train-mla", *self.place(checkpoints), "--expert", expert),
            *_settings(phase | shape | settings),
        ]


def measure(ground: Ground) -> None:
    """Run both models, print a table in MB."""
    commands = {"transformer": ground.transformer(MEASURED), "nanothink_mla": ground.nanothink({})}
    print("| model | all weights | run | process | " + " | ".join(MOMENTS) + " |")
    print("|---|---:|---|---:|" + "---:|" * len(MOMENTS))
    for kind, command in commands.items():
        for run, arguments in (("new", command), ("resumed", [*command, "--resume"])):
            for rank, found in enumerate(_two(ground, arguments, stops=run == "new")):
                peaks = [f"{found[m] / 1e6:.0f}" if m in found else "" for m in MOMENTS]
                cells = [kind, f"{found['weights'] / 1e6:.0f}", run, str(rank), *peaks]
                print(f"| {' | '.join(cells)} |", flush=True)


def measure_frozen_experts(ground: Ground) -> None:
    """Run NanoThink with its expert kept in each way, print a table in MB and seconds."""
    _two(ground, ground.transformer(MEASURED), stops=False)
    print("| frozen expert | held | most in a step | processor seconds of a step | loss of the last step |")
    print("|---|---:|---:|---:|---:|")
    for kept in KEPT:
        command = ground.nanothink({"train_mla.max_steps": 10}, checkpoints=kept)
        found = _two(ground, command, stops=False, kept=kept)
        held, peak = (max(each[name] for each in found) for name in ("held", "a step"))
        seconds = sum(each["seconds"] for each in found)
        print(
            f"| {kept} | {held / 1e6:.0f} | {peak / 1e6:.0f} | {seconds:.3f} | {found[0]['loss']:.5f} |",
            flush=True,
        )


def measure_shard(ground: Ground) -> None:
    """Run a small transformer in both ways, in turns, print a table in milliseconds."""
    print("| shard | processor milliseconds of a step | of which the optimizer |")
    print("|---|---:|---:|")
    found: dict[str, list[tuple[float, float]]] = {"full": [], "none": []}
    for _ in range(3):
        for shard, times in found.items():
            settings = SMALL | {"distributed.shard": shard}
            both = _two(ground, [*ground.transformer(settings), "--overwrite"], stops=False)
            times.append((sum(e["seconds"] for e in both), sum(e["moving"] for e in both)))
    for shard, times in found.items():
        whole, moving = (1000 * statistics.median(column) for column in zip(*times, strict=True))
        print(f"| `{shard}` | {whole:.0f} | {moving:.0f} |")


def _settings(settings: dict[str, Any]) -> list[str]:
    return [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]


def _two(ground: Ground, arguments: list[str], *, stops: bool, kept: str = KEPT[0]) -> list[dict[str, float]]:
    """Run two processes; returns for each what ``train_and_measure`` found."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1]), "WORLD_SIZE": "2"}
    results = [ground.folder / f"rank{rank}.json" for rank in range(2)]
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(result), str(int(stops)), kept, *arguments],
            env={
                **plain_environment(),
                **address,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "OMP_NUM_THREADS": "1",
                "MALLOC_MMAP_THRESHOLD_": "131072",
            },
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, result in enumerate(results)
    ]
    for process in processes:
        said = process.communicate()[1]
        if process.returncode != (130 if stops else 0):
            raise SystemExit(f"a process ended with {process.returncode}: {said}")
    return [json.loads(result.read_text()) for result in results]


def train_and_measure(result: str, stops: str, kept: str, *arguments: str) -> None:
    """Be one of the two processes.

    Writes the bytes of all weights, the most memory by moment, that held at the beginning of the last step,
    its loss, and the processor seconds of a step and of its optimizer (medians).
    """
    from nanothink.cli.app import run as run_command
    from nanothink.runs import building, pretraining
    from nanothink.training import loop
    from nanothink.training.optimizer import GroupedOptimizer

    found: dict[str, float] = {}
    seconds: dict[str, list[float]] = {"seconds": [], "moving": []}
    take_step, evaluate, move = loop.take_step, loop._evaluate, GroupedOptimizer.step

    def measured(moment: str, do: Callable[..., Any]) -> Callable[..., Any]:
        def measuring(*given: Any) -> Any:
            Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
            done = do(*given)
            found[moment] = max(found.get(moment, 0), _bytes("VmHWM"))
            Path(result).write_text(json.dumps(found))
            return done

        return measuring

    def timed(name: str, do: Callable[..., Any]) -> Callable[..., Any]:
        def timing(*given: Any) -> Any:
            began = time.process_time()
            done = do(*given)
            seconds[name].append(time.process_time() - began)
            found[name] = statistics.median(seconds[name])
            return done

        return timing

    def stepping(run: loop.Run) -> loop.StepTaken:
        found.setdefault(MOMENTS[0], _bytes("VmHWM"))
        if int(stops) and run.state.step + 1 == STOPPED_AFTER:
            os.kill(os.getpid(), signal.SIGTERM)
        tensors = run.model.state_dict().values()
        found["weights"] = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        found["held"] = _bytes("VmRSS")
        taken: loop.StepTaken = step_measured(run)
        found["loss"] = taken.loss
        return taken

    step_measured = measured(MOMENTS[3], timed("seconds", take_step))

    def evaluating(run: loop.Run, callbacks: loop.Callbacks) -> None:
        found.setdefault(MOMENTS[0], _bytes("VmHWM"))
        save = callbacks.save
        write_best = measured(MOMENTS[2], save)
        evaluate(
            run,
            dataclasses.replace(
                callbacks,
                evaluate=measured(MOMENTS[1], callbacks.evaluate),
                sample=measured(MOMENTS[1], callbacks.sample),
                save=lambda role: write_best(role) if role == "best" else save(role),
            ),
        )

    def experts_whole(model: Any, objective: Any) -> list[torch.nn.Module]:
        if kept == KEPT[2]:
            keep_narrow(model.experts)
        return list(model.experts)

    loop.take_step, loop._evaluate = stepping, evaluating
    GroupedOptimizer.step = timed("moving", move)  # type: ignore[method-assign]
    finish_best = pretraining.finish_best

    def finishing(*given: Any) -> Any:
        with sampled() as most:
            done = finish_best(*given)
        found[MOMENTS[4]] = max(most)
        Path(result).write_text(json.dumps(found))
        return done

    pretraining.finish_best = finishing  # type: ignore[assignment]
    if kept != KEPT[0]:
        building._kept_whole = experts_whole
    sys.exit(run_command(list(arguments)))


def keep_narrow(experts: torch.nn.Module) -> None:
    """Make the matrices of blocks bfloat16, as those of published models may be."""
    for name, layer in experts.named_modules():
        if isinstance(layer, torch.nn.Linear) and in_blocks(f"{name}.weight"):
            layer.weight.data = layer.weight.data.to(torch.bfloat16)


@contextmanager
def sampled() -> Iterator[list[int]]:
    """Memory in the block every two milliseconds, without files that are mapped there."""
    mapped, over = _bytes("RssFile"), threading.Event()
    found: list[int] = []

    def sample() -> None:
        while not over.wait(0.002):
            found.append(mapped + _bytes("RssAnon"))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()


def _bytes(name: str) -> int:
    found = re.search(rf"{name}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


if __name__ == "__main__":
    if "RANK" in os.environ:
        train_and_measure(*sys.argv[1:])
    else:
        main()
