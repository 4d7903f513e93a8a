"""Memory of each process of a training run: computed for three models on 1, 8 and 64 GPUs, or measured here.

    python benchmarks/process_memory.py
    python benchmarks/process_memory.py --measured

Computed as by --dry-run: nothing is trained or allocated, models are built on the device "meta". Measured:
two processes on this CPU (gloo) begin, stop and resume a transformer of 38 M parameters and NanoThink over
it; the most resident memory of each until it trains or validates, in a validation with samples, while the
best model is written, and in a step. Both tables are in docs/distributed.md.
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
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from side_by_side import plain_environment

from nanothink.config.run import resolve_config
from nanothink.models import build_model, training_of
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
MOMENTS = ("when it begins", "validation and samples", "best model written", "a step")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_RAW)
    parser.add_argument("--measured", action="store_true", help="run two processes here, for some minutes")
    if parser.parse_args().measured:
        measure()
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


def measure() -> None:
    """Run both models, print a table in MB."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        chance = random.Random(0)
        for domain in ("letters", "tales"):
            (folder / "data" / domain).mkdir(parents=True)
            texts = [" ".join(chance.choices(("time", "stone", "river"), k=120)) for _ in range(12)]
            lines = "".join(json.dumps({"text": f"{text} {n}."}) + "\n" for n, text in enumerate(texts))
            (folder / "data" / domain / "texts.jsonl").write_text(lines)
        nanothink = [sys.executable, "-m", "nanothink"]
        place = ["--data-dir", str(folder / "data"), "--checkpoint-dir", str(folder / "checkpoints")]
        tokenizer = ["--vocab-size", "320", "--out", str(folder / "tokenizer")]
        subprocess.run(
            [*nanothink, "tokenizer", "train", *place[:2], *tokenizer], env=plain_environment(), check=True
        )
        commands = {
            "transformer": [
                *("pretrain", "transformer", *place, "--tokenizer", str(folder / "tokenizer")),
                *_settings(MEASURED | {f"train_expert.{name}": value for name, value in PHASE.items()}),
            ],
            "nanothink_mla": [
                *("train-mla", *place, "--expert", str(folder / "checkpoints/transformer_expert.pt")),
                *_settings({f"train_mla.{name}": value for name, value in PHASE.items()}),
                # the experts are shared out too
                *_settings({"train_mla.fit": "full", "train_mla.states_disk_gb": 0, "mla.n_heads": 8}),
            ],
        }
        print("| model | weights | run | process | " + " | ".join(MOMENTS) + " |")
        print("|---|---:|---|---:|" + "---:|" * len(MOMENTS))
        for kind, command in commands.items():
            for run, arguments in (("new", command), ("resumed", [*command, "--resume"])):
                for rank, (n_bytes, found) in enumerate(_two(folder, arguments, stops=run == "new")):
                    cells = " | ".join(
                        f"{found[moment] / 1e6:.0f}" if moment in found else "" for moment in MOMENTS
                    )
                    print(f"| {kind} | {n_bytes / 1e6:.0f} | {run} | {rank} | {cells} |", flush=True)


def _settings(settings: dict[str, Any]) -> list[str]:
    return [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]


def _two(folder: Path, arguments: list[str], *, stops: bool) -> list[tuple[int, dict[str, int]]]:
    """Run two processes; returns for each the bytes of the model's weights, and its peaks by moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1]), "WORLD_SIZE": "2"}
    results = [folder / f"rank{rank}.json" for rank in range(2)]
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(result), str(int(stops)), *arguments],
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
    return [tuple(json.loads(result.read_text())) for result in results]


def train_and_measure(result: str, stops: str, *arguments: str) -> None:
    """Be one of the two processes."""
    from nanothink.cli.app import run as run_command
    from nanothink.training import loop

    peaks: dict[str, int] = {}
    take_step, evaluate = loop.take_step, loop._evaluate

    def measured(moment: str, do: Callable[..., Any]) -> Callable[..., Any]:
        def measuring(*given: Any) -> Any:
            Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
            done = do(*given)
            peaks[moment] = max(peaks.get(moment, 0), _peak_bytes())
            return done

        return measuring

    def stepping(run: loop.Run) -> loop.StepTaken:
        peaks.setdefault(MOMENTS[0], _peak_bytes())
        if int(stops) and run.state.step + 1 == STOPPED_AFTER:
            os.kill(os.getpid(), signal.SIGTERM)
        tensors = run.model.state_dict().values()
        sizes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        taken = take_measured(run)
        Path(result).write_text(json.dumps([sizes, peaks]))
        return taken

    take_measured = measured(MOMENTS[3], take_step)

    def evaluating(run: loop.Run, callbacks: loop.Callbacks) -> None:
        peaks.setdefault(MOMENTS[0], _peak_bytes())
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

    loop.take_step, loop._evaluate = stepping, evaluating
    sys.exit(run_command(list(arguments)))


def _peak_bytes() -> int:
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


if __name__ == "__main__":
    if "RANK" in os.environ:
        train_and_measure(*sys.argv[1:])
    else:
        main()
