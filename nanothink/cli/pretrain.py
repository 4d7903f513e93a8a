"""``nanothink pretrain`` and ``nanothink resume``: train an expert, resume any run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nanothink.cli import completion, output
from nanothink.cli.options import (
    CheckpointDir,
    Device,
    DryRun,
    ForgivingCommand,
    Json,
    NewRun,
    Set,
    TokenizerName,
    argument,
    configure_from,
    examples,
    flag,
    grouped,
    option,
    refuse_early,
)
from nanothink.cli.processes import is_first_process, launch
from nanothink.cli.suggestions import called_as, command_of_run
from nanothink.errors import DataError, StorageError

if TYPE_CHECKING:
    from nanothink.runs.preparing import Configure
    from nanothink.runs.resuming import RunSpec


PRETRAIN_EXAMPLES = examples(
    "pretrain transformer --preset tiny --dry-run",
    "pretrain state_space --domains code,manual --name code",
    "pretrain diffuser --set train_diffuser.lr=5e-5",
    "pretrain transformer --init smollm2_expert.pt --lora 8",
    "pretrain transformer --teacher nanothink_mla.pt --name student",
    "pretrain transformer --resume",
)
RESUME_EXAMPLES = examples("resume", "resume checkpoints/code_expert_interrupted.pt --max-epochs 40")


def register(app: typer.Typer) -> None:
    app.command(cls=ForgivingCommand, epilog=PRETRAIN_EXAMPLES)(pretrain)
    app.command(cls=ForgivingCommand, epilog=RESUME_EXAMPLES)(resume)


@grouped
def pretrain(
    kind: Annotated[
        str,
        argument("KIND", "What to train: transformer, state_space or diffuser.", complete=completion.kinds),
    ],
    tokenizer: TokenizerName = None,
    transformer: Annotated[
        str | None,
        option(
            "PATH",
            "What a diffuser learns from. [default: transformer_expert.pt in --checkpoint-dir]",
            complete=completion.checkpoints,
        ),
    ] = None,
    init: Annotated[
        Path | None,
        option(
            "PATH",
            "Checkpoint whose weights it starts from. [default: random weights]",
            complete=completion.checkpoints,
        ),
    ] = None,
    lora: Annotated[
        int | None,
        option("R", "Train adapters of this rank on the frozen weights of --init. [default: all weights]"),
    ] = None,
    teacher: Annotated[
        Path | None,
        option(
            "PATH",
            "Checkpoint whose predictions it learns, such as a NanoThink. [default: none]",
            complete=completion.checkpoints,
        ),
    ] = None,
    name: Annotated[
        str | None, option("NAME", "Its checkpoint is NAME_expert.pt. [default: the kind's name]")
    ] = None,
    *,
    options: NewRun,
) -> int:
    """Train an expert on your data."""
    from nanothink.errors import UsageError
    from nanothink.models import known_kind

    kind = known_kind(kind)
    if transformer is not None and kind != "diffuser":
        raise UsageError(f"--transformer names what a diffuser learns from; a {kind} learns from text.")
    if lora is not None and kind == "diffuser":
        raise UsageError("--lora is for a transformer or a state_space; a diffuser is trained whole.")
    flags = {
        "data.tokenizer": ("--tokenizer", tokenizer),
        "train_expert.lora_rank": ("--lora", lora),
        "diffuser.transformer": ("--transformer", transformer),
    }
    return start(kind, name, options, flags, init=init, teacher=teacher)


def resume(
    checkpoint: Annotated[
        Path | None,
        argument(
            "CHECKPOINT",
            "Checkpoint to resume. [default: the run that was interrupted last]",
            complete=completion.checkpoints,
        ),
    ] = None,
    max_epochs: Annotated[int | None, option("N", "New end of the run. [default: the checkpoint's]")] = None,
    max_steps: Annotated[int | None, option("N", "New end of the run. [default: the checkpoint's]")] = None,
    data_dir: Annotated[str | None, option("DIR", "Folder of the data. [default: the run's]")] = None,
    checkpoint_dir: CheckpointDir = Path("checkpoints"),
    device: Device = None,
    assignments: Set = None,
    overwrite: Annotated[
        bool, flag("--overwrite", "Discard a later interrupted state of the same run.")
    ] = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> int:
    """Resume an interrupted run.

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


def start(
    kind: str,
    name: str | None,
    options: NewRun,
    flags: Mapping[str, tuple[str, Any]],
    experts: Sequence[Path] = (),
    init: Path | None = None,
    teacher: Path | None = None,
) -> int:
    """Train a new model, or resume it with ``--resume``.

    Args:
        flags: settings by the command's own options, beside those of ``options``.
        experts: checkpoints that a NanoThink combines.
        init: checkpoint whose weights an expert starts from.
        teacher: checkpoint whose predictions an expert learns.
    """
    from nanothink.errors import UsageError
    from nanothink.models import training_section

    domains = options.domains or None
    if name == "" or (domains and not any(part.strip(" ,") for part in domains)):
        raise UsageError("--name and --domains need a value; leave the option out for the default.")
    section = training_section(kind)
    configure = configure_from(
        preset=options.preset,
        config_file=options.config_file,
        assignments=options.assignments,
        flags={
            "data.data_dir": ("--data-dir", options.data_dir),
            "data.domains": ("--domains", domains),
            "data.skip_bad_records": ("--skip-bad-records", options.skip_bad_records or None),
            f"{section}.max_epochs": ("--max-epochs", options.max_epochs),
            f"{section}.max_steps": ("--max-steps", options.max_steps),
            f"{section}.seed": ("--seed", options.seed),
            **flags,
        },
    )
    if options.resume is None:
        refuse_early(configure)
    from nanothink.runs.resuming import RunSpec

    spec = RunSpec(
        kind=kind,
        checkpoint_dir=options.checkpoint_dir,
        name=name,
        resume=options.resume,
        overwrite=options.overwrite,
        device=options.device,
        experts=tuple(experts),
        init=init,
        teacher=teacher,
    )
    return train(spec, configure, dry_run=options.dry_run, as_json=options.as_json)


def train(spec: RunSpec, configure: Configure, *, dry_run: bool, as_json: bool) -> int:
    """Train the model of ``spec`` and show the run, or print an estimate of it."""
    from dataclasses import replace

    from nanothink.cli import render
    from nanothink.errors import OutputError, ReaderGoneError
    from nanothink.runs.preparing import prepare

    if dry_run:
        if not is_first_process():
            return 0
        from nanothink.runs.estimate import estimate_run
        from nanothink.runs.joint_gate import settle_fit
        from nanothink.runs.long_runs import advise_smaller

        launched = launch()
        with render.reporting() as reporter:
            setup = settle_fit(prepare(spec, configure, reporter), reporter)
            estimate = estimate_run(setup, launched.size if launched else 1, reporter)
            advise_smaller(setup, estimate.time, configure, reporter)
        if as_json:
            totals = {"peak_memory_bytes": estimate.peak_memory_bytes, "seconds": estimate.time.seconds}
            render.print_json({**render.plain(estimate), **totals})
        else:
            render.estimate(spec.stem, estimate)
        return 0

    from nanothink.runs.pretraining import pretrain as run_training
    from nanothink.training.records import read_description

    if not is_first_process():
        # It reports only until it has met the first process.
        run_training(spec, configure, render.BarReporter())
        return 0
    spec = replace(spec, command=_command_of(spec))
    with render.training_view() as view, called_as(spec.command):
        finished = run_training(spec, configure, view)
    best = spec.store.best
    found = read_description(spec.checkpoint_dir / "runs" / spec.stem).get("data")
    data = found if isinstance(found, dict) else {}
    # The run is complete and saved: failing to print its summary is not a failure of the run.
    with output.optional_results() as lost:
        if as_json:
            render.print_json(
                {
                    "checkpoint": str(best) if best.exists() else None,
                    "step": finished.step,
                    "epoch": finished.epoch,
                    "reason": finished.reason,
                    "best_loss": finished.best_loss,
                    "validation": view.last_validation,
                    "seconds": finished.seconds,
                    "n_bad_lines": data.get("n_bad_lines", 0),
                }
            )
        else:
            render.training_summary(
                spec.stem, finished, best, view, answers=bool(data.get("has_conversations"))
            )
    if lost and isinstance(lost[0], ReaderGoneError):
        return lost[0].exit_code if as_json else 0
    if lost:
        told = OutputError(lost[0].reason, f"The run is complete and saved in {best}; its summary is lost.")
        if as_json:  # the object was asked for
            raise told
        render.note(str(told))
    return 0


def _command_of(spec: RunSpec) -> str:
    """The command that starts the run of ``spec`` anew. That of a resumed run is in its records."""
    from nanothink.training.records import read_description

    begun_by = None
    if spec.resume is not None:
        with suppress(DataError, StorageError):
            begun_by = read_description(spec.checkpoint_dir / "runs" / spec.stem).get("command") or None
    return command_of_run(begun_by, spec.checkpoint_dir)
