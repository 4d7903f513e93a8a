"""Editing at a terminal: a text in an editor or in the line, and lines with a history."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from nanothink import disk
from nanothink.errors import NanoThinkError, UsageError

_HISTORY_LINES = 1000


def changed(text: str, read: Callable[[str], str]) -> str:
    """Let a person change a text, in the editor of their choice, or else in the line."""
    editor = os.environ.get("VISUAL") or os.environ.get("EDITOR")
    return edited(editor, text) if editor else retyped(text, read)


def edited(editor: str, text: str) -> str:
    """Let a person change a text in an editor, a command line such as ``vim`` or ``code --wait``.

    Raises UsageError if the editor fails.
    """
    with tempfile.TemporaryDirectory(prefix="nanothink-") as folder:
        path = Path(folder) / "text.txt"
        path.write_bytes(text.encode())
        # Ctrl-C is the editor's. A handler, unlike SIG_IGN, is not inherited by it.
        before = signal.signal(signal.SIGINT, lambda *_: None)
        try:
            subprocess.run([*shlex.split(editor), str(path)], check=True)
            new = path.read_bytes().decode()
        except (OSError, ValueError, subprocess.CalledProcessError) as error:
            raise UsageError(
                f"The editor failed, and the text is as before: {error}. Set EDITOR to another one."
            ) from None
        finally:
            signal.signal(signal.SIGINT, before)
    return new if text.endswith("\n") else new.removesuffix("\n")  # which editors add


def retyped(text: str, read: Callable[[str], str]) -> str:
    """Let a person change a text in the line; what they do not touch stays."""
    with suppress(ImportError):
        import readline

        n_lines = readline.get_current_history_length()
        readline.set_startup_hook(lambda: readline.insert_text(text))
        try:
            return read("edit> ")
        finally:
            readline.set_startup_hook(None)
            if readline.get_current_history_length() > n_lines:  # the history is of lines, not of whole texts
                readline.remove_history_item(n_lines)
    raise UsageError("This Python has no readline. Set EDITOR to an editor, such as: export EDITOR=nano")


@contextmanager
def line_editing(commands: Iterable[str]) -> Iterator[None]:
    """Context with history across sessions, and these commands completed at Tab, for ``input``."""
    try:
        import readline
    except ImportError:
        yield
        return
    for line in (earlier := _earlier_lines()):
        readline.add_history(line)
    n_before = readline.get_current_history_length()
    readline.set_completer_delims(" ")
    readline.set_completer(_completer([f"/{name} " for name in commands]))
    if "libedit" in (readline.__doc__ or ""):  # on macOS for example; it has a language of its own
        readline.parse_and_bind("bind ^I rl_complete")
    else:
        readline.parse_and_bind("tab: complete")
        readline.parse_and_bind("set enable-bracketed-paste on")  # pasted lines are one; Python disables it
    try:
        yield
    finally:
        places = range(n_before + 1, readline.get_current_history_length() + 1)
        new = [readline.get_history_item(place) for place in places]
        if new:
            _keep_lines([*(_earlier_lines() or earlier), *new])


def _completer(words: Sequence[str]) -> Callable[[str, int], str | None]:
    def complete(beginning: str, number: int) -> str | None:
        found = [word for word in words if word.startswith(beginning)]
        return found[number] if beginning and number < len(found) else None

    return complete


def _history_file() -> Path | None:
    folder = disk.private_folder("nanothink", "history")
    return None if folder is None else folder / "generate.jsonl"


def _earlier_lines() -> list[str]:
    """Lines of earlier sessions; none where they cannot be read."""
    path = _history_file()
    with suppress(OSError, ValueError):
        if path is not None:
            with os.fdopen(disk.open_private(path), "rb") as file:
                return [str(json.loads(line)) for line in file]
    return []


def _keep_lines(lines: Sequence[str]) -> None:
    path = _history_file()
    if path is not None:
        content = "".join(json.dumps(line) + "\n" for line in lines[-_HISTORY_LINES:])
        with suppress(NanoThinkError):  # a full disk is no reason to end with an error
            disk.write_whole(path, content.encode())
