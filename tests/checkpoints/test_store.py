from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from reports import Told

from nanothink.checkpoints import (
    FORMAT_VERSION,
    CheckpointStore,
    CheckpointSummary,
    DamagedEntry,
    list_checkpoints,
    prune,
    read_checkpoint,
    verify_checkpoint,
    write_checkpoint,
)
from nanothink.disk import temporary_path
from nanothink.errors import CheckpointMismatchError, StorageError, UsageError


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path / "checkpoints", "transformer_expert")


def damage(path: Path) -> None:
    """Flip one byte in the middle of the tensor data."""
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 1
    path.write_bytes(whole)


# --- names and search ---------------------------------------------------------------------------------


def test_names_are_those_of_the_design(store):
    names = [path.name for path in (store.best, store.epoch(15), store.interrupted)]
    assert names == [
        "transformer_expert.pt",
        "transformer_expert_epoch15.pt",
        "transformer_expert_interrupted.pt",
    ]
    assert store.existing() == []
    assert store.newest(Told(pytest.fail)) is None


def test_a_stem_that_could_be_taken_for_another_is_refused(tmp_path):
    for stem in ("a_epoch3", "a_interrupted", "a/b", ""):
        with pytest.raises(UsageError):
            CheckpointStore(tmp_path, stem)


def test_newest_goes_by_role_and_number(store, make_payload):
    order = [store.best, store.epoch(5), store.epoch(10), store.epoch(100), store.interrupted]
    for path in reversed(order):  # the newest by date is the oldest by role
        store.write(path, make_payload())
    assert store.existing() == order
    while order:
        assert store.newest(Told(pytest.fail)) == order[-1]
        order.pop().unlink()


def test_newest_prefers_a_best_file_that_is_further_on_than_the_snapshots(store, make_payload):
    store.write(store.epoch(5), make_payload(step=50))
    store.write(store.best, make_payload(step=60))
    assert store.newest(Told(pytest.fail)) == store.best
    store.write(store.interrupted, make_payload(step=55))
    assert store.newest(Told(pytest.fail)) == store.interrupted
    store.interrupted.unlink()
    store.write(store.epoch(7), make_payload(step=70))
    assert store.newest(Told(pytest.fail)) == store.epoch(7)


@pytest.mark.parametrize("cut_off", [True, False])
def test_newest_goes_from_a_damaged_snapshot_to_the_best_file_not_past_it(store, make_payload, cut_off):
    store.write(store.epoch(5), make_payload(step=50))
    store.write(store.best, make_payload(step=60))
    store.write(store.epoch(7), make_payload(step=70))
    if cut_off:
        store.epoch(7).write_bytes(b"")
    else:
        damage(store.epoch(7))
    notes: list[str] = []
    assert store.newest(Told(notes.append)) == store.best
    (note,) = notes
    assert note.startswith(f"Passing over {store.epoch(7)}: ")


def test_newest_passes_over_damaged_files_and_says_why(store, make_payload):
    for path in (store.best, store.epoch(9), store.epoch(10), store.interrupted):
        store.write(path, make_payload())
    damage(store.interrupted)
    store.epoch(10).write_bytes(b"")
    notes: list[str] = []
    assert store.newest(Told(notes.append)) == store.epoch(9)
    first, second = notes
    assert first.startswith(f"Passing over {store.interrupted}: its content is not what was written")
    assert second.startswith(f"Passing over {store.epoch(10)}: it is empty")
    for path in (store.best, store.epoch(9)):
        damage(path)
    assert store.newest() is None


def test_newest_does_not_pass_over_what_may_be_sound(store, make_payload, monkeypatch):
    """A resumed run would write over it."""
    store.write(store.best, make_payload())
    torch.save({"format_version": FORMAT_VERSION + 1}, store.interrupted)
    with pytest.raises(CheckpointMismatchError, match="newer NanoThink"):
        store.newest(Told(pytest.fail))
    store.write(store.interrupted, make_payload())
    really_open = Path.open

    def refuse(path: Path, *arguments: Any, **options: Any) -> Any:
        if path == store.interrupted:
            raise PermissionError(13, "Permission denied")
        return really_open(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(StorageError, match="cannot be read: Permission denied"):
        store.newest(Told(pytest.fail))


def test_newest_passes_over_a_file_that_has_just_gone(store, make_payload, monkeypatch):
    for path in (store.best, store.interrupted):
        store.write(path, make_payload())
    both = store.existing()
    store.interrupted.unlink()
    monkeypatch.setattr(store, "existing", lambda: list(both))
    assert store.newest(Told(pytest.fail)) == store.best


def test_a_stem_never_takes_files_of_another(tmp_path, make_payload):
    names = [
        "a.pt",
        "a_epoch5.pt",
        "a_epoch_expert.pt",
        "a_epoch5_expert.pt",
        "ab.pt",
        "a_b.pt",
        "a-b_epoch5.pt",
    ]
    for name in (*names, "a_expert_interrupted.pt", "A.pt"):
        write_checkpoint(tmp_path / name, make_payload())
    (tmp_path / "a_epoch7.pt").mkdir()
    (tmp_path / "a_epoch8.pt.bak").write_text("x")
    assert [path.name for path in CheckpointStore(tmp_path, "a").existing()] == ["a.pt", "a_epoch5.pt"]
    # a dot is a dot
    assert CheckpointStore(tmp_path, "a.b").existing() == []


# --- a new run over an old one ------------------------------------------------------------------------


def test_a_new_run_is_let_in_where_there_is_none(store):
    store.guard_new_run(overwrite=False)
    store.guard_new_run(overwrite=True)


@pytest.mark.parametrize("damaged", [False, True])
def test_a_new_run_does_not_start_over_an_old_one(store, make_payload, damaged):
    for path in (store.best, store.interrupted):
        store.write(path, make_payload())
        if damaged:
            path.write_bytes(b"")
    with pytest.raises(UsageError) as caught:
        store.guard_new_run(overwrite=False)
    for part in (
        store.best.name,
        store.interrupted.name,
        "--resume",
        "--name",
        "--overwrite",
        "interrupted run",
    ):
        assert part in str(caught.value)
    assert ("step 7" in str(caught.value)) is not damaged


def test_overwriting_sets_the_old_files_aside_with_the_first_write(store, make_payload):
    old = [store.best, store.epoch(5), store.interrupted]
    for path in old:
        store.write(path, make_payload(seed=1))
    other = store.folder / "other_expert.pt"
    write_checkpoint(other, make_payload())
    before = {path.name: path.read_bytes() for path in old}

    new_run = CheckpointStore(store.folder, store.stem)
    new_run.guard_new_run(overwrite=True)
    assert new_run.existing() == old

    new_run.write(new_run.interrupted, make_payload(seed=2))
    assert new_run.existing() == [new_run.interrupted]
    assert other.exists()
    (aside,) = (store.folder / "replaced").iterdir()
    assert aside.name.startswith("transformer_expert-")
    assert {path.name: path.read_bytes() for path in aside.iterdir()} == before

    new_run.write(new_run.epoch(5), make_payload(seed=3))
    assert new_run.existing() == [new_run.epoch(5), new_run.interrupted]
    assert len(list((store.folder / "replaced").iterdir())) == 1

    again = CheckpointStore(store.folder, store.stem)  # within the same second: nothing is overwritten
    again.guard_new_run(overwrite=True)
    again.write(again.best, make_payload(seed=4))
    assert {path.name: path.read_bytes() for path in aside.iterdir()} == before
    assert len(list((store.folder / "replaced").iterdir())) == 2


def test_overwriting_that_never_writes_loses_nothing(store, make_payload, monkeypatch):
    for path in (store.best, store.interrupted):
        store.write(path, make_payload(seed=1))
    before = [path.read_bytes() for path in store.existing()]
    new_run = CheckpointStore(store.folder, store.stem)
    new_run.guard_new_run(overwrite=True)

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        with pytest.raises(StorageError, match="No space left"):
            new_run.write(new_run.best, make_payload(seed=2))
    assert [path.read_bytes() for path in store.existing()] == before
    assert not (store.folder / "replaced").exists()
    new_run.write(new_run.best, make_payload(seed=2))
    assert new_run.existing() == [new_run.best]


@pytest.mark.parametrize("failing", [1, 2, 0], ids=["first move", "second move", "the rename"])
def test_an_overwriting_save_that_fails_late_puts_the_old_files_back(
    store, make_payload, monkeypatch, failing
):
    for path in (store.best, store.interrupted):
        store.write(path, make_payload(seed=1))
    before = {path: path.read_bytes() for path in store.existing()}
    new_run = CheckpointStore(store.folder, store.stem)
    new_run.guard_new_run(overwrite=True)
    n_renames, rename, replace = 0, os.rename, os.replace

    def failing_rename(source: Any, target: Any) -> None:
        nonlocal n_renames
        n_renames += 1
        if n_renames == failing:
            raise OSError(5, "Input/output error")
        rename(source, target)

    def failing_replace(source: Any, target: Any) -> None:
        if failing == 0:
            raise OSError(5, "Input/output error")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", failing_rename)
        patch.setattr(os, "replace", failing_replace)
        with pytest.raises(StorageError, match="Input/output error") as caught:
            new_run.write(new_run.best, make_payload(seed=2))
    assert {path: path.read_bytes() for path in store.existing()} == before
    assert os.listdir(store.folder / "replaced") == []
    if failing == 0:
        assert f"The earlier run's files are in {store.folder}" in str(caught.value)
    new_run.write(new_run.best, make_payload(seed=2))
    assert new_run.existing() == [new_run.best]


def test_a_link_in_place_of_a_checkpoint_becomes_a_file(store, make_payload, tmp_path):
    elsewhere = tmp_path / "elsewhere.pt"
    store.write(store.best, make_payload(seed=1))
    before = store.best.read_bytes()
    store.best.rename(elsewhere)
    store.best.symlink_to(elsewhere)
    assert verify_checkpoint(store.best).step == 8  # what it leads to is read
    store.write(store.best, make_payload(seed=2))
    assert not store.best.is_symlink()
    assert elsewhere.read_bytes() == before


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
def test_the_best_so_far_is_kept(store, make_payload, monkeypatch, links):
    assert store.keep_best() is None
    store.write(store.best, make_payload(seed=1))
    before = store.best.read_bytes()
    if not links:

        def refuse(*_: object) -> None:
            raise OSError(1, "Operation not permitted")

        monkeypatch.setattr(os, "link", refuse)
    kept = store.keep_best()
    assert store.best.read_bytes() == before
    store.write(store.best, make_payload(seed=2))
    assert kept.read_bytes() == before != store.best.read_bytes()
    assert kept.parent.parent == store.folder / "replaced"


def test_remove_interrupted(store, make_payload):
    for path in (store.best, store.interrupted):
        store.write(path, make_payload())
    store.remove_interrupted()
    store.remove_interrupted()
    assert store.existing() == [store.best]


# --- listing and pruning ------------------------------------------------------------------------------


def test_list_is_sorted_and_shows_damaged_files(tmp_path, make_payload):
    names = ["a.pt", "a_epoch5.pt", "a_epoch10.pt", "a_interrupted.pt", "b.pt", "b_epoch5.pt"]
    for name in reversed(names):
        write_checkpoint(tmp_path / name, make_payload())
    (tmp_path / "b.pt").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("x")
    temporary_path(tmp_path / "a.pt").write_bytes(b"x")
    entries = list_checkpoints(tmp_path)
    assert [entry.path.name for entry in entries] == names
    kinds = [type(entry) for entry in entries]
    assert kinds == [CheckpointSummary] * 4 + [DamagedEntry] + [CheckpointSummary]
    entry = entries[4]
    assert isinstance(entry, DamagedEntry)
    assert entry.n_bytes == 0
    assert entry.reason.startswith("it is empty")
    assert list_checkpoints(tmp_path / "none") == []
    with pytest.raises(StorageError):
        list_checkpoints(tmp_path / "notes.txt")


@pytest.mark.parametrize(("keep", "kept"), [(1, {10}), (2, {9, 10}), (3, {5, 9, 10}), (99, {5, 9, 10})])
def test_prune_keeps_the_newest_snapshots(tmp_path, make_payload, keep, kept):
    store = CheckpointStore(tmp_path, "a")
    others = [store.best, store.interrupted, tmp_path / "b_epoch1.pt", tmp_path / "b.pt"]
    for path in (*others, *(store.epoch(n) for n in (5, 9, 10))):
        write_checkpoint(path, make_payload())
    orphan = tmp_path / temporary_path(store.best).name.replace(f".{os.getpid()}-", ".99999999-")
    orphan.write_bytes(b"x")
    (tmp_path / "notes.txt").write_text("x")
    expected = {store.epoch(n) for n in {5, 9, 10} - kept} | {orphan}
    everything = set(tmp_path.iterdir())

    assert set(prune(tmp_path, keep=keep, dry_run=True)) == expected
    assert set(tmp_path.iterdir()) == everything
    assert set(prune(tmp_path, keep=keep)) == expected
    assert set(tmp_path.iterdir()) == everything - expected
    assert prune(tmp_path, keep=keep) == []


def test_prune_never_leaves_only_damaged_snapshots(tmp_path, make_payload):
    store = CheckpointStore(tmp_path, "a")
    for n in (1, 2, 3, 4):
        write_checkpoint(store.epoch(n), make_payload(seed=n))
    damage(store.epoch(4))
    assert prune(tmp_path) == [store.epoch(1), store.epoch(2)]
    assert verify_checkpoint(store.epoch(3)).step == 10
    damage(store.epoch(3))
    assert prune(tmp_path) == []


def test_prune_refuses_to_keep_none(tmp_path):
    with pytest.raises(UsageError, match="keep=0"):
        prune(tmp_path, keep=0)
    assert prune(tmp_path / "none") == []


def test_what_the_store_writes_can_be_read(store, make_payload):
    store.write(store.best, make_payload(seed=3))
    assert read_checkpoint(store.best)["step"] == 10
