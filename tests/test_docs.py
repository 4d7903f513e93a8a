"""What the documentation says is so: its tree, commands, table of settings and links. Examples run in
test_docs_examples.py.

``python tests/test_docs.py`` writes the tables of options in docs/commands.md and of settings in
docs/configuration.md anew.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from documentation import (
    CALLS,
    PAGES,
    ROOT,
    blocks,
    commands_of_the_program,
    leaf,
)

COMMANDS_PAGE = ROOT / "docs" / "commands.md"
SETTINGS_PAGE = ROOT / "docs" / "configuration.md"
_BEGIN, _END = "<!-- settings: begin -->\n", "<!-- settings: end -->\n"

# ---------------------------------------------------------------------------------------------------
# 1. The tree


def listed_in_the_tree() -> tuple[set[str], set[str]]:
    """Folders and files of the tree in docs/architecture.md, as paths from the root."""
    (block,) = [block for block in blocks(ROOT / "docs" / "architecture.md") if block.mark == "tree"]
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
# 2. Every command of an example parses


def parse(words: list[str]) -> None:
    """Let Typer parse a call without running it; raises what a person would see as a usage error."""
    command, rest = leaf(words)
    assert not hasattr(command, "commands") or rest, f"{' '.join(words)}: a command is missing"
    if not {"--help", "--version"} & set(rest):
        command.make_context(" ".join(words), rest)


def test_there_are_commands_to_check() -> None:
    assert len(CALLS) > 30
    with pytest.raises(AssertionError):
        parse(["pretain", "transformer"])
    with pytest.raises(Exception, match="No such option"):
        parse(["pretrain", "transformer", "--max-stepz", "3"])


def test_every_command_parses() -> None:
    refused = []
    for block, call in CALLS:
        try:
            parse(call)
        except Exception as error:
            refused.append(f"{block}: {' '.join(call)}: {error}")
    assert refused == []


# ---------------------------------------------------------------------------------------------------
# 3. The reference of commands

_SECTION = re.compile(r"^### `(nanothink [^`]*)`\n(.*?)(?=^##|\Z)", re.M | re.S)
_OPTIONS = re.compile(r"(?<=<!-- options -->\n).*?(?=<!-- /options -->\n)", re.S)


def reference() -> dict[str, str]:
    """Table of arguments and options of every command, by its usage line."""
    tables = {}
    for path, command in commands_of_the_program():
        context = command.make_context(path, [], resilient_parsing=True)
        arguments = command.collect_usage_pieces(context)[1:]  # without [OPTIONS]
        rows = [
            f"| {_names(record[0])} | {' '.join(record[1].split()).replace('|', chr(92) + '|')} |"
            for parameter in command.params
            if parameter.name != "help" and (record := parameter.get_help_record(context))
        ]
        usage = " ".join(["nanothink", path, *arguments])
        tables[usage] = "\n".join(["| option | meaning |", "|---|---|", *rows]) + "\n"
    return tables


def _names(record: str) -> str:
    """``-c, --checkpoint PATH`` as code, the long name first."""
    spelled = [name for name in record.partition(" <")[0].replace(" / ", ", ").split(", ") if name]
    spelled.sort(key=lambda name: not name.startswith("--"))
    return ", ".join(f"`{name}`" for name in spelled)


def with_reference(text: str) -> str:
    """The page with the table of each section made from its command."""
    tables = reference()

    def refreshed(section: re.Match[str]) -> str:
        return _OPTIONS.sub(lambda _: tables.get(section[1], ""), section[0])

    return _SECTION.sub(refreshed, text)


def test_the_reference_is_the_commands() -> None:
    text = COMMANDS_PAGE.read_text("utf-8")
    sections = dict(_SECTION.findall(text))
    assert set(sections) == set(reference()), "docs/commands.md has a section for each command, and no other"
    assert all(_OPTIONS.search(section) for section in sections.values())
    assert text == with_reference(text), "refresh it: python tests/test_docs.py"


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
    extras = "parquet|datasets|documents|near_duplicates|serve|gguf|tensorboard|trackio|wandb|bench|dev"
    section = re.compile(rf"^(?:dependencies|{extras}) = \[(.*?)\]$", re.M | re.S)
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    asked = [name for part in section.findall(project) for name in re.findall(r'"([\w-]+)', part)]
    assert sorted(listed) == sorted(asked)


def test_extras_that_are_named_are_there() -> None:
    extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text("utf-8"), re.M)
    named = {name for page in PAGES for name in re.findall(r"'\.\[(\w+)\]'", page.read_text("utf-8"))}
    assert {"parquet", "datasets", "near_duplicates", "bench"} <= named <= set(extras)


# ---------------------------------------------------------------------------------------------------
# 4. Links


def _anchor(heading: str) -> str:
    """The anchor that GitHub makes of a heading."""
    plain = re.sub(r"[`*]", "", heading.strip().lower())
    return re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")


def _leads_somewhere(page: Path, target: str) -> bool:
    path, _, anchor = target.partition("#")
    aim = (page.parent / path).resolve() if path else page
    if not aim.exists() or not anchor:
        return aim.exists()
    return anchor in map(_anchor, re.findall(r"^#+ (.*)$", aim.read_text("utf-8"), re.M))


def test_links_lead_somewhere() -> None:
    dead = []
    for page in PAGES:
        text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text("utf-8"), flags=re.S)
        inner = (t for t in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"[a-z]+:", t))
        dead += [f"{page.name} links to {target}" for target in inner if not _leads_somewhere(page, target)]
    assert dead == []


def test_files_that_are_named_are_there() -> None:
    gone = []
    for page in PAGES:
        prose = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.S)
        names = re.findall(r"`(?:python )?((?:nanothink|tests|benchmarks|docs)/[\w/.-]+\.\w+)", prose)
        gone += [f"{page.name} names {n}" for n in names if not ((ROOT / n).is_file() or "NAME" in n)]
    assert gone == []


# ---------------------------------------------------------------------------------------------------
# 5. The site


def test_the_navigation_names_every_page_but_single_decisions() -> None:
    named = set(re.findall(r"[\w/]+\.md", (ROOT / "mkdocs.yml").read_text("utf-8")))
    pages = {str(p.relative_to(ROOT / "docs")) for p in (ROOT / "docs").rglob("*.md")}
    decisions = {page for page in pages if re.match(r"decisions/\d", page)}
    assert named == pages - decisions
    index = (ROOT / "docs" / "decisions" / "README.md").read_text("utf-8")
    assert {f"decisions/{name}" for name in re.findall(r"\]\(([\w-]+\.md)\)", index)} == decisions


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Zensical has no build for Python 3.10")
def test_the_site_builds_and_holds_every_page(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    # Strict: a link or an anchor that leads nowhere is an error.
    command = [sys.executable, "-m", "zensical", "build", "--strict"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {p.relative_to(ROOT / "docs") for p in (ROOT / "docs").rglob("*.md")}
    for page in pages:
        folder = page.parent if page.stem in {"index", "README"} else page.with_suffix("")
        assert (tmp_path / "site" / folder / "index.html").is_file(), page


# ---------------------------------------------------------------------------------------------------
# 6. Nothing of one machine


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
    hosts = "|".join(("(?<!gh-action-)pyp[i]", r"python[h]osted\.", "index-[u]rl", r"download\.py[t]orch"))
    path_or_host = re.compile(rf"(?<![\w.~}}>)-])/(?:{folders})\b|\b(?:{hosts})")
    found = [
        f"{name}:{text[: match.start()].count(chr(10)) + 1}: {match.group()}"
        for name, text in tracked_text_files()
        for match in path_or_host.finditer(text)
    ]
    assert found == []


if __name__ == "__main__":
    COMMANDS_PAGE.write_text(with_reference(COMMANDS_PAGE.read_text("utf-8")), "utf-8")
    print(f"{COMMANDS_PAGE.relative_to(ROOT)}: tables of options written")
    SETTINGS_PAGE.write_text(with_settings_table(SETTINGS_PAGE.read_text("utf-8")), "utf-8")
    print(f"{SETTINGS_PAGE.relative_to(ROOT)}: table of settings written")
