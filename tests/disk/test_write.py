"""Files and folders that are whole or not there, whatever the disk answers and whatever lies in the way."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nanothink.disk import (
    GrowingFile,
    make_folder,
    new_folder,
    scratch_folder,
    storage_error,
    sync_folder,
    try_to_write,
    whole_file,
    whole_folder,
    write_whole,
)
from nanothink.disk.folders import set_mode, share
from nanothink.errors import StorageError


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def refuse(monkeypatch: pytest.MonkeyPatch, name: str, number: int, *, where: Callable[..., bool]) -> None:
    """Let ``os.<name>`` fail where its arguments are of a kind."""
    really = getattr(os, name)

    def refusing(*arguments: Any, **more: Any) -> Any:
        if where(*arguments):
            raise OSError(number, os.strerror(number))
        return really(*arguments, **more)

    monkeypatch.setattr(os, name, refusing)


def is_folder(descriptor: int) -> bool:
    return stat.S_ISDIR(os.fstat(descriptor).st_mode)


# --- whole files ----------------------------------------------------------------------------------------


def test_a_file_is_written_and_replaced_with_its_folders(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file"
    write_whole(path, b"old")
    write_whole(path, b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(path.parent) == ["file"]


def test_an_error_of_the_block_passes_through_and_leaves_nothing(tmp_path: Path) -> None:
    write_whole(tmp_path / "there", b"old")
    for path in (tmp_path / "there", tmp_path / "new" / "folder" / "file"):
        for raised in (KeyError("x"), OSError(errno.EIO, "of another file"), KeyboardInterrupt()):
            with pytest.raises(type(raised)) as caught, whole_file(path) as file:
                file.write(b"half")
                raise raised
            assert caught.value is raised
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"there": b"old"}


@pytest.mark.parametrize("call", ["open", "write", "fsync", "replace"])
def test_a_refusal_changes_nothing_and_says_so(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_whole(tmp_path / "there", b"old")
    refuse(monkeypatch, call, errno.ENOSPC, where=lambda *_: True)
    for path in (tmp_path / "there", tmp_path / "new" / "file"):
        with pytest.raises(StorageError, match=r"No space left.*Free some space.*Nothing was changed"):
            write_whole(path, b"new")
    monkeypatch.undo()
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"there": b"old"}


def test_a_disk_that_takes_no_bytes_is_not_asked_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "write", lambda descriptor, data: 0)
    with pytest.raises(StorageError, match="took no bytes"):
        write_whole(tmp_path / "file", b"new")


def test_short_writes_make_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    really = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: really(descriptor, bytes(data[:3])))
    write_whole(tmp_path / "file", bytes(range(256)) * 100)
    assert (tmp_path / "file").read_bytes() == bytes(range(256)) * 100


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF])
def test_a_disk_that_cannot_sync_folders_is_written_to(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(monkeypatch, "fsync", number, where=is_folder)
    write_whole(tmp_path / "file", b"new")
    with whole_folder(tmp_path / "folder") as folder:
        (folder / "inside").write_bytes(b"new")
    sync_folder(tmp_path)
    assert (tmp_path / "file").read_bytes() == (tmp_path / "folder" / "inside").read_bytes() == b"new"


def test_a_folder_that_may_not_be_listed_is_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(monkeypatch, "open", errno.EACCES, where=lambda path, *_: os.path.isdir(path))
    refuse(monkeypatch, "scandir", errno.EACCES, where=lambda path: path == tmp_path)
    write_whole(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_a_folder_that_fails_to_sync_is_said_of_files_that_are_there(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    n_synced = 0

    def last(descriptor: int) -> bool:
        nonlocal n_synced
        n_synced += is_folder(descriptor)
        return n_synced == 2

    refuse(monkeypatch, "fsync", number, where=is_folder)
    with pytest.raises(StorageError, match="The new file is complete, but might not survive") as caught:
        write_whole(tmp_path / "new" / "file", b"new")
    monkeypatch.undo()
    refuse(monkeypatch, "fsync", number, where=last)
    with pytest.raises(StorageError, match="is complete, but"), whole_folder(tmp_path / "folder") as folder:
        (folder / "inside").write_bytes(b"new")
    assert "Nothing was changed" not in str(caught.value)
    assert (tmp_path / "new" / "file").read_bytes() == (tmp_path / "folder" / "inside").read_bytes() == b"new"


def test_a_rename_that_was_done_before_its_answer_was_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    really = os.replace

    def replace(old: Path, new: Path) -> None:  # as NFS asks twice when the first answer does not come
        really(old, new)
        really(old, new)

    monkeypatch.setattr(os, "replace", replace)
    write_whole(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"


def test_a_failed_rename_that_was_done_all_the_same_is_not_called_undone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    really = os.replace

    def replace(old: Path, new: Path) -> None:
        really(old, new)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(StorageError, match="complete, but"):
        write_whole(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.EROFS, "Read-only file system.*who may write there"),
        (errno.EXDEV, "mount point"),
        (errno.EBUSY, "mount point"),
        (errno.EACCES, "who may write there"),
        (errno.ELOOP, "a symbolic link: remove it"),
        (errno.ENAMETOOLONG, "too long"),
        (errno.EIO, "Check the disk"),
    ],
)
def test_an_error_says_what_to_do(number: int, remedy: str) -> None:
    error = OSError(number, os.strerror(number))
    unsaid, unchanged, there = (str(storage_error(Path("a\nb"), error, r)) for r in (None, False, True))
    assert re.search(remedy, unsaid)
    assert "changed" not in unsaid
    assert unchanged == f"{unsaid} Nothing was changed."
    assert "complete" in there
    assert {unsaid.count("a\\nb"), there.count("a\\nb")} == {1}


# --- modes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_the_umask_decides_and_then_the_file_that_is_replaced(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        write_whole(tmp_path / "file", b"new")
        with whole_folder(tmp_path / "folder") as folder:
            assert mode(folder) == 0o700
            (folder / "inside").write_bytes(b"new")
        with scratch_folder(tmp_path / "x") as scratch:
            assert mode(scratch) == 0o700
    finally:
        os.umask(before)
    assert mode(tmp_path / "file") == mode(tmp_path / "folder" / "inside") == 0o666 & ~umask
    assert mode(tmp_path / "folder") == 0o777 & ~umask
    (tmp_path / "file").chmod(0o640)
    write_whole(tmp_path / "file", b"newer")
    assert mode(tmp_path / "file") == 0o640


# --- whole folders --------------------------------------------------------------------------------------


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    for n in range(2):
        with whole_folder(tmp_path / "a" / "folder") as folder:
            (folder / f"file{n}").write_bytes(b"x")
            (folder / "sub").mkdir()
            (folder / "sub" / "deep").write_bytes(b"x")
        assert sorted(os.listdir(tmp_path / "a" / "folder")) == [f"file{n}", "sub"]
    assert os.listdir(tmp_path / "a") == ["folder"]
    with pytest.raises(KeyError), whole_folder(tmp_path / "b" / "folder") as folder:
        (folder / "file").write_bytes(b"x")
        raise KeyError
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("nth", [1, 2])
def test_a_folder_that_cannot_be_renamed_leaves_the_old_one(
    nth: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with whole_folder(tmp_path / "folder") as folder:
        (folder / "old").write_bytes(b"x")
    n_calls = 0

    def is_nth(*_: Any) -> bool:
        nonlocal n_calls
        n_calls += 1
        return n_calls == nth

    refuse(monkeypatch, "rename", errno.EXDEV, where=is_nth)
    with (
        pytest.raises(StorageError, match=r"mount point.*Nothing was changed"),
        whole_folder(tmp_path / "folder") as folder,
    ):
        (folder / "new").write_bytes(b"x")
    assert os.listdir(tmp_path) == ["folder"]
    assert os.listdir(tmp_path / "folder") == ["old"]


def test_a_folder_that_cannot_be_put_back_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with whole_folder(tmp_path / "folder") as folder:
        (folder / "old").write_bytes(b"x")
    refuse(monkeypatch, "rename", errno.EIO, where=lambda old, new: new == tmp_path / "folder")
    with pytest.raises(StorageError, match="lies whole in") as caught, whole_folder(tmp_path / "folder"):
        pass
    assert "Nothing was changed" not in str(caught.value)
    (aside,) = os.listdir(tmp_path)
    assert str(tmp_path / aside) in str(caught.value)
    assert os.listdir(tmp_path / aside) == ["old"]


def test_a_new_folder_takes_no_name_that_is_there(tmp_path: Path) -> None:
    made = [new_folder(tmp_path / "a" / "b", within=tmp_path).name for _ in range(3)]
    assert made == ["b", "b-2", "b-3"]


def test_trying_leaves_no_trace(tmp_path: Path) -> None:
    try_to_write(tmp_path / "a" / "b")
    try_to_write(tmp_path)
    (tmp_path / "file").write_bytes(b"x")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StorageError, match="is a file, not a folder"):
            try_to_write(place)
    assert os.listdir(tmp_path) == ["file"]


# --- links ----------------------------------------------------------------------------------------------


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    victim, place = tmp_path / "victim", tmp_path / "place"
    place.mkdir()
    victim.write_bytes(b"precious")
    write_whole(place / "file", b"old")
    (place / "file").unlink()
    (place / "file").symlink_to(victim)
    write_whole(place / "file", b"new")  # the link is replaced, not followed
    assert (place / "file").read_bytes() == b"new"
    assert not (place / "file").is_symlink()
    (place / "log").symlink_to(victim)
    (place / "dangling").symlink_to(tmp_path / "made")
    for name in ("log", "dangling"):
        with pytest.raises(OSError, match="a symbolic link is in the way"):
            GrowingFile(place / name)
    (place / "folder").symlink_to(tmp_path)
    with whole_folder(place / "folder") as folder:
        (folder / "inside").write_bytes(b"x")
    assert os.listdir(place / "folder") == ["inside"]
    assert victim.read_bytes() == b"precious"
    assert sorted(os.listdir(tmp_path)) == ["place", "victim"]


def test_modes_are_not_changed_through_a_link(tmp_path: Path) -> None:
    """Somebody may put one in the place of a folder that was just made."""
    (tmp_path / "private").mkdir(mode=0o750)
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o775)
    (tmp_path / "shared" / "link").symlink_to(tmp_path / "private")
    share(tmp_path / "shared" / "link", tmp_path / "shared")
    with pytest.raises(OSError, match="a symbolic link is in the way"):
        set_mode(tmp_path / "shared" / "link", 0o777)
    assert mode(tmp_path / "private") == 0o750
    share(tmp_path / "private", tmp_path / "shared")
    assert mode(tmp_path / "private") == 0o770


@pytest.mark.parametrize("link", [os.symlink, os.link], ids=["symbolic link", "hard link"])
def test_a_name_that_somebody_takes_beforehand_is_not_used(
    link: Callable[[Path, Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not by chance but by the system: what is made is made exclusively."""
    (tmp_path / "victim").write_bytes(b"precious")
    link(tmp_path / "victim", tmp_path / "guessed")
    monkeypatch.setattr("nanothink.disk.write.temporary_path", lambda path: tmp_path / "guessed")
    with pytest.raises(StorageError, match="Nothing was changed"):
        write_whole(tmp_path / "file", b"new")
    with pytest.raises(StorageError, match="Nothing was changed"), scratch_folder(tmp_path / "x"):
        pass
    assert (tmp_path / "victim").read_bytes() == b"precious"
    assert not (tmp_path / "file").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make another user's link")
def test_folders_that_nanothink_names_are_not_anothers_links(tmp_path: Path) -> None:
    (tmp_path / "else").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "else")
    make_folder(tmp_path / "link" / "own", within=tmp_path)  # this user's own, to another disk perhaps
    os.lchown(tmp_path / "link", 2001, 2001)
    for folder in (tmp_path / "link", tmp_path / "link" / "new"):
        with pytest.raises(OSError, match="another user"):
            make_folder(folder, within=tmp_path)
    make_folder(tmp_path / "link" / "typed")  # a path that was typed is the user's business
    assert sorted(os.listdir(tmp_path / "else")) == ["own", "typed"]
