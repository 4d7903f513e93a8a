"""``nanothink demo``: ``nanothink train`` on the starter corpus, with every kind of expert."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from nanothink.cli.options import ForgivingCommand, flag, option
from nanothink.suggestions import command as as_typed

_SECONDS = 240.0
_KINDS = ("transformer", "state_space", "diffuser")


def register(app: typer.Typer) -> None:
    app.command(cls=ForgivingCommand)(demo)


def demo(
    context: typer.Context,
    out: Annotated[Path, option("DIR", "Where its data and checkpoints go.")] = Path("demo"),
    overwrite: Annotated[
        bool, flag("--overwrite", "Start anew instead of resuming an earlier demo.")
    ] = False,
) -> int:
    """Show the whole story, offline, from text to a trained model.

    Writes a starter corpus and trains on it for four minutes, as 'nanothink train' does: tokenizer, three
    experts, NanoThink with a vector store, evaluation and a sample. Each command is shown before it runs;
    one that was interrupted resumes when the demo is started again.
    """
    from nanothink.cli import render
    from nanothink.cli.story import Story

    data = str(out / "data")
    sample = ["data", "sample", data, "--overwrite"]
    title = "A starter corpus: code, manual and docstrings of Python"
    render.chapter(title, f"$ nanothink {shlex.join(sample)}")
    if code := context.obj(sample):
        return int(code)
    story = Story(
        call=context.obj,
        checkpoint_dir=out / "checkpoints",
        data_dir=data,
        seconds=_SECONDS,
        kinds=_KINDS,
        overwrite=overwrite,
        extend=True,
        prompt="def main(",
    )
    place = ["--checkpoint-dir", str(story.checkpoint_dir), *(["--overwrite"] if overwrite else [])]
    command = ["train", data, "--time", "4m", "--experts", ",".join(_KINDS), *place]
    render.chapter("All that follows, in one command", f"$ nanothink {shlex.join(command)}")
    code = story.tell()
    if not code:
        render.say(f"  {as_typed('train your_texts --time 1h')}   # the same on your own text")
    return code
