"""Every command on a terminal of 80 and of 160 columns, in a pipe, without colours, and with --json.

Names are long here, so that tables have no room. Lines are those that the program writes: a path or a command
that is longer than a line is one of them, for the terminal to wrap and a person to copy; nothing else is.
"""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import selectors
import shlex
import shutil
import struct
import subprocess
import termios
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from documentation import commands_of_the_program
from forking_shell import ForkingShell, quick
from rich.cells import cell_len

ROOT = Path(__file__).parents[2]
DOMAIN = "letters_of_the_nineteenth_century"
FILE = "a_file_whose_name_goes_on_and_on_for_a_good_while_until_it_ends_at_last_part_0001"
RUN = "a_name_for_an_expert_that_says_all_about_it"

SETUP = f"""
nanothink tokenizer train --vocab-size 300
nanothink pretrain transformer --tokenizer tokenizer
nanothink pretrain state_space --tokenizer tokenizer
nanothink pretrain diffuser
nanothink pretrain transformer --tokenizer tokenizer --name {RUN}
nanothink train-mla --use-vector-store
head -c 9000 checkpoints/{RUN}_expert.pt > checkpoints/{RUN}_broken_expert.pt
"""

CASES = {
    "data inspect": ["--tokenizer tokenizer"],
    "data validate": ["", "broken"],
    "data sample": ["full"],
    "data import": [f"{FILE}.csv --domain {DOMAIN} --data-dir new --text-field body --overwrite"],
    "tokenizer train": ["--vocab-size 300 --out new_tokenizer --overwrite"],
    "pretrain": [
        f"transformer --tokenizer tokenizer --name {RUN}_again --overwrite",
        "diffuser --dry-run",
        "transformer",
    ],
    "train-mla": ["--dry-run --name other", "--name other --overwrite"],
    "resume": [f"checkpoints/{RUN}_expert.pt --dry-run", ""],
    "eval": [
        f"checkpoints/nanothink_mla.pt checkpoints/{RUN}_expert.pt --max-tokens 50",
        "checkpoints/nanothink_mla.pt --max-tokens 50",
    ],
    "generate": [
        "stone garden -n 4 -c checkpoints/transformer_expert.pt",
        "'the stone' -n 4 -c checkpoints/nanothink_mla.pt --show-routing",
        "'the stone in the garden' --denoise --level 50 -c checkpoints/diffuser_expert.pt",
    ],
    "serve": ["--host 0.0.0.0"],
    "store build": ["--dry-run", "--overwrite"],
    "store add": ["data --dry-run"],
    "store info": [""],
    "store search": ["'the stone'"],
    "store compact": ["--max-tokens 50"],
    "report": ["nanothink_mla"],
    "checkpoints ls": [""],
    "checkpoints show": [f"checkpoints/{RUN}_expert.pt"],
    "checkpoints verify": [""],
    "checkpoints prune": ["--dry-run"],
    "checkpoints export": [f"checkpoints/{RUN}_expert.pt --to exported --overwrite"],
    "checkpoints push": [f"me/mine checkpoints/{RUN}_expert.pt --license mit --dry-run"],
    "checkpoints import": ["exported --name again --overwrite"],
    "config show": ["train_expert", "transformer"],
    "config presets": ["", "tiny"],
    "doctor": [""],
    "demo": ["--out full"],
    "train": ["--time soon", "--time 1m --checkpoint-dir full"],
}
"""Lines for each command. `full` is a file, so nothing can be written below it: that is an error."""

STYLE = re.compile(r"\x1b\[([\d;]*)m")
COLOUR = re.compile(r"(?:^|;)(?:3[0-8]|4[0-8]|9[0-7]|10[0-7])(?:;|$)")
CONTROL = re.compile(r"\x1b\[[\d;?]*[A-Za-z]")


@dataclass(frozen=True)
class Place:
    """A project with everything in it, and a shell."""

    shell: ForkingShell
    folder: Path

    def piped(self, line: str) -> tuple[str, str]:
        """What ``line`` writes to pipes: results, and what is said besides."""
        done = self.shell.run(f"{line} || true", self.folder)
        assert "Traceback" not in done.stderr, done.stderr
        return done.stdout, done.stderr

    def on_terminal(self, line: str, columns: int, **environment: str) -> tuple[str, str]:
        """The same on a terminal, escapes and all; each of the two on one of its own."""
        terminals = [pty.openpty() for _ in range(2)]
        for _, theirs in terminals:
            fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        (results, out), (said, err) = terminals
        inherited = {k: v for k, v in self.shell.environment.items() if k not in ("COLUMNS", "NO_COLOR")}
        process = subprocess.Popen(
            shlex.split(line),
            cwd=self.folder,
            env=inherited | {"TERM": "xterm-256color"} | environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
        )
        os.close(out)
        os.close(err)
        written = {results: bytearray(), said: bytearray()}
        with selectors.DefaultSelector() as waiting:
            for terminal in written:
                waiting.register(terminal, selectors.EVENT_READ)
            while waiting.get_map():
                for key, _ in waiting.select():
                    try:
                        piece = os.read(key.fd, 1 << 16)
                    except OSError:  # the other end is closed
                        piece = b""
                    written[key.fd] += piece
                    if not piece:
                        waiting.unregister(key.fd)
        process.wait(60)
        for terminal in written:
            os.close(terminal)
        texts = written[results].decode(), written[said].decode()
        assert "Traceback" not in texts[1], texts[1]
        return texts


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Path, shell: ForkingShell) -> Place:
    folder = tmp_path_factory.mktemp("widths")
    for domain, name in ((DOMAIN, FILE), ("code", "texts")):
        (folder / "data" / domain).mkdir(parents=True)
        shutil.copy(tiny_corpus / "tales" / "texts.jsonl", folder / "data" / domain / f"{name}.jsonl")
    (folder / "broken" / DOMAIN).mkdir(parents=True)
    records = [{"text": 3}, {"txet": "x"}, {"text": "good"}]
    (folder / "broken" / DOMAIN / f"{FILE}.jsonl").write_text("\n".join(map(json.dumps, records)))
    (folder / f"{FILE}.csv").write_text("n,body\n1,some text\n2\n")
    (folder / "full").touch()
    shell = shell.with_environment(**quick(steps=2, max_keys=500), COLUMNS=os.environ["COLUMNS"])
    done = shell.run(SETUP, folder)
    assert done.returncode == 0, done.stderr
    return Place(shell, folder)


def lines_of(command: str) -> list[str]:
    return [f"nanothink {command} {arguments}".rstrip() for arguments in CASES[command]]


EVERY = [line for command in CASES for line in lines_of(command)]


def test_every_command_has_a_case() -> None:
    assert set(CASES) == {path.removeprefix("nanothink ") for path, _ in commands_of_the_program()}


def written_lines(text: str) -> list[str]:
    """What stays on the screen: bars that were drawn over are gone, and so are styles."""
    shown = []
    for line in text.replace("\r\n", "\n").split("\n"):
        last = re.split(r"\x1b\[2K|\r", line)[-1]
        shown.append(CONTROL.sub("", last).rstrip())
    return shown


UNITS = {"KB", "MB", "GB"}
"""Of sizes and speeds, which are not the same each time."""


def letters(text: str) -> set[str]:
    """Words as far as they are letters: half a word is none of them."""
    return {word for word in re.findall(r"[^\W\d_]+", text) if len(word) > 1} - UNITS


def too_wide(line: str, columns: int) -> bool:
    """Whether a line has no room, and not because it is one path or one command."""
    return cell_len(line) > columns and not re.match(
        r"\s*(?:\$ )?(?:nanothink|mkdir) |\s*(?:error: |warning: )?\S+$", line
    )


@pytest.mark.parametrize("line", EVERY)
def test_results_on_a_terminal(place: Place, line: str) -> None:
    """At 80 columns without colours, at 160 with them, against what a pipe gets."""
    piped, notes = place.piped(line)
    assert "\x1b" not in piped + notes
    for columns in (80,) if line.startswith(SLOW) else (80, 160):
        environment = {"NO_COLOR": "1"} if columns == 80 else {}
        results, said = place.on_terminal(line, columns, **environment)
        if columns == 80:
            assert not [style for style in STYLE.findall(results + said) if COLOUR.search(style)]
        shown = written_lines(results)
        assert [part for part in [*shown, *written_lines(said)] if too_wide(part, columns)] == []
        assert not [part for part in shown if "…" in part]
        if line.startswith("nanothink generate"):
            continue  # it writes as the model does, and the terminal wraps that
        assert letters("\n".join(shown)) - letters(piped) == set(), "folded inside a word"
        if not line.startswith(SHORTER):
            assert letters(piped) - letters("\n".join(shown)) == set(), "left out"


SLOW = tuple(
    f"nanothink {name}"
    for name in (
        *("doctor", "store compact", "pretrain", "resume", "report", "train-mla", "eval"),
        *("checkpoints export", "checkpoints import"),
    )
)
"""Not run at 160 columns too: nothing in them is wider than that and yet fits 80."""

SHORTER = ("nanothink checkpoints ls", "nanothink eval")
"""These leave out columns that say what stands elsewhere, where there is no room."""


# --- for scripts -------------------------------------------------------------------------------


TAKES_JSON = [
    path.removeprefix("nanothink ")
    for path, command in commands_of_the_program()
    if any("--json" in parameter.opts for parameter in command.params)
]


def one_document(written: str) -> Any:
    """The object in ``written``, which is nothing else; and JSON as the standard has it, without NaN."""

    def refuse(name: str) -> Any:
        raise AssertionError(f"{name} is not JSON")

    document = json.loads(written, parse_constant=refuse)
    assert isinstance(document, dict)
    assert written.endswith("}\n")
    return document


def leaves(value: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, below in value.items():
            yield from leaves(below, f"{at}.{key}".strip("."))
    elif isinstance(value, list):
        for below in value:
            yield from leaves(below, f"{at}[]")
    else:
        yield at, value


def test_commands_that_take_json() -> None:
    assert len(TAKES_JSON) >= 20
    assert {"eval", "data validate", "tokenizer train", "checkpoints export"} <= set(TAKES_JSON)


@pytest.mark.parametrize("line", [line for command in TAKES_JSON for line in lines_of(command)])
def test_json_is_one_document_or_an_error(place: Place, line: str, tmp_path: Path) -> None:
    """With everything there, and in a folder where nothing is. In the first, stdout holds ASCII alone."""
    for folder in (place.folder, tmp_path):
        ascii_only = {"PYTHONIOENCODING": "ascii"} if folder == place.folder else {}
        exports = "".join(f"export {name}={value}; " for name, value in ascii_only.items())
        done = place.shell.run(f"{exports}{line} --json", folder)
        assert "Traceback" not in done.stderr, done.stderr
        assert "\x1b" not in done.stdout + done.stderr
        if done.returncode == 0 or done.stdout:
            document = one_document(done.stdout)
            for at, value in leaves(document):
                numeral = isinstance(value, str) and re.fullmatch(
                    r"-?[\d,]+(?:\.\d+)?(?: ?(?:%|[KMGT]?B|s|ms))?", value
                )
                said_by_model = at.endswith(".text")
                assert said_by_model or not numeral, f"{at} is {value!r}"
        if done.returncode:
            assert done.returncode in (1, 2)
            assert done.stdout or done.stderr.startswith("error: ")
        if done.returncode == 2:
            assert done.stdout == ""


@pytest.mark.parametrize("command", TAKES_JSON)
def test_json_of_a_mistyped_command_is_an_error_alone(place: Place, command: str) -> None:
    done = place.shell.run(f"nanothink {command} --json --no-such-option", place.folder)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
