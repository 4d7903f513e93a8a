"""``nanothink doctor``: what this machine can do, and why."""

from __future__ import annotations

from pathlib import Path

import typer

from nanothink.cli.options import CheckpointDir, Device, ForgivingCommand, Json


def register(app: typer.Typer) -> None:
    app.command(cls=ForgivingCommand)(doctor)


def doctor(
    device: Device = None, checkpoint_dir: CheckpointDir = Path("checkpoints"), as_json: Json = False
) -> None:
    """Say what this machine can do, and why."""
    from nanothink.cli import render
    from nanothink.runs.doctor import examine

    with render.reporting() as reporter:
        findings = examine(device, checkpoint_dir, reporter)
    render.result(findings, findings.items(), title="", as_json=as_json)
