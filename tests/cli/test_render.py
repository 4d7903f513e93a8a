"""Tables on a terminal and in a pipe, and progress where nothing can be redrawn."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import ProgressColumn

from nanothink.cli import render
from nanothink.cli.render import results, tables
from nanothink.cli.render.progress import BarReporter, ProgressBars, progress_columns
from nanothink.cli.render.training import TrainingView
from nanothink.inference.evaluate import Evaluation, Score
from nanothink.runs.evaluating import CheckpointEvaluation
from nanothink.training import events
from nanothink.wording import counted

Terminal = Callable[[int], io.StringIO]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Results go to a terminal of so many columns from now on."""

    def of(width: int) -> io.StringIO:
        written = io.StringIO()
        console = Console(file=written, force_terminal=True, width=width, color_system=None)
        for module in (tables, results, render.console):
            monkeypatch.setattr(module, "out", console)
        return written

    return of


def test_a_piped_table_is_a_line_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    render.table([">n", "path", ">size"], [["1", "a" * 300, "10"], ["20", "b\nc", "5"]], title="Files")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Files"
    assert [line.split() for line in lines[1:]] == [
        ["n", "path", "size"],
        ["1", "a" * 300, "10"],
        ["20", "b", "c", "5"],
    ]
    assert len({len(line) for line in lines[1:]}) == 1  # right-aligned to the end
    assert all(line == line.rstrip() for line in lines)


def test_piped_facts_are_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    render.facts([("device", "cpu"), ("disk", "x" * 300)], title="machine")
    assert capsys.readouterr().out.splitlines() == ["machine", "device  cpu", f"disk    {'x' * 300}"]


def _evaluated(n_domains: int) -> list[CheckpointEvaluation]:
    domains = {f"domain{i}": Score(1000.0 * (i + 1), 1000, 4000) for i in range(n_domains)}
    return [
        CheckpointEvaluation(Path(f"checkpoints/{kind}_expert.pt"), kind, Evaluation(domains), 0)
        for kind in ("transformer", "state_space", "diffuser")
    ]


def test_side_by_side_turns_where_a_line_a_checkpoint_has_no_room(terminal: Terminal) -> None:
    narrow = terminal(80)
    render.evaluations(_evaluated(6), "val")
    text = narrow.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    for word in ("transformer", "state_space", "diffuser", "domain5", "0.3607", "perplexity"):
        assert word in text  # whole, not folded

    wide = terminal(160)
    render.evaluations(_evaluated(6), "val")
    assert "checkpoints/state_space_expert.pt" in wide.getvalue()


def test_numbers_are_never_broken(terminal: Terminal) -> None:
    written = terminal(40)
    render.table(["file", ">parameters", ">bits per byte"], [["checkpoints/" * 5, "1,234,567", "0.8080"]])
    assert "1,234,567" in written.getvalue()
    assert "0.8080" in written.getvalue()


def test_plain_progress_says_when_it_will_be_done(capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    bars = BarReporter(clock=lambda: now)
    for done in range(11):
        now = 6.0 * done
        bars.progress("verifying", done, 10)
    assert capsys.readouterr().err.splitlines() == [
        "verifying: 20 %, ETA 48s",
        "verifying: 40 %, ETA 36s",
        "verifying: 60 %, ETA 24s",
        "verifying: 80 %, ETA 12s",
    ]


def test_a_bar_counts_down_between_reports_and_says_nothing_once_late() -> None:
    now = 0.0
    drawn = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    with ProgressBars(*progress_columns(), console=drawn, auto_refresh=False) as bars:
        reporter = BarReporter(bars, clock=lambda: now)

        def eta(at: float, done: int | None = None) -> str:
            nonlocal now
            now = at
            if done is not None:
                reporter.progress("learning lists", done, 10)
            (task,) = bars.tasks
            remaining = bars.columns[-1]
            assert isinstance(remaining, ProgressColumn)
            return str(remaining.render(task))

        assert eta(0, 0) == "-:--:--"
        assert eta(50, 1) == "0:07:30"  # reports that are further apart than Rich looks back
        assert eta(70) == "0:07:10"
        assert eta(450, 9) == "0:00:50"
        assert eta(499) == "0:00:01"
        assert eta(502) == "-:--:--"


def test_the_eta_of_a_run_counts_its_validations() -> None:
    now = 0.0
    view = TrainingView(clock=lambda: now)
    view.event(events.RunStarted("run", 0, 40, 0, 1, 400, 10))
    validated = Evaluation({"all": Score(10.0, 10, 10)})
    for step in range(1, 41):
        now += 1.0
        view.event(events.StepDone(step, 40, 0, 1.0, 0.1, 1.0, 10, 1.0, False, True))
        if step == 5:
            assert view.remaining() == 35
        if step == 15:
            assert view.remaining() == 25 + 3 * 100
        if step == 40:
            assert view.remaining() == 100  # the last one goes on after 100 %
            now += 101
            assert view.remaining() is None
            now -= 1
        if step % 10 == 0:
            now += 100.0 if step < 40 else 0.0
            view.event(events.Evaluated(step, 0, validated, False, 1))
    assert view.remaining() == 0


def test_a_bar_leaves_room_for_the_echo_of_ctrl_c() -> None:
    drawn = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    bars = ProgressBars(*progress_columns(), console=drawn)
    bars.add_task("validating", total=10, completed=3)
    with drawn.capture() as captured:
        drawn.print(bars)
    (line,) = captured.get().splitlines()
    assert len(line) == 78


def test_a_dumb_terminal_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render.console, "err", Console(force_terminal=True, _environ={"TERM": "dumb"}))
    assert not render.console.redraws()
    monkeypatch.setattr(render.console, "err", Console(force_terminal=True, _environ={"TERM": "xterm"}))
    assert render.console.redraws()


@pytest.mark.parametrize(
    ("value", "shown"),
    [(True, "true"), (None, "-"), (3e-4, "0.0003"), ([0.9, 0.95], "0.9, 0.95"), (1e6, "1e+06"), ("a", "a")],
)
def test_settings_are_shown_as_they_are_typed(value: object, shown: str) -> None:
    assert render.setting(value) == shown


def test_one_is_singular() -> None:
    assert counted(1, "record") == "1 record"
    assert counted(0, "record") == "0 records"
    assert counted(2844, "record") == "2,844 records"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\u3000日本語\u00a0« été\u202f»\ttab\n", None),  # spaces that Python counts as unprintable
        ("می\u200cخواهم क्\u200dष \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f3f4\U000e0067", None),
        ("\u0378 \U0001fae0 \ue000", None),  # unassigned, younger than some Pythons, private
        ("a\x1b[2Jb\x9b3m\x07\x7f\0", "a\ufffd[2Jb\ufffd3m\ufffd\ufffd\ufffd"),
        ("\u202egpj.exe\u2066\u2028\ud800", "\ufffdgpj.exe\ufffd\ufffd\ufffd"),
    ],
)
def test_text_of_any_script_is_shown_and_drives_no_terminal(text: str, shown: str | None) -> None:
    assert render.console.printable(text) == (text if shown is None else shown)


def test_a_prompt_on_a_terminal_is_shown_as_it_is(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = terminal(20)
    monkeypatch.setattr(sys, "stdout", written)
    prompt = "The quick brown fox jumps over the lazy dog:   "
    with results.streaming(prompt + "\x1b[31m") as write:
        write("one\r\ntwo\r")
        write("\nthree")
    assert written.getvalue() == prompt + "\ufffd[31mone\ntwo\nthree\n"


def test_no_column_is_lost_however_narrow(terminal: Terminal) -> None:
    written = terminal(40)
    columns = ["domain", *(f">expert_number_{i}" for i in range(8))]
    render.table(columns, [["a_domain", *(f"0.{i}000" for i in range(8))]])
    lines = written.getvalue().splitlines()
    assert max(map(len, lines)) <= 40
    assert [f"0.{i}000" in written.getvalue() for i in range(8)] == [True] * 8
    assert sum("domain" in line and "expert" not in line for line in lines) > 1  # the first in each part


def test_messages_are_broken_between_words_and_commands_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=30)
    text = "Nothing is there yet. Train a model: `nanothink pretrain transformer --preset tiny`"
    assert render.console.flowing(text, console).split("\n") == [
        "Nothing is there yet. Train a",
        "model:",
        "`nanothink pretrain transformer --preset tiny`",
    ]
    shares = "weight of the experts transformer 24 %, diffuser 30 % (1.5 MB)"
    assert render.console.flowing(shares, console).split("\n") == [
        "weight of the experts",
        "transformer 24 %, diffuser",
        "30 % (1.5 MB)",
    ]
    bare = "Try it: nanothink generate 'Once upon' --checkpoint a.pt"
    assert render.console.flowing(bare, console).split("\n") == [
        "Try it:",
        "nanothink generate 'Once upon' --checkpoint a.pt",
    ]
    listed = "  nanothink serve checkpoints/a.pt   # in the browser"
    assert render.console.flowing(listed, console) == listed
    monkeypatch.setattr(console, "_force_terminal", False)
    assert render.console.flowing(text, console) == text


def test_a_long_label_leaves_the_eta_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    monkeypatch.setattr(sys.modules[ProgressBars.__module__], "err", drawn)
    bars = ProgressBars(*progress_columns(), console=drawn)
    bars.add_task("a_name_that_is_longer_than_any_bar_has_room_for_expert", total=10, eta=lambda: 3725.0)
    with drawn.capture() as captured:
        drawn.print(bars)
    assert "ETA 1:02:05" in captured.get()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_json_keeps_what_the_encoding_lacks(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding, errors="replace"))
    value = {
        "générale": "Ωμέγα 😀 é \x9b \u202e \udcff \\ \n",
        "path": Path("é"),
        "loss": [float("nan"), 1e300],
    }
    render.print_json(value)
    sys.stdout.flush()
    written = raw.getvalue().decode(encoding)
    assert json.loads(written) == {**value, "path": "é", "loss": [None, 1e300]}
    assert ("é" in written) == (encoding != "ascii")
    assert ("😀" in written) == (encoding == "utf-8")
    assert not any(driving in written for driving in "\x9b\u202e\udcff")


def test_a_total_that_is_known_late_is_taken_over() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    with ProgressBars(*progress_columns(), console=console) as drawn:
        bars = BarReporter(drawn)
        bars.progress("merging", 0, 300)
        bars.progress("merging", 400, 900)
        (task,) = drawn.tasks
        assert (task.completed, task.total) == (400, 900)
        bars.progress("merging", 900, 900)
        assert drawn.tasks == []
