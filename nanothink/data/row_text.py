r"""The text of a row: one field, a template of several, or the turns of a conversation.

text_field   a string; a list of strings, one paragraph each; or a list of turns. ``meta.title`` is a field
of a field
template     ``"{subject}\n\n{body}"``; a line whose fields are all empty is left out
neither      ``text``, or the first shape below that the row has

messages, conversations    turns with role and content, as OpenAI has them, or from and value, as ShareGPT
instruction, input, output Alpaca's; input may be missing or empty
prompt, completion         strings, or lists of turns
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache

from nanothink.data.messages import conversation_fields
from nanothink.data.text_files import no_such_field
from nanothink.errors import DataError, UsageError
from nanothink.suggestions import did_you_mean

Fields = Mapping[str, object]

_ESCAPES = {"n": "\n", "t": "\t", "\\": "\\"}
_FIELD = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")

_ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot"), "assistant"),
}

_MISSING = object()


class Turns(list[dict[str, object]]):
    """A conversation as messages with ``role`` and ``content``, not yet checked."""


class RowFault(Exception):
    """A row without usable text; the message says why."""


class RowText:
    r"""Makes the text of a row from its fields.

    Args:
        text_field: name of the field that is the text.
        template: text with names of fields in braces. ``\n``, ``\t``, ``\\`` are escapes, ``{{`` is a brace.

    Raises:
        UsageError: both are given, or the template is none.
    """

    def __init__(self, text_field: str | None = None, template: str | None = None) -> None:
        if text_field is not None and template is not None:
            raise UsageError("--text-field and --template both say what the text is. Leave one out.")
        self.text_field = text_field
        self._lines = None if template is None else _parse(template)
        self.names: tuple[str, ...] = ()
        """Fields named by the person."""
        if self._lines is not None:
            self.names = tuple(dict.fromkeys(part for line in self._lines for part in line[1::2]))
        elif text_field is not None:
            self.names = (text_field,)

    def columns(
        self, where: str, header: Iterable[object], first_row: Callable[[], Fields] | None = None
    ) -> list[str]:
        """Return the columns that the text is made of.

        Raises DataError if one is missing, and suggests those that have text in ``first_row()``.
        """
        known = [str(name) for name in header]
        if not self.names:
            needed = ["text"] if "text" in known else conversation_fields(known)
            if not needed:
                texts = None if first_row is None else tuple(_with_text(first_row()))
                raise no_such_field(where, "text", known, texts=texts)
            return needed
        for name in self.names:
            if _column(name, known) is None:
                raise no_such_field(where, name, known, in_template=self._lines is not None)
        return list(dict.fromkeys(column for name in self.names if (column := _column(name, known))))

    def has_columns(self, header: Iterable[object]) -> bool:
        try:
            self.columns("", header)
        except DataError:
            return False
        return True

    def of(self, fields: Fields) -> object:
        """Return the text, or whatever the text field holds instead. Raises RowFault."""
        if self._lines is not None:
            return _filled(self._lines, fields)
        if self.text_field is None and "text" not in fields:
            return _conversation(fields)
        value = _look_up(fields, self.text_field or "text")
        if value is _MISSING:
            raise RowFault(_missing(self.text_field or "text", fields))
        if isinstance(value, list):
            if all(item is None or isinstance(item, str) for item in value):
                return "\n\n".join(item for item in value if item and not item.isspace())
            if all(isinstance(item, Mapping) for item in value):
                return _turns(value)
        return value


def _with_text(fields: Fields) -> Iterator[str]:
    """Names of the fields, inner ones too, that are strings or lists of them."""
    for name, value in fields.items():
        if isinstance(value, Mapping):
            yield from (f"{name}.{inner}" for inner in _with_text(value))
        elif isinstance(value, str) or (isinstance(value, list) and all(isinstance(v, str) for v in value)):
            yield str(name)


def _column(name: str, header: list[str]) -> str | None:
    """The column that holds a field, which may be one of its inner fields."""
    if name in header:
        return name
    parts = name.split(".")
    return next((head for n in range(len(parts) - 1, 0, -1) if (head := ".".join(parts[:n])) in header), None)


def _look_up(fields: Fields, name: str) -> object:
    if name in fields:
        return fields[name]
    parts = name.split(".")
    for n in range(len(parts) - 1, 0, -1):
        inner = fields.get(".".join(parts[:n]), _MISSING)
        if isinstance(inner, Mapping):
            return _look_up(inner, ".".join(parts[n:]))
        if inner is None:
            return None
    return _MISSING


def _missing(name: str, fields: Fields) -> str:
    """Reason of a missing field, with those that are there: of its outer field, if there is one."""
    head, _, _ = name.rpartition(".")
    outer = _look_up(fields, head) if head else None
    if isinstance(outer, Mapping):
        return _no_field(name, tuple(f"{head}.{key}" for key in outer))
    return _no_field(name, tuple(map(str, fields)))


@lru_cache(maxsize=64)  # the rows of a file have the same keys, and the search for a likeness is slow
def _no_field(name: str, keys: tuple[str, ...]) -> str:
    there_is = ", ".join(f"{key:.60}" for key in keys[:20])
    return f"there is no '{name}'.{did_you_mean(name, keys[:20])} There is: {there_is}"


# ---------------------------------------------------------------------------------------------------
# Templates


def _parse(template: str) -> list[list[str]]:
    """Split a template into lines, each of which is literal text and names of fields in turn."""
    text = re.sub(r"\\([nt\\])", lambda found: _ESCAPES[found.group(1)], template)
    lines = []
    for line in text.split("\n"):
        parts, end = [""], 0
        for found in _FIELD.finditer(line):
            parts[-1] += line[end : found.start()]
            end = found.end()
            name = found.group(1)
            if found.group() in ("{{", "}}"):
                parts[-1] += found.group()[0]
            elif name is None or not name.strip():
                raise UsageError(
                    f"The template {template!r} has a brace that belongs to no field. Write a name "
                    "between two braces, as in '{title}', and a brace of the text twice."
                )
            else:
                parts += [name.strip(), ""]
        parts[-1] += line[end:]
        lines.append(parts)
    if not any(len(line) > 1 for line in lines):
        raise UsageError(
            f"The template {template!r} names no field. Write the name of each in braces: "
            r"--template '{subject}\n\n{body}'"
        )
    return lines


def _filled(lines: list[list[str]], fields: Fields) -> str:
    """Fill a template; empty if all its fields are.

    A line whose fields are all empty is left out with what else stands in it, and so are blank lines after.
    """
    written: list[str] = []
    is_empty, skipping = True, False
    for line in lines:
        if len(line) == 1:
            if not skipping or line[0].strip():
                written.append(line[0])
                skipping = False
            continue
        is_alone = len(line) == 3 and not line[0].strip() and not line[2].strip()
        values = [_value(fields, name, "\n\n" if is_alone else ", ") for name in line[1::2]]
        skipping = not any(values)
        if not skipping:
            is_empty = False
            written.append("".join(a + b for a, b in zip(line[::2], [*values, ""], strict=True)))
    return "" if is_empty else "\n".join(written).strip("\n")


def _value(fields: Fields, name: str, between: str) -> str:
    value = _look_up(fields, name)
    if value is _MISSING:
        raise RowFault(_missing(name, fields))
    if isinstance(value, list) and all(item is None or isinstance(item, str) for item in value):
        value = between.join(item for item in value if item and not item.isspace())
    if isinstance(value, str):
        return "" if value.isspace() else value
    if value is None or value != value:  # missing, or NaN, which tables have for it
        return ""
    if isinstance(value, (Mapping, list, bytes)):
        raise RowFault(f"'{name}' is {type(value).__name__}, which has no place in a template")
    return str(value)


# ---------------------------------------------------------------------------------------------------
# Conversations


def _conversation(fields: Fields) -> object:
    names = conversation_fields(fields)
    if not names:
        raise RowFault(_no_field("text", tuple(map(str, fields))))
    if len(names) == 1:
        turns = fields[names[0]]
        if turns is None or turns == []:
            return None
        if not isinstance(turns, list):
            raise RowFault(f"'{names[0]}' must be a list of turns, not {type(turns).__name__}")
        return _turns(turns)
    question, answer = fields[names[0]], fields[names[-1]]
    if isinstance(question, list) or isinstance(answer, list):
        sides = zip((question, answer), ("user", "assistant"), strict=True)
        turns = [
            turn
            for side, role in sides
            for turn in (side if isinstance(side, list) else [{"role": role, "content": side}])
        ]
        return _turns(turns)
    asked = [part for name in names[:-1] if (part := fields.get(name)) is not None and part != ""]
    for part in [*asked, answer]:
        if not isinstance(part, str):
            raise RowFault(f"a text must be a string, not {type(part).__name__}")
    return _turns(
        [{"role": "user", "content": "\n\n".join(map(str, asked))}, {"role": "assistant", "content": answer}]
    )


def _turns(turns: list[object]) -> Turns:
    return Turns(map(_turn, turns))


def _turn(turn: object) -> dict[str, object]:
    """Return a turn as a message, with the role by the name that records have for it."""
    if not isinstance(turn, Mapping):
        raise RowFault(f"a turn must be an object, not {type(turn).__name__}")
    role = turn.get("role", turn.get("from"))
    content = turn.get("content", turn.get("value"))
    if isinstance(content, list):  # Parquet gives every part all keys
        content = [
            {k: v for k, v in part.items() if v is not None} if isinstance(part, Mapping) else part
            for part in content
        ]
    return {"role": _ROLES.get(str(role).lower(), role), "content": content}
