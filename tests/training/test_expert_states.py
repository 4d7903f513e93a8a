"""The experts' states from the disk: the same bits as computed, or not used."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from reports import Told
from torch import Tensor

from nanothink.config.run import resolve_config
from nanothink.data import cache
from nanothink.models import COMBINED, EXPERTS, ExpertDescription, build_model
from nanothink.models.contract import Batch
from nanothink.models.nanothink import NanoThink
from nanothink.training import block_folder
from nanothink.training.expert_states import ExpertStates, Shape, open_states, states_bytes
from nanothink.training.objectives import Routed

VOCABULARY, LENGTH, WIDTH, N_BLOCKS = 50, 24, 16, 6
SHAPE: Shape = (N_BLOCKS, 3, LENGTH, WIDTH)
IDENTITY = {"experts": "these"}


class Counted(NanoThink):
    """Remembers how many blocks its experts have read."""

    n_read = 0

    def expert_states(self, tokens: Tensor) -> list[Tensor]:
        self.n_read += len(tokens)
        return super().expert_states(tokens)


@pytest.fixture(scope="module")
def whole() -> NanoThink:
    return build()


def build() -> NanoThink:
    torch.manual_seed(0)
    sets = {
        "model.d_model": WIDTH,
        "model.max_seq_len": LENGTH,
        "transformer.n_heads": 2,
        "mla.n_heads": 2,
        "mla.n_layers": 1,
        "state_space.scan": "plain",
        **{f"{kind}.n_layers": 1 for kind in EXPERTS},
    }
    config = resolve_config(assignments=[f"{name}={value}" for name, value in sets.items()]).config
    model = build_model(
        COMBINED, config, VOCABULARY, [ExpertDescription(kind, kind, config) for kind in EXPERTS]
    )
    model.__class__ = Counted
    assert isinstance(model, Counted)
    with torch.no_grad():
        for parameter in model.parameters():  # nothing is left at a start that hides it
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.train()


@pytest.fixture
def model(whole: NanoThink) -> Counted:
    assert isinstance(whole, Counted)
    whole.n_read = 0
    return whole


def block(number: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (LENGTH,), generator=torch.Generator().manual_seed(number % N_BLOCKS))


def batch(*numbers: int) -> Tensor:
    return torch.stack([block(number) for number in numbers])


class Place:
    """Opens states in a folder and keeps what was said."""

    def __init__(self, root: Path) -> None:
        self.root, self.said = root, ""

    def open(self, **changed: Any) -> ExpertStates | None:
        notes: list[str] = []
        options: dict[str, Any] = {
            "identity": IDENTITY,
            "shape": SHAPE,
            "budget_bytes": 10**8,
            "begin": True,
            "number": lambda position: position % N_BLOCKS,
        } | changed
        states = open_states(self.root, reporter=Told(notes.append), **options)
        self.notes = notes
        self.said = " ".join(notes)
        return states

    def opened(self, **changed: Any) -> ExpertStates:
        states = self.open(**changed)
        assert states is not None, self.said
        return states


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def assert_right(states: ExpertStates, model: Counted, numbers: Sequence[int], n_read: int) -> None:
    """The states of these blocks are the experts', and this many blocks were computed for it."""
    before = model.n_read
    found = states.of(model, batch(*numbers), numbers)
    assert model.n_read - before == n_read
    expected = model.expert_states(batch(*numbers))
    assert len(found) == len(expected) == 3
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
        assert not ours.requires_grad


def filled(place: Place, model: Counted, *numbers: int) -> Path:
    states = place.opened()
    states.of(model, batch(*numbers), numbers)
    states.close()
    return states.folder


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
