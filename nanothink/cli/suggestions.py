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


def _called_again(options: str) -> str:
    """The command that was called, with these options; of a resumed run the options alone."""
    command, *path = _called[-1].command_path.split()
    return options if path == ["resume"] else shlex.join([command, *path, *shlex.split(options)])


def _completed_call(text: str) -> str:
    call, words = _called[-1], shlex.split(text)
    path: list[str] = []
    target = call.find_root().command
    while words and words[0] in getattr(target, "commands", {}):
        target = target.commands[words[0]]
        path.append(words.pop(0))
    if not path or hasattr(target, "commands"):
        return text
    has = _given(target.make_context(path[-1], list(words), resilient_parsing=True))
    given = _given(call)
    arguments = [p.name for p in target.params if p.param_type_name == "argument"]
    again = target is call.command and all(given.get(a) == has.get(a, given.get(a)) for a in arguments)
    kept = set(given) - _ONCE if again else _kept(path, call) & set(given)
    if path[0] == "config":
        kept = set()  # one of the options may be what is wrong
    if "expert" in has:
        kept.discard("checkpoint")  # either names the model
    positional: list[str] = []
    options: list[str] = []
    for parameter in target.params:
        name = parameter.name
        if name not in kept or (name in has and name != "assignments"):
            continue
        values = given[name] if isinstance(given[name], (list, tuple)) else [given[name]]
        if parameter.param_type_name == "argument":
            positional += map(str, values)
        elif parameter.is_flag:
            options.append(parameter.opts[0] if given[name] else parameter.secondary_opts[0])
        else:
            new = [value for value in values if not _is_set(value, has.get(name))]
            options += [word for value in new for word in (parameter.opts[0], str(value))]
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


def _is_set(assignment: object, others: Sequence[str] | None) -> bool:
    """True if another ``--set`` gives this setting a value."""
    name = str(assignment).partition("=")[0]
    return any(other.partition("=")[0] == name for other in others or ())
