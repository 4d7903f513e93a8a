"""Shell completion: names that are quick to find. The shell completes everything else.

Typer calls these while a person waits at a prompt, so they import little and tolerate missing folders.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import typer

from nanothink.models import EXPERTS

DEVICES = ("auto", "cpu", "cuda", "mps")


def kinds(incomplete: str) -> list[str]:
    return _starting(EXPERTS, incomplete)


def devices(incomplete: str) -> list[str]:
    return _starting(DEVICES, incomplete)


def domains(ctx: typer.Context, incomplete: str) -> list[str]:
    """Folders of the data folder; after a comma, those not yet named."""
    before, comma, _ = incomplete.rpartition(",")
    named = before.split(",")
    root = Path(ctx.params.get("data_dir") or ctx.params.get("folder") or "data")
    names = [entry.name for entry in _entries(root) if entry.is_dir() and not entry.name.startswith(".")]
    return _starting((before + comma + name for name in names if name not in named), incomplete)


def checkpoints(ctx: typer.Context, incomplete: str) -> list[str]:
    """Files of the checkpoint folder, and of the folder that is being typed."""
    folders = [Path(ctx.params.get("checkpoint_dir") or "checkpoints")]
    if "/" in incomplete:
        folders.append(Path(incomplete.rpartition("/")[0] or "/"))
    found = (
        str(entry)
        for folder in folders
        for entry in _entries(folder)
        if entry.suffix in {".pt", ".dcp"} and not entry.name.startswith(".")
    )
    return _starting(dict.fromkeys(found), incomplete)


def runs(ctx: typer.Context, incomplete: str) -> list[str]:
    """Names of runs."""
    folder = Path(ctx.params.get("checkpoint_dir") or "checkpoints") / "runs"
    return _starting((entry.name for entry in _entries(folder)), incomplete)


def presets(incomplete: str) -> list[str]:
    from nanothink.config.run import preset_names

    return _starting(preset_names(), incomplete)


def settings(incomplete: str) -> list[tuple[str, str]]:
    """Every setting as ``SECTION.KEY=``, with its meaning."""
    from nanothink.config.run import known_settings

    known = known_settings().items()
    return [(f"{name}=", meaning) for name, meaning in known if name.startswith(incomplete)]


def sections(incomplete: str) -> list[str]:
    from nanothink.config.run import known_settings

    return _starting(dict.fromkeys(name.partition(".")[0] for name in known_settings()), incomplete)


def _starting(names: Iterable[str], start: str) -> list[str]:
    return [name for name in names if name.startswith(start)]


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []
