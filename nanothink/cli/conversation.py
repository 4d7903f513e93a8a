"""``nanothink generate --chat --interactive``: a person and a model talk, in the terminal."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from nanothink.cli import render
from nanothink.cli.interactive import COMMANDS, Session, interrupts
from nanothink.cli.line_editor import changed, line_editing
from nanothink.errors import UsageError

if TYPE_CHECKING:
    from nanothink.runs.trained_model import TrainedModel

Messages = list[dict[str, str]]

_COMMANDS = {
    "again": "replace the last answer by another one",
    "undo": "undo the last change: a message of yours with its answer, an edit",
    "edit": "edit your last message, which is then answered anew",
    "system": "/system TEXT tells the model what comes first; 'none' takes it back",
    "show": "show the whole conversation",
    "save": "/save FILE writes the conversation to a new file, as a record that can be trained on",
    "set": COMMANDS["set"],
    "help": COMMANDS["help"],
    "quit": COMMANDS["quit"],
}

_HELP = (
    "What you type is your message, and the model answers it. Begin it with // for a slash. Lines between "
    '""" and """ are one message. Ctrl-C stops the model and keeps what it wrote.'
)


def talk(
    loaded: TrainedModel, text: str, sampling: dict[str, Any], *, stop: Sequence[str], system: str | None
) -> None:
    """Let the person at the terminal and a model talk; arguments as of ``Conversation``.

    Raises:
        UsageError: the model has no chat template.
    """
    _ = loaded.chat  # raises before anything is shown
    render.note(f"{loaded.path} ({loaded.kind}) answers. /help lists commands, Ctrl-D leaves.")
    with line_editing(_COMMANDS), interrupts():
        Conversation(loaded, sampling, stop=stop, system=system, text=text).run()
    render.say()


class Conversation(Session):
    """Messages of a person and answers of a model, in turns; the settings are those of ``Session``.

    Args:
        system: what the model is told first.
        text: the first message, which is answered at once unless it is empty.
        loaded, sampling, stop, read: as of ``Session``.
    """

    commands, help = _COMMANDS, _HELP

    def __init__(
        self,
        loaded: TrainedModel,
        sampling: dict[str, Any],
        *,
        stop: Sequence[str] = (),
        system: str | None = None,
        read: Callable[[str], str] = input,
        text: str = "",
    ) -> None:
        super().__init__(loaded, sampling, stop=stop, read=read)
        self.messages: Messages = []
        self._before: list[Messages] = []
        if system is not None:
            self.messages.append({"role": "system", "content": system})
        self._opening = (lambda: self._take(text)) if text else None

    def _take(self, typed: str) -> None:
        if not typed.strip():
            raise UsageError("There is nothing to answer: type a message. /help lists commands.")
        self._answered([*self.messages, {"role": "user", "content": typed}])

    def _answered(self, messages: Messages) -> None:
        """Let the model answer the messages, which are then the conversation."""
        context, written = self._loaded.model.context_length, []
        if context is not None and len(self._loaded.chat.prompt(messages)) > context:
            render.note(f"The model sees the last {context} tokens of this conversation at most.")
        ended = "Nothing was written"
        try:
            with render.streaming("") as show:

                def on_text(_: int, piece: str) -> None:
                    written.append(piece)
                    show(piece)

                self._loaded.answer([messages], on_text=on_text, stop=self._stop, **self._sampling)
                ended = "The model ends its answer at once"
        except KeyboardInterrupt:
            pass
        finally:  # an error too keeps what was written before it
            if written:
                self._become([*messages, {"role": "assistant", "content": "".join(written)}])
        if not written:
            render.note(f"{ended}; the conversation is as before.")

    def _become(self, messages: Messages) -> None:
        self._before.append(self.messages)
        self.messages = messages

    def _again(self, _: str) -> None:
        if not self.messages or self.messages[-1]["role"] != "assistant":
            raise UsageError("There is no answer yet.")
        if "seed" in self._sampling:
            render.note("The seed is set, so this is the same answer: '/set seed none' lets chance decide.")
        self._answered(self.messages[:-1])

    def _undo(self, _: str) -> None:
        if not self._before:
            raise UsageError("There is nothing to undo.")
        self.messages = self._before.pop()
        self._show("")

    def _edit(self, _: str) -> None:
        own = [number for number, message in enumerate(self.messages) if message["role"] == "user"]
        if not own:
            raise UsageError("There is no message of yours yet.")
        new = changed(self.messages[own[-1]]["content"], self._read)
        self._answered([*self.messages[: own[-1]], {"role": "user", "content": new}])

    def _system(self, rest: str) -> None:
        if not rest:
            told = [message["content"] for message in self.messages if message["role"] == "system"]
            render.say(told[0] if told else "The model is told nothing first. /system TEXT changes that.")
            return
        others = [message for message in self.messages if message["role"] != "system"]
        first = [] if rest == "none" else [{"role": "system", "content": rest}]
        self._become([*first, *others])

    def _show(self, _: str) -> None:
        for message in self.messages:
            with render.streaming(f"{message['role']}: ") as write:
                write(message["content"])

    def _saved(self) -> str:
        return json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n"
