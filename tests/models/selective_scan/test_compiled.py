"""The compiled scan's library: built, kept, and never loaded when another user can have changed it."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nanothink.disk import private
from nanothink.models import native
from nanothink.models.selective_scan import compiled

pytestmark = pytest.mark.skipif(bool(compiled.unavailable()), reason=compiled.unavailable() or "-")

STRANGER = 'extern "C" __attribute__((constructor)) void f() { __builtin_abort(); }'
"""Ends the process that loads it."""


@pytest.fixture(scope="module")
def built() -> Iterator[Path]:
    """A cache that holds the library. Read only."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        cache = Path(folder).resolve() / "cache"
        patch.setenv("XDG_CACHE_HOME", str(cache))
        assert compiled._load.__wrapped__()[1] == ""
        yield cache


@pytest.fixture(scope="module")
def strangers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("strangers") / "library.so"
    compiler = native.find_compiler()
    assert compiler is not None
    command = [compiler, "-shared", "-fPIC", "-x", "c++", "-", "-o", str(path)]
    subprocess.run(command, input=STRANGER.encode(), check=True)
    return path


@pytest.fixture
def cache(built: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of that cache, and the folder of temporary files beside it."""
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder).resolve()
        shutil.copytree(built, base / "cache")
        (base / "tmp").mkdir()
        monkeypatch.setenv("XDG_CACHE_HOME", str(base / "cache"))
        monkeypatch.setattr("tempfile.tempdir", str(base / "tmp"))
        yield base / "cache"


def library_in(cache: Path) -> Path:
    (path,) = (cache / "nanothink" / "compiled").glob("scan-*.so")
    return path


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch, built: Path) -> list[Path]:
    """Where it was built, by copying instead of compiling."""
    made: list[Path] = []

    def build(compiler: str, source: bytes, path: Path) -> Any:
        shutil.copy(library_in(built), path)
        made.append(path)
        return native.open_library(path)

    monkeypatch.setattr(native, "build", build)
    return made


def test_it_is_built_once_for_this_user_alone(built: Path, cache: Path, builds: list[Path]) -> None:
    for path in (library_in(built), *library_in(built).parents[:3]):
        assert path.stat().st_mode & 0o777 == 0o700
    assert os.listdir(library_in(built).parent) == [library_in(built).name]
    assert compiled._load.__wrapped__()[1] == ""
    assert builds == []


@pytest.mark.parametrize("where", ["cache", "nanothink", "compiled", "the library"])
def test_a_library_that_others_can_reach_is_not_loaded(
    where: str, cache: Path, strangers: Path, builds: list[Path]
) -> None:
    library = library_in(cache)
    shutil.copy(strangers, library)
    opened = {
        "cache": cache,
        "nanothink": library.parents[1],
        "compiled": library.parent,
        "the library": library,
    }
    opened[where].chmod(0o777)
    found, why_not = compiled._load.__wrapped__()
    assert why_not == ""
    assert found is not None
    assert len(builds) == 1
    kept = library if where == "the library" else cache.parent / "tmp"
    assert builds[0].is_relative_to(kept)


def test_a_file_that_changes_after_it_was_checked_is_not_what_is_loaded(
    cache: Path, strangers: Path, builds: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    really = private.open_private

    def then_replaced(path: Path) -> int:
        descriptor = really(path)
        shutil.copy(strangers, path.with_name("strangers.so"))
        os.replace(path.with_name("strangers.so"), path)
        return descriptor

    monkeypatch.setattr(native, "open_private", then_replaced)
    assert compiled._load.__wrapped__()[1] == ""
    assert builds == []


def test_a_damaged_library_is_built_again(cache: Path, builds: list[Path]) -> None:
    library_in(cache).write_bytes(b"cut off")
    for _ in range(2):
        assert compiled._load.__wrapped__()[1] == ""
    assert builds == [library_in(cache)]


def test_no_place_is_safe(cache: Path, builds: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all may rename what is in the folder of temporary files, no folder in it is anybody's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    (cache.parent / "tmp").chmod(0o777)
    found, why_not = compiled._load.__wrapped__()
    assert found is None
    assert str(cache.parent / "tmp") in why_not
    assert builds == []
    (cache.parent / "tmp").chmod(0o1777)
    assert compiled._load.__wrapped__()[1] == ""


def test_a_system_without_proc_loads_a_copy_of_its_own(
    cache: Path, builds: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []
    really = ctypes.CDLL

    def noted(name: str) -> ctypes.CDLL:
        loaded.append(name)
        return really(name)

    monkeypatch.setattr(ctypes, "CDLL", noted)
    exists = Path.exists
    monkeypatch.setattr(Path, "exists", lambda path: not str(path).startswith("/proc") and exists(path))
    assert compiled._load.__wrapped__()[1] == ""
    assert builds == []
    name, _ = loaded  # the other is PyTorch
    assert Path(name).is_relative_to(cache.parent / "tmp")
    assert Path(name).parent.stat().st_mode & 0o777 == 0o700
