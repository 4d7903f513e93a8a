"""``nanothink train-mla``: combine trained experts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nanothink.cli import completion
from nanothink.cli.options import (
    CheckpointDir,
    ConfigFile,
    DataDir,
    Device,
    Domains,
    DryRun,
    ForgivingCommand,
    Json,
    MaxEpochs,
    MaxSteps,
    Overwrite,
    Preset,
    Resume,
    Seed,
    Set,
    SkipBadRecords,
    configure_from,
    examples,
    refuse_early,
)
from nanothink.cli.pretrain import train

EXAMPLES = examples(
    "train-mla --preset tiny --use-vector-store",
    "train-mla --expert code_expert.pt --expert tales_expert.pt",
    "train-mla --resume",
)


def register(app: typer.Typer) -> None:
    app.command("train-mla", cls=ForgivingCommand, epilog=EXAMPLES)(train_mla)


def train_mla(
    expert: Annotated[
        list[Path] | None,
        typer.Option(
            "--expert",
            metavar="PATH",
            help="An expert to combine; repeatable. [default: transformer_expert.pt, state_space_expert.pt "
            "and diffuser_expert.pt in --checkpoint-dir]",
            autocompletion=completion.checkpoints,
        ),
    ] = None,
    data_dir: DataDir = None,
    domains: Domains = None,
    preset: Preset = None,
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", metavar="NAME", help="Must be the experts'; leave it out.")
    ] = None,
    max_epochs: MaxEpochs = None,
    max_steps: MaxSteps = None,
    resume: Resume = None,
    name: Annotated[
        str | None,
        typer.Option(
            "--name", metavar="NAME", help="Its checkpoint is NAME_nanothink_mla.pt. [default: no name]"
        ),
    ] = None,
    use_vector_store: Annotated[
        bool,
        typer.Option(
            "--use-vector-store",
            help="Train with a vector store of the training text beside the experts; built if it is missing.",
        ),
    ] = False,
    overwrite: Overwrite = False,
    checkpoint_dir: CheckpointDir = Path("checkpoints"),
    device: Device = None,
    seed: Seed = None,
    config_file: ConfigFile = None,
    assignments: Set = None,
    skip_bad_records: SkipBadRecords = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> int:
    """Train NanoThink, a router over frozen experts.

    Latent attention, router and head are trained; the experts stay as they are. Files and tables call it by
    its kind, nanothink_mla.
    """
    from nanothink.errors import UsageError
    from nanothink.models import COMBINED

    if name == "" or (domains and not any(part.strip(" ,") for part in domains)):
        raise UsageError("--name and --domains need a value; leave the option out for the default.")
    flags = {
        "data.data_dir": ("--data-dir", data_dir),
        "data.domains": ("--domains", domains or None),
        "data.tokenizer": ("--tokenizer", tokenizer),
        "data.skip_bad_records": ("--skip-bad-records", skip_bad_records or None),
        "vector_store.enabled": ("--use-vector-store", use_vector_store or None),
        "train_mla.max_epochs": ("--max-epochs", max_epochs),
        "train_mla.max_steps": ("--max-steps", max_steps),
        "train_mla.seed": ("--seed", seed),
    }
    configure = configure_from(preset=preset, config_file=config_file, assignments=assignments, flags=flags)
    if resume is None:
        refuse_early(configure)
    from nanothink.runs.resuming import RunSpec

    spec = RunSpec(
        kind=COMBINED,
        checkpoint_dir=checkpoint_dir,
        name=name,
        resume=resume,
        overwrite=overwrite,
        device=device,
        experts=tuple(expert or ()),
    )
    return train(spec, configure, dry_run=dry_run, as_json=as_json)
