"""The processes of test_distributed.py: each does what is asked about and writes down what it saw.

``python distributed_child.py FOLDER N_PROCESSES PORT``: forks of one that has imported everything.
"""

from __future__ import annotations

import errno
import importlib
import importlib.util
import json
import math
import os
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from nanothink.checkpoints import CheckpointStore, read_checkpoint
from nanothink.checkpoints.restore import gathered, restore_model
from nanothink.errors import DistributedError, InterruptedRun, StorageError, TrainingDivergedError
from nanothink.models.contract import Batch, Loss
from nanothink.runs.resuming import ResumePoint
from nanothink.training.distributed import Processes, join
from nanothink.training.events import StepDone
from nanothink.training.interruption import StopRequest
from nanothink.training.objectives import next_token
from nanothink.training.optimizer import GroupedOptimizer
from nanothink.training.sharding import Shard


def harness(**settings: Any) -> Any:
    """The loop on a tiny model."""
    return module("training_harness.py").Harness(**settings)


@cache
def module(path: str) -> Any:
    """A module of the tests, which are no package."""
    tests = Path(__file__).parents[1]
    sys.path.append(str(tests))  # pytest has it there
    name = Path(path).stem
    spec = importlib.util.spec_from_file_location(name, tests / path)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def among(processes: Processes, shard: Shard = "full", **settings: Any) -> Any:
    made = harness(**settings)
    placed = processes.place(made.run.model, shard)
    optimizer = GroupedOptimizer(placed.groups(), made.config, placed)
    made.run = replace(made.run, processes=processes, placed=placed, optimizer=optimizer)
    return made


def weights(made: Any) -> list[float]:
    """All weights of the model, in every process."""
    whole: list[float] = torch.cat(
        [gathered(p).detach().flatten() for p in made.run.model.parameters()]
    ).tolist()
    return whole


def saw(made: Any) -> dict[str, Any]:
    return {
        "losses": [step.loss for step in made.steps],
        "norms": [step.gradient_norm for step in made.steps],
        "tokens": [step.tokens for step in made.steps],
        "weights": weights(made),
        "held": sum(p.numel() for p in made.run.optimizer.parameters),
    }


def sums(processes: Processes) -> dict[str, Any]:
    rank = processes.rank
    return {
        "total": processes.all_reduce_sum([1.0, rank]),
        "any": [processes.any(False), processes.any(rank == 1), processes.any(True)],
    }


def same(processes: Processes) -> str:
    processes.assert_same_on_all_ranks("nothing", "equal everywhere")
    try:
        processes.assert_same_on_all_ranks("taste", "sweet" if processes.rank != 2 else "sour")
    except DistributedError as error:
        return str(error)
    return ""


def in_turn(processes: Processes) -> list[Any]:
    began = time.monotonic()

    def first() -> tuple[str, str]:
        time.sleep(0.5)
        return "of the first", "a word"

    return [processes.rank0_first(first, lambda word: f"heard {word}"), time.monotonic() - began]


def training(processes: Processes) -> dict[str, Any]:
    settings: dict[str, Any] = {"batch_size": 5, "grad_accum_steps": 2, "max_steps": 4, "n_blocks": 1000}
    full, none, alone = (
        among(processes, **settings),
        among(processes, "none", **settings),
        harness(**settings),
    )
    for made in (full, none, alone):
        made.go()
    return {"full": saw(full), "none": saw(none), "alone": saw(alone)}


def poisoned(processes: Processes) -> dict[str, Any]:
    """Loss or gradient goes wrong in one process alone: in its loss, and in its gradient only."""
    made = among(processes, batch_size=3, max_steps=99, max_skipped_steps=3, n_blocks=1000)
    made.run = replace(made.run, scaler=torch.amp.GradScaler("cpu"))

    def objective(model: Any, batch: Batch, scale: float) -> Loss:
        loss, step = next_token(model, batch, scale).total, made.run.state.step
        if processes.rank == 1 and (step == 1 or step >= 4):
            return Loss(loss * math.nan)
        if processes.rank == 2 and step == 2:
            return Loss(loss + (loss - loss.detach()) * math.inf)  # the value stays as it was
        return Loss(loss)

    made.run = replace(made.run, objective=objective)
    ended = ""
    try:
        made.go()
    except TrainingDivergedError as error:
        ended = str(error)
    return {
        "skipped": [step.skipped for step in made.steps],
        "weights": weights(made),
        "scale": made.run.scaler.get_scale(),
        "ended": ended,
        "saved": made.saved,
    }


class StopAfter(list[Any]):
    """Events of a run that is stopped by a signal after a step."""

    def __init__(self, step: int, stop: StopRequest) -> None:
        super().__init__()
        self.step, self.stop = step, stop

    def append(self, event: Any) -> None:
        super().append(event)
        if isinstance(event, StepDone) and event.step == self.step:
            self.stop._on_signal(15, None)


def stopped(processes: Processes) -> dict[str, Any]:
    """A signal reaches one process alone; and, in the rolling checkpoint's time, their clocks disagree."""
    made = among(processes, batch_size=3, max_steps=99, n_blocks=1000, save_every_seconds=1e-9)
    if processes.rank == 2:
        made.events = StopAfter(2, made.stop)
    else:
        made.run = replace(made.run, config=made.run.config.model_copy(update={"save_every_seconds": 1e9}))
    try:
        made.go()
    except InterruptedRun as error:
        return {"ended": str(error), "step": made.run.state.step}
    return {}


def folders(processes: Processes) -> dict[str, Any]:
    """Checkpoints that all write together: read whole, in parts, and after one cannot write."""
    whole_run, made, other = (among(processes, batch_size=3, max_steps=5, n_blocks=1000) for _ in range(3))
    whole_run.go()
    made.events = StopAfter(3, made.stop)
    with suppress(InterruptedRun):
        made.go()
    store = CheckpointStore(Path(sys.argv[1]) / "checkpoints", "tiny_expert")
    parts = {"model_state": made.run.model.state_dict(), "optimizer_state": made.run.optimizer.state_dict()}
    payload = module("checkpoints/conftest.py").build_payload(**parts)
    seen: dict[str, Any] = {}
    seen["written"] = [store.write_shards(*of, payload).name for of in (("interrupted", 0), ("epoch", 2))]
    latest = store.write_shards("interrupted", 0, payload)
    seen["written"].append(latest.name)
    seen["kept"] = [path.name for path in store.existing()]
    whole = read_checkpoint(latest)
    seen["weights"] = all(
        torch.equal(gathered(t), whole["model_state"][n]) for n, t in parts["model_state"].items()
    )
    point = ResumePoint.open(latest)
    restore_model(
        other.run.model, point.payload, expect_kind="transformer", path=latest, read=point.read_weights
    )
    fresh = other.run.optimizer.load_state_dict(point.payload["optimizer_state"], point.read_moments)
    pairs = zip(made.run.optimizer.parameters, other.run.optimizer.parameters, strict=True)
    seen["rows"] = not fresh and all(torch.equal(a, b) for a, b in pairs)
    seen["moments"] = same_state(made.run.optimizer.state_dict(), other.run.optimizer.state_dict())

    other.run = replace(other.run, state=made.run.state)
    other.go()
    seen["resumed"] = weights(other) == weights(whole_run) and len(other.steps) == 2

    def full(descriptor: int, data: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write, os.write = os.write, full if processes.rank == 1 else os.write
    try:
        store.write_shards("interrupted", 0, payload)
    except StorageError as error:
        seen["full"] = str(error)
    finally:
        os.write = write
    processes.any(True)  # the first has removed what was begun
    seen["left"] = sorted(entry.name for entry in store.folder.iterdir())
    return seen


def same_state(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same_state(one[key], other[key]) for key in one)
    if isinstance(one, torch.Tensor):
        return torch.equal(gathered(one), gathered(other))
    return True


def main() -> None:
    seen: dict[str, Any] = {}
    with join("cpu") as processes:
        for part in (sums, same, in_turn, training, poisoned, stopped, folders):
            seen[part.__name__] = part(processes)
        seen["who"] = [processes.rank, processes.size, processes.is_rank0, processes.device]
    with join("cpu") as again:  # a second run of the same processes
        seen["again"] = again.all_reduce_sum([1.0])
        seen["in turn again"] = again.rank0_first(lambda: ("first", "second word"), str)
    Path(sys.argv[1], f"{os.environ['RANK']}.json").write_text(json.dumps(seen))
    with join("cpu") as failing:  # and one that cannot begin
        try:
            failing.rank0_first(lambda: (1 / 0, ""), lambda word: 0.0)
        except (ZeroDivisionError, DistributedError) as error:
            Path(sys.argv[1], f"{os.environ['RANK']}.failed").write_text(f"{type(error).__name__}: {error}")
    with join("cpu") as leaving:  # and one that loses a process
        if leaving.rank == 1:
            os._exit(9)
        try:
            leaving.all_reduce_sum([1.0])
        except DistributedError as error:
            Path(sys.argv[1], f"{os.environ['RANK']}.lost").write_text(str(error))
            os._exit(0)


def fork_all(n_processes: int, port: str) -> list[int]:
    """Run ``main`` in every process, and give their exit codes by rank."""
    module("training_harness.py")
    module("checkpoints/conftest.py")
    importlib.import_module("torch._dynamo")
    os.environ.update(WORLD_SIZE=f"{n_processes}", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    pids = []
    for rank in range(n_processes):
        pids.append(os.fork())
        if pids[-1] == 0:
            os.environ.update(RANK=f"{rank}", LOCAL_RANK=f"{rank}")
            try:
                main()
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


if __name__ == "__main__":
    print(json.dumps(fork_all(int(sys.argv[2]), sys.argv[3])))
