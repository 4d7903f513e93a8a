"""How routing looks: colours on a terminal, plain lines in a pipe."""

from __future__ import annotations

import io
import sys

import pytest
from rich.console import Console

from nanothink.cli.render import results
from nanothink.inference.routed import RoutedPiece

PIECES = [
    RoutedPiece("The", 5, {"code": 0.7, "tales": 0.3}),
    RoutedPiece("", 6, {"code": 0.6, "tales": 0.4}),
    RoutedPiece(" [b]\n\x1b", 7, {"code": 0.25, "tales": 0.75}),
]


def shown(monkeypatch: pytest.MonkeyPatch, *, terminal: bool) -> str:
    file = io.StringIO()
    console = Console(
        file=file, force_terminal=terminal, color_system="standard" if terminal else None, width=40
    )
    monkeypatch.setattr(results, "out", console)
    monkeypatch.setattr(sys, "stdout", file)
    with results.routing("Once [i]") as show:
        for piece in PIECES:
            show(piece)
    return file.getvalue()


def test_on_a_terminal_each_token_has_its_experts_colour_and_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(monkeypatch, terminal=True)
    first, second = "\x1b[36m", "\x1b[35m"  # cyan and magenta
    assert text.index("Once [i]") < text.index(f"{first}The")
    assert f"{first}The\x1b[0m\x1b[2m⁷⁰\x1b[0m" in text
    assert f"{second} [b]" in text
    assert "⁷⁵" in text
    assert "⁷⁰: with 70 % of the weight" in " ".join(text.split())
    assert f"{first}code 52 %" in text
    assert f"{second}tales 48 %" in text
    assert "\x1b\x1b" not in text  # what a model writes does not drive the terminal
    assert "�" in text


def test_in_a_pipe_it_is_a_plain_line_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(monkeypatch, terminal=False).splitlines() == [
        "token\texpert\tcode\ttales",
        '"The"\tcode\t0.700\t0.300',
        '""\tcode\t0.600\t0.400',
        '" [b]\\n\\u001b"\ttales\t0.250\t0.750',
    ]


def test_a_text_that_ends_at_once_leaves_the_prompt_on_a_line_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, color_system="standard", width=40)
    monkeypatch.setattr(results, "out", console)
    with results.routing("Once"):
        pass
    assert file.getvalue().endswith("Once\x1b[0m\n")
