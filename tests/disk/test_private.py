"""Paths that nobody else can make lead elsewhere."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from nanothink.disk import is_safe, open_private, private_folder, user_folders

STRANGER = 2001

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make another user's files")


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache and a folder of temporary files on a safe path, as those of pytest may not be."""
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder).resolve()
        (base / "cache").mkdir(mode=0o700)
        (base / "tmp").mkdir()
        (base / "tmp").chmod(0o1777)
        monkeypatch.setenv("XDG_CACHE_HOME", str(base / "cache"))
        monkeypatch.setattr("tempfile.tempdir", str(base / "tmp"))
        yield base


def test_the_cache_comes_first(home: Path) -> None:
    assert private_folder("a", "b") == home / "cache" / "a" / "b"
    assert is_safe(home / "cache" / "a" / "b")


@pytest.mark.parametrize("where", ["cache", "cache/a", "cache/a/b"])
@pytest.mark.parametrize("mode", [0o770, 0o707, 0o1777])
def test_a_folder_that_others_can_write_to(where: str, mode: int, home: Path) -> None:
    """A sticky one may stand above, since others cannot rename there, but not be it."""
    (home / "cache" / "a" / "b").mkdir(parents=True)
    (home / where).chmod(mode)
    own = home / "tmp" / f"nanothink-{os.getuid()}" / "a" / "b"
    safe = mode == 0o1777 and where != "cache/a/b"
    assert private_folder("a", "b") == (home / "cache" / "a" / "b" if safe else own)


@as_root
@pytest.mark.parametrize("where", ["cache", "cache/a", "cache/a/b"])
def test_a_folder_of_somebody_else(where: str, home: Path) -> None:
    (home / "cache" / "a" / "b").mkdir(parents=True)
    os.chown(home / where, STRANGER, STRANGER)
    assert private_folder("a", "b") == home / "tmp" / f"nanothink-{os.getuid()}" / "a" / "b"


@as_root
def test_a_name_among_temporary_files_that_somebody_else_took(home: Path) -> None:
    (home / "cache").chmod(0o777)
    taken = home / "tmp" / f"nanothink-{os.getuid()}"
    for take in (lambda: taken.mkdir(), lambda: taken.symlink_to(home / "cache"), lambda: taken.touch()):
        take()
        os.lchown(taken, STRANGER, STRANGER)
        assert list(user_folders()) == [home / "cache"]
        assert private_folder("a") is None
        taken.rmdir() if taken.is_dir() and not taken.is_symlink() else taken.unlink()
    taken.mkdir()
    taken.chmod(0o777)  # its own, but open to all
    assert private_folder("a") is None


def test_links_are_followed_before_they_are_judged(home: Path) -> None:
    (home / "cache" / "real").mkdir(mode=0o700)
    (home / "open").mkdir()
    (home / "open").chmod(0o777)
    (home / "open" / "link").symlink_to(home / "cache" / "real")
    os.environ["XDG_CACHE_HOME"] = str(home / "open" / "link")
    assert private_folder("a") == home / "cache" / "real" / "a"


def test_files_that_others_can_change_are_not_opened(home: Path) -> None:
    path = home / "cache" / "file"
    path.write_bytes(b"x")
    path.chmod(0o700)
    os.close(open_private(path))
    for mode in (0o720, 0o702):
        path.chmod(mode)
        with pytest.raises(PermissionError):
            open_private(path)
    path.chmod(0o700)
    (home / "cache" / "link").symlink_to(path)
    os.mkfifo(home / "cache" / "pipe", 0o600)
    for name in ("link", "pipe", "."):
        with pytest.raises(OSError, match=r"symbolic|write to it"):
            open_private(home / "cache" / name)
    if os.geteuid() == 0:
        os.chown(path, STRANGER, STRANGER)
        with pytest.raises(PermissionError):
            open_private(path)
