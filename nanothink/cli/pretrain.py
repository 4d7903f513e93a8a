"""``nanothink pretrain`` and ``nanothink resume``: train an expert, go on with one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nanothink.cli import completion, output
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
    TokenizerName,
    configure_from,
    examples,
    is_first_process,
    launch,
    refuse_early,
)

if TYPE_CHECKING:
    from nanothink.runs.preparing import Configure
    from nanothink.runs.resuming import RunSpec


PRETRAIN_EXAMPLES = examples(
    "pretrain transformer --preset tiny --dry-run",
    "pretrain state_space --domains code,manual --name code",
    "pretrain diffuser --set train_diffuser.lr=5e-5",
    "pretrain transformer --resume",
)
RESUME_EXAMPLES = examples("resume", "resume checkpoints/code_expert_interrupted.pt --max-epochs 40")


def register(app: typer.Typer) -> None:
    app.command(cls=ForgivingCommand, epilog=PRETRAIN_EXAMPLES)(pretrain)
    app.command(cls=ForgivingCommand, epilog=RESUME_EXAMPLES)(resume)


def pretrain(
    kind: Annotated[
        str,
        typer.Argument(
            metavar="KIND",
            help="What to train: transformer, state_space or diffuser.",
            autocompletion=completion.kinds,
        ),
    ],
    data_dir: DataDir = None,
    domains: Domains = None,
    preset: Preset = None,
    tokenizer: TokenizerName = None,
    transformer: Annotated[
        str | None,
        typer.Option(
            "--transformer",
            metavar="PATH",
            help="What a diffuser learns from. [default: transformer_expert.pt in --checkpoint-dir]",
            autocompletion=completion.checkpoints,
        ),
    ] = None,
    max_epochs: MaxEpochs = None,
    max_steps: MaxSteps = None,
    resume: Resume = None,
    name: Annotated[
        str | None,
        typer.Option(
            "--name", metavar="NAME", help="Its checkpoint is NAME_expert.pt. [default: the kind's name]"
        ),
    ] = None,
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
    """Train an expert on your data."""
    from nanothink.errors import UsageError
    from nanothink.models import known_kind, training_section

    if name == "" or (domains and not any(part.strip(" ,") for part in domains)):
        raise UsageError("--name and --domains need a value; leave the option out for the default.")
    kind = known_kind(kind)
    if transformer is not None and kind != "diffuser":
        raise UsageError(f"--transformer names what a diffuser learns from; a {kind} learns from text.")
    section = training_section(kind)
    flags = {
        "data.data_dir": ("--data-dir", data_dir),
        "data.domains": ("--domains", domains or None),
        "data.tokenizer": ("--tokenizer", tokenizer),
        "data.skip_bad_records": ("--skip-bad-records", skip_bad_records or None),
        "diffuser.transformer": ("--transformer", transformer),
        f"{section}.max_epochs": ("--max-epochs", max_epochs),
        f"{section}.max_steps": ("--max-steps", max_steps),
        f"{section}.seed": ("--seed", seed),
    }
    configure = configure_from(preset=preset, config_file=config_file, assignments=assignments, flags=flags)
    if resume is None:
        refuse_early(configure)
    from nanothink.runs.resuming import RunSpec

    spec = RunSpec(
        kind=kind,
        checkpoint_dir=checkpoint_dir,
        name=name,
        resume=resume,
        overwrite=overwrite,
        device=device,
    )
    return train(spec, configure, dry_run=dry_run, as_json=as_json)


def resume(
    checkpoint: Annotated[
        Path | None,
        typer.Argument(
            metavar="CHECKPOINT",
            help="Checkpoint to go on from. [default: what was interrupted last]",
            autocompletion=completion.checkpoints,
        ),
    ] = None,
    max_epochs: Annotated[
        int | None, typer.Option("--max-epochs", metavar="N", help="A new end. [default: the checkpoint's]")
    ] = None,
    max_steps: Annotated[
        int | None, typer.Option("--max-steps", metavar="N", help="A new end. [default: the checkpoint's]")
    ] = None,
    data_dir: Annotated[
        str | None,
        typer.Option("--data-dir", metavar="DIR", help="Where the data is now. [default: where it was]"),
    ] = None,
    checkpoint_dir: CheckpointDir = Path("checkpoints"),
    device: Device = None,
    assignments: Set = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Give up a later interrupted state of the same run.")
    ] = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> int:
    """Go on with what was interrupted.

    Kind, settings and data come from the checkpoint.
    """
    from dataclasses import replace

    from nanothink.cli import render
    from nanothink.models import training_section
    from nanothink.reporter import SILENT
    from nanothink.runs.resuming import locate

    with render.reporting() as reporter:
        spec = locate(
            str(checkpoint) if checkpoint else None,
            checkpoint_dir,
            reporter if is_first_process() else SILENT,
        )
    spec = replace(spec, device=device, overwrite=overwrite)
    section = training_section(spec.kind)
    flags = {
        "data.data_dir": ("--data-dir", data_dir),
        f"{section}.max_epochs": ("--max-epochs", max_epochs),
        f"{section}.max_steps": ("--max-steps", max_steps),
    }
    configure = configure_from(preset=None, config_file=None, assignments=assignments, flags=flags)
    return train(spec, configure, dry_run=dry_run, as_json=as_json)


def train(spec: RunSpec, configure: Configure, *, dry_run: bool, as_json: bool) -> int:
    """Train what ``where`` names and show how it goes; or say what it would take."""
    from nanothink.cli import render
    from nanothink.errors import OutputError, ReaderGoneError
    from nanothink.runs.preparing import prepare

    if dry_run:
        if not is_first_process():
            return 0
        from nanothink.runs.estimate import estimate_run

        launched = launch()
        with render.reporting() as reporter:
            setup = prepare(spec, configure, reporter)
            estimate = estimate_run(setup, launched.size if launched else 1)
        if as_json:
            render.print_json(_estimate_as_dict(estimate))
        else:
            render.estimate(spec.stem, estimate)
        return 0

    from nanothink.runs.pretraining import pretrain as run_training
    from nanothink.training.records import read_description

    if not is_first_process():
        # It speaks only until it has met the first.
        run_training(spec, configure, render.BarReporter())
        return 0
    with render.training_view() as view:
        finished = run_training(spec, configure, view)
    best = spec.store.best
    data = read_description(spec.checkpoint_dir / "runs" / spec.stem).get("data")
    # A summary that nobody can read any more is no failure of a run that is complete and saved.
    with output.optional_results() as lost:
        if as_json:
            render.print_json(
                {
                    "checkpoint": str(best) if best.exists() else None,
                    "step": finished.step,
                    "epoch": finished.epoch,
                    "reason": finished.reason,
                    "best_loss": finished.best_loss,
                    "validation": view.last_validation_as_dict(),
                    "seconds": finished.seconds,
                    "n_bad_lines": data.get("n_bad_lines", 0) if isinstance(data, dict) else 0,
                }
            )
        else:
            render.training_summary(spec.stem, finished, best, view)
    if lost and isinstance(lost[0], ReaderGoneError):
        return lost[0].exit_code if as_json else 0
    if lost:
        told = OutputError(lost[0].reason, f"The run is complete and saved in {best}; its summary is lost.")
        if as_json:  # the object was asked for
            raise told
        render.note(str(told))
    return 0


def _estimate_as_dict(estimate: Any) -> dict[str, Any]:
    from dataclasses import asdict

    return {**asdict(estimate), "peak_memory_bytes": estimate.peak_memory_bytes}
