"""An error of the machine is never a bad record: nothing is left out for it, and nothing kept of it."""

from __future__ import annotations

import builtins
import errno
import gzip
import io
import json
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zstandard
from reports import Told

from nanothink.cli.app import _allow_open_files, run
from nanothink.data.corpus import find_corpus, validate_corpus
from nanothink.data.importing import import_source
from nanothink.data.lines import Problem
from nanothink.data.pages import OpenFiles
from nanothink.data.records import iter_records
from nanothink.data.split import SplitRule
from nanothink.data.token_files import open_token_file
from nanothink.data.tokenizer import Tokenizer, load_tokenizer, train_on_corpus
from nanothink.data.tokens import tokenise
from nanothink.errors import DataError, UnreadableError

RULE = SplitRule(0.2)
PACKED: dict[str, Callable[[bytes], bytes]] = {
    "": lambda content: content,
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}
FAULTS: list[int | str] = [
    *(errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ETIMEDOUT, errno.EACCES),
    "memory",
    "short",
]


class FailingDisk:
    """Makes reading of one file fail from some byte on, until it is mended."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path: Path | None = None
        self.fault: int | str = 0
        self.after_bytes = self.sound_openings = 0
        open_really = builtins.open

        def open_badly(path: Any, *args: Any, **options: Any) -> Any:
            if self.path is None or Path(path) != self.path:
                return open_really(path, *args, **options)
            if self.sound_openings:
                self.sound_openings -= 1
                return open_really(path, *args, **options)
            if not self.after_bytes:
                self._fail()
            return _FailingFile(self, open_really(path, *args, **options))

        monkeypatch.setattr("nanothink.data.source_file.open", open_badly, raising=False)

    def breaks(self, path: Path, fault: int | str, after_bytes: int, sound_openings: int = 0) -> None:
        self.path, self.fault, self.after_bytes = path, fault, after_bytes
        self.sound_openings = sound_openings

    def is_mended(self) -> None:
        self.path = None

    def _fail(self) -> None:
        if self.fault == "memory":
            raise MemoryError
        if isinstance(self.fault, int):
            raise OSError(self.fault, os.strerror(self.fault))


class _FailingFile:
    def __init__(self, disk: FailingDisk, file: io.FileIO) -> None:
        self._disk, self._file = disk, file

    def read(self, n_bytes: int) -> bytes:
        left = self._disk.after_bytes - self._file.tell()
        if left <= 0:
            self._disk._fail()
            return b""  # a read that comes back short, with nothing said
        return self._file.read(min(n_bytes, left))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> FailingDisk:
    return FailingDisk(monkeypatch)


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer: Path) -> Tokenizer:
    return load_tokenizer(str(tiny_tokenizer))


def lines(name: str, n: int = 60) -> bytes:
    return b"".join(json.dumps({"text": f"{name} {i} sails far away."}).encode() + b"\n" for i in range(n))


def put(root: Path, name: str, content: bytes) -> Path:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(content)
    return root / name


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("after", ["opening", "a part"])
def test_no_fault_is_a_bad_record(
    tmp_path: Path, disk: FailingDisk, tokenizer: Tokenizer, packed: str, after: str
) -> None:
    root = tmp_path / "data"
    put(root, "a/0.jsonl", lines("The first boat"))
    hurt = put(root, f"a/1.jsonl{packed}", PACKED[packed](lines("The second boat")))
    corpus = find_corpus(root)
    whole = tokenise(corpus, tokenizer, split=RULE).fingerprint
    for kept in root.rglob("*.tokens"):
        kept.unlink()
    for fault in FAULTS:
        if fault == "short" and after == "opening":
            continue
        disk.breaks(hurt, fault, 0 if after == "opening" else hurt.stat().st_size // 2)
        number = errno.ENOMEM if fault == "memory" else fault
        what = os.strerror(number) if isinstance(number, int) else "could be read"
        problems: list[Problem] = []
        with pytest.raises(UnreadableError, match=what) as caught:
            for _ in iter_records(hurt, on_problem=problems.append):
                pass
        assert problems == []
        assert str(caught.value).startswith(f"Cannot read {hurt}")
        for skip in (True, False):
            with pytest.raises(UnreadableError, match=what):
                tokenise(corpus, tokenizer, split=RULE, skip_bad_records=skip)
            # Only when it is tokenised, its digest being known.
            disk.breaks(hurt, fault, disk.after_bytes, sound_openings=1)
            with pytest.raises(UnreadableError, match=what):
                tokenise(corpus, tokenizer, split=RULE, skip_bad_records=skip)
            assert disk.sound_openings == 0
        with pytest.raises(UnreadableError, match=what):
            train_on_corpus(corpus, vocab_size=300, split=RULE)
        with pytest.raises(DataError, match=what):
            import_source(hurt, domain="new", data_dir=tmp_path / "imported")
        assert not (tmp_path / "imported").exists()
        report = validate_corpus(corpus)
        assert not report.ok
        assert [str(error.file) for error in report.unreadable] == [str(hurt)]
        assert [(error.file, what in error.reason) for error in report.errors] == [(str(hurt), True)]
    disk.is_mended()
    tokens = tokenise(corpus, tokenizer, split=RULE, skip_bad_records=True)
    assert tokens.fingerprint == whole
    assert tokens.skipped_records == 0


def test_a_short_read_is_not_kept_under_the_digest_of_the_whole_file(
    tmp_path: Path, disk: FailingDisk, tokenizer: Tokenizer
) -> None:
    """The size of the file says no more than was read: only hashing what is tokenised can tell."""
    root = tmp_path / "data"
    put(root, "a/0.jsonl", lines("The first boat"))
    hurt = put(root, "a/1.jsonl", lines("The second boat"))
    corpus = find_corpus(root)
    size = hurt.stat().st_size

    def truncate_once(_: str, done: int, __: int) -> None:
        if done == 0 or hurt.stat().st_size < size:
            return
        os.truncate(hurt, len(lines("The second boat", 30)))

    with pytest.raises(DataError, match="changed while it was being read"):
        tokenise(corpus, tokenizer, split=RULE, skip_bad_records=True, reporter=Told(progress=truncate_once))
    assert len(list(root.rglob("*.tokens"))) <= 1


def test_the_fingerprint_covers_what_was_tokenised(tmp_path: Path, tokenizer: Tokenizer) -> None:
    root = tmp_path / "data"
    put(root, "a/0.jsonl", lines("The first boat"))
    put(root, "b/0.jsonl", lines("The second boat"))
    before = tokenise(find_corpus(root), tokenizer, split=None)
    one, other = sorted(root.rglob("*.tokens"))
    other.write_bytes(one.read_bytes())  # sound tokens of as many documents, but not of this file
    after = tokenise(find_corpus(root), tokenizer, split=None)
    assert after.fingerprint != before.fingerprint
    other.write_bytes(one.read_bytes())
    one.unlink()
    assert tokenise(find_corpus(root), tokenizer, split=None).fingerprint == after.fingerprint


@pytest.mark.parametrize("code", [errno.EACCES, errno.EMFILE, errno.EIO])
def test_a_folder_that_cannot_be_looked_into_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    root = tmp_path / "data"
    put(root, "a/0.jsonl", lines("One boat"))
    put(root, "b/0.jsonl", lines("Another boat"))
    really = os.scandir

    def scandir(path: Any) -> Any:
        if Path(path) == hidden:
            raise OSError(code, os.strerror(code), str(path))
        return really(path)

    monkeypatch.setattr(os, "scandir", scandir)
    for hidden in (root, root / "b"):
        with pytest.raises(UnreadableError, match=f"Cannot read {hidden}: {os.strerror(code)}"):
            find_corpus(root)
    assert list(find_corpus(root, ["a"]).domains) == ["a"]


def test_a_text_that_cannot_be_looked_at_ends_an_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, "notes/a.txt", b"One boat.")
    hurt = put(tmp_path, "notes/b.txt", b"Another boat.")
    really = Path.is_file

    def is_file(path: Path) -> bool:
        if path == hurt:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return really(path)

    monkeypatch.setattr(Path, "is_file", is_file)
    with pytest.raises(UnreadableError, match=f"Cannot read {hurt}: Stale file handle"):
        import_source(tmp_path / "notes", domain="new", data_dir=tmp_path / "data")
    assert not (tmp_path / "data").exists()


@pytest.fixture
def few_descriptors() -> Iterator[int]:
    """64 of them, of which the process has some already."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, before[1]))
    yield 64
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_more_files_than_descriptors(tmp_path: Path, few_descriptors: int, tokenizer: Tokenizer) -> None:
    root = tmp_path / "data"
    n_files = 3 * few_descriptors
    for i in range(n_files):
        put(root, f"d{i % 20:02}/{i:03}.jsonl", lines(f"Boat {i}", 4))
    tokens = tokenise(find_corpus(root), tokenizer, split=RULE)
    streams = [*tokens.train.values(), *tokens.val.values()]
    assert sum(stream.n_documents for stream in streams) == 4 * n_files
    for _ in range(2):
        for stream in streams:
            for index in range(stream.n_blocks(16)):
                stream.block(index, 16)
    assert len(os.listdir("/proc/self/fd")) < few_descriptors


def test_the_limit_on_open_files_is_raised_as_far_as_it_may_be(few_descriptors: int) -> None:
    _allow_open_files()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert soft == (65_536 if hard == resource.RLIM_INFINITY else min(hard, 65_536))


def test_no_descriptor_left_for_kept_tokens_is_an_error(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says nothing about the tokens, so they are not thrown away."""
    put(tmp_path, "a/0.jsonl", lines("One boat"))
    tokenise(find_corpus(tmp_path), tokenizer, split=RULE)
    (kept,) = tmp_path.rglob("*.tokens")

    def refuse(_path: object, _flags: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patch:
        patch.setattr("nanothink.data.pages.os.open", refuse)
        with pytest.raises(UnreadableError, match="Too many open files"):
            open_token_file(kept, OpenFiles())
    assert open_token_file(kept, OpenFiles()) is not None


def test_commands_say_it_in_one_line(
    tmp_path: Path, disk: FailingDisk, tiny_tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hurt = put(tmp_path / "data", "a/0.jsonl", lines("One boat"))
    disk.breaks(hurt, errno.ESTALE, 100)
    own = ["--tokenizer", str(tiny_tokenizer), "--skip-bad-records"]
    assert run(["data", "inspect", str(tmp_path / "data"), *own]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: Cannot read {hurt}: Stale file handle. ")
    assert run(["data", "validate", str(tmp_path / "data"), "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert (said["ok"], said["n_unreadable"], said["n_records"]) == (False, 1, 2)
