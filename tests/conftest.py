"""Fixtures that several parts of the tests share: a tiny corpus, a tiny tokenizer, the real command."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from documentation import ROOT
from forking_shell import ForkingShell, quick

# Tests run beside one another and compare bits: one thread, no network, no settings from outside.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Compiled once for all processes of the suite and for the next run of it: half of what collecting takes.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
os.environ["COLUMNS"] = "200"  # pytest-xdist sets its own, and tables would be cut to it
if threading.current_thread() is threading.main_thread():
    # A shell that starts the tests in the background ignores SIGINT, and nohup SIGHUP; children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
for name in [name for name in os.environ if name.startswith("NANOTHINK_")]:
    del os.environ[name]
os.environ["NANOTHINK_DOCUMENT_CACHE__FIT_STEPS"] = "5"  # at the end of every run; 250 take a second or more

SHARED = Path(__file__).parents[2] / "shared" / "data"

WORDS = (
    "time light stone water letter garden river wind moon house question answer winter morning hand voice "
    "road tree bread salt fire snow door"
).split()


def write_domain(folder: Path, texts: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "texts.jsonl").open("w", encoding="utf-8") as file:
        for i, text in enumerate(texts):
            file.write(json.dumps({"text": text, "id": i}) + "\n")


def made_up_texts(seed: int, n_texts: int, n_words: int = 60) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choice(WORDS) for _ in range(n_words)) + f" {i}." for i in range(n_texts)]


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three domains of made-up sentences, about 40 KB. Read only: copy it to change it."""
    root = tmp_path_factory.mktemp("corpus")
    for seed, (domain, n_texts) in enumerate({"letters": 60, "manuals": 30, "tales": 20}.items()):
        write_domain(root / domain, made_up_texts(seed, n_texts))
    return root


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a byte-level BPE of about 300 entries."""
    from nanothink.data.corpus import find_corpus
    from nanothink.data.split import SplitRule
    from nanothink.data.tokenizer import save_tokenizer, train_on_corpus

    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_on_corpus(find_corpus(tiny_corpus), vocab_size=320, split=SplitRule(0.1)), folder)
    return folder


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--every-change",
        action="store_true",
        help="kill writing commands at each change to the disk (test_killed_commands.py; some minutes more)",
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The examples of the documentation first: most of its pages begin with what the tutorial leaves behind.

    A worker that has nothing left takes the last tests of another, and would make that a second time.
    """
    items.sort(key=lambda item: item.path.name != "test_docs_examples.py")


@pytest.fixture(scope="session")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkingShell]:
    """For documented lines: ``nanothink`` starts at once in it, and all models and runs are tiny."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    small = quick(steps=4, max_keys=2000)
    environment = {**os.environ, **small, "PATH": path, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    shell = ForkingShell(tmp_path_factory.mktemp("bin"), environment)
    yield shell
    shell.close()


Nanothink = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def nanothink() -> Nanothink:
    """Run the real command in a process of its own."""

    def call(
        *arguments: str | Path, cwd: Path | None = None, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "nanothink", *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
            timeout=240,
            cwd=cwd,
            env={**os.environ, **environment},
        )

    return call


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real text for measurements, where it is at hand."""
    if not SHARED.is_dir():
        pytest.skip("the folder of real text is not here")
    return SHARED
