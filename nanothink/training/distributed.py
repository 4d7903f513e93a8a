"""Data-parallel training: shares of blocks, agreement between processes.

    torchrun --nproc-per-node=N -m nanothink pretrain ...

Every process takes its share of each micro-batch; the parameters are shared out too (sharding.py). Rank 0
alone prints and holds the lock. A decision that depends on a clock, a signal or a disk is made by one process
and told to the others, so that no process waits for a call that another does not make.

A single process is a ``Processes`` too: its methods then do nothing, and torch.distributed is never imported.
"""

from __future__ import annotations

import hashlib
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar, cast

from nanothink.errors import (
    DistributedError,
    InterruptedRun,
    NanoThinkError,
    RankError,
    TrainingDivergedError,
    UsageError,
)
from nanothink.reporter import SILENT, Reporter
from nanothink.training.interruption import stopping_signals
from nanothink.training.launch import (
    FIRST_WORD_SECONDS,
    POLL_SECONDS,
    Launch,
    first_sentence,
    meet,
    telling_after,
)

if TYPE_CHECKING:
    import torch

    from nanothink.models.contract import LanguageModel
    from nanothink.training.sharding import Placement, Shard

T = TypeVar("T")

TIMEOUT = timedelta(minutes=30)
"""Wait for a process that is alive and silent. It must outlast the writing of a checkpoint."""


class Processes:
    """The processes of a run, as one of them sees them; this class is a run of one process."""

    rank = 0
    size = 1
    launcher: Sequence[str] = ()
    """Command line before ``nanothink`` that starts as many processes again."""

    def __init__(self, device: str | None = None) -> None:
        self.device = device
        """Device of this process, as ``--device`` names it; None leaves the choice open."""

    @property
    def is_rank0(self) -> bool:
        """True in the process that writes and prints."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """Indices of this process's share of ``count`` items; shares differ in size by at most 1."""
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def all_reduce_sum(self, values: Sequence[float]) -> list[float]:
        """Add each number over all processes. Every process must call it, with as many numbers."""
        return list(values)

    def any(self, flag: bool) -> bool:
        """True if ``flag`` is in at least one process. Every process must call it."""
        return bool(self.all_reduce_sum([float(flag)])[0])

    def rank0_first(self, first: Callable[[], tuple[T, str]], others: Callable[[str], T]) -> T:
        """Run ``first`` on rank 0, then ``others(message)`` on the other ranks, with the message it returned.

        The other ranks wait without a time limit, and end if it fails. Every process must call it.
        """
        return first()[0]

    def of_rank0(self, value: T) -> T:
        """The value that rank 0 gives, pickled on the way. Every process must call it."""
        return value

    def assert_same_on_all_ranks(self, what: str, value: str) -> None:
        """Compare ``value`` between the processes. Every process must call it.

        Raises:
            DistributedError: they differ in ``what``.
        """

    def place(
        self,
        model: LanguageModel,
        shard: Shard,
        leave_whole: Sequence[torch.nn.Module] = (),
        *,
        from_rank0: bool = False,
    ) -> Placement:
        """Share the parameters of ``model`` out; see ``ShardedPlacement``. Every process must call it."""
        from nanothink.training.sharding import Placement

        return Placement(model)


ALONE = Processes()


@contextmanager
def join(device: str | None = None, reporter: Reporter = SILENT) -> Iterator[Processes]:
    """Meet the other processes of this run, if torchrun has started any.

    Args:
        device: as ``--device`` names it; on GPUs every process takes one of its own.

    Raises:
        UsageError: the device cannot be shared out.
        DistributedError: the others do not start, or one of them is lost later.
        RankError: this process failed, and rank 0 did not.
    """
    launch = Launch.of(os.environ)
    if launch is None:
        yield Processes(device)
        return
    import torch.distributed as dist

    own = _own_device(device, launch)
    store = meet(launch, reporter, TIMEOUT)

    def still_connecting() -> None:
        if launch.rank == 0:
            reporter.note(
                "All processes are there and connect to each other. If that does not end, they have chosen "
                "network cards that cannot reach each other: name one by GLOO_SOCKET_IFNAME and "
                "NCCL_SOCKET_IFNAME."
            )

    backend = "cpu:gloo,cuda:nccl" if own.type == "cuda" else "gloo"
    with (
        _peers("The processes of this run could not connect to each other"),
        telling_after(FIRST_WORD_SECONDS, still_connecting),
    ):
        dist.init_process_group(
            backend, store=store, rank=launch.rank, world_size=launch.size, timeout=TIMEOUT
        )
    try:
        with _peers(only_theirs=True):
            yield _Several(launch, str(own), store)
    except BaseException as error:
        # torchrun ends all processes once one of them has; this one is to say first why it does.
        if threading.current_thread() is threading.main_thread():
            for number in stopping_signals():
                signal.signal(number, signal.SIG_IGN)
        if isinstance(error, (InterruptedRun, TrainingDivergedError)):  # all have agreed on these
            _leave_together()
        elif isinstance(error, NanoThinkError) and not isinstance(error, DistributedError) and launch.rank:
            raise RankError.of(error, launch.rank, launch.size, socket.gethostname()) from error
        raise
    _leave_together()


class _Several(Processes):
    def __init__(self, launch: Launch, device: str, store: Any) -> None:
        super().__init__(device)
        self.rank, self.size, self.launcher = launch.rank, launch.size, launch.command
        self._store = store
        self._turn = 0

    def all_reduce_sum(self, values: Sequence[float]) -> list[float]:
        import torch
        import torch.distributed as dist

        sums = torch.tensor(values, dtype=torch.float64)
        with _peers():
            dist.all_reduce(sums)
        numbers: list[float] = sums.tolist()
        return numbers

    def rank0_first(self, first: Callable[[], tuple[T, str]], others: Callable[[str], T]) -> T:
        self._turn += 1
        key = f"turn {self._turn}"
        if self.is_rank0:
            try:
                done, word = first()
            except BaseException:
                self._store.set(key, "failed")
                raise
            self._store.set(key, "done:" + word)
            return done
        while True:
            # Not a wait inside the store: there a signal would not reach Python.
            with _peers():
                if self._store.check([key]):
                    break
            time.sleep(POLL_SECONDS)
        verdict = self._store.get(key).decode()
        if verdict == "failed":
            raise DistributedError("The first process of this run failed, and says why.")
        return others(verdict.removeprefix("done:"))

    def of_rank0(self, value: T) -> T:
        import torch.distributed as dist

        box = [value if self.is_rank0 else None]
        with _peers():
            dist.broadcast_object_list(box, src=0)
        return cast("T", box[0])

    def assert_same_on_all_ranks(self, what: str, value: str) -> None:
        import torch
        import torch.distributed as dist

        digest = hashlib.blake2b(value.encode(), digest_size=8).digest()
        own = torch.tensor([int.from_bytes(digest, "little", signed=True)])
        all_of_them = [torch.empty_like(own) for _ in range(self.size)]
        with _peers():
            dist.all_gather(all_of_them, own)
        different = [rank for rank, other in enumerate(all_of_them) if int(other) != int(all_of_them[0])]
        if different:
            raise DistributedError(
                f"The processes of this run differ in {what}: {different} of {self.size} from the first. All "
                "must run the same versions, with the same command, on the same files. The last checkpoint "
                "is untouched."
            )

    def place(
        self,
        model: LanguageModel,
        shard: Shard,
        leave_whole: Sequence[torch.nn.Module] = (),
        *,
        from_rank0: bool = False,
    ) -> Placement:
        import torch

        from nanothink.training.sharding import ShardedPlacement

        device = torch.device(self.device or "cpu")
        with _peers():
            return ShardedPlacement(model, device, shard, leave_whole, from_rank0=from_rank0)


def _own_device(asked: str | None, launch: Launch) -> torch.device:
    import torch

    from nanothink.models.precision import choose_device

    device = choose_device(asked)
    if device.type == "mps":
        raise UsageError("Several processes cannot share one MPS device. Start one, or use --device cpu.")
    if device.type == "cuda":
        if device.index is not None:
            raise UsageError(
                f"--device {asked}: each of the {launch.size} processes takes a GPU of its own. Use --device "
                "cuda, or leave it out."
            )
        count = torch.cuda.device_count()
        if launch.local_rank >= count:
            raise RankError(
                f"Process {launch.rank} of {launch.size} finds no GPU: this machine shows {count}. "
                f"Start as many as there are (--nproc-per-node={count}), or use --device cpu."
            )
        device = torch.device("cuda", launch.local_rank)
        torch.cuda.set_device(device)
    return device


_OF_THE_NETWORK = re.compile(r"gloo|nccl|connection (closed|reset)", re.IGNORECASE)


@contextmanager
def _peers(
    what: str = "Another process of this run has ended, or does not answer", *, only_theirs: bool = False
) -> Iterator[None]:
    """Raise the errors that torch.distributed raises when a process is gone as DistributedError.

    ``only_theirs``: other RuntimeErrors pass, as from a block in which not every call is one to the others.
    """
    try:
        yield
    except RuntimeError as error:
        if only_theirs and not _OF_THE_NETWORK.search(str(error)):
            raise
        raise DistributedError(
            f"{what} ({first_sentence(error)}). The last checkpoint is untouched: start all processes again, "
            "with --resume."
        ) from error


def _leave_together() -> None:
    """Wait for all processes: rank 0 may still be writing, and torchrun ends all once one has ended."""
    import torch
    import torch.distributed as dist

    with suppress(RuntimeError):  # one was lost after all was done
        dist.all_reduce(torch.zeros(1))
        dist.destroy_process_group()
