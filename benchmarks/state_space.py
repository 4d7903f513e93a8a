"""The state-space expert: training against mambapy and ``transformers``, decoding, and long texts.

    python benchmarks/state_space.py step --threads 1     a training step, bfloat16 autocast on all sides
    python benchmarks/state_space.py memory --batch 16    its peak memory, a fresh process a side
    python benchmarks/state_space.py decode --threads 1   tokens/s at batch 1, a step far into a text
    python benchmarks/state_space.py length --threads 1   memory and time of a step by length, a plot

``--sides`` picks what is compared; ``transformers`` is MambaForCausalLM as it comes, whose backward on a CPU
is quadratic in length (``--length 128`` is about what it can bear), ``transformers+mambapy`` the same with
``use_mambapy=True``, ``plain`` and ``compiled`` are NanoThink's. Ratios are against the first side.

Six layers of width 384, vocabulary 8,192, clipping and optimizer step included (Muon with AdamW here, AdamW
there). ``--device cuda`` does ``step`` and ``memory`` on a GPU. ``pip install -e '.[bench]'`` brings mambapy
and matplotlib.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import torch.nn.functional as F
from side_by_side import last_number, machine, peak, rows, take_turns, training_in, wait_for
from torch import Tensor, nn

from nanothink.config import Config, TrainExpertConfig
from nanothink.models import build_model
from nanothink.models.contract import LanguageModel
from nanothink.models.selective_scan import choose_scan
from nanothink.training.optimizer import GroupedOptimizer

VOCABULARY, WIDTH, LAYERS = 8192, 384, 6
Step = Callable[[], None]


class Size(NamedTuple):
    """Of a training step, and what it runs in and on."""

    batch: int
    length: int
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    def __str__(self) -> str:
        return f"{self.batch} x {self.length} tokens, {self.dtype_name}"

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def tokens(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets, each (B, T)."""
        return tuple(part.to(self.device) for part in tokens(self.batch, self.length))  # type: ignore[return-value]

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device, self.dtype, enabled=self.dtype is not torch.float32)


def expert(kind: str, scan: str = "auto") -> LanguageModel:
    config = Config()
    shape = config.state_space.model_copy(update={"scan": scan, "n_layers": LAYERS})
    torch.manual_seed(0)
    return build_model(kind, config.model_copy(update={"state_space": shape}), VOCABULARY)


def tokens(batch: int, length: int) -> tuple[Tensor, Tensor]:
    drawn = torch.randint(VOCABULARY, (batch, length + 1), generator=torch.Generator().manual_seed(0))
    return drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous()


def nanothink_step(scan: str, size: Size) -> Step:
    model = expert("state_space", scan).to(size.device).train()
    optimizer = GroupedOptimizer(model.parameter_groups(), training_in(size.dtype, size.device))
    inputs, targets = size.tokens()

    def step() -> None:
        with size.autocast():
            loss = model.loss(inputs, targets, scale=1 / targets.numel())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(optimizer.parameters, 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad()
        wait_for(size.device)

    return step


def mambapy_step(size: Size) -> Step:
    from mambapy.mamba import Mamba, MambaConfig

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(VOCABULARY, WIDTH),
        Mamba(MambaConfig(d_model=WIDTH, n_layers=LAYERS)),
        nn.RMSNorm(WIDTH),
        nn.Linear(WIDTH, VOCABULARY, bias=False),
    ).to(size.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    inputs, targets = size.tokens()

    def step() -> None:
        with size.autocast():
            logits = model(inputs)
        F.cross_entropy(logits.float().flatten(0, 1), targets.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        wait_for(size.device)

    return step


def transformers_step(size: Size, *, use_mambapy: bool) -> Step:
    from transformers import MambaConfig, MambaForCausalLM

    from nanothink.models.state_space import StateSpace, to_mamba_config

    ours = expert("state_space")
    assert isinstance(ours, StateSpace)
    config = MambaConfig(**to_mamba_config(ours), use_mambapy=use_mambapy)
    model = MambaForCausalLM(config).to(size.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    inputs, targets = size.tokens()

    def step() -> None:
        with size.autocast():
            logits = model(inputs).logits
        F.cross_entropy(logits.float().flatten(0, 1), targets.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        wait_for(size.device)

    return step


def make(side: str, size: Size) -> Step:
    if side == "mambapy":
        return mambapy_step(size)
    if side.startswith("transformers"):
        return transformers_step(size, use_mambapy=side.endswith("mambapy"))
    return nanothink_step(side, size)


def sides(device: str) -> list[str]:
    fast = choose_scan(device).name
    return ["mambapy", "transformers+mambapy", "plain", *([fast] if fast != "plain" else [])]


def training_speed(names: list[str], size: Size, rounds: int, clock: Callable[[], float]) -> None:
    seconds = take_turns({side: make(side, size) for side in names}, rounds, clock)
    print(f"\na training step of {size}, {machine(size.device)}\n")
    print(f"| side | seconds (median) | min | max | tokens/s | tokens/s against {names[0]} | min to max |")
    print("|---|---:|---:|---:|---:|---:|---|")
    print(rows(seconds, names[0], tokens=size.batch * size.length))


def training_memory(names: list[str], size: Size) -> None:
    print(f"\npeak memory of a training step of {size}, {machine(size.device)}\n")
    print(f"| side | peak memory | against {names[0]} |\n|---|---:|---:|")
    peaks: dict[str, float] = {}
    where = ("--batch", str(size.batch), "--length", str(size.length), "--device", size.device)
    for side in names:
        peaks[side] = last_number(__file__, "child", "--side", side, *where, "--dtype", size.dtype_name)
        print(f"| {side} | {peaks[side] / 1e9:.2f} GB | {peaks[side] / peaks[names[0]]:.3f} |", flush=True)


def decoding(rounds: int, n_tokens: int, far: int) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    from nanothink.models.state_space import StateSpace, to_mamba_config

    model = expert("state_space").eval()
    assert isinstance(model, StateSpace)
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    theirs = MambaForCausalLM(MambaConfig(**to_mamba_config(model))).eval()
    theirs.load_state_dict(model.state_dict())
    prompt = tokens(1, 16)[0]

    def ours_decode() -> None:
        state = model.start(1)
        logits = model.step(prompt, state)
        for _ in range(n_tokens):
            logits = model.step(logits.argmax(-1, keepdim=True), state)

    def theirs_decode() -> None:
        found = theirs(prompt, use_cache=True)
        for _ in range(n_tokens):
            token = found.logits[:, -1].argmax(-1, keepdim=True)
            found = theirs(token, cache_params=found.cache_params, use_cache=True)

    with torch.inference_mode():
        expected = theirs(prompt).logits[:, -1]
        torch.testing.assert_close(model.step(prompt, model.start(1)), expected, rtol=1e-3, atol=1e-4)
        seconds = take_turns({"transformers, cached": theirs_decode, "nanothink": ours_decode}, rounds)
    print(f"\n{n_tokens} tokens one by one after a prompt of 16, batch 1, float32, {machine()}\n")
    print("| side | seconds (median) | min | max | tokens/s | against transformers | min to max |")
    print("|---|---:|---:|---:|---:|---:|---|")
    print(rows(seconds, "transformers, cached", tokens=n_tokens))

    def ten_steps(position: int) -> Callable[[], None]:
        state = model.start(1)
        model.step(torch.randint(VOCABULARY, (1, position)), state)

        def call() -> None:
            for _ in range(10):
                model.step(prompt[:, :1], state)

        return call

    seconds = take_turns({f"position {p:,}": ten_steps(p) for p in (10, far)}, 5 * rounds)
    milliseconds = {name: 100 * statistics.median(values) for name, values in seconds.items()}
    print("\none step: " + ", ".join(f"{ms:.2f} ms at {name}" for name, ms in milliseconds.items()))


def by_length(lengths: list[int], figure: Path) -> None:
    """One sequence of each length, a fresh process each; the transformer beside it for scale."""
    found: dict[str, list[tuple[int, float, float]]] = {"state_space": [], "transformer": []}
    print("\n| T | state_space: peak memory | seconds a step | transformer: peak memory | seconds a step |")
    print("|---:|---:|---:|---:|---:|")
    for length in lengths:
        cells = []
        for kind, points in found.items():
            child = (__file__, "child", "--side", kind, "--batch", "1", "--length", str(length))
            peak, seconds = last_number(*child), last_number(*child, "--time-only", "1")
            points.append((length, peak, seconds))
            cells.append(f"{peak / 1e9:.2f} GB | {seconds:.2f}")
        print(f"| {length:,} | {' | '.join(cells)} |", flush=True)
    draw(found, figure)
    print(f"\nplot: {figure}")


def draw(found: dict[str, list[tuple[int, float, float]]], figure: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    drawing, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for kind, points in found.items():
        lengths = [length for length, _, _ in points]
        left.plot(lengths, [peak / 1e9 for _, peak, _ in points], marker="o", label=kind)
        right.plot(lengths, [1e3 * seconds / length for length, _, seconds in points], marker="o", label=kind)
    left.set(xlabel="tokens in one sequence", ylabel="peak memory of a training step, GB", ylim=(0, None))
    right.set(xlabel="tokens in one sequence", ylabel="milliseconds a token", ylim=(0, None))
    left.legend()
    figure.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(figure)


def child(side: str, size: Size, time_only: bool) -> None:
    """What a fresh process does: two steps, and then it says its peak memory or the second one's seconds."""
    if side in {"state_space", "transformer"}:
        config = Config()
        longer = config.model.model_copy(update={"max_seq_len": size.length})
        model = build_model(side, config.model_copy(update={"model": longer}), VOCABULARY).train()
        optimizer = GroupedOptimizer(model.parameter_groups(), TrainExpertConfig())
        inputs, targets = tokens(size.batch, size.length)

        def step() -> None:
            model.loss(inputs, targets, scale=1 / targets.numel()).backward()
            optimizer.step()
            optimizer.zero_grad()
    else:
        step = make(side, size)
    step()
    start = time.perf_counter()
    step()
    if time_only:
        print(time.perf_counter() - start)
    else:
        print(peak(size.device))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("step", "memory", "decode", "length", "child"))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--far", type=int, default=100_000)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--figure", type=Path, default=Path("docs/figures/state_space_length.svg"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    every = ("mambapy", "transformers", "transformers+mambapy", "plain", "compiled", "triton")
    parser.add_argument("--sides", nargs="+", choices=every, default=None)
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="of a step, on one thread of a CPU that others use as well",
    )
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--time-only", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.threads or options.processor_time:
        torch.set_num_threads(options.threads or 1)
    size = Size(options.batch, options.length, getattr(torch, options.dtype), options.device)
    if options.what == "step":
        clock = time.thread_time if options.processor_time else time.perf_counter
        training_speed(options.sides or sides(options.device), size, options.rounds, clock)
    elif options.what == "memory":
        training_memory(options.sides or sides(options.device), size)
    elif options.what == "decode":
        decoding(options.rounds, options.tokens, options.far)
    elif options.what == "length":
        by_length(options.lengths, options.figure)
    else:
        child(options.side, size, bool(options.time_only))


if __name__ == "__main__":
    main()
