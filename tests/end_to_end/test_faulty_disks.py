"""Disks that say no, files that are not what they were: nothing is lost, and one message says what to do."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from struck_runs import Ended, Ground, assert_same_run, metrics

from nanothink.checkpoints import FORMAT_VERSION, read_checkpoint, write_checkpoint

STEM = "transformer_expert"
NOBODY = 65534


def said(ended: Ended, code: int = 1) -> str:
    """The message of a command that failed as it should."""
    assert ended.code == code, ended.stderr
    assert "Traceback" not in ended.stderr
    assert ended.stderr.count("error: ") == 1
    return " ".join(ended.stderr.partition("error: ")[2].split())


@pytest.fixture(scope="module")
def stopped(ground: Ground, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stopped")
    strike = {"event": "StepDone", "having": {"step": 14}, "signals": ["SIGINT"]}
    assert ground.server.run(ground.typed("transformer", folder), strike=strike).code == 130
    return folder


@pytest.fixture
def interrupted(stopped: Path, tmp_path: Path) -> Path:
    """Folder of a run that was stopped at step 14, in its second epoch: best, snapshot, rolling file."""
    return Path(shutil.copytree(stopped, tmp_path / "checkpoints"))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.pt")}


# --- full disks -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("own_disks")
def test_a_disk_that_fills_up_while_training(
    ground: Ground, uninterrupted: Callable[[str], Path], tmp_path: Path
) -> None:
    """Two checkpoints of 190 KB have room; the third, which is to replace the first, has not."""
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    arguments = ground.typed("transformer", disk)
    small = {"folder": str(disk), "options": "size=500k", "kept_in": str(kept)}
    message = said(ground.server.run(arguments, disk=small))
    for part in (
        "No space left on device",
        "bytes are needed",
        "bytes are free",
        "checkpoints prune",
        "--resume",
    ):
        assert part in message
    # What was there is whole, nothing half-written lies about, and with room the run ends as it would have.
    assert content(kept).keys() == {f"{STEM}_interrupted.pt", f"{STEM}.pt"}
    assert not [name for name in os.listdir(kept) if name.endswith(".tmp")]
    ended = ground.server.run([*ground.typed("transformer", kept), "--resume"])
    assert ended.code == 0, ended.stderr
    assert_same_run(uninterrupted("transformer"), kept, STEM)


@pytest.mark.usefixtures("own_disks")
def test_a_disk_that_is_full_already(ground: Ground, interrupted: Path, tmp_path: Path) -> None:
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    full = {
        "folder": str(disk),
        "options": "size=2m",
        "content": str(interrupted),
        "fill": True,
        "kept_in": str(kept),
    }
    for more in (["--resume"], ["--overwrite"]):
        message = said(ground.server.run([*ground.typed("transformer", disk), *more], disk=full))
        assert "full" in message or "No space left" in message
        assert content(kept) == content(interrupted)
        shutil.rmtree(kept)


@pytest.mark.usefixtures("own_disks")
def test_no_room_for_tokens(ground: Ground, tmp_path: Path) -> None:
    disk, plain = tmp_path / "disk", tmp_path / "plain"
    disk.mkdir()
    shutil.copytree(ground.corpus, plain, ignore=shutil.ignore_patterns(".nanothink"))
    arguments = ground.typed("transformer", tmp_path / "checkpoints")
    arguments[arguments.index("--data-dir") + 1] = str(disk)
    full = {"folder": str(disk), "options": "size=100k", "content": str(plain), "fill": True}
    message = said(ground.server.run(arguments, disk=full))
    assert "No space left on device. Free some space" in message
    assert str(disk) in message


# --- no permission, read-only ---------------------------------------------------------------------------


@pytest.mark.usefixtures("own_disks")
def test_a_read_only_folder_can_be_read_and_is_not_trained_in(
    ground: Ground, interrupted: Path, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    locked = {"folder": str(disk), "options": "size=4m", "content": str(interrupted), "read_only": True}
    for more in (["--resume"], ["--overwrite"]):
        message = said(ground.server.run([*ground.typed("transformer", disk), *more], disk=locked))
        assert "Read-only file system" in message or "read-only" in message
        assert "--checkpoint-dir" in message
    for reading in (
        ["checkpoints", "ls", "--checkpoint-dir", str(disk)],
        ["checkpoints", "verify", "--checkpoint-dir", str(disk)],
        ["generate", "time", "-n", "3", "--checkpoint-dir", str(disk)],
    ):
        ended = ground.server.run(reading, disk=locked)
        assert ended.code == 0, ended.stderr
        assert ended.stdout


@pytest.fixture
def open_to_all(ground: Ground) -> Iterator[Ground]:
    """The same ground where another user may read it: the folders of pytest are closed to them."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        shutil.copytree(ground.corpus, folder / "corpus")
        shutil.copytree(ground.tokenizer, folder / "tokenizer")
        (folder / "cache").mkdir()
        (folder / "cache").chmod(0o777)
        yield Ground(ground.server, folder / "corpus", folder / "tokenizer", ground.experts)


@pytest.mark.parametrize("what", ["folder", "file"])
def test_no_permission(what: str, open_to_all: Ground, interrupted: Path) -> None:
    folder = open_to_all.corpus.parent / "checkpoints"
    shutil.copytree(interrupted, folder)
    rolling = folder / f"{STEM}_interrupted.pt"
    options: dict[str, Any] = {"XDG_CACHE_HOME": str(open_to_all.corpus.parent / "cache")}
    if os.getuid() == 0:
        options["user"] = NOBODY
    if what == "folder":
        for path in (folder, folder / "runs"):
            path.chmod(0o555)
    else:
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o777)
        rolling.chmod(0)
    before = {name: os.stat(folder / name).st_mtime_ns for name in os.listdir(folder)}
    arguments = [*open_to_all.typed("transformer", folder), "--resume"]
    message = said(open_to_all.server.run(arguments, **options))
    assert "ermission" in message
    assert str(folder if what == "folder" else rolling) in message
    # A later state that cannot be read is not trained over either.
    pt_files = [name for name in before if name.endswith(".pt")]
    assert {n: os.stat(folder / n).st_mtime_ns for n in pt_files} == {n: before[n] for n in pt_files}
    folder.chmod(0o755)


# --- files that are not what they were ------------------------------------------------------------------


def test_a_rolling_file_that_is_empty_is_passed_over_by_both_commands(
    ground: Ground, uninterrupted: Callable[[str], Path], interrupted: Path, tmp_path: Path
) -> None:
    (interrupted / f"{STEM}_interrupted.pt").write_bytes(b"")
    other = tmp_path / "other"
    shutil.copytree(interrupted, other)
    for folder, arguments in (
        (interrupted, [*ground.typed("transformer", interrupted), "--resume"]),
        (other, ["resume", "--checkpoint-dir", str(other)]),
    ):
        ended = ground.server.run(arguments)
        assert ended.code == 0, ended.stderr
        assert f"Passing over {folder / f'{STEM}_interrupted.pt'}: it is empty (0 bytes)" in ended.stderr
        assert f"Resuming from {folder / f'{STEM}_epoch1.pt'}: epoch 1, step 12" in ended.stderr
        # The best of steps that were done twice is older; all that came later is the same.
        last = f"{STEM}_epoch2.pt"
        assert (folder / last).exists()
        assert metrics(folder, STEM) == metrics(uninterrupted("transformer"), STEM)


def test_a_resume_with_nothing_sound_says_so(ground: Ground, interrupted: Path) -> None:
    for path in interrupted.glob("*.pt"):
        path.write_bytes(path.read_bytes()[:-1])
    before = content(interrupted)
    message = said(ground.server.run(["resume", "--checkpoint-dir", str(interrupted)]))
    assert "all their files are damaged" in message
    assert "nanothink checkpoints ls" in message
    assert content(interrupted) == before


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped"])
def test_a_damaged_file_is_refused_by_name(damage: str, ground: Ground, interrupted: Path) -> None:
    path = interrupted / f"{STEM}.pt"
    whole = bytearray(path.read_bytes())
    if damage == "flipped":
        whole[len(whole) // 2] ^= 1
    path.write_bytes({"empty": b"", "cut": bytes(whole[:-500]), "flipped": bytes(whole)}[damage])
    for arguments in (
        ["resume", str(path)],
        ["generate", "time", "-c", str(path)],
        ["eval", str(path)],
        ["checkpoints", "show", str(path)],
    ):
        message = said(ground.server.run(arguments))
        assert str(path) in message
        assert "Use another checkpoint" in message
    ended = ground.server.run(["checkpoints", "verify", "--checkpoint-dir", str(interrupted)])
    assert ended.code == 1
    assert "Traceback" not in ended.stderr


def test_a_checkpoint_of_a_newer_version_is_not_trained_over(ground: Ground, interrupted: Path) -> None:
    path = interrupted / f"{STEM}_interrupted.pt"
    payload = read_checkpoint(path)
    payload["format_version"] = FORMAT_VERSION + 1
    write_checkpoint(path, payload)
    before = content(interrupted)
    for arguments in (
        [*ground.typed("transformer", interrupted), "--resume"],
        [*ground.typed("transformer", interrupted), "--resume", str(interrupted / f"{STEM}.pt")],
        ["resume", "--checkpoint-dir", str(interrupted)],
        ["resume", str(path)],
    ):
        message = said(ground.server.run(arguments))
        assert str(path) in message
        assert "newer NanoThink" in message
        assert "Upgrade" in message
        assert content(interrupted) == before
