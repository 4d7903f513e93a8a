"""``generate --interactive``: commands with injected lines, and one session in a pseudo-terminal."""

from __future__ import annotations

import json
import os
import pty
import readline
import select
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import nanothink
from nanothink.cli.app import run
from nanothink.cli.interactive import Session
from nanothink.cli.line_editor import edited, line_editing
from nanothink.runs.trained_model import TrainedModel

TINY = [
    *("--set", "model.d_model=32", "--set", "model.max_seq_len=32", "--set", "transformer.n_layers=1"),
    *("--set", "transformer.n_heads=2", "--set", "train_expert.batch_size=4"),
    *("--set", "train_expert.sample_tokens=0", "--max-steps", "2"),
]


@pytest.fixture(scope="module")
def checkpoint(tiny_corpus: Path, tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("interactive")
    places = ("--data-dir", tiny_corpus, "--tokenizer", tiny_tokenizer, "--checkpoint-dir", folder)
    assert run(["pretrain", "transformer", *map(str, places), *TINY]) == 0
    return folder / "transformer_expert.pt"


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> TrainedModel:
    return nanothink.load(checkpoint)


Typed = Callable[..., str]


@pytest.fixture
def typed(loaded: TrainedModel) -> Typed:
    """The text after a session in which these lines are typed; a callable is called, and its result typed."""

    def call(*lines: str | Callable[[], str], text: str = "", **sampling: Any) -> str:
        left: Iterator[str | Callable[[], str]] = iter(lines)

        def read(_: str) -> str:
            line = next(left, None)
            if line is None:
                raise EOFError
            return line if isinstance(line, str) else line()

        settings = {"max_new_tokens": 4, "seed": 1, "stop_at_eos": False, **sampling}
        session = Session(loaded, settings, read=read, text=text)
        session.run()
        return session.text

    return call


def interrupted() -> str:
    raise KeyboardInterrupt


def test_a_line_is_appended_and_continued_as_by_generate(typed: Typed, loaded: TrainedModel) -> None:
    settings: dict[str, Any] = {"max_new_tokens": 4, "seed": 1, "stop_at_eos": False}
    first = "the moon" + loaded.generate("the moon", **settings)
    assert typed("the moon") == first
    assert typed(text="the moon") == first
    then = first + " and"
    assert typed("the moon", " and") == then + loaded.generate(then, **settings)
    assert typed("the moon", "", "/continue") == typed("the moon", "/con", "")
    assert len(typed("the moon", "")) > len(first)


def test_undo_goes_back_through_every_change(typed: Typed, capsys: pytest.CaptureFixture[str]) -> None:
    once = typed("the moon")
    assert typed("the moon", " and", "/undo") == once + " and"
    assert typed("the moon", " and", "/undo", "/undo") == once
    assert typed("the moon", "/undo", "/u", "/undo") == ""
    assert "nothing to undo" in capsys.readouterr().err


def test_again_replaces_the_last_continuation(typed: Typed, capsys: pytest.CaptureFixture[str]) -> None:
    assert typed("the moon", "/set seed 2", "/again") == typed("the moon", seed=2)
    assert typed("the moon", "/again", "/undo") == "the moon"
    assert typed("/again") == ""
    assert "not a continuation" in capsys.readouterr().err


def test_settings_change_what_follows(typed: Typed, capsys: pytest.CaptureFixture[str]) -> None:
    assert typed("/set max_new_tokens 9", "the moon") == typed("the moon", max_new_tokens=9)
    assert typed("/set max-new = 9", "the moon", max_new_tokens=2) == typed("the moon", max_new_tokens=9)
    assert typed("/set temperature 0", "moon", seed=5) == typed("moon", temperature=0, seed=6)
    assert typed("/set temp 0", "/set temp none", "moon") == typed("moon")
    capsys.readouterr()
    typed("/set seed 3", "/set")
    output, notes = capsys.readouterr()
    assert notes.startswith("seed 3\n")
    assert ["seed", "3"] in [line.split() for line in output.splitlines()]


def test_a_stop_text_may_be_a_line_end_or_have_spaces(typed: Typed) -> None:
    whole = typed("moon", max_new_tokens=20)[len("moon") :]
    place = whole.index(" ", 1)
    assert typed(f'/set stop xyz "{whole[place : place + 2]}"', "moon", max_new_tokens=20) == (
        "moon" + whole[:place]
    )
    assert typed('/set stop "x', "/set stop m", "/set stop none", "moon") == typed("moon")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/set temperature -1", "greater than or equal to 0"),
        ("/set temprature 1", "Did you mean 'temperature'?"),
        ("/set top_ 3", "top_k or top_p"),
        ("/set seed", "/set seed VALUE"),
        ("/udno", "Did you mean 'undo'?"),
        ("/s", "'s' may be show or set or save."),
        ("/", "There are: continue, again"),
        ("/save", "Give a file"),
    ],
)
def test_a_mistake_is_said_and_changes_nothing(
    line: str, said: str, typed: Typed, capsys: pytest.CaptureFixture[str]
) -> None:
    assert typed(line, "moon") == typed("moon")
    assert said in capsys.readouterr().err.replace("\n", " ")


def test_several_lines_and_a_slash_are_text(typed: Typed) -> None:
    assert typed('"""', "one", "", 'two"""', "/undo") == "one\n\ntwo"
    assert typed('"""one', '"""', "/undo") == "one\n"
    assert typed('"""one', interrupted, "/undo") == ""
    assert typed("//home", "/undo") == "/home"


def test_the_editor_changes_the_text(
    typed: Typed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An editor ends a file with a line end, which is no part of the text unless it was there before."""
    monkeypatch.delenv("VISUAL", raising=False)
    script = tmp_path / "an editor.py"
    script.write_text(
        "import pathlib, sys\n"
        "file = pathlib.Path(sys.argv[1])\n"
        "file.write_text(file.read_text().rstrip('\\n').replace('moon', 'sun') + '\\n')\n"
    )
    monkeypatch.setenv("EDITOR", shlex.join([sys.executable, str(script)]))
    assert typed("the moon", "/undo", "/edit") == "the sun"
    assert typed("the moon", "/undo", "/edit", "/undo") == "the moon"
    assert edited(os.environ["EDITOR"], "the moon\n") == "the sun\n"
    monkeypatch.setenv("EDITOR", "false")
    assert typed("the moon", "/undo", "/edit") == "the moon"
    assert "the text is as before" in capsys.readouterr().err.replace("\n", " ")


def test_a_text_is_saved_in_a_new_file_only(typed: Typed, tmp_path: Path) -> None:
    path = tmp_path / "my story.txt"
    text = typed("moon", f"/save {path}", "/set seed 8", "", f"/save {path}")
    assert text.startswith(path.read_text("utf-8"))
    assert path.read_text("utf-8") == typed("moon")


@pytest.mark.parametrize("more", [[], ["--json"], ["one", "two"]])
def test_without_a_terminal_it_is_refused(more: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", "--interactive", *more]) == 2
    assert "echo 'Once upon a time' | nanothink generate" in capsys.readouterr().err


def test_tab_completes_the_commands_of_this_session_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with line_editing(["system", "save"]):
        complete = readline.get_completer()
        assert complete is not None
        assert [complete("/s", number) for number in range(3)] == ["/system ", "/save ", None]
        assert complete("/continue", 0) is None
    with line_editing(["again"]):
        found = readline.get_completer()
        assert found is not None
        assert found("/s", 0) is None


BY_LIBEDIT = "libedit" in (readline.__doc__ or "")
PROMPT = "\n> " if BY_LIBEDIT else "2004h> "  # behind the escape that asks for pasted lines in brackets


class Terminal:
    """A session of the real command in a pseudo-terminal."""

    def __init__(self, *command: str, cache: Path) -> None:
        self.seen = b""
        self._ours, theirs = pty.openpty()
        environment = {**os.environ, "TERM": "dumb", "XDG_CACHE_HOME": str(cache), "INPUTRC": os.devnull}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "nanothink", *command],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=environment,
            start_new_session=True,
        )
        os.close(theirs)

    def until(self, wanted: str) -> None:
        """Read until ``wanted`` is written."""
        seen = b""
        while wanted.encode() not in seen:
            seen += self.read(1)

    def read(self, n_bytes: int) -> bytes:
        """Read so many bytes, for which a minute is time enough."""
        seen, end = b"", time.monotonic() + 60
        while len(seen) < n_bytes:
            assert select.select([self._ours], [], [], max(0, end - time.monotonic()))[0], self.seen
            seen += os.read(self._ours, n_bytes - len(seen))
        self.seen += seen
        return seen

    def type(self, keys: str) -> None:
        os.write(self._ours, keys.encode())

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)


def test_control_c_keeps_what_is_written_and_control_d_leaves(checkpoint: Path, tmp_path: Path) -> None:
    """The second Ctrl-C would end any other command at once. The next session remembers the lines,
    takes pasted ones for one, and does not remember the text that was edited."""
    plain = ("--ignore-eos", "--temperature", "0")
    command = ("generate", "--interactive", *plain, "--checkpoint", str(checkpoint))
    saved = tmp_path / "text"
    with Terminal(*command, cache=tmp_path) as terminal:
        terminal.until(PROMPT)
        terminal.type("/set max_new_tokens 1000000\n")
        terminal.until(PROMPT)
        for _ in range(3):
            terminal.type("stone\n")
            terminal.until("stone\r\n")
            terminal.read(200)  # more than the end of the text, which is shown before its continuation
            terminal.process.send_signal(signal.SIGINT)
            terminal.until(PROMPT)
        terminal.type(f"/save {saved}\n")
        terminal.until("Saved")
        terminal.until(PROMPT)
        terminal.type("\x04")
        assert terminal.process.wait(60) == 0
    text = saved.read_text("utf-8")
    assert text.startswith("stone")
    assert text.count("stone") >= 3
    assert len(text) > 3 * 100

    (history,) = (tmp_path / "nanothink" / "history").iterdir()
    assert history.parent.stat().st_mode & 0o077 == 0
    with Terminal(*command, "-n", "3", cache=tmp_path) as again:
        again.until(PROMPT)
        again.type("\x10")  # Ctrl-P: the line before
        again.until(f"/save {saved}"[:40])
        again.type("\x15")
        again.type('"""one\n\ntwo"""\n' if BY_LIBEDIT else "\x1b[200~one\n\ntwo\x1b[201~\n")
        for keys, then in (
            ("", PROMPT),
            ("/undo\n", PROMPT),
            ("/edit\n", "two"),  # the end of the text in the line
            (" three\n", PROMPT),
            (f"/save {saved}.2\n", "Saved"),
            ("", PROMPT),
            ("/quit\n", ""),
        ):
            again.type(keys)
            again.until(then)
        assert again.process.wait(60) == 0
    assert Path(f"{saved}.2").read_text("utf-8") == "one\n\ntwo three"
    lines = [json.loads(line) for line in history.read_text("utf-8").splitlines()]
    assert "/edit" in lines
    assert "one\n\ntwo three" not in lines
