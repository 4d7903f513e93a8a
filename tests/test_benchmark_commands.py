"""Every benchmark that the documentation or the Makefile runs takes the options that stand there.

Running them takes hours; here each reads its command line and goes no further.
"""

from __future__ import annotations

import argparse
import re
import runpy
import shlex
import sys
from collections.abc import Iterator

import pytest
from documentation import PAGES, ROOT

BENCHMARKS = ROOT / "benchmarks"
LIST = BENCHMARKS / "README.md"  # of names


def documented() -> Iterator[str]:
    for page in PAGES:
        if page != LIST:
            text = page.read_text("utf-8")
            yield from re.findall(r"`python (benchmarks/[^`]+)`", text)
            yield from re.findall(r"^(?: {4})?python (benchmarks/.+)$", text, flags=re.M)
    for command in re.findall(r"\$\(BIN\)/python (benchmarks/.+)", (ROOT / "Makefile").read_text()):
        yield re.sub(r"\$\((\w+)\)", r"\1", command)


COMMANDS = sorted({" ".join(command.split()) for command in documented()})


@pytest.mark.parametrize("command", COMMANDS)
def test_a_benchmark_takes_its_command_line(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Parsed(Exception):
        pass

    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser: argparse.ArgumentParser) -> None:
        parse(parser)
        raise Parsed

    script, *words = shlex.split(command)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    monkeypatch.setattr(sys, "argv", [script, *words])
    monkeypatch.syspath_prepend((ROOT / script).parent)
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    except Parsed:
        return
    except SystemExit:
        pytest.fail(capsys.readouterr().err)
    pytest.fail(f"{script} reads no command line")


def test_every_benchmark_is_listed_and_documented() -> None:
    scripts = {
        str(path.relative_to(ROOT)) for path in BENCHMARKS.rglob("*.py") if "\ndef main(" in path.read_text()
    }
    listed = re.findall(r"^ {4}python (\S+)", LIST.read_text("utf-8"), flags=re.M)
    assert scripts - set(listed) == {"benchmarks/selective_scan_gpu.py"}
    assert {command.split()[0] for command in COMMANDS} == scripts
