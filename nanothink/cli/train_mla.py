"""``nanothink train-mla``: combine trained experts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nanothink.cli import completion
from nanothink.cli.options import ForgivingCommand, NewRun, examples, flag, grouped, option
from nanothink.cli.pretrain import start

EXAMPLES = examples(
    "train-mla --preset tiny --use-vector-store",
    "train-mla --expert code_expert.pt --expert tales_expert.pt",
    "train-mla --resume",
)


def register(app: typer.Typer) -> None:
    app.command("train-mla", cls=ForgivingCommand, epilog=EXAMPLES)(train_mla)


@grouped
def train_mla(
    expert: Annotated[
        list[Path] | None,
        option(
            "PATH",
            "An expert to combine; repeatable. [default: transformer_expert.pt, state_space_expert.pt "
            "and diffuser_expert.pt in --checkpoint-dir]",
            complete=completion.checkpoints,
        ),
    ] = None,
    tokenizer: Annotated[str | None, option("NAME", "Must be the experts'; leave it out.")] = None,
    name: Annotated[
        str | None, option("NAME", "Its checkpoint is NAME_nanothink_mla.pt. [default: no name]")
    ] = None,
    use_vector_store: Annotated[
        bool,
        flag(
            "--use-vector-store",
            "Train with a vector store of the training text beside the experts; built if it is missing.",
        ),
    ] = False,
    *,
    options: NewRun,
) -> int:
    """Train NanoThink, a router over frozen experts.

    Latent attention, router and head are trained; the experts stay as they are. Files and tables call it by
    its kind, nanothink_mla.
    """
    from nanothink.models import COMBINED

    flags = {
        "data.tokenizer": ("--tokenizer", tokenizer),
        "vector_store.enabled": ("--use-vector-store", use_vector_store or None),
    }
    return start(COMBINED, name, options, flags, expert or ())
