"""A folder that a group shares, and users whose umask is 022 or 077."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import numpy as np
import pytest
from reports import Told
from two_users import FIRST, GROUP, SECOND, AsUser

from nanothink.data.cache import cache_folder
from nanothink.disk import held, is_in_use, locked, make_folder, whole_folder, write_whole
from nanothink.disk.block_file import BlockFile


def mode(path: Path) -> str:
    return stat.filemode(path.stat().st_mode)


def write_all(folder: Path, user: int) -> str:
    """Everything that NanoThink does in a shared folder."""
    cache = cache_folder(folder / "data", Told(pytest.fail))
    with locked(cache):
        make_folder(cache / "tokens" / "t", within=cache)
        with whole_folder(cache / "tokens" / "t" / "same") as tokens:
            (tokens / "file").write_text(str(user))
        write_whole(cache / "manifest.json", b"{}")
        if not (cache / "states").exists():
            with whole_folder(cache / "states", in_use=True) as states:
                (states / "blocks").touch()
                (states / "marks").touch()
    blocks = BlockFile(cache / "states" / "blocks", cache / "states" / "marks")
    blocks.hold()
    blocks.write(user % 10, [np.full(4, user)])
    blocks.close()
    blocks = BlockFile(cache / "own.blocks", cache / "own.marks", create=True)
    blocks.write(user % 10, [np.full(4, user)])
    blocks.close()
    make_folder(folder / "checkpoints")
    with held(folder / "checkpoints" / ".stem.lock"):
        write_whole(folder / "checkpoints" / "stem.pt", b"x")
    return "fine"


@pytest.mark.parametrize("passes_group_on", [True, False], ids=["2775", "0775"])
def test_two_users_of_a_group_write_in_turn(passes_group_on: bool, shared: Path, as_user: AsUser) -> None:
    shared.chmod(0o2775 if passes_group_on else 0o775)
    assert as_user(FIRST, lambda: make_folder(shared / "data") and "") == ""
    for user in (FIRST, SECOND, FIRST):
        assert as_user(user, lambda: write_all(shared, user)) == "fine"  # noqa: B023
    cache = shared / "data" / ".nanothink"
    for path in (cache / "lock", shared / "checkpoints" / ".stem.lock", cache / "states" / "marks"):
        assert mode(path) == "-rw-rw-r--"
        assert path.stat().st_gid == GROUP
    assert (cache / "tokens" / "t" / "same" / "file").read_text() == str(FIRST)
    assert mode(cache / "tokens" / "t" / "same" / "file") == "-rw-r--r--"


def test_what_the_umask_hides_stays_hidden(shared: Path, as_user: AsUser) -> None:
    assert as_user(FIRST, lambda: write_all(shared, FIRST), umask=0o077) == "fine"
    cache = shared / "data" / ".nanothink"
    assert not (shared / "data").stat().st_mode & 0o077
    assert mode(cache / "lock") == "-rw-------"
    assert as_user(SECOND, lambda: write_all(shared, SECOND)).startswith(("StorageError", "Failed"))


def test_a_lock_that_the_group_may_only_read_is_locked(shared: Path, as_user: AsUser) -> None:
    """As versions before this one made them."""

    def lock() -> str:
        with locked(shared), held(shared / ".stem.lock"):
            return "locked"

    assert as_user(FIRST, lock) == "locked"
    (shared / "lock").chmod(0o644)
    (shared / ".stem.lock").chmod(0o644)
    assert as_user(SECOND, lock) == "locked"
    with held(shared / "lock", wait=True), held(shared / ".stem.lock"):
        assert as_user(SECOND, lambda: _try(shared / ".stem.lock")).startswith("HeldError:  (process ")


def _try(path: Path) -> str:
    with held(path):
        return "locked"


def test_a_cache_of_another_user_gives_way_to_the_own_one(shared: Path, as_user: AsUser) -> None:
    """Where others may write as well, the group does not matter: no folder is opened to everybody."""
    os.chown(shared, 0, 0)
    shared.chmod(0o777)
    home = shared.parent / "home"
    home.mkdir()
    home.chmod(0o777)

    def cache() -> list[str]:
        os.environ["XDG_CACHE_HOME"] = str(home)
        notes: list[str] = []
        folder = cache_folder(shared, Told(notes.append))
        return [folder.parts[-3] if folder != shared / ".nanothink" else "shared", *notes]

    assert as_user(FIRST, cache) == ["shared"]
    (where, note) = as_user(SECOND, cache)
    assert where == "home"
    assert f"{shared / '.nanothink'} cannot be written to" in note


@pytest.mark.parametrize("name", [".nanothink", ".nanothink/lock", ".nanothink/.gitignore"])
def test_links_that_another_user_left_in_the_data_are_not_followed(
    name: str, shared: Path, as_user: AsUser
) -> None:
    private = shared.parent / "private"
    private.mkdir()
    (private / "precious").write_bytes(b"x")
    os.chown(private, SECOND, SECOND)
    os.chown(private / "precious", SECOND, SECOND)

    def plant() -> str:
        make_folder((shared / name).parent)
        target = {".nanothink": private, ".nanothink/lock": private / "precious"}.get(name, private / "made")
        (shared / name).symlink_to(target)
        return ""

    def use() -> str:
        os.environ["XDG_CACHE_HOME"] = str(private / "cache")
        return str(cache_folder(shared))

    assert as_user(FIRST, plant) == ""
    found = as_user(SECOND, use)
    assert found.startswith(str(private / "cache")) == (name != ".nanothink/.gitignore"), found
    assert set(os.listdir(private)) <= {"precious", "cache"}
    assert (private / "precious").read_bytes() == b"x"
    assert mode(private / "precious") == "-rw-r--r--"


def test_leftovers_of_others_that_may_not_be_removed_do_not_matter(shared: Path, as_user: AsUser) -> None:
    from nanothink.disk.names import host

    shared.chmod(0o1777)  # as the folder of temporary files
    left = shared / f".file.{host()}.{2**22 + 1}-0123456789ab.tmp"

    def leave() -> str:
        left.write_bytes(b"x")
        return ""

    def write() -> str:
        write_whole(shared / "file", b"new")
        return "written"

    assert as_user(FIRST, leave) == ""
    assert as_user(SECOND, write) == "written"
    assert left.exists()


def test_blocks_in_use_are_seen_by_others(shared: Path, as_user: AsUser) -> None:
    blocks = BlockFile(shared / "blocks", shared / "marks", create=True)
    blocks.hold()
    assert as_user(SECOND, lambda: is_in_use(shared / "marks")) is True
    blocks.close()
    assert as_user(SECOND, lambda: is_in_use(shared / "marks")) is False
    (shared / "link").symlink_to(shared / "blocks")
    with pytest.raises(OSError, match="a symbolic link is in the way"):
        BlockFile(shared / "link", shared / "marks", create=True)
