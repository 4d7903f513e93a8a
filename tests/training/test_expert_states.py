"""The experts' states from the disk: the same bits as computed, or not used."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
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
from torch import Tensor

from nanothink.models.contract import Batch
from nanothink.models.nanothink import NanoThink
from nanothink.training.expert_states import states_bytes
from nanothink.training.objectives import Routed


def test_each_block_is_computed_once_and_comes_back_bit_equal(model: Counted, place: Place) -> None:
    states = place.opened()
    assert_right(states, model, [0, 3], n_read=3)  # one of them twice, to see that alone it is the same
    assert_right(states, model, [3, 4, 0], n_read=1)
    assert_right(states, model, [N_BLOCKS + 4, N_BLOCKS + 3], n_read=0)  # the next epoch
    states.close()
    again = place.opened()
    assert "3 of 6 blocks are there already" in place.said
    assert_right(again, model, [4, 0], n_read=3)  # a run's first batch is computed and compared
    assert_right(again, model, [0, 3, 1], n_read=1)


def test_loss_gradients_and_records_are_the_same_bits(model: Counted, place: Place) -> None:
    inputs, targets = batch(0, 1, 2), batch(3, 4, 5)
    results = []
    states = place.opened()
    for kept in (None, states, states, states):  # computed, the first batch, from the disk twice
        model.zero_grad()
        loss = Routed(0.01, kept)(model, Batch(inputs, targets, range(3)), 0.1)
        loss.total.backward()
        gradients: dict[str, Any] = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        assert all(g is not None for g in gradients.values())
        results.append({"": loss.total.detach(), **loss.parts, **gradients})
    for other in results[1:]:
        assert other.keys() == results[0].keys()
        assert all(torch.equal(results[0][name], value) for name, value in other.items())
    assert model.n_read == 3 + 4


def test_damaged_blocks_are_made_again(model: Counted, place: Place) -> None:
    folder = filled(place, model, 0, 1, 2)
    size = states_bytes((1, *SHAPE[1:])) - 8
    with open(folder / "states.f32", "r+b") as file:
        file.seek(size + 100)
        byte = file.read(1)
        file.seek(size + 100)
        file.write(bytes([byte[0] ^ 1]))  # one bit of block 1
    marks = bytearray((folder / "marks.u64").read_bytes())
    marks[3 * 8 : 4 * 8] = marks[2 * 8 : 3 * 8]  # block 3 claims to be there, with the mark of another
    (folder / "marks.u64").write_bytes(marks)
    states = place.opened()
    assert_right(states, model, [0], n_read=2)
    place.notes.clear()
    assert_right(states, model, [0, 1, 2, 3], n_read=2)
    assert len(place.notes) == 1
    assert "damaged; they are made again" in place.notes[0]
    assert_right(states, model, [0, 1, 2, 3], n_read=0)


def test_a_block_that_moved_is_not_trusted(model: Counted, place: Place) -> None:
    folder = filled(place, model, 0, 1)
    size = states_bytes((1, *SHAPE[1:])) - 8
    for name, n in (("states.f32", size), ("marks.u64", 8)):
        content = bytearray((folder / name).read_bytes())
        content[: 2 * n] = content[n : 2 * n] + content[:n]
        (folder / name).write_bytes(content)
    states = place.opened()
    assert_right(states, model, [5], n_read=2)
    assert_right(states, model, [0, 1], n_read=2)


@pytest.mark.parametrize("name", ["states.f32", "marks.u64", "identity.json"])
@pytest.mark.parametrize("how", ["cut", "gone", "longer"])
def test_a_damaged_folder_is_begun_anew(name: str, how: str, model: Counted, place: Place) -> None:
    path = filled(place, model, 0, 1) / name
    content = path.read_bytes()
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(content[:-5] if how == "cut" else content + b"12345678")
    states = place.opened()
    assert "damaged; they are made again" in place.said
    assert_right(states, model, [0, 1], n_read=3)
    assert_right(states, model, [0, 1], n_read=0)


@pytest.mark.parametrize(
    "changed",
    [{"identity": {"experts": "others"}}, {"shape": (N_BLOCKS + 1, *SHAPE[1:])}],
    ids=["identity", "shape"],
)
def test_states_of_something_else_are_not_used(changed: dict[str, Any], model: Counted, place: Place) -> None:
    first = filled(place, model, 0, 1)
    states = place.opened(**changed)
    assert states.folder != first
    assert "already" not in place.said
    assert_right(states, model, [0, 1], n_read=3)


def test_states_that_the_experts_do_not_give_are_thrown_away(model: Counted, place: Place) -> None:
    """As from another machine that calls itself the same: whole, and not what is computed here."""
    folder = filled(place, model, 0, 1)
    states = place.opened()
    wrong = torch.stack(model.expert_states(batch(0))) + 1e-6
    states._write([0], wrong, [0])
    states.close()
    states = place.opened()
    place.notes.clear()
    assert_right(states, model, [1, 0], n_read=3)
    assert "are not what the experts compute here" in place.notes[0]
    assert "computed in every epoch" in place.notes[0]
    assert not folder.exists()
    assert_right(states, model, [1, 0], n_read=2)


def test_states_that_depend_on_their_neighbours_are_not_kept(
    model: Counted, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def blurred(self: NanoThink, tokens: Tensor) -> list[Tensor]:
        return [h + len(tokens) * 1e-6 for h in NanoThink.expert_states(self, tokens)]

    monkeypatch.setattr(Counted, "expert_states", blurred)
    states = place.opened()
    place.notes.clear()
    found = states.of(model, batch(0, 1), [0, 1])
    assert all(torch.equal(a, b) for a, b in zip(found, blurred(model, batch(0, 1)), strict=True))
    assert "a block's states depend on those beside it" in place.notes[0]
    assert not states.folder.exists()


def test_a_killed_run_leaves_nothing_that_is_trusted_and_not_whole(model: Counted, place: Place) -> None:
    """SIGKILL, at some moment while blocks are being written."""
    script = place.root / "fill.py"
    script.write_text(
        "import os, sys, torch\n"
        "from pathlib import Path\n"
        "from nanothink.training.expert_states import open_states\n"
        "class Experts:\n"
        "    def expert_states(self, tokens):\n"
        "        return [tokens[:, :, None].float().expand(-1, -1, 64) + e for e in range(3)]\n"
        "def fill():\n"
        "    states = open_states(Path(sys.argv[1]), {'experts': 'killed'}, (2000, 3, 64, 64),\n"
        "                         budget_bytes=10**9, begin=True, number=int)\n"
        "    print(os.getpid(), flush=True)\n"
        "    for number in range(2000):\n"
        "        states.of(Experts(), torch.full((1, 64), number), [number])\n"
        "for line in sys.stdin:\n"
        "    if os.fork() == 0:\n"
        "        fill()\n"
        "        os._exit(0)\n"
        "    os.wait()\n"
        "    print('gone', flush=True)\n"
    )
    shape = (2000, 3, 64, 64)
    root = place.root / "data"
    root.mkdir()
    command = [sys.executable, str(script), str(root)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        seen, partly = 0, False
        for wait in (0.005, 0.02, 0.05):
            print(file=process.stdin, flush=True)
            pid = int(process.stdout.readline())
            time.sleep(wait)
            os.kill(pid, signal.SIGKILL)
            assert process.stdout.readline() == "gone\n"
            states = Place(root).opened(identity={"experts": "killed"}, shape=shape, number=int)
            n_filled = states.n_filled()
            assert n_filled >= seen
            seen = n_filled
            partly |= 0 < n_filled < 2000
            into = torch.empty(3, 64, 64)
            whole = 0
            for number in range(2000):
                if states._read(number, into):
                    assert torch.equal(into, (number + torch.arange(3.0))[:, None, None].expand(3, 64, 64))
                    whole += 1
            assert whole == n_filled
            states.close()
    assert partly, "the moment to strike never came"
