"""Several processes that train one model: three real ones, joined by gloo, on a tiny model."""

from __future__ import annotations

import json
import pickle
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reports import Told

from nanothink.checkpoints import (
    CheckpointStore,
    CheckpointSummary,
    list_checkpoints,
    prune,
    read_checkpoint,
    verify_checkpoint,
)
from nanothink.checkpoints.shards import weights_of
from nanothink.errors import CheckpointDamagedError, NanoThinkError, RankError, UsageError
from nanothink.training.distributed import ALONE, Processes, join
from nanothink.training.launch import Launch

N_PROCESSES = 3


@given(count=st.integers(0, 200), size=st.integers(1, 17))
def test_shares_are_everything_once_and_nearly_equal(count: int, size: int) -> None:
    shares = []
    for rank in range(size):
        processes = Processes()
        processes.rank, processes.size = rank, size
        shares.append(processes.share(count))
    assert [i for share in shares for i in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_process_is_alone_unless_torchrun_says_otherwise() -> None:
    said = {
        "RANK": "3",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "4",
        "MASTER_ADDR": "10.0.0.1",
        "MASTER_PORT": "29500",
    }
    assert Launch.of(said) == Launch(rank=3, local_rank=1, size=4)
    assert Launch.of(said | {"WORLD_SIZE": "1", "RANK": "0"}) is None
    for name in said:
        assert Launch.of({k: v for k, v in said.items() if k != name}) is None


def test_alone_nothing_is_joined() -> None:
    with join("cpu") as processes:
        assert processes.device == "cpu"
        assert (processes.rank, processes.size, processes.is_rank0) == (0, 1, True)
        assert not torch.distributed.is_initialized()
    assert ALONE.all_reduce_sum([2.5, 1.0]) == [2.5, 1.0]
    assert (ALONE.any(True), ALONE.any(False)) == (True, False)
    assert ALONE.rank0_first(lambda: ("done", "word"), str) == "done"


def test_an_error_of_one_process_says_which_and_keeps_its_exit_code() -> None:
    error = RankError.of(UsageError("no such setting"), 2, 4, "node7")
    assert str(error) == "Process 2 of 4, on node7: no such setting"
    assert error.exit_code == UsageError.exit_code
    assert RankError.exit_code == NanoThinkError.exit_code


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What each of three processes saw, as rank.json and so on."""
    folder = tmp_path_factory.mktemp("processes")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    child = Path(__file__).with_name("distributed_child.py")
    done = subprocess.run(
        [sys.executable, str(child), str(folder), str(N_PROCESSES), str(port)],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert json.loads(done.stdout) == [0, 9, 0], done.stderr
    return folder


@pytest.fixture(scope="module")
def by_rank(seen: Path) -> list[dict[str, Any]]:
    return [json.loads((seen / f"{rank}.json").read_text()) for rank in range(N_PROCESSES)]


def test_numbers_are_added_and_flags_joined(by_rank: list[dict[str, Any]]) -> None:
    for rank, saw in enumerate(by_rank):
        assert saw["who"] == [rank, 3, rank == 0, "cpu"]
        assert saw["sums"] == {"total": [3.0, 3.0], "any": [False, True, True]}
        assert saw["again"] == [3.0]


def test_processes_that_differ_are_refused_by_all(by_rank: list[dict[str, Any]]) -> None:
    for saw in by_rank:
        assert "differ in taste: [2] of 3 from the first" in saw["same"]


def test_the_others_wait_for_the_first_and_hear_its_word(by_rank: list[dict[str, Any]]) -> None:
    assert by_rank[0]["in_turn"][0] == "of the first"
    assert by_rank[0]["in turn again"] == "first"
    for saw in by_rank[1:]:
        said, seconds = saw["in_turn"]
        assert said == "heard a word"
        assert seconds > 0.3
        assert saw["in turn again"] == "second word"


def test_three_train_as_one(by_rank: list[dict[str, Any]]) -> None:
    """Five blocks are shared by three, some with fewer targets: each target counts the same all the same."""
    for saw in by_rank:
        alone = saw["training"]["alone"]
        for shard in ("full", "none"):
            found = saw["training"][shard]
            assert found["tokens"] == alone["tokens"]
            assert found["losses"] == pytest.approx(alone["losses"], rel=1e-6)
            assert found["norms"] == pytest.approx(alone["norms"], rel=1e-4)
            assert found["weights"] == pytest.approx(alone["weights"], rel=1e-3, abs=1e-5)
            assert found["weights"] == by_rank[0]["training"][shard]["weights"], "bit-equal in all processes"
        assert saw["training"]["none"]["held"] == alone["held"]
    held = [saw["training"]["full"]["held"] for saw in by_rank]
    assert sum(held) == by_rank[0]["training"]["alone"]["held"], "every number is in one process"
    assert max(held) < 0.5 * sum(held)


def test_what_goes_wrong_in_one_is_skipped_by_all(by_rank: list[dict[str, Any]]) -> None:
    for saw in by_rank:
        found = saw["poisoned"]
        assert found["skipped"] == [False, True, True, False, True, True, True]
        assert "not finite for 3 steps in a row, up to step 7" in found["ended"]
        assert found["saved"] == []
        assert found["weights"] == by_rank[0]["poisoned"]["weights"]
        assert found["scale"] == 2.0**16 / 2**5, "every process has halved it for each of five bad steps"
        assert torch.tensor(found["weights"]).isfinite().all()


def test_a_signal_to_one_stops_all_after_the_same_step(by_rank: list[dict[str, Any]]) -> None:
    for rank, saw in enumerate(by_rank):
        assert saw["stopped"]["step"] == 2
        by = "SIGTERM" if rank == 2 else "a signal to another process"
        assert saw["stopped"]["ended"].startswith(f"Stopped by {by} after step 2 of 99")


def test_processes_write_a_checkpoint_together_and_each_reads_its_rows(by_rank: list[dict[str, Any]]) -> None:
    kept = ["tiny_expert_epoch2.dcp", "tiny_expert_interrupted2.dcp"]
    for saw in by_rank:
        found = saw["folders"]
        assert found["written"] == ["tiny_expert_interrupted1.dcp", *kept]
        assert found["kept"] == kept, "the earlier rolling state is removed once the later one is there"
        assert found["weights"], "read whole by one process"
        assert found["rows"]
        assert found["moments"]
        assert found["resumed"], "stopped after 3 steps of 5, resumed: bit-equal to a run that was not"


def test_a_disk_full_for_one_process_leaves_the_last_checkpoint(
    by_rank: list[dict[str, Any]],
) -> None:
    for saw in by_rank:
        assert "cannot be written: " in saw["folders"]["full"]
        assert saw["folders"]["left"] == ["tiny_expert_epoch2.dcp", "tiny_expert_interrupted2.dcp"]


def test_a_folder_is_verified_listed_and_pruned_like_a_file(seen: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(seen / "checkpoints", tmp_path / "checkpoints"))
    store = CheckpointStore(folder, "tiny_expert")
    snapshot, rolling = store.existing()
    listed = list_checkpoints(folder)
    assert [entry.path for entry in listed] == [snapshot, rolling]
    assert [type(entry) for entry in listed] == [CheckpointSummary] * 2
    assert verify_checkpoint(rolling) == listed[1]
    assert store.newest() == rolling
    notes: list[str] = []
    shutil.copytree(snapshot, later := store.folder / "tiny_expert_epoch3.dcp")
    for name, reason in [("__1_0.distcp", "digest differs"), ("manifest.json", "manifest.json is damaged")]:
        shutil.rmtree(rolling)
        shutil.copytree(snapshot, rolling)
        content = bytearray((rolling / name).read_bytes())
        content[len(content) // 2] ^= 255
        (rolling / name).write_bytes(content)
        assert store.newest(Told(notes.append)) == later
        assert reason in notes[-1] or name == "manifest.json"
    assert prune(folder) == [snapshot]
    assert sorted(path.name for path in folder.iterdir()) == [later.name, rolling.name]
    (later / ".metadata").write_bytes(pickle.dumps(print))
    with pytest.raises(CheckpointDamagedError):
        read_checkpoint(later)
    with pytest.raises(pickle.UnpicklingError, match="would run code"):
        list(weights_of(later))


def test_a_first_that_cannot_begin_ends_the_others(seen: Path) -> None:
    assert (seen / "0.failed").read_text().startswith("ZeroDivisionError")
    for rank in (1, 2):
        assert (seen / f"{rank}.failed").read_text().startswith("DistributedError: The first process")


def test_a_process_that_dies_is_noticed_and_said(seen: Path) -> None:
    for rank in (0, 2):
        said = (seen / f"{rank}.lost").read_text()
        assert "Another process of this run has ended" in said
        assert "The last checkpoint is untouched: start all processes again, with --resume." in said
