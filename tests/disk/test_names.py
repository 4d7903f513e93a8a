"""Temporary names, and what dead writers left under them."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

from nanothink.disk import leftovers, sweep, sweep_folder, temporary_path
from nanothink.disk.names import FOREIGN_TEMPORARY_SECONDS

DEAD = 2**22 + 1  # above any process number that Linux gives out


def left_by(folder: Path, host: str, pid: int, *, age_seconds: float = 0, name: str = "a.pt") -> str:
    path = folder / f".{name}.{host}.{pid}-0123456789ab.tmp"
    path.write_bytes(b"x")
    os.utime(path, (time.time() - age_seconds,) * 2)
    return path.name


def test_leftovers_of_dead_writers_are_told_from_files_under_way(tmp_path: Path) -> None:
    here = temporary_path(tmp_path / "a.pt").name.split(".")[3]
    assert here.replace("-", "") in socket.gethostname().replace("-", "").replace(".", "").replace("_", "")
    alive, old = os.getppid(), FOREIGN_TEMPORARY_SECONDS + 60
    (tmp_path / f".b.pt.{here}.{DEAD}.tmp").write_bytes(b"as earlier versions named it")
    expected = {
        left_by(tmp_path, here, DEAD): "a.pt",
        left_by(tmp_path, here, os.getpid()): "a.pt",
        left_by(tmp_path, "elsewhere", alive, age_seconds=old): "a.pt",
        left_by(tmp_path, here, alive, age_seconds=old, name="c.pt"): "c.pt",
        f".b.pt.{here}.{DEAD}.tmp": "b.pt",
    }
    kept = {left_by(tmp_path, here, alive), left_by(tmp_path, "elsewhere", DEAD)}
    for name in (".a.pt.tmp", "a.pt.x.1.tmp", ".a.pt.x.y.tmp", f".a.pt.{here}.1-xyz.tmp", "a.pt"):
        (tmp_path / name).write_bytes(b"x")
        kept.add(name)
    assert {path.name: name for path, name in leftovers(tmp_path)} == expected
    sweep(tmp_path / "b.pt")
    assert {path.name: name for path, name in leftovers(tmp_path)} == {
        left: name for left, name in expected.items() if name != "b.pt"
    }
    sweep_folder(tmp_path)
    assert set(os.listdir(tmp_path)) == kept


def test_a_link_is_removed_and_not_what_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "precious").write_text("x")
    link = Path(str(temporary_path(tmp_path / "a.pt")).replace(f".{os.getpid()}-", f".{DEAD}-"))
    link.symlink_to(tmp_path / "else")
    sweep(tmp_path / "a.pt")
    assert not link.is_symlink()
    assert (tmp_path / "else" / "precious").exists()


def test_a_name_is_new_each_time_and_fits_the_file_system(tmp_path: Path) -> None:
    target = tmp_path / ("x" * 255)
    assert len({temporary_path(target) for _ in range(100)}) == 100
    temporary_path(target).touch()
    sweep(target)
    assert os.listdir(tmp_path) == []
