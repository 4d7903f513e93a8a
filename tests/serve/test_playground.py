"""The playground in a real browser: it writes, colours, explains, branches, fits, asks this server alone."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from report.conftest import Browser
    from serve.conftest import Running

TOKENS = "document.querySelectorAll('.token')"


def wait(browser: Browser, condition: str) -> Any:
    """Until an expression in the page is true; gives it."""
    deadline = time.monotonic() + 20
    while not (found := browser.script(condition)):
        assert time.monotonic() < deadline, condition
        time.sleep(0.05)
    return found


def opened(browser: Browser, server: Running, *models: str, **window: Any) -> None:
    """The page with some models chosen."""
    browser.open(f"{server.url}/", **window)
    wait(browser, "document.querySelectorAll('#models input').length === 4")
    browser.script(
        f"""document.querySelectorAll('#models input').forEach((box) => {{
          if (box.checked !== {list(models)!r}.includes(box.value)) box.click();
        }})"""
    )


def write(browser: Browser, text: str, n_tokens: int = 12) -> None:
    settings = f"$('max_tokens').value = {n_tokens}; $('seed').value = 3; $('ignore_eos').checked = true"
    browser.script(f"$('text').value = {text!r}; {settings}; write()")
    wait(browser, "running.length === 0")


def test_it_writes_what_generate_writes(browser: Browser, server: Running) -> None:
    opened(browser, server, "transformer_expert", "nanothink_mla")
    write(browser, "The river")
    for place, name in enumerate(("transformer_expert", "nanothink_mla")):
        expected = server.models[name].generate(
            "The river", temperature=0.8, top_k=50, seed=3, max_new_tokens=12, stop_at_eos=False
        )
        assert browser.script(f"panes[{place}].answer") == expected
        assert browser.script(f"panes[{place}].text.textContent") == expected
    browser.script("panes[0].keep.click()")
    assert browser.script("$('text').value") == "The river" + server.models["transformer_expert"].generate(
        "The river", temperature=0.8, top_k=50, seed=3, max_new_tokens=12, stop_at_eos=False
    )


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_a_token_shows_whom_it_trusts_and_what_is_recalled(
    browser: Browser, server: Running, tmp_path: Path, width: int, dark: bool
) -> None:
    opened(browser, server, "nanothink_mla", width=width, dark=dark)
    write(browser, "The river and the stone", 30)
    assert browser.script(f"{TOKENS}.length") > 5
    assert browser.script("document.querySelectorAll('.token.weighed').length") > 5
    assert "vector_store" in browser.script("document.querySelector('.legend').textContent")
    browser.script(f"{TOKENS}[3].click()")
    wait(browser, "document.querySelectorAll('.alternative').length === 10")
    passages = browser.script("[...document.querySelectorAll('.passage')].map((p) => p.textContent)")
    assert len(passages) == 8
    assert all("texts.jsonl:" in passage for passage in passages)
    assert browser.script("innerWidth") == width
    assert browser.script("document.documentElement.scrollWidth") <= width
    ground = browser.script("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, ground[4:-1].split(","))) < 200) == dark
    complaints = browser.seen("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
    assert complaints == []
    asked = [event["params"]["request"]["url"] for event in browser.seen("Network.requestWillBeSent")]
    assert all(url.startswith((server.url, "data:")) for url in asked)
    browser.screenshot(Path(os.environ.get("SCREENSHOTS", tmp_path)) / f"playground-{width}-{dark}.png")


def test_another_choice_is_written_on_from(browser: Browser, server: Running) -> None:
    opened(browser, server, "state_space_expert")
    write(browser, "The river")
    before = browser.script("panes[0].tokens.slice(0, 2).map((t) => t.text)")
    browser.script(f"{TOKENS}[2].click()")
    wait(browser, "document.querySelectorAll('.alternative').length === 10")
    browser.script("document.querySelectorAll('.alternative')[4].click()")
    wait(browser, "running.length === 0")
    chosen = browser.script("document.querySelectorAll('.alternative code')[4].textContent")
    answer = browser.script("panes[0].tokens.map((t) => t.text)")
    assert answer[:2] == before
    assert answer[2].replace("\n", "⏎").replace("\t", "⇥") == chosen
    assert browser.script(f"[...{TOKENS}].filter((t) => t.tabIndex === 0).length") == 1
    assert browser.script(f"{TOKENS}[2] === document.activeElement && $('about').hidden")
    assert len(answer) > 5


def test_the_keyboard_is_enough(browser: Browser, server: Running) -> None:
    opened(browser, server, "transformer_expert")
    write(browser, "The river")
    browser.script(f"{TOKENS}[0].focus()")
    for _ in range(2):
        browser.press("ArrowRight")
    assert browser.script(f"[...{TOKENS}].indexOf(document.activeElement)") == 2
    browser.press("Enter")
    wait(browser, "document.activeElement === document.querySelector('.alternative')")
    assert browser.script("document.querySelectorAll('.alternative').length") == 10
    browser.press("Escape")
    assert browser.script("$('about').hidden")
    assert browser.script(f"[...{TOKENS}].indexOf(document.activeElement)") == 2
    browser.script("$('max_tokens').value = 4000; write()")
    wait(browser, "running.length === 1")
    browser.press("Escape")
    wait(browser, "running.length === 0")
    tree = browser("Accessibility.getFullAXTree")["nodes"]
    used = [
        n for n in tree if n.get("role", {}).get("value") in {"button", "textbox", "spinbutton", "checkbox"}
    ]
    assert len(used) > 12
    assert [node for node in used if not node["ignored"] and not node.get("name", {}).get("value")] == []


def test_an_error_is_shown_as_the_server_says_it(browser: Browser, server: Running) -> None:
    opened(browser, server, "transformer_expert")
    write(browser, "The river", 5000)
    assert "max_tokens is 5000" in wait(browser, "!$('error').hidden && $('error').textContent")
