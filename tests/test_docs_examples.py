"""Every example of the documentation runs, in the order of its page, in a folder as its reader would have it.

Pages that need no more begin with text alone, the others with what the tutorial leaves behind. Before an
example stands ``<!-- run -->``; ``<!-- run: in a clone -->`` if it wants more around it, see surroundings.py;
``<!-- bench: with lm-eval -->`` if it wants packages that only ``make test-bench`` has; or ``<!-- ci -->`` if
it takes minutes and is a line of ``.ci/run``.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from documentation import (
    CALLS,
    PAGES,
    ROOT,
    SHELL,
    Block,
    blocks,
    calls_in_prose,
    commands,
    commands_of_the_program,
    leaf,
    shell_lines,
)
from forking_shell import ForkingShell
from surroundings import SURROUNDINGS, Place

TUTORIAL = ROOT / "docs" / "tutorial.md"
BEGIN_WITH_TEXT = (
    ROOT / "README.md",
    ROOT / "docs" / "index.md",
    TUTORIAL,
    ROOT / "docs" / "data.md",
    ROOT / "docs" / "configuration.md",
    ROOT / "docs" / "distributed.md",
)
IN_BENCH = {ROOT / "docs" / "commands.md"}
"""Long pages whose commands the tests of end_to_end/ run too: their examples are for ``make test-bench``."""

EXAMPLES = {page: [b for b in blocks(page) if b.language in {"console", "bash", "python"}] for page in PAGES}
EXAMPLES = {page: found for page, found in EXAMPLES.items() if found}
RUN = {page: [block for block in found if block.mark == "run"] for page, found in EXAMPLES.items()}
RUN = {page: marked for page, marked in RUN.items() if marked}
BENCH = [block for found in EXAMPLES.values() for block in found if block.mark == "bench"]

IN_PROSE = {f"nanothink {shlex.join(call)}" for page in PAGES for call in calls_in_prose(page)}
IN_PROSE -= {f"nanothink {shlex.join(call)}" for _, call in CALLS}
IN_PROSE = {command for command in IN_PROSE if " ... " not in command}
# Commands that need an argument, files of kinds that are tested elsewhere, a terminal or the network, or that
# run until they are stopped or for hours: their help runs.
NAMES = {
    "nanothink data import",
    "nanothink data import hf:owner/name --config-name en --split train --domain pages",
    "nanothink checkpoints export",
    "nanothink checkpoints import",
    "nanothink checkpoints push",
    "nanothink checkpoints push REPO",
    "nanothink generate --interactive",
    "nanothink data import page.html book.epub --domain books",
    "nanothink serve",
    "nanothink serve FOLDER",
    "nanothink serve exported/model",
    "nanothink train",
    "nanothink train DATA_DIR --time 2h",
    "nanothink train demo/data --time 4m",
}
WORDS = {
    "PATH": "checkpoints/transformer_expert.pt",
    "FILE": "own.csv",
    "NAME": "own",
    "N": "2",
    "2000": "8",
    "480": "4",
}
BEFORE = {
    # The shell above it is looked up, and a fork has another one or none.
    "nanothink --install-completion": 'nanothink() { python -m nanothink "$@"; }',
    "nanothink data import FILE --domain NAME --text-field txt": "printf 'n,txt\\n1,A text.\\n' > own.csv",
    "nanothink data import notes.txt 'letters/**/*.md' --domain notes": (
        "mkdir letters; echo A text. | tee notes.txt letters/one.md"
    ),
    "nanothink data import pages.parquet --domain pages": (
        'python -c "import pyarrow, pyarrow.parquet as file; '
        "file.write_table(pyarrow.table({'text': ['A text.']}), 'pages.parquet')\""
    ),
    r"nanothink data import tickets.csv --domain tickets --template '{subject}\n\n{body}'": (
        r"rm -r data/tickets; printf 'subject,body\nHello,A text.\n' > tickets.csv"
    ),
    "nanothink store build": "rm -r checkpoints/*.store",
    "nanothink pretrain transformer": "mv checkpoints others",
    "nanothink pretrain diffuser --preset tiny --max-steps 480 --set diffuser.n_layers=2": (
        "mv checkpoints others; mkdir checkpoints; cp others/transformer_expert.pt checkpoints"
    ),
}
"""What is typed first, where a command wants something else than the tutorial leaves behind."""


@pytest.fixture(scope="module")
def own_text(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What somebody has before the first command: a data folder, and text in other forms beside it."""
    folder = tmp_path_factory.mktemp("text")
    letters, manuals, tales = (
        [json.loads(line)["text"] for line in (tiny_corpus / domain / "texts.jsonl").read_text().splitlines()]
        for domain in ("letters", "manuals", "tales")
    )
    for name, texts in {
        "data/letters": letters[:30],
        "data/manuals": manuals,
        "more/recipes": tales[:6],
        "more/songs": tales[6:12],
    }.items():
        (folder / name).mkdir(parents=True)
        lines = (json.dumps({"text": text}) for text in texts)
        (folder / name / "texts.jsonl").write_text("\n".join(lines))
    (folder / "stories").mkdir()
    for number, text in enumerate(tales[12:]):
        (folder / "stories" / f"{number}.txt").write_text(text)
    rows = "".join(f'{number},"{text}"\n' for number, text in enumerate(letters[30:]))
    (folder / "tickets.csv").write_text(f"number,body\n{rows}")
    (folder / "notes.txt").write_text("\n\n".join(manuals[:10]))
    (folder / "notes.csv").write_text(f"number,text\n{rows}")
    return folder


@pytest.fixture(scope="module")
def after_the_tutorial(
    shell: ForkingShell, own_text: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[], Path]:
    """Gives the folder in which the tutorial ran, as it was then; checkpoints know where their data lies."""
    parent = tmp_path_factory.mktemp("tutorial")
    folder, kept = parent / "work", parent / "kept"
    shutil.copytree(own_text, folder)
    for block in RUN[TUTORIAL]:
        run(block, Place(folder, own_text, shell))
    folder.rename(kept)

    def renewed() -> Path:
        shutil.rmtree(folder, ignore_errors=True)
        return Path(shutil.copytree(kept, folder))

    return renewed


def run(block: Block, place: Place) -> None:
    script = "\n".join(shell_lines(block))
    if block.language == "python":
        script = shlex.join(["forked-python", block.text])
    SURROUNDINGS[block.note](script, place)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=pytest.mark.bench) if page in IN_BENCH else page for page in RUN],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_examples_run_in_order(
    page: Path, shell: ForkingShell, own_text: Path, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    if page == TUTORIAL:
        request.getfixturevalue("after_the_tutorial")
        return
    if page in BEGIN_WITH_TEXT:
        folder = Path(shutil.copytree(own_text, tmp_path / "work"))
    else:
        folder = request.getfixturevalue("after_the_tutorial")()
    for block in RUN[page]:
        run(block, Place(folder, own_text, shell))


@pytest.mark.bench
@pytest.mark.timeout(900)
@pytest.mark.parametrize("block", BENCH, ids=str)
def test_examples_with_more_packages_run(
    block: Block, shell: ForkingShell, own_text: Path, tmp_path: Path
) -> None:
    run(block, Place(tmp_path, own_text, shell))


@pytest.mark.bench
@pytest.mark.timeout(900)
def test_commands_in_running_text_run(
    shell: ForkingShell, own_text: Path, after_the_tutorial: Callable[[], Path]
) -> None:
    """Those that no example shows, each in the folder that the tutorial leaves behind."""
    failed = []
    for command in sorted(IN_PROSE):
        place = Place(after_the_tutorial(), own_text, shell)
        typed = command + " --help" * (command in NAMES)
        for word, other in WORDS.items():
            typed = re.sub(rf"\b{word}\b", other, typed)
        try:
            place.run(f"{BEFORE.get(command, '')}\n{typed}", HOME=str(place.folder))
        except AssertionError as error:
            failed.append(str(error))
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize("page", EXAMPLES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_example_runs_here_or_in_ci(page: Path) -> None:
    ci = set(map(without_comment, (ROOT / ".ci" / "run").read_text().splitlines()))
    for block in EXAMPLES[page]:
        if block.mark in {"run", "bench"}:
            assert block.note in SURROUNDINGS, block
        else:
            assert block.mark == "ci", f"{block} runs nowhere"
            for line in shell_lines(block):
                assert without_comment(line) in ci, f"{block}: .ci/run does not run {line}"


def test_every_command_is_in_some_example() -> None:
    ran = {" ".join(path_of(call)) for block in SHELL for call in commands(block)}
    assert ran >= {path for path, _ in commands_of_the_program()}


def without_comment(line: str) -> str:
    return line.partition(" #")[0].strip()


def path_of(call: list[str]) -> list[str]:
    """The words of a call that name its command."""
    return call[: len(call) - len(leaf(call)[1])]
