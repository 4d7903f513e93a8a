"""What the diffuser's defaults rest on: ablations, the comparison with the transformer, sampling, cost.

Everything is done with a trained transformer checkpoint, on the data and with the tokenizer that it names.

    python benchmarks/diffuser.py ablate --settings '{"target": "head_row"}'
    python benchmarks/diffuser.py pair --steps 300 --seeds 0 1 --save FOLDER
    python benchmarks/diffuser.py sampling
    python benchmarks/diffuser.py cost --preset tiny --vocabulary 4096 --batch 8

"ablate" trains one diffuser for each JSON object of ``diffuser`` (and ``train_diffuser.``) settings on the
same blocks in the same order, and prints validation bits per byte and the error by noise level. "pair" trains
a diffuser and a transformer of its width and number of layers on equal tokens. "sampling" writes text by DDIM
and scores it under the transformer. "cost" measures a training step of each, taking turns.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from nanothink.checkpoints import read_checkpoint
from nanothink.config import Config
from nanothink.config.run import resolve_config
from nanothink.data.batches import TrainingBatches
from nanothink.data.corpus import find_corpus
from nanothink.data.tokens import IGNORE, TokenisedCorpus
from nanothink.inference.denoising import denoising_errors
from nanothink.inference.evaluate import evaluate_model
from nanothink.models import build_model, training_of
from nanothink.models.contract import Batch, LanguageModel
from nanothink.models.diffuser import Diffuser
from nanothink.models.precision import Precision
from nanothink.models.transformer import Transformer
from nanothink.runs.building import TARGET_SAMPLE_BLOCKS
from nanothink.runs.held_out import held_out
from nanothink.runs.trained_model import TrainedModel, load
from nanothink.training.objectives import ExpertObjective, Objective, next_token
from nanothink.training.optimizer import GroupedOptimizer, learning_rate_fraction

EXACT = Precision(torch.device("cpu"), torch.float32, "benchmark")
SCORED_TOKENS = 10_000  # of each domain's validation text


def objective_of(config: Config, seed: int, frozen: Transformer) -> Objective:
    return ExpertObjective(seed, frozen if config.diffuser.target == "hidden_state" else None)


def train(
    kind: str, config: Config, tokens: TokenisedCorpus, frozen: Transformer, steps: int, seed: int
) -> tuple[LanguageModel, float]:
    """A trained model, and the seconds of a step (median)."""
    training = training_of(kind, config)
    torch.manual_seed(seed)
    model = build_model(kind, config, frozen.vocab_size)
    batches = TrainingBatches(tokens.train, config.model.max_seq_len, seed)
    objective: Objective = next_token
    if isinstance(model, Diffuser):
        model.adopt(frozen, batches.read(0, TARGET_SAMPLE_BLOCKS)[1])
        objective = objective_of(config, seed, frozen)
    optimizer = GroupedOptimizer(model.parameter_groups(), training)
    seconds = []
    for step in range(steps):
        start = time.perf_counter()
        optimizer.set_fraction(learning_rate_fraction(step, steps, training))
        first = step * training.batch_size
        inputs, targets = batches.read(first, training.batch_size)
        batch = Batch(inputs, targets, range(first, first + training.batch_size))
        loss = objective(model, batch, 1 / targets.numel())
        loss.total.backward()
        torch.nn.utils.clip_grad_norm_(optimizer.parameters, training.grad_clip, foreach=True)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    return model, statistics.median(seconds)


def bits_per_byte(model: LanguageModel, tokens: TokenisedCorpus, length: int) -> float:
    scored = evaluate_model(
        model, tokens.val, length=length, batch_size=8, precision=EXACT, max_tokens=SCORED_TOKENS
    )
    return scored.overall.bits_per_byte


def settings_of(options: argparse.Namespace, changed: dict[str, Any]) -> Config:
    named = [f"{k}={v}" if "." in k else f"diffuser.{k}={v}" for k, v in changed.items()]
    return resolve_config(preset=options.preset, assignments=[*options.set, *named]).config


def opened(options: argparse.Namespace) -> tuple[TrainedModel, TokenisedCorpus]:
    """The frozen transformer, and its data."""
    frozen = load(options.transformer)
    data = frozen.config.data
    corpus = find_corpus(options.data_dir or data.data_dir, data.domains)
    return frozen, held_out(corpus, [frozen], frozen.tokenizer)


def ablate(options: argparse.Namespace) -> None:
    frozen, tokens = opened(options)
    assert isinstance(frozen.model, Transformer)
    print("| settings | seed | bits per byte | MSE by noise level | s/step |\n|---|---:|---:|---|---:|")
    for text in options.settings or ["{}"]:
        for seed in options.seeds:
            config = settings_of(options, json.loads(text))
            model, seconds = train("diffuser", config, tokens, frozen.model, options.steps, seed)
            assert isinstance(model, Diffuser)
            length = config.model.max_seq_len
            errors = denoising_errors(
                model, tokens.val, length=length, precision=EXACT, transformer=frozen.model
            )
            by_level = ", ".join(f"{level}: {mse:.3f}" for level, mse in errors.items())
            score = bits_per_byte(model, tokens, length)
            print(f"| {text} | {seed} | {score:.4f} | {by_level} | {seconds:.2f} |", flush=True)


def pair(options: argparse.Namespace) -> None:
    frozen, tokens = opened(options)
    assert isinstance(frozen.model, Transformer)
    print("| model | layers | seed | bits per byte | s/step |\n|---|---:|---:|---:|---:|")
    for seed in options.seeds:
        for kind in options.kinds:
            config = settings_of(options, {})
            model, seconds = train(kind, config, tokens, frozen.model, options.steps, seed)
            score = bits_per_byte(model, tokens, config.model.max_seq_len)
            layers = (config.diffuser if kind == "diffuser" else config.transformer).n_layers
            print(f"| {kind} | {layers} | {seed} | {score:.4f} | {seconds:.2f} |", flush=True)
            if options.save:
                save(Path(options.save) / f"{kind}_{seed}_expert.pt", model, config, frozen)


def save(path: Path, model: LanguageModel, config: Config, frozen: TrainedModel) -> None:
    """As a checkpoint that every command can open; its optimizer state is left out."""
    from nanothink.checkpoints import write_checkpoint
    from nanothink.checkpoints.restore import model_state

    payload = read_checkpoint(frozen.path)
    settled = config.model_copy(update={"data": frozen.config.data})
    payload |= {"kind": model.kind, "model_state": model_state(model), "optimizer_state": {}}
    payload["config"] = settled.model_dump(mode="json")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_checkpoint(path, payload)


def sampling(options: argparse.Namespace) -> None:
    frozen, tokens = opened(options)
    diffuser = load(options.diffuser)
    length, context = options.sample_tokens, frozen.config.model.max_seq_len
    prompts, real = [], []
    for stream in tokens.val.values():
        for index in range(options.samples):
            block = stream.block(index, context)[0].tolist()
            prompts.append(block[: options.prompt_tokens])
            real.append(block[options.prompt_tokens : options.prompt_tokens + length])
    print(
        "| sampled by | temperature | bits per byte under the transformer | distinct 1 / 2 / 3-grams | ",
        end="",
    )
    print("ms per token |\n|---|---:|---:|---:|---:|")
    report("the text itself", "", prompts, real, frozen, 0.0)
    for temperature in options.temperatures:
        for steps in [None, *options.ddim]:
            texts, seconds = write(diffuser, prompts, length, steps, temperature)
            ms = 1000 * seconds / sum(map(len, texts))
            name = "head, null noise" if steps is None else f"DDIM, {steps} steps"
            report(name, f"{temperature:g}", prompts, texts, frozen, ms)
        texts, seconds = write(frozen, prompts, length, None, temperature)
        name = "the transformer itself"
        report(name, f"{temperature:g}", prompts, texts, frozen, 1000 * seconds / sum(map(len, texts)))


def write(
    loaded: TrainedModel, prompts: Sequence[list[int]], length: int, steps: int | None, temperature: float
) -> tuple[list[list[int]], float]:
    start = time.perf_counter()
    texts = loaded.continue_tokens(
        prompts,
        ddim_steps=steps,
        max_new_tokens=length,
        temperature=temperature,
        top_k=0,
        seed=1,
        stop_at_eos=False,
    )
    return texts, time.perf_counter() - start


def report(
    name: str,
    temperature: str,
    prompts: Sequence[list[int]],
    texts: Sequence[list[int]],
    frozen: TrainedModel,
    ms: float,
) -> None:
    nats, n_bytes = 0.0, 0
    for prompt, text in zip(prompts, texts, strict=True):
        whole = torch.tensor([prompt + text])
        targets = whole[:, 1:].clone()
        targets[:, : len(prompt) - 1] = IGNORE
        with torch.no_grad():
            nats -= float(frozen.model.log_likelihood(whole[:, :-1], targets).sum())
        n_bytes += len(frozen.tokenizer.decode(text).encode())
    distinct = " / ".join(f"{distinct_share(texts, n):.3f}" for n in (1, 2, 3))
    bits = nats / math.log(2) / n_bytes
    print(f"| {name} | {temperature} | {bits:.3f} | {distinct} | {ms:.2f} |", flush=True)


def distinct_share(texts: Sequence[list[int]], n: int) -> float:
    """Different n-grams over all n-grams, of all texts together."""
    grams = [tuple(text[i : i + n]) for text in texts for i in range(len(text) - n + 1)]
    return len(set(grams)) / max(1, len(grams))


def cost(options: argparse.Namespace) -> None:
    """Seconds a step of both kinds, of equal width and number of layers, in turns."""
    config = settings_of(options, {"transformer.n_layers": options.layers, "n_layers": options.layers})
    torch.manual_seed(0)
    frozen = build_model("transformer", config, options.vocabulary)
    assert isinstance(frozen, Transformer)
    generator = torch.Generator().manual_seed(0)
    shape = (options.batch, config.model.max_seq_len + 1)
    tokens = torch.randint(options.vocabulary, shape, generator=generator)
    batch = Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), range(options.batch))
    steps: dict[str, Callable[[], None]] = {}
    for kind in ("transformer", "diffuser"):
        model = build_model(kind, config, options.vocabulary)
        objective: Objective = next_token
        if isinstance(model, Diffuser):
            model.adopt(frozen, batch.targets)
            objective = objective_of(config, 0, frozen)
        optimizer = GroupedOptimizer(model.parameter_groups(), training_of(kind, config))

        def step(model: Any = model, objective: Any = objective, optimizer: Any = optimizer) -> None:
            objective(model, batch, 1 / batch.targets.numel()).total.backward()
            torch.nn.utils.clip_grad_norm_(optimizer.parameters, 1.0, foreach=True)
            optimizer.step()
            optimizer.zero_grad()

        step()
        steps[kind] = step
    seconds: dict[str, list[float]] = {kind: [] for kind in steps}
    for _ in range(options.rounds):
        for kind, one_step in steps.items():
            start = time.perf_counter()
            one_step()
            seconds[kind].append(time.perf_counter() - start)
    ratios = [d / t for t, d in zip(seconds["transformer"], seconds["diffuser"], strict=True)]
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, float32")
    print(f"width {config.model.d_model}, {options.layers} layers, vocabulary {options.vocabulary}, ", end="")
    print(f"step of {options.batch} x {config.model.max_seq_len} tokens")
    print("\n| model | seconds (median) | min | max |\n|---|---:|---:|---:|")
    for kind, values in seconds.items():
        low, middle, high = min(values), statistics.median(values), max(values)
        print(f"| {kind} | {middle:.3f} | {low:.3f} | {high:.3f} |")
    print(f"\ndiffuser / transformer, pair by pair: median {statistics.median(ratios):.2f}, ", end="")
    print(f"min {min(ratios):.2f}, max {max(ratios):.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("ablate", "pair", "sampling", "cost"))
    parser.add_argument("--transformer", default="checkpoints/transformer_expert.pt", help="the frozen one")
    parser.add_argument("--diffuser", default="checkpoints/diffuser_expert.pt", help="to sample from")
    parser.add_argument("--data-dir", help="default: what the transformer was trained on")
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--set", action="append", default=[], help="section.key=value, as for nanothink")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--settings", nargs="+", help="JSON objects of diffuser settings to compare")
    parser.add_argument("--kinds", nargs="+", default=["transformer", "diffuser"])
    parser.add_argument("--save", help="folder for the trained models of a pair")
    parser.add_argument("--ddim", type=int, nargs="+", default=[1, 2, 5, 10, 50])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[1.0])
    parser.add_argument("--samples", type=int, default=4, help="prompts of each domain")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--sample-tokens", type=int, default=96)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    {"ablate": ablate, "pair": pair, "sampling": sampling, "cost": cost}[options.what](options)


if __name__ == "__main__":
    main()
