"""Where the experts' states do not fit, cannot be written, are cut or share their place."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from counted_experts import (
    N_BLOCKS,
    SHAPE,
    Counted,
    Place,
    assert_right,
    batch,
    filled,
)

from nanothink.data import cache
from nanothink.training import block_folder
from nanothink.training.expert_states import states_bytes


def test_what_does_not_fit_is_left_alone_with_one_line(place: Place) -> None:
    assert place.open(budget_bytes=states_bytes(SHAPE) - 1) is None
    (line,) = place.notes
    assert "take 0.03 MB" in line
    assert "states_disk_gb allows 0.03 MB" in line
    assert "--set train_mla.states_disk_gb=0.1" in line
    assert not list(place.root.rglob("states*"))
    assert place.open(budget_bytes=states_bytes(SHAPE)) is not None


def test_the_disk_keeps_room_for_checkpoints(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_folder, "SPARE_BYTES", 10**18)
    assert place.open() is None
    (line,) = place.notes
    assert "are left for checkpoints, so they are computed in every epoch" in line


def test_a_folder_that_cannot_be_written_to(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_writable", lambda folder: False)
    assert place.open() is None
    (line,) = place.notes
    assert "cannot be kept" in line
    assert "so they are computed in every epoch" in line


def test_a_run_of_one_epoch_reads_and_leaves_nothing(model: Counted, place: Place) -> None:
    assert place.open(begin=False) is None
    assert place.notes == []
    filled(place, model, 0, 1)
    assert_right(place.opened(begin=False), model, [0], n_read=2)


def test_a_full_disk_ends_it_and_gives_the_room_back(
    model: Counted, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = place.opened()
    assert_right(states, model, [0, 1], n_read=3)
    real = os.pwritev

    def full(file: int, parts: Any, offset: int) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwritev", full)
    place.notes.clear()
    inputs = batch(1, 2)
    found = states.of(model, inputs, [1, 2])
    monkeypatch.setattr(os, "pwritev", real)
    assert all(torch.equal(a, b) for a, b in zip(found, model.expert_states(inputs), strict=True))
    (line,) = place.notes
    assert "No space left on device" in line
    assert "so they are computed in every epoch" in line
    assert not states.folder.exists()
    assert_right(states, model, [0, 1], n_read=2)
    assert len(place.notes) == 1


def test_deleted_in_the_middle_it_goes_on(model: Counted, place: Place) -> None:
    states = place.opened()
    assert_right(states, model, [0, 1], n_read=3)
    shutil.rmtree(place.root / ".nanothink")
    assert_right(states, model, [0, 1, 2], n_read=1)


def test_a_file_cut_off_in_the_middle_costs_its_blocks(model: Counted, place: Place) -> None:
    states = place.opened()
    assert_right(states, model, [0, 1], n_read=3)
    os.truncate(states.folder / "states.f32", 1000)
    assert_right(states, model, [0, 1], n_read=2)
    os.truncate(states.folder / "marks.u64", 0)
    assert_right(states, model, [0, 1], n_read=2)
    assert_right(states, model, [0, 1], n_read=0)


def test_runs_side_by_side_fill_one_place(model: Counted, place: Place) -> None:
    one, two = place.opened(), place.opened()
    assert one.folder == two.folder
    assert_right(one, model, [0, 1], n_read=3)
    assert_right(two, model, [1, 2], n_read=3)
    assert_right(one, model, [1, 2, 0], n_read=0)


def test_older_states_give_way_unless_they_are_in_use(model: Counted, place: Place) -> None:
    def folder(name: str) -> Path:
        states = place.opened(identity={"experts": name})
        states.of(model, batch(*range(N_BLOCKS)), range(N_BLOCKS))
        states.close()
        return states.folder

    old, new = folder("old"), folder("new")
    os.utime(old, (1, 1))
    size = block_folder.taken(new)
    assert size >= states_bytes(SHAPE)
    third = place.opened(identity={"experts": "third"}, budget_bytes=2 * size)
    assert not old.exists()
    assert new.exists()
    third.of(model, batch(*range(N_BLOCKS)), range(N_BLOCKS))
    # Only ``new`` can give way: the third is being used, however long ago it was opened.
    os.utime(third.folder, (1, 1))
    assert place.open(identity={"experts": "fourth"}, budget_bytes=2 * size) is not None
    assert third.folder.exists()
    assert not new.exists()
    assert place.open(identity={"experts": "fifth"}, budget_bytes=size) is None
    assert "other runs just now use" in place.said
    assert third.folder.exists()
