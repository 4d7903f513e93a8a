"""``nanothink config``: the settings as they would be used, and where each came from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nanothink.cli import completion
from nanothink.cli.options import (
    ConfigFile,
    ForgivingCommand,
    Json,
    Preset,
    Set,
    argument,
    configure_from,
    option,
)
from nanothink.suggestions import suggest

app = typer.Typer(
    help="Settings: what they are and where they come from.", no_args_is_help=True, rich_markup_mode=None
)


@app.command(cls=ForgivingCommand)
def show(
    section: Annotated[
        str | None, argument("SECTION", "Only this section. [default: all]", complete=completion.sections)
    ] = None,
    preset: Preset = None,
    config_file: ConfigFile = None,
    assignments: Set = None,
    checkpoint: Annotated[
        Path | None,
        option(
            "PATH",
            "The settings inside a checkpoint instead of the defaults.",
            "--checkpoint",
            "-c",
            complete=completion.checkpoints,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show every setting: value, where it comes from, meaning."""
    from nanothink.cli import render
    from nanothink.config.run import flatten, known_settings
    from nanothink.errors import UsageError
    from nanothink.suggestions import did_you_mean

    base = None
    if checkpoint is not None:
        from nanothink.checkpoints import read_checkpoint

        base = read_checkpoint(checkpoint, mmap=True, shapes_only=True)["config"]
    configure = configure_from(preset=preset, config_file=config_file, assignments=assignments, flags={})
    resolved = configure(base)
    meanings = known_settings()
    values = flatten(resolved.config)
    sections = list(dict.fromkeys(name.partition(".")[0] for name in values))
    if section is not None and section not in sections:
        raise UsageError(
            f"No section '{section}'.{did_you_mean(section, sections)} Known: {', '.join(sections)}."
        )
    shown = {n: v for n, v in values.items() if section is None or n.startswith(f"{section}.")}
    if as_json:
        render.print_json(
            {n: {"value": v, "source": resolved.sources[n], "meaning": meanings[n]} for n, v in shown.items()}
        )
        return
    render.table(
        ["setting", "value", "from", "meaning"],
        [[n, render.setting(v), _near(resolved.sources[n]), meanings[n]] for n, v in shown.items()],
    )


def _near(source: str) -> str:
    """A file in the working folder by its name alone: a table has little room."""
    return source.removeprefix(f"{Path.cwd()}/")


@app.command(cls=ForgivingCommand)
def presets(
    name: Annotated[
        str | None,
        argument("NAME", "Print this preset as TOML. [default: compare all]", complete=completion.presets),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare the presets, or print one as TOML."""
    from nanothink.cli import render
    from nanothink.config.run import preset_names, preset_text, resolve_config

    if name is not None and not as_json:
        render.say(preset_text(name).rstrip())
        return
    names = preset_names() if name is None else [name]
    resolved = {n: resolve_config(preset=n).config for n in names}
    ordered = sorted(resolved.items(), key=lambda item: item[1].model.d_model)
    if as_json:
        render.print_json({n: c.model_dump(mode="json") for n, c in ordered})
        return
    render.table(
        ["preset", ">d_model", ">block", ">layers", ">batch", ">epochs"],
        [
            [
                n,
                str(c.model.d_model),
                str(c.model.max_seq_len),
                f"{c.transformer.n_layers} / {c.state_space.n_layers} / {c.diffuser.n_layers}",
                f"{c.train_expert.batch_size} x {c.train_expert.grad_accum_steps}",
                str(c.train_expert.max_epochs),
            ]
            for n, c in ordered
        ],
    )
    render.say("Layers are those of transformer / state_space / diffuser.")
    render.say(f"Use one with --preset NAME; read one with: {suggest('config presets', ordered[0][0])}")
