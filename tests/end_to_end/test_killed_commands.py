"""Commands that write something else than checkpoints, killed at every moment at which the disk changes.

A command is started again and again, each time over the same beginning. It is killed by SIGKILL just before
its first change to the disk (a file opened to write, renamed, removed, a folder made), the next time before
its second, and so on until it ends by itself; and by the system in the middle of the write that makes any
file longer than some size. After each kill what it was to write is as it was before, or as it is when the
command ends, and never anything else; and the same command, given once more, ends as it should and leaves
nothing that lies about.

Commands that take long are struck before every 17th change, or every seventh where there are few; in the
second suite before every seventh, or with ``--every-change`` before every one.
"""

from __future__ import annotations

import itertools
import json
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from reports import Told
from struck_runs import Ground, assert_same_run, stem

from nanothink.config import VectorStoreConfig
from nanothink.data.corpus import find_corpus
from nanothink.data.split import SplitRule
from nanothink.data.tokenizer import load_tokenizer
from nanothink.data.tokens import tokenise
from nanothink.errors import CheckpointDamagedError, TokenizerError, VectorStoreNotFoundError
from nanothink.runs.trained_model import load
from nanothink.vector_store.manifest import store_folder
from nanothink.vector_store.store import open_store

MODEL = stem("nanothink_mla")
NOTHING = "nothing"
WITH_STORE = ("--use-vector-store", "--set", "vector_store.n_neighbours=4")


@dataclass(frozen=True)
class Case:
    """A command and what it writes."""

    arguments: list[str]
    beginning: Path | None
    """What the folder holds before the command; None: nothing, not even the folder."""
    state: Callable[[], str]
    """A fingerprint of what is there, which is whole; NOTHING when there is nothing."""
    repeated: tuple[int, ...] = (0,)
    """Exit codes with which the command may answer when it is given again."""


@pytest.fixture
def every_change(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--every-change"))


@pytest.fixture(params=[17, pytest.param(7, marks=pytest.mark.bench)])
def stride(request: pytest.FixtureRequest, every_change: bool) -> int:
    """Changes from one kill of a command that takes long to the next."""
    return 1 if every_change else request.param


@pytest.fixture
def short_stride(every_change: bool) -> int:
    """The same for commands that change the disk less than 20 times."""
    return 1 if every_change else 7


class Kills:
    """Runs a case again and again in one folder."""

    def __init__(self, ground: Ground, folder: Path, case: Case) -> None:
        self.ground, self.folder, self.case = ground, folder, case
        self._begin()
        self.before = case.state()
        ended = ground.server.run(case.arguments)
        assert ended.code == 0, ended.stderr
        self.after = case.state()
        assert self.after != NOTHING
        self.files = self._names()
        self.longest = max(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        self.seen: list[str] = []

    def _begin(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.case.beginning is not None:
            shutil.copytree(self.case.beginning, self.folder)

    def _names(self) -> list[str]:
        """Files of a whole result; what changes with each time has its number left out."""
        names = (str(path.relative_to(self.folder)) for path in self.folder.rglob("*"))
        # Digests of the data's files are kept for those that were left alone for two seconds.
        names = (name for name in names if ".nanothink" not in name or "manifest.json" not in name)
        return sorted("-".join(part for part in name.split("-") if not _is_hash(part)) for name in names)

    def at_every_change(self, stride: int = 1) -> None:
        for n in itertools.count(1, stride):
            strike = {"change_below": str(self.folder), "nth": n, "signals": ["SIGKILL"]}
            if not self._kill(-signal.SIGKILL, f"before change {n}", strike=strike):
                break
        assert len(self.seen) >= 2, "it was not killed at all"
        assert self.seen[0] == self.before

    def in_the_middle_of_writes(self, *sizes: int) -> None:
        for size in sizes:
            self._kill(-signal.SIGXFSZ, f"at {size} bytes", file_bytes=size)

    def _kill(self, code: int, when: str, **how: object) -> bool:
        self._begin()
        ended = self.ground.server.run(self.case.arguments, **how)
        if ended.code == 0:
            return False
        assert ended.code == code, f"{when}: {ended.stderr}"
        found = self.case.state()
        assert found in {self.before, self.after}, f"killed {when}, it left {found}"
        self.seen.append(found)
        again = self.ground.server.run(self.case.arguments)
        assert again.code in self.case.repeated, f"after a kill {when}: {again.stderr}"
        assert "Traceback" not in again.stderr
        assert self.case.state() == self.after, f"after a kill {when}"
        if again.code == 0:
            assert self._names() == self.files, f"after a kill {when}"
        return True


def _is_hash(part: str) -> bool:
    stem = part.partition(".")[0]
    return len(stem) == 12 and all(c in "0123456789abcdef" for c in stem)


# --- the memory -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def more_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("more") / "data"
    (folder / "songs").mkdir(parents=True)
    lines = [json.dumps({"text": f"song {n}: " + "river of stone " * 12}) + "\n" for n in range(12)]
    (folder / "songs" / "texts.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def source(ground: Ground, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint folder of a NanoThink with a memory. Read only."""
    folder = tmp_path_factory.mktemp("remembering")
    ended = ground.server.run([*ground.typed("nanothink_mla", folder, max_steps=4), *WITH_STORE])
    assert ended.code == 0, ended.stderr
    return folder


def store_of(folder: Path) -> str:
    """The text, keys and counts of the memory there, every byte of which is verified."""
    try:
        store = open_store(store_folder(folder, MODEL), VectorStoreConfig())
    except VectorStoreNotFoundError:
        return NOTHING
    contents = store.contents
    similarities, numbers = store.index.search(np.eye(16, dtype=np.float32), 5)
    parts = (contents.tokens, contents.documents, contents.held_out, contents.merged, similarities, numbers)
    return f"{contents.domains} {store.index.n_keys} {hash(tuple(np.asarray(p).tobytes() for p in parts))}"


@pytest.mark.parametrize("command", ["build", "build anew", "add", "compact"])
def test_the_old_memory_is_there_or_the_new_one(
    command: str, ground: Ground, source: Path, more_text: Path, tmp_path: Path, stride: int
) -> None:
    folder, beginning = tmp_path / "checkpoints", tmp_path / "beginning"
    shutil.copytree(source, beginning)
    where = ["--checkpoint-dir", str(folder)]
    arguments, repeated = {
        "build": (["store", "build", *where], (0, 2)),  # refused where the first has come to its end
        "build anew": (["store", "build", "--overwrite", "--domains", "tales", *where], (0,)),
        "add": (["store", "add", str(more_text), *where], (0, 1)),
        "compact": (["store", "compact", "--similarity", "0.9", "--max-tokens", "0", *where], (0,)),
    }[command]
    if command == "build":
        shutil.rmtree(store_folder(beginning, MODEL))
    for path in store_folder(beginning, MODEL).glob("neighbours-*"):
        shutil.rmtree(path)  # they go with the store that they were found in
    kills = Kills(ground, folder, Case(arguments, beginning, lambda: store_of(folder), repeated))
    assert kills.before != kills.after
    kills.at_every_change(stride)
    kills.in_the_middle_of_writes(2000)


def test_training_with_a_memory_killed_while_that_is_built(
    ground: Ground, source: Path, tmp_path: Path, stride: int
) -> None:
    """While the store is written, and while neighbours are: resumed, it ends in the same bits."""
    folder = tmp_path / "checkpoints"
    arguments = [*ground.typed("nanothink_mla", folder, max_steps=4), *WITH_STORE]
    n = 0
    for n in itertools.count(1, stride):
        shutil.rmtree(folder, ignore_errors=True)
        strike = {"change_below": str(folder / f"{MODEL}.store"), "nth": n, "signals": ["SIGKILL"]}
        ended = ground.server.run(arguments, strike=strike)
        if ended.code == 0:
            break
        assert ended.code == -signal.SIGKILL, ended.stderr
        assert store_of(folder) in {NOTHING, store_of(source)}
        ended = ground.server.run([*arguments, "--resume"])
        assert ended.code == 0, ended.stderr
        assert store_of(folder) == store_of(source)
        assert_same_run(source, folder, MODEL)
        left = [path.name for path in store_folder(folder, MODEL).rglob("*tmp*")]
        assert left == []
    assert n > 20, "neighbours come after the store"


# --- everything else ------------------------------------------------------------------------------------


def test_tokens_are_whole_or_made_again(ground: Ground, tmp_path: Path, short_stride: int) -> None:
    plain, corpus = tmp_path / "plain", tmp_path / "corpus"
    shutil.copytree(ground.corpus, plain, ignore=shutil.ignore_patterns(".nanothink"))
    tokenizer = load_tokenizer(str(ground.tokenizer))

    def state() -> str:
        """What training would read, from the cache as it is left; nothing of it may be made here."""
        copy = tmp_path / "looked-at"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(corpus, copy)
        notes: list[str] = []
        tokens = tokenise(find_corpus(copy), tokenizer, split=SplitRule(0.1), reporter=Told(notes.append))
        assert not [note for note in notes if "damaged" in note]
        whole = {
            (d, side): stream.block(0, stream.n_tokens)[1].tobytes()
            for side, streams in (("train", tokens.train), ("val", tokens.val))
            for d, stream in streams.items()
        }
        return f"{tokens.fingerprint} {hash(tuple(sorted(whole.items())))}"

    inspect = ["data", "inspect", str(corpus), "--tokenizer", str(ground.tokenizer)]
    kills = Kills(ground, corpus, Case(inspect, plain, state))
    assert list((corpus / ".nanothink").rglob("*.tokens")), "it keeps tokens"
    kills.at_every_change(short_stride)
    kills.in_the_middle_of_writes(300, 2000)


def exported(folder: Path) -> str:
    try:
        model = load(str(folder), device="cpu", vector_store=False).model
    except CheckpointDamagedError:
        return "damaged"
    except Exception:
        return NOTHING
    return str(hash(tuple(tensor.numpy().tobytes() for tensor in model.state_dict().values())))


@pytest.mark.parametrize("over", ["nothing", "an earlier one"])
def test_an_export_is_whole_or_not_there(
    over: str, ground: Ground, uninterrupted: Callable[[str], Path], tmp_path: Path, short_stride: int
) -> None:
    parent, beginning = tmp_path / "parent", tmp_path / "beginning"
    folder = parent / "export"
    checkpoint, earlier = (
        str(uninterrupted(kind) / f"{stem(kind)}.pt") for kind in ("transformer", "state_space")
    )
    beginning.mkdir()
    if over == "an earlier one":
        ended = ground.server.run(["checkpoints", "export", earlier, "--to", str(beginning / "export")])
        assert ended.code == 0, ended.stderr
    arguments = ["checkpoints", "export", checkpoint, "--to", str(folder)]
    arguments += ["--overwrite"] if over == "an earlier one" else []
    case = Case(arguments, beginning, lambda: exported(folder) if folder.exists() else NOTHING, (0, 2))
    kills = Kills(ground, parent, case)
    if over == "an earlier one":
        # Between the two renames that replace it the earlier one stands under a temporary name.
        kills.case = replace(case, state=lambda: _or_aside(parent, case.state()))
    kills.at_every_change(short_stride)
    kills.in_the_middle_of_writes(kills.longest // 2)


def _or_aside(parent: Path, found: str) -> str:
    aside = list(parent.glob(".export.replaced.*.tmp"))
    return exported(aside[0]) if found == NOTHING and aside else found


@pytest.mark.parametrize("over", ["nothing", "an earlier one"])
def test_a_tokenizer_is_whole_or_not_there(
    over: str, ground: Ground, tmp_path: Path, short_stride: int
) -> None:
    folder = tmp_path / "tokenizer"

    def state() -> str:
        try:
            return load_tokenizer(str(folder)).fingerprint
        except TokenizerError:
            return NOTHING

    arguments = ["tokenizer", "train", "--data-dir", str(ground.corpus), "--vocab-size", "300"]
    arguments += ["--out", str(folder)] + (["--overwrite"] if over == "an earlier one" else [])
    beginning = ground.tokenizer if over == "an earlier one" else None
    kills = Kills(ground, folder, Case(arguments, beginning, state, (0, 2)))
    kills.at_every_change(short_stride if over == "nothing" else 1)
    kills.in_the_middle_of_writes(100, 1000)


@pytest.mark.parametrize("over", ["nothing", "an earlier one"])
def test_an_import_is_whole_or_not_there(over: str, ground: Ground, tmp_path: Path) -> None:
    folder, source, beginning = tmp_path / "data", tmp_path / "notes.txt", tmp_path / "beginning"
    source.write_text("\n\n".join(f"Paragraph {n}. " + "Stone and water. " * 40 for n in range(60)))
    written = folder / "notes" / "notes.jsonl"
    if over == "an earlier one":
        (beginning / "notes").mkdir(parents=True)
        (beginning / "notes" / "notes.jsonl").write_text('{"text": "what was there"}\n')
    arguments = ["data", "import", str(source), "--domain", "notes", "--data-dir", str(folder)]
    arguments += ["--overwrite"] if over == "an earlier one" else []
    state = lambda: written.read_text() if written.exists() else NOTHING  # noqa: E731
    case = Case(arguments, beginning if over == "an earlier one" else None, state, (0, 1))
    kills = Kills(ground, folder, case)
    kills.at_every_change()
    kills.in_the_middle_of_writes(10, 20_000)


def test_a_report_is_whole_or_not_there(
    ground: Ground, uninterrupted: Callable[[str], Path], tmp_path: Path
) -> None:
    folder, beginning = tmp_path / "reports", tmp_path / "beginning"

    def reporting(kind: str, out: Path) -> list[str]:
        return ["report", "--checkpoint-dir", str(uninterrupted(kind)), "--out", str(out / "report.html")]

    def state() -> str:
        text = (folder / "report.html").read_text().rstrip()
        return f"{stem('state_space') in text}, {text.endswith('</html>')}"

    beginning.mkdir()
    assert ground.server.run(reporting("state_space", beginning)).code == 0
    kills = Kills(ground, folder, Case(reporting("transformer", folder), beginning, state))
    assert (kills.before, kills.after) == ("True, True", "False, True")
    kills.at_every_change()
    kills.in_the_middle_of_writes(100, 20_000)
