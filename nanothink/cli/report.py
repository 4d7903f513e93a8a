"""``nanothink report``: one self-contained HTML page of one or several runs."""

from __future__ import annotations

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

EXAMPLES = examples("report --open", "report transformer_expert nanothink_mla --out both.html")


def register(app: typer.Typer) -> None:
    app.command(cls=ForgivingCommand, epilog=EXAMPLES)(report)


def report(
    run: Annotated[
        list[str] | None,
        argument(
            "RUN",
            "Names of runs, their folders, or checkpoints. [default: every run in --checkpoint-dir]",
            complete=completion.runs,
        ),
    ] = None,
    out: Annotated[
        Path, option("FILE", "HTML file to write; replaces an earlier report, nothing else.", "--out", "-o")
    ] = Path("report.html"),
    open_it: Annotated[bool, flag("--open", "Open it in the browser.")] = False,
    data_dir: Annotated[
        str | None, option("DIR", "Source of the held-out passages. [default: the data of each run]")
    ] = None,
    checkpoint_dir: CheckpointDir = Path("checkpoints"),
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Write one self-contained HTML page of one or several runs.

    Curves, domains, experts, samples, settings, machine. Needs no network, neither to make nor to read.
    """
    import webbrowser

    from nanothink.cli import render
    from nanothink.runs.reporting import find_runs, summary, write_report

    folders = find_runs(run or [], checkpoint_dir)
    with render.reporting() as reporter:
        made = write_report(folders, out, data_dir=data_dir, device=device, reporter=reporter)
    if as_json:
        runs = [summary(one) for one in made.runs]
        render.print_json({"report": made.path, "n_bytes": made.n_bytes, "runs": runs})
    else:
        names = ", ".join(one.label for one in made.runs)
        render.say(f"{made.path}: {render.size(made.n_bytes)}, with {names}")
    if open_it and not webbrowser.open(made.path.absolute().as_uri()):
        render.note(f"No browser found. Open {made.path} yourself.")
