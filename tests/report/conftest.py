"""Runs written by the recorder itself, and a browser where there is one.

The browser is a headless Chromium, spoken to in its DevTools protocol through two pipes.
"""

from __future__ import annotations

import base64
import json
import math
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from nanothink.config import Config
from nanothink.inference.evaluate import Evaluation, Routing, Score
from nanothink.training.events import Evaluated, Sampled, StepDone
from nanothink.training.recording import RunRecorder
from nanothink.training.state import TrainState

HOSTILE = '</script><img src="x" onerror="document.body.id=\'broken\'"><b>bold</b> & "quoted" \u2028'
"""What a sample may hold: HTML, and a line separator that old JavaScript takes for the end of a statement."""

MakeRun = Callable[..., Path]


def evaluation_at(step: int, kind: str) -> Evaluation:
    scores = {name: Score(400.0 - step, 100, 300) for name in ("letters", "tales")}
    routing = {name: Routing({"one": 70.0, "two": 30.0}, 61.0, 100) for name in scores}
    return Evaluation(
        scores,
        denoising={1: 0.1, 50: 0.5, 100: 0.9 - step / 1000} if kind == "diffuser" else {},
        routing=routing if kind == "nanothink_mla" else {},
    )


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Writes a run's records into ``checkpoints/runs/NAME``, as training does; gives the folder."""

    def make(
        name: str,
        kind: str = "transformer",
        *,
        n_steps: int = 40,
        losses: Sequence[float] = (),
        changed: dict[str, dict[str, Any]] | None = None,
        finished: bool = True,
    ) -> Path:
        config = Config().model_dump(mode="json")
        for section, values in (changed or {}).items():
            config[section] |= values
        description = {
            "kind": kind,
            "name": name,
            "config": config,
            "sources": {"train_expert.lr": "--set"},
            "parameters": 1234,
            "tokenizer": {"name": "bpe", "vocab_size": 320, "fingerprint": "ab" * 32},
            "data": {
                "fingerprint": "cd" * 32,
                "train_tokens": {"letters": 900},
                "validation_tokens": {"letters": 90},
            },
            "precision": {"device": "cpu", "dtype": "float32", "reason": "there is no other"},
            "machine": {"python": "3.11", "threads": 1},
            "started": f"2026-01-0{len(name) % 9 + 1}T10:00:00+0000",
        }
        folder = tmp_path / "checkpoints" / "runs" / name
        recorder = RunRecorder(folder, description, TrainState())
        parts = {
            "diffuser": {"cross_entropy": 3.0, "mse_pure": 0.5},
            "nanothink_mla": {"cross_entropy": 3.0, "weight_one": 0.7, "weight_two": 0.3},
        }.get(kind, {})
        for step in range(1, n_steps + 1):
            loss = losses[step - 1] if losses else 5 * math.exp(-step / 30)
            recorder.event(StepDone(step, n_steps, 0, loss, 1e-4, 0.5, 1024, 0.5, loss != loss, True, parts))
            if step % max(1, n_steps // 4) == 0:
                recorder.event(Evaluated(step, 0, evaluation_at(step, kind), True, 0))
                recorder.event(Sampled(step, 0, {"Once <i>upon</i>": HOSTILE}))
        recorder.close()
        if finished:
            (folder / "finished.json").write_text(json.dumps({"reason": "all steps done", "step": n_steps}))
        return folder

    return make


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    command = find_browser()
    if command is None:
        pytest.skip("no Chromium here: the page is not looked at (Debian: apt-get install chromium)")
    with running_browser(command, tmp_path_factory.mktemp("profile")) as found:
        yield found


NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")

EVENTS = (
    "Network.requestWillBeSent",
    "Runtime.exceptionThrown",
    "Runtime.consoleAPICalled",
    "Log.entryAdded",
)


def find_browser() -> str | None:
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One tab of it. ``events`` are those of ``EVENTS`` since the page was opened."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._to, self._from = to_browser, from_browser
        self._rest = b""
        self._number = 0
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self._session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self(f"{domain}.enable")

    def __call__(self, method: str, **parameters: Any) -> Any:
        """Call a method of the protocol and wait for its answer."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def open(self, page: Path | str, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Open a file or an address, and wait until it has loaded and drawn."""
        self(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self("Emulation.setEmulatedMedia", features=[scheme])
        self.events.clear()
        self("Page.navigate", url=page if isinstance(page, str) else page.absolute().as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self._receive()
        self.script(
            "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))"
        )

    def script(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        answer = self("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def press(self, key: str) -> None:
        for kind in ("rawKeyDown", "keyUp"):
            self("Input.dispatchKeyEvent", type=kind, key=key, code=key)

    def seen(self, *methods: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["method"] in methods]

    def screenshot(self, path: Path) -> None:
        """The whole page as PNG."""
        shot = self("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            part = os.read(self._from, 1 << 20)
            assert part, "the browser has gone"
            self._rest += part
        line, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        if message.get("method") in {*EVENTS, "Page.loadEventFired"}:
            self.events.append(message)
        return message


@contextmanager
def running_browser(command: str, profile: Path) -> Iterator[Browser]:
    """Start Chromium and end it again."""
    browser_reads, to_browser = os.pipe()
    from_browser, browser_writes = os.pipe()

    def as_3_and_4() -> None:
        # Through high numbers first: either pipe may lie on 3 or 4 itself.
        reading, writing = os.dup2(browser_reads, 103), os.dup2(browser_writes, 104)
        os.dup2(reading, 3)
        os.dup2(writing, 4)

    process = subprocess.Popen(
        [
            command,
            "--headless",
            "--remote-debugging-pipe",
            "--no-sandbox",  # tests may run as root in a container
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
            f"--user-data-dir={profile}",
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        close_fds=False,
        preexec_fn=as_3_and_4,
    )
    os.close(browser_reads)
    os.close(browser_writes)
    try:
        yield Browser(to_browser, from_browser)
    finally:
        os.close(to_browser)  # it ends by itself when nobody speaks to it any more
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        os.close(from_browser)
