"""Data-parallel training: shares of blocks, the sum of gradients, agreement between processes.

    torchrun --nproc-per-node=N -m nanothink pretrain ...

Every process holds the whole model and takes its share of each micro-batch; gradients are added once an
optimizer step, after which all take the same step. Rank 0 alone writes, prints and holds the lock. A decision
that depends on a clock, a signal or a disk is made by one process and told to the others, so that no
process waits for a call that another does not make.

A single process is a ``Processes`` too: its methods then do nothing, and torch.distributed is never imported.
docs/decisions/0017-distributed.md says why this is not DistributedDataParallel.
"""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

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

T = TypeVar("T")

TIMEOUT = timedelta(minutes=30)
"""Wait for a process that is alive and silent. It must outlast the writing of a checkpoint."""

BUCKET_BYTES = 25 << 20
"""Size of the pieces in which gradients are added, each sent off while the backward pass continues."""

_ALIGNMENT = 16  # floats: every gradient begins at a multiple of 64 bytes, as a tensor of its own would


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

    def assert_same_on_all_ranks(self, what: str, value: str) -> None:
        """Compare ``value`` between the processes. Every process must call it.

        Raises:
            DistributedError: they differ in ``what``.
        """

    def watch(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Name the parameters whose gradients are added, in forward order. Once, before training."""

    def adding_gradients(self) -> AbstractContextManager[None]:
        """Context for a step's last backward pass; when it ends, gradients are summed over all processes.

        Gradients accumulated by earlier passes are included. A parameter that has no gradient in any
        process keeps none.
        """
        return nullcontext()


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
        self._gradients: _GradientSum | None = None

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

    def watch(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        self._gradients = _GradientSum(parameters)

    def adding_gradients(self) -> AbstractContextManager[None]:
        assert self._gradients is not None, "watch() comes first"
        return self._gradients.adding()


class _GradientSum:
    """Adds gradients over all processes, bucket by bucket, while the backward pass continues.

    The parameters alone decide the buckets and their order. So every process makes the same calls whichever
    gradients it has, and the order of summation does not depend on earlier steps: a resumed run forms the
    same sums as one that was never interrupted.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter], bucket_bytes: int = BUCKET_BYTES) -> None:
        self._buckets: list[_Bucket] = []
        self._of: dict[torch.nn.Parameter, _Bucket] = {}
        self._begun = 0
        self._adding = False
        waiting: list[torch.nn.Parameter] = []
        for parameter in reversed(parameters):  # gradients come from the last layer to the first
            if waiting and (
                sum(p.nbytes for p in waiting) + parameter.nbytes > bucket_bytes
                or (parameter.dtype, parameter.device) != (waiting[0].dtype, waiting[0].device)
            ):
                self._add_bucket(waiting)
                waiting = []
            waiting.append(parameter)
        if waiting:
            self._add_bucket(waiting)

    def _add_bucket(self, parameters: list[torch.nn.Parameter]) -> None:
        bucket = _Bucket(parameters)
        self._buckets.append(bucket)
        for parameter in parameters:
            self._of[parameter] = bucket
            parameter.register_post_accumulate_grad_hook(self._arrived)  # type: ignore[no-untyped-call]

    @contextmanager
    def adding(self) -> Iterator[None]:
        self._begun, self._adding = 0, True
        for bucket in self._buckets:
            bucket.missing = len(bucket.parameters)
        try:
            yield
        finally:
            self._adding = False
        self._begin(len(self._buckets))
        for bucket in self._buckets:
            bucket.finish()

    def _arrived(self, parameter: torch.nn.Parameter) -> None:
        if not self._adding:
            return
        self._of[parameter].missing -= 1
        n_ready = self._begun
        while n_ready < len(self._buckets) and not self._buckets[n_ready].missing:
            n_ready += 1
        self._begin(n_ready)

    def _begin(self, until: int) -> None:
        for bucket in self._buckets[self._begun : until]:
            bucket.begin()
        self._begun = max(self._begun, until)


class _Bucket:
    """Some parameters, with one buffer for their gradients, followed by a flag for each that has one."""

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        import torch

        self.parameters = parameters
        self.missing = 0
        offsets, end = [], 0
        for parameter in parameters:
            offsets.append(end)
            end += -(-parameter.numel() // _ALIGNMENT) * _ALIGNMENT
        like = parameters[0]
        self._flat = torch.zeros(end + len(parameters), dtype=like.dtype, device=like.device)
        self._views = [
            self._flat[offset : offset + p.numel()].view(p.shape)
            for offset, p in zip(offsets, parameters, strict=True)
        ]
        self._present = self._flat[end:]
        self._work: Any = None

    def begin(self) -> None:
        import torch
        import torch.distributed as dist

        present = [p.grad is not None for p in self.parameters]
        with torch.no_grad():
            if all(present):
                self._present.fill_(1.0)  # as always, and without a copy from the processor
            else:
                self._present.copy_(torch.tensor(present))
            for parameter, view in zip(self.parameters, self._views, strict=True):
                if parameter.grad is None:
                    view.zero_()
                else:
                    view.copy_(parameter.grad)
        with _peers():
            self._work = dist.all_reduce(self._flat, async_op=True)

    def finish(self) -> None:
        with _peers():
            self._work.wait()
        for i, (parameter, view) in enumerate(zip(self.parameters, self._views, strict=True)):
            if parameter.grad is not None or float(self._present[i]):
                parameter.grad = view  # until the next step, which writes there only after it was dropped


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


@contextmanager
def _peers(
    what: str = "Another process of this run has ended, or does not answer",
) -> Iterator[None]:
    """Raise the errors that torch.distributed raises when a process is gone as DistributedError."""
    try:
        yield
    except RuntimeError as error:
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
