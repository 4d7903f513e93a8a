"""Options that several commands share, alone and in groups, and how the command line parses them.

Typer knows no option with an optional value, yet ``--resume`` must work bare, with a path, and before
another flag. ``ForgivingCommand`` puts the missing value in before Typer parses: a ``--resume`` that is
not followed by something that looks like a checkpoint gets the value ``newest``. It also takes the
underscore spellings of the older scripts (``--data_dir``) for the hyphenated ones.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import typer
from typer.core import TyperCommand

from nanothink.cli import completion
from nanothink.cli.processes import launch
from nanothink.cli.suggestions import calling, completed
from nanothink.errors import NanoThinkError, StorageError, UsageError
from nanothink.models import COMBINED

if TYPE_CHECKING:
    from nanothink.config import DataConfig
    from nanothink.config.run import ResolvedConfig
    from nanothink.reporter import Reporter
    from nanothink.runs.trained_model import TrainedModel

NEWEST = "newest"

GROUP: dict[str, Any] = {"no_args_is_help": True, "rich_markup_mode": None}
"""Settings of every group of commands; importing rich would double the time that --help takes."""


class ForgivingCommand(TyperCommand):
    """A command that takes bare ``--resume`` and underscores in option names."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        takes_kind = any(p.name == "kind" for p in self.params)
        filled = fill_bare_resume([_hyphenated(a) for a in args], takes_kind=takes_kind)
        return super().parse_args(ctx, filled)

    def invoke(self, ctx: Any) -> Any:
        ctx.params |= _checkpoints_by_name(ctx)
        with calling(ctx):
            try:
                return super().invoke(ctx)
            except NanoThinkError as error:
                error.args = (completed(str(error)), *error.args[1:])
                raise

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Show ``KIND`` where Typer shows ``{KIND}``."""
        return [piece.replace("{", "").replace("}", "") for piece in super().collect_usage_pieces(ctx)]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """List arguments and options as Typer does, without the Python types beside the arguments."""
        for title, kind in (("Arguments", "argument"), ("Options", "option")):
            records = [p.get_help_record(ctx) for p in self.get_params(ctx) if p.param_type_name == kind]
            shown = [(record[0].partition(" <")[0], record[1]) for record in records if record]
            if shown:
                with formatter.section(title):
                    formatter.write_dl(shown)


_CHECKPOINTS = ("checkpoint", "expert", "transformer", "teacher", "init", "resume")
"""Parameters that name checkpoints."""


def _checkpoints_by_name(ctx: Any) -> dict[str, Any]:
    """Parameters that name checkpoints: ``code`` is ``checkpoints/code_expert.pt`` where no file is."""
    place = Path(ctx.params.get("checkpoint_dir") or "checkpoints")
    resumes = ctx.command.name == "resume" or ctx.params.get("resume")

    def found(value: Any) -> Any:
        word = str(value)
        if value is None or word == NEWEST or os.path.lexists(word) or os.path.basename(word) != word:
            return value
        stems = [f"{word.removesuffix('.pt')}{kind}" for kind in ("", "_expert", f"_{COMBINED}")]
        rolling = [path for stem in stems for path in _rolling(place, stem)[-1:]] if resumes else []
        names = [word] if word.endswith(".dcp") else [f"{stem}.pt" for stem in stems]
        files = (*rolling, *(place / name for name in names))
        missing = place / word if os.path.isdir(place) else word  # so that the error lists what is there
        return next((type(value)(file) for file in files if os.path.exists(file)), type(value)(missing))

    return {
        name: [found(one) for one in value] if isinstance(value, (list, tuple)) else found(value)
        for name, value in ctx.params.items()
        if name in _CHECKPOINTS
    }


def _rolling(checkpoint_dir: Path, stem: str) -> list[Path]:
    """Rolling states of a run, the latest last."""
    from nanothink.checkpoints import CheckpointStore

    with suppress(UsageError, StorageError):  # no name of a run; a folder that cannot be read
        return CheckpointStore(checkpoint_dir, stem).rolling()
    return []


def examples(*commands: str) -> str:
    """Format the end of a command's help: examples of its use."""
    return "\b\nExamples:\n" + "\n".join(f"  nanothink {command}" for command in commands)


def fill_bare_resume(args: list[str], *, takes_kind: bool = True) -> list[str]:
    """Give every bare ``--resume`` the value ``newest``.

    The next argument is its value only when it cannot be the kind: it ends in .pt, holds a path separator, is
    a file or a folder, or the kind stands elsewhere. ``--resume transformer`` is therefore bare.
    """
    filled: list[str] = []
    for i, argument in enumerate(args):
        if argument == "--":
            return filled + args[i:]
        filled.append(argument)
        if argument == "--resume" and not _is_value(
            args[i + 1 : i + 2], args[:i] + args[i + 2 :], takes_kind
        ):
            filled.append(NEWEST)
    return filled


def _is_value(following: list[str], others: list[str], takes_kind: bool) -> bool:
    if not following or following[0].startswith("-"):
        return False
    value = following[0]
    if (
        value == NEWEST
        or value.endswith((".pt", ".dcp"))
        or "/" in value
        or os.path.isfile(value)
        or not takes_kind
    ):
        return True
    if _is_kind(value):
        return False
    return os.path.isdir(value) or any(map(_is_kind, others))


def _is_kind(word: str) -> bool:
    from nanothink.models import EXPERTS

    return word.replace("-", "_") in EXPERTS


def _hyphenated(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value


def option(
    metavar: str, help: str, *names: str, complete: Callable[..., Any] | None = None, **more: Any
) -> Any:
    """An option with a value; ``names`` where its parameter's is not the one to type. ``more`` is Typer's."""
    return typer.Option(*names, metavar=metavar, help=help, autocompletion=complete, **more)


def flag(name: str, help: str, *names: str) -> Any:
    """An option without a value; it has no ``--no-`` form."""
    return typer.Option(name, *names, help=help)


def argument(metavar: str, help: str, complete: Callable[..., Any] | None = None) -> Any:
    return typer.Argument(metavar=metavar, help=help, autocompletion=complete)


DataDir = Annotated[
    str | None, option("DIR", "Folder with one folder of JSONL files per domain. [default: data]")
]
Domains = Annotated[
    list[str] | None,
    option("A,B", "Domains to use, comma-separated or repeated. [default: all]", complete=completion.domains),
]
CheckpointDir = Annotated[Path, option("DIR", "Where checkpoints and run records are kept.")]
TokenizerName = Annotated[
    str | None, option("NAME", "Hub name, local folder or tokenizer.json. [default: gpt2]")
]
Device = Annotated[
    str | None, option("NAME", "auto, cpu, cuda, cuda:N or mps. [default: auto]", complete=completion.devices)
]
MaxEpochs = Annotated[int | None, option("N", "Passes over the training text. [default: the preset's]")]
MaxSteps = Annotated[
    int | None, option("N", "Optimizer steps; overrides --max-epochs. [default: by --max-epochs]")
]
Seed = Annotated[int | None, option("N", "Seed of weights and data order. [default: 42]")]
ConfigFile = Annotated[
    Path | None,
    option("FILE", "TOML file of settings. [default: nanothink.toml if there is one]", "--config"),
]
Preset = Annotated[
    str | None,
    option(
        "NAME",
        "tiny, auto, default, large: see 'nanothink config presets'. [default: default]",
        complete=completion.presets,
    ),
]
Set = Annotated[
    list[str] | None,
    option(
        "SECTION.KEY=VALUE",
        "Any setting of 'nanothink config show'; repeatable.",
        "--set",
        complete=completion.settings,
    ),
]
Resume = Annotated[
    str | None,
    option(
        "[PATH]",
        "Resume the latest state, or PATH; starts a new run if there is none.",
        complete=completion.checkpoints,
    ),
]
Overwrite = Annotated[bool, flag("--overwrite", "Replace an earlier run of the same name.")]
SkipBadRecords = Annotated[bool, flag("--skip-bad-records", "Leave out lines that are not valid records.")]
NoVectorStore = Annotated[
    bool, flag("--no-vector-store", "Run a model without the vector store it was trained with.")
]
DocumentCache = Annotated[
    bool, flag("--document-cache", "Use a document cache: states of the text read so far.")
]
Quantize = Annotated[
    Literal["int8"] | None,
    option("int8", "Matrices of 8 bits a number: faster text on a CPU. [default: none]"),
]
NewestCheckpoint = Annotated[
    Path | None,
    argument(
        "CHECKPOINT",
        "A checkpoint file. [default: the newest best one in --checkpoint-dir]",
        complete=completion.checkpoints,
    ),
]
DryRun = Annotated[bool, flag("--dry-run", "Estimate time, memory and disk, and stop there.")]
Json = Annotated[bool, flag("--json", "Print one JSON object for scripts.")]


def grouped(command: Callable[..., Any]) -> Callable[..., Any]:
    """Let a command take options in groups: a parameter that is a dataclass stands for one option a field."""
    options: list[inspect.Parameter] = []
    groups: dict[str, tuple[Any, list[str]]] = {}
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        group = parameter.annotation
        if not is_dataclass(group):
            options.append(parameter)
            continue
        hints = get_type_hints(group, include_extras=True)
        groups[parameter.name] = group, [field.name for field in fields(group)]
        options += [
            parameter.replace(name=field.name, default=field.default, annotation=hints[field.name])
            for field in fields(group)
        ]

    @functools.wraps(command)
    def call(**given: Any) -> Any:
        made = {name: group(**{o: given.pop(o) for o in own}) for name, (group, own) in groups.items()}
        return command(**given, **made)

    call.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
    call.__annotations__ = {option.name: option.annotation for option in options}
    return call


@dataclass(frozen=True)
class NewRun:
    """Options of the commands that train a model from its beginning."""

    data_dir: DataDir = None
    domains: Domains = None
    preset: Preset = None
    max_epochs: MaxEpochs = None
    max_steps: MaxSteps = None
    resume: Resume = None
    overwrite: Overwrite = False
    checkpoint_dir: CheckpointDir = Path("checkpoints")
    device: Device = None
    seed: Seed = None
    config_file: ConfigFile = None
    assignments: Set = None
    skip_bad_records: SkipBadRecords = False
    dry_run: DryRun = False
    as_json: Json = False


@dataclass(frozen=True)
class UsedModel:
    """Options of the commands that write with trained models: where they are, and how they run."""

    no_vector_store: NoVectorStore = False
    document_cache: DocumentCache = False
    quantize: Quantize = None
    checkpoint_dir: CheckpointDir = Path("checkpoints")
    device: Device = None

    def load(self, path: Path, reporter: Reporter) -> TrainedModel:
        from nanothink.runs.trained_model import load

        return load(
            path,
            device=self.device,
            vector_store=not self.no_vector_store,
            document_cache=self.document_cache,
            quantize=self.quantize,
            reporter=reporter,
        )


def refuse_early(configure: Callable[[Mapping[str, Any] | None], ResolvedConfig]) -> None:
    """Raise errors in the settings and domains of a new run before torch is imported, which takes seconds.

    With several processes the first one checks, later.
    """
    if launch() is None:
        from nanothink.data.corpus import find_corpus

        data = configure(None).config.data
        find_corpus(data.data_dir, data.domains)


def domain_names(domains: list[str] | None) -> tuple[str, ...] | None:
    """Split ``--domains a,b``, given once or several times; None for all domains."""
    from nanothink.config import DataConfig

    return DataConfig(domains=tuple(domains)).domains if domains else None


def data_settings(
    config_file: Path | None,
    assignments: list[str] | None,
    *,
    data_dir: str | None,
    domains: list[str] | None,
    tokenizer: str | None = None,
    skip_bad_records: bool = False,
) -> DataConfig:
    """Resolve the data settings as training does: the same sources in the same order."""
    flags = {
        "data.data_dir": ("--data-dir", data_dir),
        "data.domains": ("--domains", domains or None),
        "data.tokenizer": ("--tokenizer", tokenizer),
        "data.skip_bad_records": ("--skip-bad-records", skip_bad_records or None),
    }
    configure = configure_from(preset=None, config_file=config_file, assignments=assignments, flags=flags)
    return configure(None).config.data


def configure_from(
    *,
    preset: str | None,
    config_file: Path | None,
    assignments: list[str] | None,
    flags: Mapping[str, tuple[str, Any]],
) -> Callable[[Mapping[str, Any] | None], ResolvedConfig]:
    """Return the function that resolves a run's configuration from the command line."""

    def configure(base: Mapping[str, Any] | None) -> ResolvedConfig:
        from nanothink.config.run import resolve_config

        return resolve_config(
            base=base,
            preset=preset,
            file=config_file,
            environ=os.environ if base is None else None,
            assignments=assignments or (),
            flags=flags,
            folder=Path.cwd() if base is None else None,
        )

    return configure
