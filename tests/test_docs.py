"""What the documentation says is so: its tree, commands, examples, table of settings and links.

``python tests/test_docs.py`` writes the table of settings in docs/configuration.md anew.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("*/README.md")})
SETTINGS_PAGE = ROOT / "docs" / "configuration.md"
_BEGIN, _END = "<!-- settings: begin -->\n", "<!-- settings: end -->\n"

# ---------------------------------------------------------------------------------------------------
# Fenced blocks


@dataclass(frozen=True)
class Block:
    """A fenced block. ``mark`` is the HTML comment on the line before it, such as "run"."""

    page: Path
    line: int
    language: str
    mark: str
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
        comment = re.fullmatch(r" *<!-- (\w+) -->", lines[first - 1]) if first else None
        yield Block(page, first + 1, opening[2], comment[1] if comment else "", text)
        number += 1


def shell_lines(block: Block) -> list[str]:
    """Lines a person would type: those after ``$ `` where there are any, else all. Continuations joined."""
    lines = block.text.replace("\\\n", " ").splitlines()
    typed = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    return typed or lines


def commands(block: Block) -> Iterator[list[str]]:
    """The words after ``nanothink`` of every call in a block, up to a comment, an explanation or a pipe."""
    for line in shell_lines(block):
        # Two blanks set a command off from its explanation.
        lexer = shlex.shlex(re.split(r" {2,}", line.strip())[0], posix=True, punctuation_chars="|;&><")
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


# ---------------------------------------------------------------------------------------------------
# 1. The tree


def listed_in_the_tree() -> tuple[set[str], set[str]]:
    """Folders and files of the tree in the README, as paths from the root."""
    (block,) = [block for block in blocks(ROOT / "README.md") if block.mark == "tree"]
    folders, files = set(), set()
    parents: list[str] = []
    for line in block.text.splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        path = "/".join([*parents[:depth], name.rstrip("/")])
        if name.endswith("/"):
            parents = [*parents[:depth], name.rstrip("/")]
            folders.add(path)
        else:
            files.add(path)
        assert depth == 0 or len(line.split()) > 1, f"the tree says nothing about {path}"
    return folders, files


def test_the_tree_is_the_package() -> None:
    folders, files = listed_in_the_tree()
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / "nanothink").rglob("*.py")}
    # A folder's line speaks for its __init__.py.
    packages = {m.removesuffix("/__init__.py") for m in modules if m.endswith("/__init__.py")}
    modules = {m for m in modules if not m.endswith("/__init__.py") or m == "nanothink/__init__.py"}
    assert files == modules
    assert folders == packages


# ---------------------------------------------------------------------------------------------------
# 2. Every command parses


def leaf(words: list[str]) -> tuple[Any, list[str]]:
    """The command that words lead to, and what is left of them; a group when they end there."""
    from typer.main import get_command

    from nanothink.cli.app import app

    command: Any = get_command(app)
    path = "nanothink"
    while hasattr(command, "commands") and words and not words[0].startswith("-"):
        assert words[0] in command.commands, f"{path} has no command '{words[0]}'"
        path = f"{path} {words[0]}"
        command, words = command.commands[words[0]], words[1:]
    return command, words


def parse(words: list[str]) -> None:
    """Let Typer parse a call without running it; raises what a person would see as a usage error."""
    command, rest = leaf(words)
    assert not hasattr(command, "commands") or rest, f"{' '.join(words)}: a command is missing"
    if not {"--help", "--version"} & set(rest):
        command.make_context(" ".join(words), rest)


def check_names(words: list[str]) -> None:
    """The command and its options exist; arguments may be missing."""
    command, rest = leaf(words)
    known = {name for parameter in command.params for name in parameter.opts} | {"--help"}
    known |= {"--install-completion", "--show-completion"}
    assert {word.partition("=")[0] for word in rest if word.startswith("-")} <= known, words


def test_there_are_commands_to_check() -> None:
    assert len(CALLS) > 30
    with pytest.raises(AssertionError):
        parse(["pretain", "transformer"])
    with pytest.raises(Exception, match="No such option"):
        parse(["pretrain", "transformer", "--max-stepz", "3"])


@pytest.mark.parametrize(("block", "call"), CALLS, ids=[f"{b}: {' '.join(c)}" for b, c in CALLS])
def test_every_command_parses(block: Block, call: list[str]) -> None:
    parse(call)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_in_prose_exists(page: Path) -> None:
    for call in calls_in_prose(page):
        check_names(call)


def commands_of_the_program() -> list[tuple[str, Any]]:
    from typer.main import get_command

    from nanothink.cli.app import app

    found: list[tuple[str, Any]] = []

    def walk(command: Any, path: str) -> None:
        if hasattr(command, "commands"):
            for name, below in command.commands.items():
                walk(below, f"{path} {name}".strip())
        else:
            found.append((path, command))

    walk(get_command(app), "")
    return found


def test_the_reference_names_every_command_and_option() -> None:
    page = (ROOT / "docs" / "commands.md").read_text("utf-8")
    section = re.compile(r"^### `nanothink ([a-z -]+?)(?: [A-Z\[][^\n]*)?`\n(.*?)(?=^##|\Z)", re.M | re.S)
    sections = dict(section.findall(page))
    for path, command in commands_of_the_program():
        assert path in sections, f"docs/commands.md has no section on nanothink {path}"
        cells = "".join(re.findall(r"^\|([^|]*)\|", sections[path], re.M))
        named = set(re.findall(r"`(--?[a-z][a-z-]*)", cells))
        known = {name for parameter in command.params for name in parameter.opts if name.startswith("-")}
        known -= {"--help", "-h"}
        assert named == known, f"nanothink {path}"


# ---------------------------------------------------------------------------------------------------
# 3. Marked examples run

SMALL = {
    "NANOTHINK_MODEL__D_MODEL": "16",
    "NANOTHINK_MODEL__MAX_SEQ_LEN": "32",
    "NANOTHINK_TRANSFORMER__N_LAYERS": "1",
    "NANOTHINK_TRANSFORMER__N_HEADS": "2",
    "NANOTHINK_TRAIN_EXPERT__MAX_STEPS": "4",
    "NANOTHINK_TRAIN_EXPERT__SAMPLE_TOKENS": "4",
    "NANOTHINK_TRAIN_EXPERT__AMP_DTYPE": "float32",
}
"""Settings that make the examples of the documentation quick without another word in them."""

RUN = {page: [block for block in blocks(page) if block.mark == "run"] for page in PAGES}
RUN = {page: marked for page, marked in RUN.items() if marked}


def test_the_readme_is_among_the_pages_that_run() -> None:
    assert ROOT / "README.md" in RUN


@pytest.mark.parametrize("page", RUN, ids=lambda page: str(page.relative_to(ROOT)))
def test_marked_examples_run_in_order(page: Path, tiny_corpus: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_corpus, tmp_path / "data")  # somebody's own text
    bin_folder = tmp_path / ".bin"
    bin_folder.mkdir()
    command = bin_folder / "nanothink"
    command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m nanothink "$@"\n')
    command.chmod(0o755)
    environment = {**os.environ, **SMALL, "PATH": f"{bin_folder}:{os.environ['PATH']}", "COLUMNS": "100"}
    for block in RUN[page]:
        steps = (
            [[sys.executable, "-c", block.text]]
            if block.language == "python"
            else [["bash", "-euo", "pipefail", "-c", line] for line in shell_lines(block)]
        )
        for step in steps:
            done = subprocess.run(
                step, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=120
            )
            assert done.returncode == 0, f"{block}: {step[-1]}\n{done.stdout}{done.stderr}"


# ---------------------------------------------------------------------------------------------------
# 4. The table of settings


def settings_table() -> str:
    """Every setting with its default and meaning, as a Markdown table."""
    from nanothink.config import Config
    from nanothink.config.run import flatten, known_settings

    values, meanings = flatten(Config()), known_settings()
    rows = [f"| `{name}` | {_shown(values[name])} | {meanings[name]} |" for name in meanings]
    return "\n".join(["| setting | default | meaning |", "|---|---|---|", *rows]) + "\n"


def _shown(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, list):
        return "`[" + ", ".join(f'"{v}"' if isinstance(v, str) else f"{v:g}" for v in value) + "]`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def with_settings_table(text: str) -> str:
    before, rest = text.split(_BEGIN)
    _, after = rest.split(_END)
    return f"{before}{_BEGIN}{settings_table()}{_END}{after}"


def test_the_table_of_settings_is_the_settings() -> None:
    text = SETTINGS_PAGE.read_text("utf-8")
    assert text == with_settings_table(text), "refresh it: python tests/test_docs.py"


def test_the_table_of_presets_is_the_presets() -> None:
    from nanothink.config.run import preset_names, resolve_config

    text = SETTINGS_PAGE.read_text("utf-8")
    for name in preset_names():
        c = resolve_config(preset=name).config
        batch = f"{c.train_expert.batch_size} × {c.train_expert.grad_accum_steps}"
        shape = (c.transformer.n_layers, c.model.d_model, c.transformer.n_heads, c.model.max_seq_len)
        cells = [f"`{name}`", *map(str, shape), batch, str(c.train_expert.max_epochs)]
        assert f"| {' | '.join(cells)} |" in text


def test_every_dependency_has_its_reason() -> None:
    table = (ROOT / "docs" / "decisions" / "0001-dependencies.md").read_text("utf-8")
    listed = re.findall(r"^\|(?: `\w+` \|)? `([\w-]+)` \|", table, re.M)
    section = re.compile(r"^(?:dependencies|parquet|datasets|bench|dev) = \[(.*?)\]$", re.M | re.S)
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    asked = [name for part in section.findall(project) for name in re.findall(r'"([\w-]+)', part)]
    assert sorted(listed) == sorted(asked)


# ---------------------------------------------------------------------------------------------------
# 5. Links


def _anchor(heading: str) -> str:
    """The anchor that GitHub makes of a heading."""
    plain = re.sub(r"[`*]", "", heading.strip().lower())
    return re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text("utf-8"), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        aim = (page.parent / path).resolve() if path else page
        assert aim.exists(), f"{page.name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", aim.read_text("utf-8"), re.M)
            assert anchor in {_anchor(heading) for heading in headings}, f"{page.name} links to {target}"


# ---------------------------------------------------------------------------------------------------
# 6. The site


def test_the_site_builds_and_holds_every_page(tmp_path: Path) -> None:
    # Strict: a page outside the navigation, or a link that leads nowhere, is an error.
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path)]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {p.relative_to(ROOT / "docs") for p in (ROOT / "docs").rglob("*.md")}
    for page in pages:
        folder = page.parent if page.stem in {"index", "README"} else page.with_suffix("")
        assert (tmp_path / folder / "index.html").is_file(), page


# ---------------------------------------------------------------------------------------------------
# 7. Nothing of one machine


def tracked_text_files() -> Iterator[tuple[str, str]]:
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if names.returncode:
        pytest.skip("not a git checkout")
    for name in names.stdout.split("\0"):
        path = ROOT / name
        if name and path.is_file():
            try:
                yield name, path.read_text("utf-8")
            except UnicodeDecodeError:
                continue


def test_no_path_or_host_of_one_machine() -> None:
    # One-letter classes, so that this file does not hold what it looks for.
    folders = "|".join(("wor[k]", "roo[t]", "tm[p]", "hom[e]/[a-z]"))
    hosts = "|".join(("pyp[i]", r"python[h]osted\.", "index-[u]rl", r"download\.py[t]orch"))
    path_or_host = re.compile(rf"(?<![\w.~}}>)-])/(?:{folders})\b|\b(?:{hosts})")
    found = [
        f"{name}:{text[: match.start()].count(chr(10)) + 1}: {match.group()}"
        for name, text in tracked_text_files()
        for match in path_or_host.finditer(text)
    ]
    assert found == []


if __name__ == "__main__":
    SETTINGS_PAGE.write_text(with_settings_table(SETTINGS_PAGE.read_text("utf-8")), "utf-8")
    print(f"{SETTINGS_PAGE.relative_to(ROOT)}: table of settings written")
