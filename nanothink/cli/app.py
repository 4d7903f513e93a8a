"""The ``nanothink`` command. Each command parses, calls, renders; this file maps errors to exit codes.

Exit codes: 0 done; 1 the data or the run failed its check; 2 wrong usage; 130 interrupted (saved); 141 the
reader of the output has gone.
Nothing heavy is imported until a command runs, so ``--help`` is instant.
"""

from __future__ import annotations

import gc
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from types import FrameType
from typing import Annotated, Any

import typer
import typer.main
from typer.core import TyperGroup

from nanothink.cli import (
    checkpoints,
    config,
    data,
    demo,
    doctor,
    evaluate,
    generate,
    output,
    pretrain,
    report,
    serve,
    store,
    tokenizer,
    train,
    train_mla,
)
from nanothink.cli.habits import calls_meant, domain_meant, option_meant
from nanothink.cli.processes import is_first_process, launched_with_others
from nanothink.errors import InterruptedRun, NanoThinkError, OutputError, RankError, ReaderGoneError
from nanothink.suggestions import did_you_mean
from nanothink.training.interruption import SignalListener, StopRequests, last_words, stopping_signals

_ORDER = (
    *("train", "data", "tokenizer", "pretrain", "train-mla", "resume", "eval", "generate", "serve", "store"),
    *("report", "checkpoints", "config", "doctor", "demo"),
)


class _InOrder(TyperGroup):
    """Lists commands in the order of their use; Typer lists groups last."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return super().get_command(ctx, "store" if cmd_name == "memory" else cmd_name)  # its first name

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(self.commands, key=_ORDER.index)


app = typer.Typer(
    name="nanothink",
    cls=_InOrder,
    help="Train a small language model of your own, from a folder of JSONL.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # importing rich would double the time that --help takes
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        from nanothink import __version__

        typer.echo(f"nanothink {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Take ``--version``; do nothing else."""


app.add_typer(data.app, name="data")
app.add_typer(tokenizer.app, name="tokenizer")
pretrain.register(app)
train.register(app)
train_mla.register(app)
evaluate.register(app)
generate.register(app)
serve.register(app)
app.add_typer(store.app, name="store")
report.register(app)
app.add_typer(checkpoints.app, name="checkpoints")
app.add_typer(config.app, name="config")
doctor.register(app)
demo.register(app)


_GARBAGE_OBJECTS = 50_000
"""Allocations between garbage collections. At Python's 700 they take a tenth of torch's import time, and a
training step leaves no garbage."""

_PATIENCE_SECONDS = 0.3
"""Time for the main thread to act on a second signal itself."""


class _Interrupted(BaseException):
    """A signal that ends a command. Typer would turn KeyboardInterrupt into an exit without a message."""


def main(args: list[str] | None = None) -> None:
    """Run the command line and leave the process with its exit code."""
    # Set before numpy and torch start thread pools: tokenizers would warn about forking.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    gc.set_threshold(_GARBAGE_OBJECTS)
    output.install()
    _allow_open_files()
    several = launched_with_others()
    try:
        with _unwinding_on_signals(forwarded=several):
            code = run(sys.argv[1:] if args is None else args)
    except _Interrupted:  # while the message of another end was being printed
        code = InterruptedRun.exit_code
    finally:
        output.finish()
    if code and several:
        # The others may be gone, and libraries wait for them as they are taken down; torchrun does not wait.
        os._exit(code)
    gc.freeze()  # Python would look through all of torch's objects once more, for 0.3 s
    sys.exit(code)


_OPEN_FILES = 65_536


def _allow_open_files() -> None:
    """Raise the soft limit on open files, 1,024 on most systems, as far as the hard limit allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


@contextmanager
def _unwinding_on_signals(*, forwarded: bool) -> Iterator[None]:
    """Let every stopping signal end a command as Ctrl-C does, so that half-written files are removed.

    A second signal ends it at once. Training stops in its own way (training/interruption.py).
    """
    handled, heard = (StopRequests(forwarded=forwarded) for _ in range(2))
    unwinding = False

    def unwind(number: int, frame: FrameType | None) -> None:
        nonlocal unwinding
        if handled.is_second(number):
            last_words()
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if not unwinding:
            unwinding = True
            raise _Interrupted

    def insist(number: signal.Signals) -> None:
        if heard.is_second(number):
            time.sleep(_PATIENCE_SECONDS)  # the main thread, unless a library keeps it, ends by the signal
            last_words()
            os._exit(128 + number)

    with SignalListener(insist):
        before = {number: signal.signal(number, unwind) for number in stopping_signals()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def run(args: list[str]) -> int:
    """Run one command; returns its exit code. Every error message passes here."""
    try:
        code = _run(args)
        sys.stdout.flush()
        return code
    except ReaderGoneError as error:
        output.drop()
        return error.exit_code
    except InterruptedRun as error:
        if is_first_process():
            from nanothink.cli import render

            render.note(str(error))
        return error.exit_code
    except NanoThinkError as error:
        if isinstance(error, OutputError):
            output.drop()
        if isinstance(error, RankError) or is_first_process():
            _print_error(str(error))
        return error.exit_code
    except (typer.Abort, KeyboardInterrupt, _Interrupted):
        if is_first_process():
            if sys.stderr.isatty():
                sys.stderr.write("\r")  # over the ^C that the terminal has echoed
            _print_error("Interrupted; there was nothing to save.")
        return InterruptedRun.exit_code
    except MemoryError:
        if args and args[0] in ("pretrain", "train-mla", "resume"):
            _print_error(
                "Out of memory. Lower train_expert.batch_size and raise train_expert.grad_accum_steps "
                "(of a diffuser: train_diffuser; of NanoThink: train_mla) by the same factor."
            )
        else:
            _print_error("Out of memory. End other programs, or ask for less at a time; then try again.")
        return 1


@cache
def command_tree() -> Any:
    """The commands as click has them, built once in a process; ``app`` itself builds all of them per call."""
    return typer.main.get_command(app)


def _run(args: list[str]) -> int:
    try:
        result = command_tree()(args=args, standalone_mode=False, prog_name="nanothink", obj=run)
        return result if isinstance(result, int) else 0
    except Exception as error:
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # click's usage errors
            return _usage_error(error, args)
        if isinstance(error, RuntimeError) and _lacks_memory(error):
            raise MemoryError from error
        raise


def _lacks_memory(error: RuntimeError) -> bool:
    """True for the errors that PyTorch raises where Python would raise MemoryError."""
    said = ("out of memory", "can't allocate memory", "not enough memory", "bad_alloc")
    return any(words in str(error) for words in said)


def _usage_error(error: Exception, args: Sequence[str]) -> int:
    if not is_first_process():
        return 2
    message = error.format_message()  # type: ignore[attr-defined]
    if type(error).__name__ == "NoArgsIsHelpError":
        typer.echo(message)
        return 2
    context: Any = getattr(error, "ctx", None)
    word = message.split("'")[1] if message.startswith("No such command") and "'" in message else ""
    option = getattr(error, "option_name", "")
    if word and context.parent is None and (meant := calls_meant(args, command_tree())):
        message = f"No such command '{word}'. Did you mean {' or '.join(meant)}?"
    elif word and "Did you mean" not in message:
        message += did_you_mean(word, getattr(context.command, "commands", {}))
    elif option and (call := option_meant(option, args)):
        message = f"No such option: {option}. Did you mean {call}?"
    elif type(error).__name__ == "MissingParameter" and (call := domain_meant(args)):
        message += f" As in: {call}."
    elif " is not one of " in message:
        given, *known = message.split("'")[3::2]
        message = message.replace("Value error, ", "") + did_you_mean(given, known)
    where = context.command_path if context is not None else "nanothink"
    message = message.partition(", unable to parse")[0]  # internals of a validator
    if message[-1] not in ".?":
        message += "."
    _print_error(f"{message} See: {where} --help")
    return 2


def _print_error(message: str) -> None:
    if "_NANOTHINK_COMPLETE" in os.environ:  # completing at Tab
        return
    from nanothink.cli import render

    render.error(message)
