"""``nanothink train``: from a folder of text to trained, combined and scored models, within a given time."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from nanothink.cli import completion
from nanothink.cli.options import (
    CheckpointDir,
    Device,
    ForgivingCommand,
    Json,
    argument,
    examples,
    flag,
    option,
)
from nanothink.errors import UsageError
from nanothink.suggestions import did_you_mean

EXAMPLES = examples(
    "train --time 2h",
    "train novels --time 30m --checkpoint-dir novels-model",
    "train --time 2h --dry-run",
)

_PER_UNIT = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86_400}


def register(app: typer.Typer) -> None:
    app.command(cls=ForgivingCommand, epilog=EXAMPLES)(train)


def train(
    context: typer.Context,
    data_dir: Annotated[
        str | None,
        argument(
            "DATA_DIR",
            "Folder with one folder per domain, or with txt, md, html, docx, epub and pdf files, or one "
            "such file. [default: data]",
        ),
    ] = None,
    duration: Annotated[
        str | None,
        option(
            "TIME", "Time for all of it: 45m, 2h, 1h30m; a number is minutes. [default: the plan's]", "--time"
        ),
    ] = None,
    experts: Annotated[
        str | None,
        option(
            "KINDS",
            "Experts to train, with commas. [default: state_space,transformer, and further ones if time is "
            "left]",
            complete=completion.kinds,
        ),
    ] = None,
    checkpoint_dir: CheckpointDir = Path("checkpoints"),
    device: Device = None,
    overwrite: Annotated[bool, flag("--overwrite", "Start anew, with a new plan.")] = False,
    dry_run: Annotated[bool, flag("--dry-run", "Print the plan, and stop there.")] = False,
    as_json: Json = False,
) -> int:
    """Train everything on your own text, within a given time.

    Looks at the text and at the speed of this machine, chooses sizes, trains a tokenizer and experts,
    combines them with a vector store, and scores them on held-out text. Each command is shown before it
    runs. Interrupted, the same command resumes it.
    """
    from nanothink.cli.story import Story

    story = Story(
        call=context.obj,
        data_dir=data_dir,
        seconds=None if duration is None else seconds_of(duration),
        kinds=None if experts is None else _kinds(experts),
        checkpoint_dir=checkpoint_dir,
        device=device,
        overwrite=overwrite,
        as_json=as_json,
    )
    return story.print_plan() if dry_run else story.tell()


def seconds_of(text: str) -> float:
    """Parse a duration: 90s, 10m, 1.5h, 1h30m; a number alone is minutes.

    Raises:
        UsageError: it is none.
    """
    pieces = re.findall(r"(\d+(?:\.\d+)?)\s*(min|[smhd]|$)", text.strip().lower())
    whole = "".join(number + unit for number, unit in pieces)
    alone = len(pieces) == 1 and not pieces[0][1]
    if (
        not pieces
        or whole != re.sub(r"\s", "", text.lower())
        or (not alone and not all(u for _, u in pieces))
    ):
        raise UsageError(
            f"--time {text!r} is no duration. Write it as 45m, 2h or 1h30m; a number is minutes."
        )
    seconds = sum(float(number) * _PER_UNIT[unit or "m"] for number, unit in pieces)
    if not seconds:
        raise UsageError("--time is 0. Write it as 45m, 2h or 1h30m; a number is minutes.")
    return seconds


def _kinds(text: str) -> tuple[str, ...]:
    from nanothink.models import EXPERTS

    kinds = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    for kind in kinds:
        if kind not in EXPERTS:
            raise UsageError(
                f"--experts: there is no expert '{kind}'.{did_you_mean(kind, EXPERTS)} Known: "
                f"{', '.join(EXPERTS)}."
            )
    if not kinds:
        raise UsageError(f"--experts needs a value, as in: --experts {','.join(EXPERTS)}")
    if "diffuser" in kinds and "transformer" not in kinds[: kinds.index("diffuser")]:
        raise UsageError(
            "--experts: a diffuser learns from a transformer, which stands before it: "
            "--experts transformer,diffuser"
        )
    return kinds
