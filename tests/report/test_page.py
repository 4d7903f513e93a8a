"""The page as text: what is on it, what is escaped, how large it gets."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from reports import Told

from nanothink.errors import CheckpointNotFoundError, StorageError, UsageError
from nanothink.report import ReportedRun, RoutedPassage, RoutedToken, page
from nanothink.report.figures import domain_figures, expert_colors, experts_of, progress_figures
from nanothink.report.tables import number, settings
from nanothink.runs.reporting import Report, find_runs, write_report
from nanothink.training.records import read_run

MakeRun = Callable[..., Path]


class Elements(HTMLParser):
    """Every tag with its attributes, and the text outside of scripts and styles."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] not in {"script", "style"}:
            self.text += data


def render(*folders: Path) -> str:
    runs = [ReportedRun(folder.name, read_run(folder)) for folder in folders]
    return page(runs, made="today", version="1.2.3")


def figures_of(html: str) -> list[dict[str, Any]]:
    match = re.search(r'<script type="application/json" id="figures">(.*?)</script>', html, re.S)
    assert match is not None
    found: list[dict[str, Any]] = json.loads(match[1])
    return found


def report(folders: list[Path], out: Path, **more: Any) -> tuple[Report, list[str]]:
    notes: list[str] = []
    return write_report(folders, out, reporter=Told(notes.append), **more), notes


def test_everything_of_a_run_is_on_its_page(make_run: MakeRun) -> None:
    html = render(make_run("mine", changed={"train_expert": {"lr": 0.0123}}))
    text = " ".join(Elements(html).text.split())
    for part in (
        "mine",
        "all steps done",
        "letters",
        "tales",
        "1,234",
        "float32",
        "cdcdcdcdcdcd",
        "today",
        "1.2.3",
    ):
        assert part in text
    assert re.search(r"train_expert\.lr\s*0\.0123 --set\s*0\.0003", text)
    titles = {"Bits per byte", "Training loss", "Learning rate", "Gradient norm", "Throughput"}
    assert titles <= set(re.findall(r"<h3>(.*?)</h3>", html))


def test_the_numbers_drawn_are_those_of_the_records(make_run: MakeRun) -> None:
    folder = make_run("mine")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    expected = [(row["step"], row["bits_per_byte"]) for row in rows if row["event"] == "validation"]
    drawn = figures_of(render(folder))[0]["lines"][0]
    assert drawn["label"] == "mine"
    assert drawn["x"] == [step for step, _ in expected]
    assert drawn["y"] == pytest.approx([value for _, value in expected], rel=1e-4)


def test_several_runs_share_their_plots(make_run: MakeRun) -> None:
    runs = [ReportedRun(n, read_run(make_run(n, n_steps=s))) for n, s in (("a", 8), ("bb", 16), ("ccc", 24))]
    bits = progress_figures(runs)[0]
    assert [(line.label, line.color, line.steps[-1]) for line in bits.lines] == [
        ("a", 0, 8),
        ("bb", 1, 16),
        ("ccc", 2, 24),
    ]
    assert [figure.title for figure in domain_figures(runs, ["letters"])] == ["letters"]


def test_samples_and_names_cannot_break_the_page(make_run: MakeRun) -> None:
    folder = make_run("mine", changed={"data": {"tokenizer": "<script>alert(1)</script>"}})
    with (folder / "samples.jsonl").open("a") as file:  # half a character, as JSON can say it
        file.write('{"step": 99, "epoch": 9, "samples": {"half": "\\ud83d </p><script>bad()</script>"}}\n')
    elements = Elements(render(folder))
    tags = [tag for tag, _ in elements.tags]
    assert tags.count("script") == 3  # figures, uPlot, ours
    assert "img" not in tags
    assert "b" not in [t for t, a in elements.tags if not a][tags.index("main") :] or tags.count("b") == 1
    assert '</script><img src="x"' in elements.text
    assert "<script>alert(1)</script>" in elements.text


def test_nothing_on_the_page_leads_out_of_it(make_run: MakeRun) -> None:
    html = render(make_run("mine"))
    for tag, attributes in Elements(html).tags:
        assert not {"src", "srcset", "action", "data", "background"} & attributes.keys(), tag
        assert attributes.get("href", "#").startswith(("#", "data:")), tag  # type: ignore[union-attr]
    assert "@import" not in html
    assert "url(" not in html
    (policy,) = [
        a["content"] or "" for _, a in Elements(html).tags if a.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy.startswith("default-src 'none'; ")
    assert "http" not in policy
    assert "script-src 'sha256-" in policy


def test_a_run_of_a_hundred_thousand_rows_makes_a_small_page(make_run: MakeRun, tmp_path: Path) -> None:
    folder = make_run("long", n_steps=4)
    row = {
        "event": "train",
        "epoch": 0,
        "learning_rate": 1e-4,
        "gradient_norm": 0.5,
        "tokens_per_second": 1234.5,
    }
    with (folder / "metrics.jsonl").open("a") as file:
        for step in range(5, 100_005):
            file.write(json.dumps({**row, "step": step, "loss": 2 + (step * 7919 % 1000) / 1000}) + "\n")
        file.write(json.dumps({**row, "step": 100_005, "loss": 77.0}) + "\n")
    made, _ = report([folder], tmp_path / "report.html")
    assert made.n_bytes < 200_000
    assert made.runs[0].records.last_step == 100_005
    lines = [
        line for figure in figures_of((tmp_path / "report.html").read_text()) for line in figure["lines"]
    ]
    assert max(len(line["x"]) for line in lines) <= 800
    assert max(max(line["y"]) for line in lines if line["faint"]) == 77


def test_a_run_that_was_killed_in_the_middle_of_a_line(make_run: MakeRun) -> None:
    folder = make_run("killed", finished=False)
    metrics = folder / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:-25])
    text = Elements(render(folder)).text
    assert "not finished" in text
    assert "damaged" not in text


def test_a_run_before_its_first_line(make_run: MakeRun) -> None:
    html = render(make_run("new", n_steps=0, finished=False))
    assert "not validated yet" in Elements(html).text
    assert figures_of(html) == []


def test_a_run_whose_losses_are_not_finite(make_run: MakeRun) -> None:
    nan = float("nan")
    html = render(make_run("bad", n_steps=4, losses=[nan] * 4))
    assert "4 logged steps skipped" in Elements(html).text
    assert "NaN" not in json.dumps(figures_of(html))


def test_settings_are_marked_where_they_concern_the_kind(make_run: MakeRun) -> None:
    changed = {"state_space": {"n_layers": 3}, "model": {"d_model": 64}}
    rows = {row.name: row for row in settings([ReportedRun("t", read_run(make_run("t", changed=changed)))])}
    assert rows["model.d_model"].differs
    assert not rows["state_space.n_layers"].differs  # of another kind
    assert not rows["train_expert.lr"].differs
    cell = rows["model.d_model"].cells[0]
    assert cell is not None
    assert (cell.value, rows["model.d_model"].default) == ("64", "384")


def test_settings_of_another_version_are_shown_too(make_run: MakeRun) -> None:
    run = ReportedRun("old", read_run(make_run("old", changed={"model": {"forgotten": 7}})))
    rows = {row.name: row for row in settings([run])}
    assert rows["model.forgotten"].differs
    assert rows["model.forgotten"].default == ""


def test_experts_have_the_colours_of_their_runs(make_run: MakeRun) -> None:
    runs = [
        ReportedRun(name, read_run(make_run(name, kind)))
        for name, kind in (
            ("all", "nanothink_mla"),
            ("two_expert", "transformer"),
            ("one_expert", "diffuser"),
        )
    ]
    assert experts_of(runs[0]) == ["one", "two"]
    assert expert_colors(runs[0], runs) == [2, 1]
    assert expert_colors(runs[0], runs[:2]) == [0, 1]
    assert experts_of(runs[1]) == []


def test_a_routed_passage_says_whom_it_trusts() -> None:
    tokens = tuple(RoutedToken(t, w) for t, w in (("a", (0.9, 0.1)), ("b", (0.2, 0.8)), ("c", (0.6, 0.4))))
    assert [token.trusted for token in tokens] == [0, 1, 0]
    assert RoutedPassage("x", ("one", "two"), tokens).shares() == pytest.approx([2 / 3, 1 / 3])


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "–"),
        (0, "0"),
        (2.70512, "2.705"),
        (12.3456, "12.35"),
        (655808, "655,808"),
        (3e-4, "3.00e-04"),
        (1.0, "1.000"),
    ],
)
def test_numbers_as_people_read_them(value: float | None, shown: str) -> None:
    assert number(value) == shown


def luminance(color: str) -> float:
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def mixed(color: str, ground: str, percent: float) -> str:
    pairs = zip(*([int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in (color, ground)), strict=True)
    return "#" + "".join(f"{round((a * percent + b * (100 - percent)) / 100):02x}" for a, b in pairs)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_colours_have_the_contrast_that_wcag_asks_for(make_run: MakeRun, scheme: int) -> None:
    palettes = re.findall(r":root \{(.*?)\}", render(make_run("mine")), re.S)
    assert len(palettes) == 2
    of = dict(re.findall(r"--([\w-]+): ([^;]+);", palettes[scheme]))
    tint = float(of["tint"].rstrip("%"))
    for ground in ("page", "card"):
        for text in ("text", "quiet", "accent", "warn"):
            assert contrast(of[text], of[ground]) >= 4.5, (text, ground)
    assert contrast(of["text"], of["mark"]) >= 4.5
    for line in (f"c{i}" for i in range(8)):
        assert contrast(of[line], of["card"]) >= 3, line
        assert contrast(of["text"], mixed(of[line], of["card"], tint)) >= 4.5, line


def test_runs_are_found_by_name_folder_and_checkpoint(make_run: MakeRun) -> None:
    second, first = make_run("bb"), make_run("a")
    home = first.parents[1]
    assert find_runs([], home) == [first, second]  # as they were started
    assert find_runs(["bb"], home) == [second]
    assert find_runs([str(second), "a"], home) == [second, first]
    assert find_runs([str(home / "bb.pt"), str(home / "bb_epoch5.pt")], home) == [second]
    with pytest.raises(UsageError, match=r"no run 'bbb'.*Did you mean 'bb'\?.*There: a, bb"):
        find_runs(["bbb"], home)


def test_no_run_at_all(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="Train a model"):
        find_runs([], tmp_path)


def test_only_a_report_is_written_over(make_run: MakeRun, tmp_path: Path) -> None:
    folder, out = make_run("mine"), tmp_path / "report.html"
    report([folder], out)
    before = out.read_text()
    report([folder, make_run("second")], out)
    assert out.read_text() != before
    out.write_text("<html>my own</html>")
    with pytest.raises(UsageError, match="is not a report"):
        report([folder], out)
    assert out.read_text() == "<html>my own</html>"
    with pytest.raises(UsageError, match="is a folder"):
        report([folder], tmp_path)
    with pytest.raises(UsageError, match="does not exist"):
        report([folder], tmp_path / "nowhere" / "report.html")


def test_a_place_that_cannot_be_written_is_said_before_a_run_is_read(make_run: MakeRun) -> None:
    heard: list[str] = []
    with pytest.raises(StorageError, match="Cannot write /proc"):
        write_report(
            [make_run("mine")],
            Path("/proc/report.html"),
            reporter=Told(heard.append, lambda stage, *_: heard.append(stage)),
        )
    assert heard == []


def test_a_full_disk_leaves_the_earlier_report(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = make_run("mine"), tmp_path / "report.html"
    report([folder], out)
    before = out.read_bytes()

    def full(descriptor: int, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(StorageError, match="No space left"):
        report([folder], out)
    assert out.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".tmp"] == []


@pytest.mark.parametrize("kind", ["nanothink_mla", "diffuser"])
def test_a_missing_checkpoint_is_said_on_the_page(make_run: MakeRun, tmp_path: Path, kind: str) -> None:
    made, notes = report([make_run("mine", kind)], tmp_path / "report.html")
    assert made.runs[0].passages
    assert "mine: no passage of held-out text is shown. Its checkpoint is not there" in notes[0]
    text = " ".join(Elements((tmp_path / "report.html").read_text()).text.split())
    assert "mine: no passage of held-out text is shown. Its checkpoint is not there" in text


def test_a_damaged_checkpoint_is_said_on_the_page(make_run: MakeRun, tmp_path: Path) -> None:
    folder = make_run("mine", "diffuser")
    (folder.parents[1] / "mine.pt").write_bytes(b"not a checkpoint")
    _, notes = report([folder], tmp_path / "report.html")
    assert "mine.pt" in notes[0]
    assert "mine.pt" in Elements((tmp_path / "report.html").read_text()).text


def test_runs_of_one_name_are_told_apart(make_run: MakeRun, tmp_path: Path) -> None:
    folder = make_run("mine")
    copy = tmp_path / "elsewhere"
    folder.rename(copy)
    made, _ = report([copy, make_run("mine")], tmp_path / "report.html")
    assert len({run.label for run in made.runs}) == 2


def test_uplot_is_as_its_authors_published_it() -> None:
    digests = {
        "uPlot.iife.min.js": "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f",
        "uPlot.min.css": "df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04",
    }
    folder = resources.files("nanothink.report").joinpath("uplot")
    for name, digest in digests.items():
        assert hashlib.sha256(folder.joinpath(name).read_bytes()).hexdigest() == digest
    assert "MIT License" in folder.joinpath("LICENSE").read_text("utf-8")
