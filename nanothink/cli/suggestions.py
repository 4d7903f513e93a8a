"""Completes the commands that a message suggests by the options of the command that was called.

``nanothink pretrain diffuser --preset tiny`` that lacks its transformer suggests ``nanothink pretrain
transformer --preset tiny``. A suggestion of the very command that was called keeps all its arguments.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nanothink.errors import NanoThinkError

_QUOTED = re.compile(r"`nanothink ((?:'[^']*'|[^`'])+)`")

_OPTIONS = re.compile(r"`(--[a-z](?:'[^']*'|[^`'])*)`")

_DATA = ("data_dir", "domains", "tokenizer", "preset", "config_file", "assignments", "skip_bad_records")
_PLACE = ("checkpoint_dir", "device")
_ONCE = frozenset(("resume", "overwrite", "dry_run", "as_json", "allow_seen"))
"""Options of one call, not of what it works on."""

_called: list[Any] = []
"""Contexts of the commands that are running, the innermost last: ``demo`` calls others."""


@contextmanager
def calling(context: Any) -> Iterator[None]:
    """Complete suggestions by the options of this command, until it ends."""
    _called.append(context)
    try:
        yield
    finally:
        _called.pop()


def completed(message: str) -> str:
    """Return the message with every suggested command completed. Twice does no more than once."""
    if not _called:
        return message
    message = _OPTIONS.sub(lambda found: f"`{_called_again(found[1])}`", message)
    return _QUOTED.sub(lambda found: f"`nanothink {_completed_call(found[1])}`", message)


def command_of_run(begun_by: object, checkpoint_dir: Path) -> str:
    """The command that starts the run at hand anew: the one that began it, with options of a resume.

    Args:
        begun_by: that command as the run's records have it; None for a run that begins now.
        checkpoint_dir: where the run lies now.

    Returns an empty string if it is not known.
    """
    if not _called:
        return ""
    called = _called[-1]
    target, given = called.command, {k: v for k, v in _given(called).items() if k not in _ONCE}
    path = called.command_path.split()[1:]
    if isinstance(begun_by, str):
        try:
            path, begun = _parsed(shlex.split(begun_by)[1:], called)
        except Exception:  # records of another version must not fail a run
            return ""
        if begun is None:
            return ""
        target, before = begun.command, _given(begun)
        accepted = {p.name for p in target.params if p.param_type_name == "option"}
        later = {name: value for name, value in given.items() if name in accepted}
        later["checkpoint_dir"] = checkpoint_dir
        kept = [v for v in before.get("assignments", ()) if not _is_set(v, later.get("assignments"))]
        later["assignments"] = [*kept, *later.get("assignments", ())]
        given = before | later
    elif path == ["resume"]:
        return ""
    positional, options = _words(target, given)
    return shlex.join(["nanothink", *path, *positional, *options])


@contextmanager
def called_as(command: str) -> Iterator[None]:
    """Complete suggestions, those of errors too, as if ``command`` had been called; not if it is empty."""
    context = _parsed(shlex.split(command)[1:], _called[-1])[1] if command and _called else None
    if context is None:
        yield
        return
    with calling(context):
        try:
            yield
        except NanoThinkError as error:
            error.args = (completed(str(error)), *error.args[1:])
            raise


def _called_again(options: str) -> str:
    """The command that was called, with these options; these alone where it resumes an unrecorded run."""
    command, *path = _called[-1].command_path.split()
    words = shlex.split(options)
    known = {option for p in _called[-1].command.params for option in (*p.opts, *p.secondary_opts)}
    if path == ["resume"] or words[0] not in known:
        return options
    return shlex.join([command, *path, *words])


def _parsed(words: Sequence[str], call: Any) -> tuple[list[str], Any]:
    """The names of the command that ``words`` call, and its context; None where they call none."""
    target, parent, path, rest = call.find_root().command, call.find_root(), list[str](), list(words)
    while rest and rest[0] in getattr(target, "commands", {}):
        target = target.commands[rest[0]]
        path.append(rest.pop(0))
        if hasattr(target, "commands"):
            parent = type(parent)(target, info_name=path[-1], parent=parent)
    if not path or hasattr(target, "commands"):
        return path, None
    return path, target.make_context(path[-1], rest, parent=parent, resilient_parsing=True)


def _completed_call(text: str) -> str:
    call, words = _called[-1], shlex.split(text)
    path, suggested = _parsed(words, call)
    if suggested is None or "--help" in words:
        return text
    target, words = suggested.command, words[len(path) :]
    has, given = _given(suggested), _given(call)
    arguments = [p.name for p in target.params if p.param_type_name == "argument"]
    again = target is call.command and all(given.get(a) == has.get(a, given.get(a)) for a in arguments)
    kept = set(given) - _ONCE if again else _kept(path, call) & set(given)
    if path[0] == "config":
        kept = set()  # one of the options may be what is wrong
    for named, other in (("expert", "checkpoint"), ("checkpoint", "expert")):  # either names the model
        if named in has:
            kept.discard(other)
    added = {name: given[name] for name in kept if name not in has or name == "assignments"}
    if "assignments" in added:
        added["assignments"] = [v for v in added["assignments"] if not _is_set(v, has.get("assignments"))]
    positional, options = _words(target, added)
    complete = shlex.join([*path, *positional, *words, *options])
    if path[0] == "pretrain" and (missing := _missing_data(given)):
        return f"data sample --data-dir {shlex.quote(missing)} && nanothink {complete}"
    return complete


def _missing_data(given: Mapping[str, Any]) -> str:
    """The data folder that a training with these options would look for in vain; else an empty string."""
    from nanothink.config.run import resolve_config

    try:
        resolved = resolve_config(
            file=given.get("config_file"),
            environ=os.environ,
            assignments=given.get("assignments", ()),
            flags={"data.data_dir": ("--data-dir", given.get("data_dir"))},
            folder=Path.cwd(),
        )
    except NanoThinkError:
        return ""
    folder = resolved.config.data.data_dir
    return "" if os.path.exists(folder) else folder


def _kept(path: list[str], call: Any) -> set[str]:
    """Options of ``call`` that the command at ``path`` takes over."""
    if path[0] == "resume":
        return set(_PLACE)  # settings and data come from the checkpoint
    if path[0] in _GROUPS.get(call.command_path.split()[1], ()):
        return set(call.params) - _ONCE
    return {*_DATA, *_PLACE}


_GROUPS = {"train-mla": ("store",), **{group: (group,) for group in ("store", "data", "checkpoints")}}
"""Commands that work on the same model or folder, so that all options that they share are kept."""


def _given(context: Any) -> dict[str, Any]:
    """Arguments and options that were typed, by name. A folder that is an argument counts as the option."""
    typed = {
        name: value
        for name, value in context.params.items()
        if value is not None and context.get_parameter_source(name).name == "COMMANDLINE"
    }
    if "folder" in typed:
        typed["data_dir"] = typed.pop("folder")
    return typed


def _words(command: Any, given: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Arguments, and options, as they are typed."""
    positional: list[str] = []
    options: list[str] = []
    for parameter in command.params:
        if parameter.name not in given:
            continue
        value = given[parameter.name]
        values = value if isinstance(value, (list, tuple)) else [value]
        if parameter.param_type_name == "argument":
            positional += map(str, values)
        elif parameter.is_flag:
            options.append(parameter.opts[0] if value else parameter.secondary_opts[0])
        else:
            options += [word for each in values for word in (parameter.opts[0], str(each))]
    return positional, options


def _is_set(assignment: object, others: Sequence[str] | None) -> bool:
    """True if another ``--set`` gives this setting a value."""
    name = str(assignment).partition("=")[0]
    return any(other.partition("=")[0] == name for other in others or ())
