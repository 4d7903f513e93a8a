"""The pages of the documentation, their fenced blocks, and the commands in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanothink.cli.app import command_tree

ROOT = Path(__file__).parents[1]
PAGES = sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("*/README.md")})


@dataclass(frozen=True)
class Block:
    """A fenced block. The HTML comment on the line before it is its ``mark``, or ``mark: note``."""

    page: Path
    line: int
    language: str
    mark: str
    note: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> Iterator[Block]:
    lines = page.read_text("utf-8").splitlines()
    number = 0
    while number < len(lines):
        opening = re.fullmatch(r"( *)```(\w*)", lines[number])
        if opening is None:
            number += 1
            continue
        indent, first = len(opening[1]), number
        number += 1
        while not re.fullmatch(r" *```", lines[number]):
            number += 1
        text = "\n".join(line[indent:] for line in lines[first + 1 : number])
        comment = re.fullmatch(r" *<!-- (\w+)(?:: (.+))? -->", lines[first - 1]) if first else None
        mark, note = (comment[1], comment[2] or "") if comment else ("", "")
        yield Block(page, first + 1, opening[2], mark, note, text)
        number += 1


def shell_lines(block: Block) -> list[str]:
    """Lines a person would type: those after ``$ `` where there are any, else all. Continuations joined."""
    lines = block.text.replace("\\\n", " ").splitlines()
    typed = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    return typed or lines


def commands(block: Block) -> Iterator[list[str]]:
    """The words after ``nanothink`` of every call in a block, up to a comment or a pipe."""
    for line in shell_lines(block):
        lexer = shlex.shlex(line.strip(), posix=True, punctuation_chars="|;&><")
        lexer.whitespace_split = True
        words = list(lexer)
        for i, word in enumerate(words):
            if word == "nanothink" and (i == 0 or words[i - 1] in {"|", "||", "&&", ";"}):
                rest = words[i + 1 :]
                end = next((n for n, w in enumerate(rest) if set(w) <= set("|;&><")), len(rest))
                yield rest[:end]


SHELL = [block for page in PAGES for block in blocks(page) if block.language in {"console", "bash"}]
CALLS = [(block, call) for block in SHELL for call in commands(block)]


def calls_in_prose(page: Path) -> Iterator[list[str]]:
    """Code spans such as `nanothink eval --json`; headings and placeholders in capitals are left out."""
    text = re.sub(r"^ *```.*?^ *```|^#.*?$", "", page.read_text("utf-8"), flags=re.M | re.S)
    for call in re.findall(r"`nanothink ([^`\[]+)`", text):
        words = shlex.split(call)
        if not words[0].isupper():
            yield words


def leaf(words: list[str]) -> tuple[Any, list[str]]:
    """The command that words lead to, and what is left of them; a group when they end there."""
    command = command_tree()
    path = "nanothink"
    while hasattr(command, "commands") and words and not words[0].startswith("-"):
        assert words[0] in command.commands, f"{path} has no command '{words[0]}'"
        path = f"{path} {words[0]}"
        command, words = command.commands[words[0]], words[1:]
    return command, words


def commands_of_the_program() -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []

    def walk(command: Any, path: str) -> None:
        if hasattr(command, "commands"):
            for name, below in command.commands.items():
                walk(below, f"{path} {name}".strip())
        else:
            found.append((path, command))

    walk(command_tree(), "")
    return found
