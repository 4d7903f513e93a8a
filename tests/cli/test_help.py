"""Every --help at 80 columns: whole sentences, words of one kind, examples that parse."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from typing import Any

from nanothink.cli.app import command_tree
from nanothink.config.run import preset_names


def _commands(command: Any, path: str = "nanothink") -> Iterator[tuple[str, Any]]:
    yield path, command
    for name, below in getattr(command, "commands", {}).items():
        yield from _commands(below, f"{path} {name}")


COMMANDS = dict(_commands(command_tree()))


def _help(path: str) -> str:
    command = COMMANDS[path]
    with command.make_context(path, [], resilient_parsing=True, terminal_width=80) as context:
        return str(command.get_help(context))


def test_help_fits_80_columns_and_speaks_of_no_python_types() -> None:
    for path in COMMANDS:
        text = _help(path)
        assert max(map(len, text.splitlines())) <= 80, path
        assert "..." not in text.partition("\n\n")[2], path  # nothing is cut off below the usage
        assert not re.search(r"<(str|int|float|path|list)|(?<!['n])\{\w+\}", text), path


def test_options_that_take_a_value_say_its_default() -> None:
    without = {"--set", "--level", "--expert", "--name", "--resume", "--transformer", "--checkpoint"}
    silent = []
    for path, command in COMMANDS.items():
        for option in command.params:
            takes_one = option.param_type_name == "option" and not option.is_flag and not option.required
            if takes_one and option.opts[0] not in without:
                shown = option.get_help_record(command.make_context(path, [], resilient_parsing=True))[1]
                silent += [] if "default:" in shown or "leave it out" in shown else [(path, option.opts)]
    assert silent == []


def test_the_examples_parse() -> None:
    for path, command in COMMANDS.items():
        for line in (command.epilog or "").splitlines()[2:]:
            words = shlex.split(line.partition(" < ")[0])
            length = len(path.split())
            assert words[:length] == path.split(), line
            command.make_context(path, words[length:])


def test_the_help_of_a_preset_names_them_all() -> None:
    options = [o for command in COMMANDS.values() for o in command.params if "--preset" in o.opts]
    assert options
    for option in options:
        assert sorted(option.help.partition(":")[0].split(", ")) == preset_names()


def test_commands_come_in_the_order_of_the_story() -> None:
    listed = re.findall(r"^  ([a-z-]+) ", _help("nanothink").partition("Commands:")[2], re.M)
    assert listed[:5] == ["train", "data", "tokenizer", "pretrain", "train-mla"]
    assert len(listed) == len(COMMANDS["nanothink"].commands)
