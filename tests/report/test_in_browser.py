"""The page in a real browser: it draws, asks nothing of the network, fits, and follows light and dark."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from nanothink.report import (
    Rebuilding,
    RebuiltPassage,
    ReportedRun,
    RoutedPassage,
    RoutedToken,
    page,
)
from nanothink.training.records import read_run

if TYPE_CHECKING:
    from report.conftest import Browser

MakeRun = Callable[..., Path]

DRAWN = """[...document.querySelectorAll("canvas")].map((canvas) => {
  const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  return new Set(new Uint32Array(pixels.buffer)).size;
})"""
"""How many colours each plot has."""


@pytest.fixture
def report(make_run: MakeRun, tmp_path: Path) -> Path:
    """A page that has everything, with names and words that are as long as they get."""
    long = "a_run_with_a_name_that_is_longer_than_a_telephone_is_wide_" + "x" * 40
    kinds = {long: "transformer", "ssm": "state_space", "dif": "diffuser", "all": "nanothink_mla"}
    words = "Word " * 30 + "W" * 300
    routed = RoutedPassage(
        "letters", ("one", "two"), tuple(RoutedToken(w + " ", (0.7, 0.3)) for w in words.split())
    )
    levels = tuple(Rebuilding(n, 0.5, ((words, True), (words, False))) for n in (10, 100))
    passages: dict[str, Any] = {"dif": (RebuiltPassage("letters", words, 100, levels),), "all": (routed,)}
    runs = [
        ReportedRun(name, read_run(make_run(name, kind)), passages.get(name, ()))
        for name, kind in kinds.items()
    ]
    path = tmp_path / "report.html"
    path.write_text(page(runs, made="today", version="1"), "utf-8")
    return path


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_it_draws_fits_and_asks_for_nothing(browser: Browser, report: Path, width: int, dark: bool) -> None:
    browser.open(report, width=width, dark=dark)
    complaints = browser.seen("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
    assert complaints == []
    asked = [event["params"]["request"]["url"] for event in browser.seen("Network.requestWillBeSent")]
    assert [url for url in asked if not url.startswith("data:")] == [report.absolute().as_uri()]
    n_plots = browser.script("document.querySelectorAll('.plot').length")
    assert n_plots > 12
    colors = browser.script(DRAWN)
    assert len(colors) == n_plots
    assert min(colors) > 3  # ground, text and grid alone would be a plot without a line
    assert browser.script("innerWidth") == width
    assert browser.script("document.documentElement.scrollWidth") <= width
    assert browser.script("document.body.id") == ""  # what a sample brought along did not run
    ground = browser.script("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, ground[4:-1].split(","))) < 200) == dark, ground


def test_a_wide_table_scrolls_in_itself(browser: Browser, report: Path) -> None:
    browser.open(report, width=390)
    tables = "[...document.querySelectorAll('.wide')].filter((e) => e.offsetWidth)"
    assert browser.script(f"{tables}.some((e) => e.scrollWidth > e.clientWidth)")
    assert browser.script(f"{tables}.every((e) => e.getBoundingClientRect().right <= innerWidth)")


def pixels_of(browser: Browser, color: str) -> int:
    """How many pixels of the first plot have exactly this colour, once what was asked for is drawn."""
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    count: int = browser.script(
        f"""new Promise((done) => setTimeout(() => {{
          const canvas = document.querySelector("canvas");
          const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
          let n = 0;
          for (let i = 0; i < data.length; i += 4)
            n += data[i] === {red} && data[i + 1] === {green} && data[i + 2] === {blue};
          done(n);
        }}, 100))"""
    )
    return count


# Of the fourth line in light and in dark. The runs have the same numbers, so the last one drawn is seen.
LIGHT, DARK = "#a21caf", "#e58af0"


def test_the_plots_follow_when_light_turns_to_dark(browser: Browser, report: Path) -> None:
    browser.open(report)
    assert pixels_of(browser, LIGHT) > 50
    assert pixels_of(browser, DARK) == 0
    browser("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    assert pixels_of(browser, LIGHT) == 0
    assert pixels_of(browser, DARK) > 50


def test_a_plot_is_read_off_by_keyboard(browser: Browser, report: Path) -> None:
    browser.open(report)
    browser.script("document.querySelector('.plot').focus()")
    browser.press("End")
    browser.press("ArrowLeft")
    slider = "document.querySelector('.plot')"
    assert browser.script(f"{slider}.getAttribute('aria-valuenow')") == "30"
    said = browser.script(f"{slider}.getAttribute('aria-valuetext')")
    assert said.startswith("step 30: ")
    assert "ssm 1.779" in said  # 400 - 30 nats on 300 bytes
    reading = "document.querySelectorAll('.legend .reading')[1].textContent"
    assert browser.script(reading) == "1.779"


def test_a_passage_is_read_off_by_keyboard(browser: Browser, report: Path) -> None:
    browser.open(report)
    browser.script("document.querySelector('.passage').focus()")
    for key in ("ArrowRight", "ArrowRight", "End"):
        browser.press(key)
        assert browser.script("document.querySelectorAll('.passage .at').length") == 1
    said = browser.script("document.querySelector('.weights').textContent")
    assert said.endswith("W”: one 70 %, two 30 %")


def test_a_line_is_hidden_by_its_button_and_comes_back(browser: Browser, report: Path) -> None:
    browser.open(report)
    button = "document.querySelectorAll('.legend button')[3]"
    assert browser.script(f"{button}.getAttribute('aria-pressed')") == "true"
    assert pixels_of(browser, LIGHT) > 50
    browser.script(f"{button}.click()")
    assert browser.script(f"{button}.getAttribute('aria-pressed')") == "false"
    assert pixels_of(browser, LIGHT) == 0
    browser.script(f"{button}.click()")
    assert pixels_of(browser, LIGHT) > 50


def test_everything_that_is_used_by_keyboard_has_a_name(browser: Browser, report: Path) -> None:
    browser.open(report)
    tree = browser("Accessibility.getFullAXTree")["nodes"]
    interactive = {"slider", "button", "link", "DisclosureTriangle"}
    used = [node for node in tree if node.get("role", {}).get("value") in interactive and not node["ignored"]]
    assert {node["role"]["value"] for node in used} >= {"slider", "button", "link"}
    assert [node for node in used if not node.get("name", {}).get("value")] == []
    headings = browser.script(
        "[...document.querySelectorAll('h1,h2,h3,h4')].map((e) => Number(e.tagName[1]))"
    )
    assert headings.count(1) == 1
    assert all(now <= before + 1 for before, now in itertools.pairwise(headings))
