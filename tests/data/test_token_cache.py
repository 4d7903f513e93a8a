"""Kept tokens: nothing done twice, nothing half-made trusted, whatever the disk does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
from reports import Told
from token_corpora import (
    cached_files,
    some_texts,
    tokenised,
    tokens_of,
    write_texts,
)

from nanothink.data.corpus import find_corpus
from nanothink.data.pages import OpenFiles
from nanothink.data.split import SplitRule
from nanothink.data.token_files import is_whole, open_token_file
from nanothink.data.tokenizer import Tokenizer
from nanothink.data.tokens import tokenise
from nanothink.disk import locked
from nanothink.errors import DataError, StorageError, UnreadableError


def cached_digests(root: Path) -> set[str]:
    return {name.split("/")[1].removesuffix(".tokens") for name in cached_files(root)}


def test_only_new_and_changed_files_are_done_again(root: Path, tokenizer: Tokenizer) -> None:
    tokenised(root, tokenizer)
    first = cached_files(root)
    assert len(cached_digests(root)) == 3
    tokenised(root, tokenizer)
    assert cached_files(root) == first
    write_texts(root / "a" / "1.jsonl", some_texts("apples", 41))
    write_texts(root / "b" / "2.jsonl", some_texts("blueberries", 9))
    (root / "a" / "2.jsonl").rename(root / "a" / "3.jsonl")
    tokenised(root, tokenizer)
    second = cached_files(root)
    assert {name: second[name] for name in first} == first
    assert len(cached_digests(root)) == 5


def test_the_same_content_is_tokenised_once(root: Path, tokenizer: Tokenizer) -> None:
    write_texts(root / "b" / "copy.jsonl", some_texts("apples", 40))
    tokens = tokenised(root, tokenizer)
    assert len(cached_digests(root)) == 3
    n_documents = tokens.train["b"].n_documents + tokens.val["b"].n_documents
    assert n_documents == 70


def test_unchanged_files_are_not_even_read(root: Path, tokenizer: Tokenizer) -> None:
    tokenised(root, tokenizer)
    time.sleep(2.1)  # a younger file could still change within the clock's tick
    before = tokenised(root, tokenizer)
    # Same size, time and inode: only by reading it could one know.
    path = root / "b" / "1.jsonl"
    manifest = json.loads((root / ".nanothink" / "manifest.json").read_text())
    assert sorted(manifest) == ["a/1.jsonl", "a/2.jsonl", "b/1.jsonl"]
    content, status = path.read_bytes(), path.stat()
    path.write_bytes(content.replace(b"best", b"rest"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    changed = path.stat()
    manifest["b/1.jsonl"][2] = changed.st_ctime_ns
    (root / ".nanothink" / "manifest.json").write_text(json.dumps(manifest))
    assert tokenised(root, tokenizer).fingerprint == before.fingerprint
    manifest["b/1.jsonl"][2] -= 1  # the change of inode that no program can undo
    (root / ".nanothink" / "manifest.json").write_text(json.dumps(manifest))
    assert tokenised(root, tokenizer).fingerprint != before.fingerprint


def kept_files(root: Path, tokenizer: Tokenizer) -> list[Path]:
    return sorted((root / ".nanothink" / "tokens" / tokenizer.fingerprint[:16]).glob("*.tokens"))


@pytest.mark.parametrize("damage", ["cut off", "empty", "gone", "tokens", "rows", "summary", "end"])
def test_damaged_tokens_are_made_again(root: Path, tokenizer: Tokenizer, damage: str) -> None:
    before = tokenised(root, tokenizer)
    expected = [tokens_of(stream) for stream in before.train.values()]
    path = kept_files(root, tokenizer)[0]
    whole = path.read_bytes()
    kept = open_token_file(path, OpenFiles())
    assert kept is not None
    flipped = bytearray(whole)
    end_of_tokens = len(kept.tokens) * 2 + 4
    places = {"tokens": 5, "rows": end_of_tokens + 9, "summary": -30, "end": -3}
    if damage in places:
        flipped[places[damage]] ^= 4
        path.write_bytes(flipped)
    elif damage == "cut off":
        os.truncate(path, len(whole) - 2)
    elif damage == "empty":
        os.truncate(path, 0)
    else:
        path.unlink()
    assert not is_whole(path, OpenFiles())
    notes: list[str] = []
    after = tokenised(root, tokenizer, reporter=Told(notes.append))
    assert [tokens_of(stream) for stream in after.train.values()] == expected
    assert after.fingerprint == before.fingerprint
    assert ["damaged" in note for note in notes] == ([] if damage == "gone" else [True])
    assert path.read_bytes() == whole


def test_tokens_that_are_damaged_or_lost_while_they_are_used_are_made_again(
    root: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda _which: (8, 8))  # one file open at a time
    tokenised(root, tokenizer)
    used = kept_files(root, tokenizer)
    write_texts(root / "single" / "x.jsonl", ["The only text here, which is cut in two. " * 20])
    notes: list[str] = []
    tokens = tokenised(root, tokenizer, reporter=Told(notes.append))
    used += [path for path in kept_files(root, tokenizer) if path.name.startswith("cut-")]
    expected = [tokens_of(stream) for stream in tokens.train.values()]
    whole = {path: path.read_bytes() for path in used}
    for path, content in whole.items():
        os.truncate(path, 10)  # the same file, which is open
        assert [tokens_of(stream) for stream in tokens.train.values()] == expected
        assert path.read_bytes() == content
    assert ["damaged" in note for note in notes] == [True] * 3  # a cut text is silently cut again
    for path in whole:
        path.unlink()
    assert [tokens_of(stream) for stream in tokens.train.values()] == expected

    # With another text in its place there is nothing to make the lost tokens from.
    write_texts(root / "b" / "1.jsonl", ["other"])
    for path in root.rglob("*.tokens"):
        os.truncate(path, 10)
    with pytest.raises(DataError, match=r"b/1\.jsonl changed while"):
        tokens_of(tokens.train["b"])


def test_any_bit_that_flips_is_found(root: Path, tokenizer: Tokenizer) -> None:
    tokenised(root, tokenizer)
    path = kept_files(root, tokenizer)[0]
    whole = path.read_bytes()
    for bit in range(0, 8 * len(whole), 41):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        assert not is_whole(path, OpenFiles()), bit
    path.write_bytes(whole)
    assert is_whole(path, OpenFiles())


def test_progress_counts_bytes_to_the_end(root: Path, tokenizer: Tokenizer) -> None:
    total = find_corpus(root).n_bytes
    for _ in range(2):
        seen: list[tuple[int, int]] = []
        tokenised(root, tokenizer, reporter=Told(progress=lambda _, *at: seen.append(at)))  # noqa: B023
        assert seen == sorted(seen)
        assert seen[-1] == (total, total)
        assert {at[1] for at in seen} == {total}


def test_a_data_root_that_cannot_be_written_to(
    root: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (root / ".nanothink").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    notes: list[str] = []
    first = tokenised(root, tokenizer, reporter=Told(notes.append))
    assert len(notes) == 1
    assert str(tmp_path / "cache" / "nanothink") in notes[0]
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.tokens")}
    assert len(made) == 3
    again = tokenised(root, tokenizer)
    assert again.fingerprint == first.fingerprint
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.tokens")} == made


def test_no_place_at_all(
    root: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (root / ".nanothink").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(root / ".nanothink"))
    monkeypatch.setattr("tempfile.tempdir", str(root / ".nanothink"))
    with pytest.raises(StorageError, match="XDG_CACHE_HOME"):
        tokenised(root, tokenizer)


def test_a_home_that_is_not_there(
    root: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (root / ".nanothink").write_text("in the way")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(root / ".nanothink"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    notes: list[str] = []
    tokenised(root, tokenizer, reporter=Told(notes.append))
    assert str(tmp_path / "nanothink-") in notes[0]


SCRIPT = """
import sys
from pathlib import Path
from nanothink.data.corpus import find_corpus
from nanothink.data.split import SplitRule
from nanothink.data.tokenizer import load_tokenizer
from nanothink.data.tokens import tokenise
from nanothink.reporter import Reporter
root, tokenizer = sys.argv[1:3]
exec(sys.argv[3])
class Printer(Reporter):
    def progress(self, stage, done, total):
        if done: print(done, flush=True)
tokens = tokenise(find_corpus(root), load_tokenizer(tokenizer), split=SplitRule(0.1), reporter=Printer())
print(tokens.fingerprint, flush=True)
status = Path("/proc/self/status").read_text()  # getrusage's peak would include that of the parent
print(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")), flush=True)
"""


@pytest.fixture
def saved(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    from nanothink.data.tokenizer import save_tokenizer

    return save_tokenizer(tokenizer, tmp_path / "tokenizer")


def start_child(
    root: Path, saved: Path, first: str = "", environment: Mapping[str, str] | None = None
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(root), str(saved), first],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **(environment or {})},
    )


def finish_child(process: subprocess.Popen[str]) -> list[str]:
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    return out.split()


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A few megabytes in one file after a small one: enough to be caught in the middle."""
    root = tmp_path / "large"
    write_texts(root / "a" / "1.jsonl", some_texts("small", 20))
    write_texts(
        root / "a" / "2.jsonl", [f"{i} {text * 9}" for i in range(40) for text in some_texts("large", 100)]
    )
    return root


def test_a_killed_build_leaves_nothing_that_is_trusted(
    large: Path, tokenizer: Tokenizer, saved: Path, tmp_path: Path
) -> None:
    process = start_child(large, saved)
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) > (large / "a" / "1.jsonl").stat().st_size:  # within the second file
            break
    process.send_signal(signal.SIGKILL)
    process.communicate()
    folder = large / ".nanothink" / "tokens" / tokenizer.fingerprint[:16]
    left = [path.name for path in folder.iterdir()]
    assert sum(name.endswith(".tmp") for name in left) == 1  # caught in the middle
    assert len(left) == 2
    after = tokenised(large, tokenizer, 0.1)
    assert not list(folder.glob(".*.tmp"))

    # The same as if nothing had happened.
    other = tmp_path / "other"
    (other / "a").mkdir(parents=True)
    for path in (large / "a").iterdir():
        os.link(path, other / "a" / path.name)
    undisturbed = tokenised(other, tokenizer, 0.1)
    assert after.fingerprint == undisturbed.fingerprint
    for path in (other / ".nanothink" / "tokens").rglob("*.tokens"):
        twin = large / path.relative_to(other)
        assert twin.read_bytes() == path.read_bytes()


def test_tokens_do_not_depend_on_the_number_of_threads(large: Path, saved: Path) -> None:
    made = []
    for threads in ("1", "3"):
        finish_child(start_child(large, saved, environment={"RAYON_NUM_THREADS": threads}))
        files = sorted((large / ".nanothink").rglob("*.tokens"))
        assert len(files) == 2
        made.append([path.read_bytes() for path in files])
        for path in files:
            path.unlink()
    assert made[0] == made[1]


def test_two_at_once_do_the_work_once(large: Path, saved: Path, tokenizer: Tokenizer) -> None:
    processes = [start_child(large, saved) for _ in range(2)]
    fingerprints = {finish_child(process)[-2] for process in processes}
    assert len(fingerprints) == 1
    assert len(cached_digests(large)) == 2
    assert not list((large / ".nanothink").rglob(".*.tmp"))


def test_waiting_for_another_process_is_said(
    root: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nanothink.disk.lock.PATIENCE_SECONDS", 0.05)
    (root / ".nanothink").mkdir()
    held = locked(root / ".nanothink")
    held.__enter__()
    notes: list[str] = []

    def let_go(message: str) -> None:
        notes.append(message)
        held.__exit__(None, None, None)

    tokenised(root, tokenizer, reporter=Told(let_go))
    assert len(notes) == 1
    assert "waiting" in notes[0]
    with locked(root / ".nanothink"):
        tokenised(root, tokenizer, reporter=Told(pytest.fail))  # nothing to write: nothing to wait for


def test_a_full_disk_is_a_clear_error_and_loses_nothing(large: Path, saved: Path) -> None:
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))"
    process = start_child(large, saved, limit)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 1
    assert error.splitlines()[-1].startswith("nanothink.errors.StorageError: Cannot write ")
    assert "Raise the limit" in error.splitlines()[-1]
    assert not list((large / ".nanothink").rglob(".*.tmp"))
    finish_child(start_child(large, saved))


@pytest.mark.parametrize(
    ("shape", "megabytes", "bound"),
    [
        ("documents", 20, 10),  # far less than the tokens alone
        ("one document", 12, 8 * 12),  # a few copies of the line and its ids
    ],
)
def test_memory_does_not_grow_with_the_corpus(
    tmp_path: Path, saved: Path, shape: str, megabytes: int, bound: int
) -> None:
    peaks = []
    sentence = "it was the best of times, it was the worst of times, number {}; "
    for name, size in (("small", 2), ("large", megabytes)):
        n = size * 2**20 // 66
        if shape == "documents":
            texts = [f"{i} " + sentence.format(i % 100) * 66 for i in range(n // 66)]
        else:
            texts = [sentence.format(1) * n, "another"]
        write_texts(tmp_path / name / "a" / "x.jsonl", texts)
        peaks.append(int(finish_child(start_child(tmp_path / name, saved))[-1]) / 1024)
    assert peaks[1] - peaks[0] < bound, peaks


@pytest.mark.parametrize("name", ["folder.jsonl", "pipe.jsonl", "link.jsonl"])
def test_what_is_no_file_is_an_error_and_never_left_out(
    tmp_path: Path, tokenizer: Tokenizer, name: str
) -> None:
    """A folder, a pipe or a dangling link called like data: named and not hung on."""
    path = tmp_path / "d" / name
    write_texts(tmp_path / "d" / "good.jsonl", some_texts("d", 20))
    if name.startswith("folder"):
        path.mkdir()
    elif name.startswith("pipe"):
        os.mkfifo(path)
    else:
        path.symlink_to("nowhere")
    for skip in (False, True):
        with pytest.raises(UnreadableError, match=f"Cannot read {path}: "):
            tokenise(find_corpus(tmp_path), tokenizer, split=SplitRule(0.1), skip_bad_records=skip)
