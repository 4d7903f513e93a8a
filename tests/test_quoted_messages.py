"""Messages that the documentation quotes are the program's own, so that looking for one finds it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("docs/models/*.md")])

Message = tuple[str | None, ...]
"""A message in the code: its words, and None wherever something is filled in."""


def in_one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text)


def message(node: ast.expr) -> Message | None:
    """What a string, an f-string or a sum of them says; None for any other expression."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return (in_one_line(node.value),)
    if isinstance(node, ast.JoinedStr):
        return tuple(in_one_line(str(v.value)) if isinstance(v, ast.Constant) else None for v in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = message(node.left), message(node.right)
        return None if left is None and right is None else (*(left or (None,)), *(right or (None,)))
    return None


@cache
def messages_of_the_program() -> list[tuple[Message, set[str]]]:
    """Each with the words in it."""
    trees = [ast.parse(path.read_text("utf-8")) for path in sorted((ROOT / "nanothink").rglob("*.py"))]
    nodes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.expr)]
    found = {told for node in nodes if (told := message(node)) is not None}
    return [(told, set(re.findall(r"\w+", " ".join(filter(None, told))))) for told in found]


LONGEST_FILLING = 60


def own_words(quote: str, told: Message) -> int:
    """Most characters of ``quote`` that are the message's own; below 0 if it is no piece of what is said."""

    @cache
    def onwards(start: int, part: int) -> int:
        if start == len(quote):
            return 0
        if part == len(told):
            return -len(quote) - 1
        words = told[part]
        if words is None:
            ends = range(start, min(len(quote), start + LONGEST_FILLING) + 1)
            return max(onwards(end, part + 1) for end in ends)
        if quote.startswith(words, start):
            return len(words) + onwards(start + len(words), part + 1)
        return len(quote) - start if words.startswith(quote[start:]) else -len(quote) - 1

    best = -1
    for part, words in enumerate(told):
        if words is None:
            best = max(best, onwards(0, part))
            continue
        for offset in (i for i, letter in enumerate(words) if letter == quote[0]):
            rest = words[offset:]
            if rest.startswith(quote):
                return len(quote)
            if quote.startswith(rest):
                best = max(best, len(rest) + onwards(len(rest), part + 1))
    return best


def is_said(quote: str) -> bool:
    """Whether it is a piece of one message: enough of it its own words, the rest filled in."""
    words = set(re.findall(r"\w+", quote))
    return any(
        sum(map(len, words & known)) > 0.2 * len(quote) and own_words(quote, told) > 0.35 * len(quote)
        for told, known in messages_of_the_program()
    )


def quotes(page: Path) -> Iterator[str]:
    """Sentences of messages: in bold code at the head of a paragraph, or indented by four."""
    text = page.read_text("utf-8")
    heads = re.findall(r"^\*\*(`.+?)\*\*", text, re.M | re.S)
    whole = [code for head in heads for code in re.findall(r"`((?:[^`]|`\w+`)+)`", head)]
    apart = re.findall(r"(?<=\n\n)((?: {4}(?! ).+\n)+)(?=\n)", text)
    whole += [block for block in apart if re.match(r" +(?:error: \w|[A-Z])[a-z]+ [a-z]", block)]
    for told in whole:
        for piece in re.split(r"\.\.\.|(?<=[.:?]) (?=[A-Z\d])| (?=\()", in_one_line(told).strip()):
            piece = piece.strip(" ,().:;").removeprefix("error: ")
            if len(piece.split()) > 2:
                yield piece


QUOTES = [(page, quote) for page in PAGES for quote in quotes(page)]


def test_there_are_quotes_to_check() -> None:
    assert len(QUOTES) > 60
    assert is_said("There is no data folder data.")
    assert not is_said("There is no folder of this sort anywhere.")
    assert not is_said("Warming up over 3 steps, a tenth of this run, instead of 50.")


def test_quoted_messages_are_those_of_the_program() -> None:
    assert [f"{page.relative_to(ROOT)}: {quote}" for page, quote in QUOTES if not is_said(quote)] == []
