"""``nanothink generate --interactive``: a person and a model write one text in turns, in the terminal."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanothink import disk
from nanothink.cli import render
from nanothink.cli.line_editor import changed, line_editing
from nanothink.errors import NanoThinkError, OutputError, UsageError
from nanothink.inference.sampling import SamplingConfig, sampling_config
from nanothink.models import COMBINED
from nanothink.suggestions import command, did_you_mean

if TYPE_CHECKING:
    from nanothink.inference.routed import RoutedPiece
    from nanothink.runs.trained_model import TrainedModel

COMMANDS = {
    "continue": "let the model continue the text, as an empty line does",
    "again": "replace the last continuation by another one",
    "undo": "undo the last change: a continuation, a line of yours, an edit",
    "edit": "edit the text in $VISUAL or $EDITOR; without either, in the line",
    "show": "show the whole text",
    "set": "show the settings; /set NAME VALUE changes one, 'none' is its default",
    "save": "/save FILE writes the text to a new file",
    "help": "show this",
    "quit": "leave, as Ctrl-D does",
}
"""Commands by name. They are typed after a slash, and may be shortened."""

HELP = (
    "What you type is appended to the text as it stands, and the model continues it. Begin it with a space "
    'for a new word, with // for a slash. Lines between """ and """ are one text. Ctrl-C stops the model and '
    "keeps what it wrote."
)

_TAIL_CHARACTERS = 60


def write_in_turns(
    loaded: TrainedModel,
    text: str,
    sampling: dict[str, Any],
    *,
    stop: Sequence[str] = (),
    show_routing: bool = False,
) -> None:
    """Let the person at the terminal and a model write a text in turns; arguments as of ``Session``.

    Raises:
        UsageError: ``show_routing`` with a model that combines no experts.
    """
    if show_routing and loaded.kind != COMBINED:
        raise UsageError(f"{loaded.path} holds a {loaded.kind}: leave out --show-routing, it has no experts.")
    render.note(
        f"{loaded.path} ({loaded.kind}) continues what you write. /help lists commands, Ctrl-D leaves."
    )
    with line_editing(COMMANDS), interrupts():
        Session(loaded, sampling, stop=stop, show_routing=show_routing, text=text).run()
    render.say()


class Session:
    """A text that a person and a model write in turns, and the settings of the model's part.

    Args:
        sampling: fields of ``SamplingConfig`` that differ from their defaults, and ``ddim_steps``, as of
            ``TrainedModel.generate``.
        stop: a continuation ends where the first of them begins.
        show_routing: show the component with the most weight at each token.
        read: reads a line after a prompt, as ``input`` does. EOFError ends the session; KeyboardInterrupt
            drops the line.
        text: the beginning, which is continued at once unless it is empty.
    """

    commands, help = COMMANDS, HELP

    def __init__(
        self,
        loaded: TrainedModel,
        sampling: dict[str, Any],
        *,
        stop: Sequence[str] = (),
        show_routing: bool = False,
        read: Callable[[str], str] = input,
        text: str = "",
    ) -> None:
        self.text = text
        self._loaded, self._stop, self._show_routing, self._read = loaded, tuple(stop), show_routing, read
        self._sampling = {name: value for name, value in sampling.items() if name != "ddim_steps"}
        self._ddim_steps: int | None = sampling.get("ddim_steps")
        self._earlier: list[tuple[str, bool]] = []  # the text before each change; True: of the model
        self._opening: Callable[[], None] | None = self._continue if text else None

    def run(self) -> None:
        """Read and obey until the end of input or ``/quit``. An error is shown, and the session goes on."""
        turn = self._opening or self._turn
        while True:
            try:
                turn()
            except EOFError:
                return
            except KeyboardInterrupt:
                render.say()
            except OutputError:
                raise
            except UnicodeError:
                render.error("That is not UTF-8. Set the terminal to UTF-8 and type it again.")
            except NanoThinkError as error:
                render.error(str(error))
            turn = self._turn

    def _turn(self) -> None:
        line = self._read("> ")
        if line.startswith("/") and not line.startswith("//"):
            name, _, rest = line[1:].partition(" ")
            found = _matching(name, self.commands, "command", "Text begins with //.")
            getattr(self, f"_{found}")(rest.strip())
            return
        if line.startswith('"""'):
            line = self._block(line[3:])
        self._take(line.removeprefix("/"))

    def _take(self, typed: str) -> None:
        """Let the model go on after what a person has typed."""
        self._change(self.text + typed)
        self._continue()

    def _block(self, first: str) -> str:
        lines = [first] if first else []
        while not (lines and lines[-1].endswith('"""')):
            lines.append(self._read(". "))
        return "\n".join(lines)[:-3]

    def _change(self, text: str, *, by_model: bool = False) -> None:
        if text != self.text:
            self._earlier.append((self.text, by_model))
            self.text = text

    def _continue(self, _: str = "") -> None:
        if loss := self._loaded.tokenizer.loss(self.text):
            render.warning(f"The tokenizer loses a part of the text: {loss}.")
        written: list[str] = []
        stopped = False
        shown = render.routing if self._show_routing else render.streaming
        with shown(self._tail()) as show:
            try:
                self._generate(written, show)
            except KeyboardInterrupt:
                stopped = True
            finally:  # an error too keeps what was written before it
                self._change(self.text + "".join(written), by_model=True)
        if not written and not stopped:
            render.note("The model ends the text here; '/set stop_at_eos false' continues past that.")

    def _generate(self, written: list[str], show: Callable[[Any], None]) -> None:
        """Continue the text: each piece goes into ``written`` before it is shown."""

        def on_text(_: int, piece: str) -> None:
            written.append(piece)
            show(piece)

        def on_piece(piece: RoutedPiece) -> None:
            written.append(piece.text)
            show(piece)

        if self._show_routing:
            self._loaded.generate_routed(self.text, on_piece=on_piece, **self._sampling)
        else:
            self._loaded.generate(
                self.text, on_text=on_text, stop=self._stop, ddim_steps=self._ddim_steps, **self._sampling
            )

    def _again(self, _: str) -> None:
        if not self._earlier or not self._earlier[-1][1]:
            raise UsageError("The last change was not a continuation. An empty line continues the text.")
        if "seed" in self._sampling:
            render.note("The seed is set, so this is the same text: '/set seed none' lets chance decide.")
        self.text, _by_model = self._earlier.pop()
        self._continue()

    def _undo(self, _: str) -> None:
        if not self._earlier:
            raise UsageError("There is nothing to undo.")
        self.text, _by_model = self._earlier.pop()
        self._show_end()

    def _edit(self, _: str) -> None:
        self._change(changed(self.text, self._read))
        self._show_end()

    def _show(self, _: str) -> None:
        with render.streaming("") as write:
            write(self.text)

    def _set(self, rest: str) -> None:
        values = self._settings()
        if not rest:
            render.facts([(name, _as_typed(value)) for name, value in values.items()])
            return
        name, _, value = rest.replace("=", " ", 1).partition(" ")
        name = _matching(name.replace("-", "_"), values, "setting")
        if not value.strip():
            raise UsageError(f"{name} is {_as_typed(values[name])}. Give a value: /set {name} VALUE")
        if name == "stop":
            if self._show_routing:
                raise UsageError("stop is for text that is written plainly, without --show-routing.")
            self._stop = _words(value)
        else:
            changed = {**self._sampling, name: value.strip()}
            if value.strip() == "none":
                del changed[name]
            # Checked together, and kept as the type of the setting.
            config = sampling_config(**changed)
            self._sampling = {key: getattr(config, key) for key in changed}
        render.note(f"{name} {_as_typed(self._settings()[name])}")

    def _settings(self) -> dict[str, Any]:
        default = {} if self._ddim_steps is None else {"temperature": 0.0}
        config = sampling_config(**{**default, **self._sampling})
        values = {name: getattr(config, name) for name in SamplingConfig.model_fields}
        return {**values, "stop": self._stop}

    def _save(self, rest: str) -> None:
        if not rest:
            raise UsageError("Give a file: /save story.txt")
        path = Path(rest).expanduser()
        if os.path.lexists(path):
            raise UsageError(f"{path} exists already. Choose another name.")
        disk.write_whole(path, self._saved().encode())
        render.note(f"Saved in {path}.")

    def _saved(self) -> str:
        return self.text

    def _help(self, _: str) -> None:
        render.facts((f"/{name}", meaning) for name, meaning in self.commands.items())
        render.say(self.help)

    def _quit(self, _: str) -> None:
        raise EOFError

    def _show_end(self) -> None:
        with render.streaming(self._tail()):
            pass

    def _tail(self) -> str:
        """The end of the text's last line."""
        line = self.text.rpartition("\n")[2]
        return line if len(line) <= _TAIL_CHARACTERS else "…" + line[-_TAIL_CHARACTERS:]


def require_terminal() -> None:
    """Raise UsageError unless standard input and output are a terminal."""
    if not (sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()):
        raise UsageError(
            "--interactive needs a terminal for input and output. Without one, leave it out: "
            f"echo 'Once upon a time' | {command('generate')}"
        )


@contextmanager
def interrupts() -> Iterator[None]:
    """Context in which Ctrl-C raises KeyboardInterrupt however often; a command ends at the second one."""
    listener = signal.set_wakeup_fd(-1)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        signal.set_wakeup_fd(listener, warn_on_full_buffer=False)


def _matching(name: str, known: Iterable[str], noun: str, otherwise: str = "") -> str:
    """The name among ``known`` that equals ``name``, or is the only one to begin with it."""
    known = list(known)
    found = [name] if name in known else [one for one in known if name and one.startswith(name)]
    if len(found) == 1:
        return found[0]
    if found:
        raise UsageError(f"'{name}' may be {' or '.join(found)}.")
    hint = did_you_mean(name, known) or f" There are: {', '.join(known)}."
    raise UsageError(f"No {noun} '{name}'.{hint} {otherwise}".rstrip())


def _words(value: str) -> tuple[str, ...]:
    r"""Stop strings as they are typed: ``. "The end" \n``; ``none`` for none."""
    lexer = shlex.shlex(value, posix=True)
    lexer.whitespace_split, lexer.escape, lexer.commenters = True, "", ""
    try:
        words = [word.replace(r"\n", "\n").replace(r"\t", "\t") for word in lexer]
    except ValueError:
        raise UsageError('A quotation mark is missing: /set stop "The end"') from None
    return () if words == ["none"] else tuple(word for word in words if word)


def _as_typed(value: object) -> str:
    if isinstance(value, tuple):
        return " ".join(json.dumps(word, ensure_ascii=False) for word in value) or "none"
    return "none" if value is None else render.setting(value)
