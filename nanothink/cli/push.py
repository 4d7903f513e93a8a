"""``nanothink checkpoints push``: a model on the Hugging Face Hub."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from nanothink.cli.options import CheckpointDir, Device, Json, NewestCheckpoint, argument, flag, option


def push(
    repository: Annotated[str, argument("REPO", "OWNER/NAME, or NAME for the owner of the token.")],
    checkpoint: NewestCheckpoint = None,
    licence: Annotated[
        str | None,
        option("NAME", "Licence, as the Hub calls it, such as mit. [default: asked for]", "--license"),
    ] = None,
    public: Annotated[
        bool, flag("--public", "Everyone sees a repository that is created. [default: private]")
    ] = False,
    overwrite: Annotated[
        bool, flag("--overwrite", "Add a commit to a repository that is there already.")
    ] = False,
    dry_run: Annotated[
        bool, flag("--dry-run", "Show the files and the model card, and upload nothing.")
    ] = False,
    data_dir: Annotated[
        str | None, option("DIR", "Text to score for the card. [default: the data it was trained on]")
    ] = None,
    checkpoint_dir: CheckpointDir = Path("checkpoints"),
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Upload a model with a model card to the Hugging Face Hub.

    The card has the data by domain and size, bits per byte, settings, licence. No text is uploaded.
    """
    from nanothink.cli import render
    from nanothink.runs import publishing
    from nanothink.runs.evaluating import newest_finished
    from nanothink.wording import counted

    with render.reporting() as reporter:
        path = checkpoint or newest_finished(checkpoint_dir, reporter)
    licence = licence or _asked(publishing.imported_licence(path))
    with render.reporting() as reporter:
        done = publishing.push(
            path,
            repository,
            licence=licence,
            private=not public,
            overwrite=overwrite,
            dry_run=dry_run,
            data_dir=data_dir,
            device=device,
            reporter=reporter,
        )
    rows = [
        ["checkpoint", str(done.checkpoint)],
        ["kind", done.kind],
        ["licence", done.licence],
        ["seen by", "its owner alone" if done.private else "everyone"],
        [
            "files",
            f"{counted(len(done.files), 'file')}: {', '.join(done.files)} ({render.size(done.n_bytes)})",
        ],
        ["address", done.url or "nothing was uploaded (--dry-run)"],
    ]
    if dry_run and not as_json:
        render.say(done.card)
    notes = (f"{path}: {line}" for line in done.notes)
    render.result(done, rows, title=done.repository, as_json=as_json, notes=notes)


def _asked(imported: str | None) -> str:
    """The licence, from whoever sits at the terminal. It is theirs to say, so nothing is guessed.

    Args:
        imported: licence of the published model that this one was made of.
    """
    from nanothink.errors import UsageError

    about = f" It was made of a model under {imported}, which may bind you." if imported else ""
    if sys.stdin is None or not sys.stdin.isatty():
        raise UsageError(
            f"Which licence does this model have?{about} Say so by --license NAME, as the Hub calls it: mit, "
            "apache-2.0, cc-by-4.0, other, ..."
        )
    return str(
        typer.prompt(f"Licence of this model (mit, apache-2.0, cc-by-4.0, other, ...).{about}", err=True)
    ).strip()
