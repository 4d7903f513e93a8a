"""``nanothink demo``: text to trained models in a few minutes, by the commands that a person would type."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from nanothink.cli.options import ForgivingCommand
from nanothink.suggestions import command

_SHAPE = ("transformer.n_layers=2", "state_space.n_layers=3", "diffuser.n_layers=2")
"""Half of the ``tiny`` preset's layers: four models have to be ready within minutes."""


_KEYS = 200_000
"""Keys of the vector store; looking up neighbours for every token would take minutes more."""


def register(app: typer.Typer) -> None:
    app.command(cls=ForgivingCommand)(demo)


def demo(
    context: typer.Context,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where its data and checkpoints go.")] = Path(
        "demo"
    ),
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Start anew instead of resuming an earlier demo.")
    ] = False,
) -> int:
    """Show the whole story, offline, from text to a trained model.

    Starter corpus, tokenizer, three experts, NanoThink with a vector store, evaluation and a sample: a few
    minutes on two cores. Each command is shown before it runs; one that was interrupted resumes when the
    demo is started again.
    """
    import time

    from nanothink.cli import render

    run: Callable[[list[str]], int] = context.obj  # as app.py gives it to every command
    start = time.monotonic()
    steps = list(_steps(out, overwrite=overwrite))
    for number, (title, words) in enumerate(steps, start=1):
        render.chapter(f"{number}/{len(steps)}  {title}", f"$ nanothink {shlex.join(words)}")
        code = run(words)
        if code:
            return code
    render.chapter(f"Done in {render.duration(time.monotonic() - start)}. What to type next", "")
    for line in _next_commands(out):
        render.say(f"  {line}")
    return 0


def _steps(out: Path, *, overwrite: bool) -> Iterator[tuple[str, list[str]]]:
    """Title and command of each chapter."""
    data, tokenizer, checkpoints = str(out / "data"), out / "tokenizer", str(out / "checkpoints")
    again = ["--overwrite"] if overwrite else ["--resume"]
    shape = [part for assignment in _SHAPE for part in ("--set", assignment)]
    common = ["--preset", "tiny", "--data-dir", data, "--checkpoint-dir", checkpoints, *shape, *again]
    text = ["--tokenizer", str(tokenizer), *common]

    yield "A starter corpus: code, manual and docstrings of Python", ["data", "sample", data, "--overwrite"]
    if overwrite or not tokenizer.exists():
        train = ["tokenizer", "train", "--data-dir", data, "--vocab-size", "2048", "--out", str(tokenizer)]
        yield "A byte-level BPE of its own", [*train, *(["--overwrite"] if overwrite else [])]
    yield "First expert: a transformer", ["pretrain", "transformer", "--max-steps", "150", *text]
    yield "Second expert: a state-space model", ["pretrain", "state_space", "--max-steps", "150", *text]
    yield (
        "Third expert: a diffuser, against the frozen transformer",
        ["pretrain", "diffuser", "--max-steps", "150", *common],
    )
    vector_store = ["--use-vector-store", "--set", f"vector_store.max_keys={_KEYS}"]
    yield (
        "NanoThink over the three, frozen, with a vector store of the text",
        ["train-mla", "--max-steps", "100", *vector_store, *common],
    )
    held_out = ["--checkpoint-dir", checkpoints, "--max-tokens", "20000"]
    yield "All four on held-out text", ["eval", *held_out]
    combined = str(out / "checkpoints" / "nanothink_mla.pt")
    prompt = ["generate", "def main(", "-c", combined, "-n", "80", "--seed", "1", "--show-routing"]
    yield "What it writes, and which expert is trusted", prompt


def _next_commands(out: Path) -> Iterator[str]:
    checkpoints = out / "checkpoints"
    combined = checkpoints / "nanothink_mla.pt"
    for call, why in (
        (command("generate", "The module", "-c", combined), "let it write"),
        (command("report --checkpoint-dir", checkpoints), "curves, domains, routing as one HTML page"),
        (command("store search", "return the", "-c", combined), "what it recalls"),
        (command("checkpoints ls --checkpoint-dir", checkpoints), "what there is"),
        (command("data import notes.csv --domain notes"), "your own text, one folder a domain"),
        (command("pretrain transformer --dry-run --data-dir", out / "data"), "what training would take"),
    ):
        yield f"{call}   # {why}"
