"""Rendezvous: the environment that torchrun sets, and the store in which the processes of a run meet.

PyTorch's own rendezvous waits inside a library call, silent and deaf to signals, until all processes have
come. Here each process connects to the store that rank 0 (or torchrun) keeps, registers in it, and checks
every tenth of a second which ranks are missing.
"""

from __future__ import annotations

import itertools
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from nanothink.errors import DistributedError, RankError, UsageError
from nanothink.reporter import Reporter
from nanothink.wording import some_of

MEETING_SECONDS = 600.0
"""Time limit for all processes to start."""

FIRST_WORD_SECONDS = 5.0
NEXT_WORD_SECONDS = 60.0
POLL_SECONDS = 0.1

_RUNS = itertools.count()  # that this process has joined


@dataclass(frozen=True)
class Launch:
    """Rank, sizes and address that torchrun passes to a process by its environment."""

    rank: int
    local_rank: int
    size: int
    address: str = field(default="localhost", compare=False)
    """Host of rank 0."""
    port: int = field(default=29500, compare=False)
    agent_store: bool = field(default=False, compare=False)
    """True if torchrun keeps the store, and not rank 0."""
    local_size: int = field(default=0, compare=False)
    """Processes on this machine; 0 if unknown."""

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> Launch | None:
        """Read the environment; None for a single process, also one that torchrun started.

        Raises:
            UsageError: what the environment says makes no sense.
        """
        numbers = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")
        if any(not environ.get(name) for name in (*numbers, "MASTER_ADDR")):
            return None
        for name in numbers:
            if not _is_number(environ[name]):
                raise UsageError(
                    f"The environment variable {name} is {environ[name]!r}, not a number. torchrun sets it; "
                    "for a run of one process, unset it."
                )
        rank, local_rank, size, port = (int(environ[name]) for name in numbers)
        if size < 2:
            return None
        if rank >= size or not 0 < port < 1 << 16:
            raise UsageError(
                f"The environment says RANK={rank}, WORLD_SIZE={size} and MASTER_PORT={port}, but ranks are "
                "below the world size, and ports from 1 to 65535. torchrun sets them; for a run of one "
                "process, unset them."
            )
        local_size = environ.get("LOCAL_WORLD_SIZE", "")
        return cls(
            rank,
            local_rank,
            size,
            environ["MASTER_ADDR"],
            port,
            agent_store=environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
            local_size=int(local_size) if _is_number(local_size) else 0,
        )

    @property
    def command(self) -> list[str]:
        """Command line before ``nanothink`` that starts as many processes again."""
        if self.local_size == self.size:
            return ["torchrun", f"--nproc-per-node={self.size}", "-m"]
        return []  # several machines, or another launcher: one process can continue the run too


def _is_number(value: str) -> bool:
    return re.fullmatch(r"[0-9]{1,9}", value) is not None


def meet(launch: Launch, reporter: Reporter, lasting: timedelta) -> Any:
    """Wait until every process of the run has come, and return the store that they share.

    After some seconds, and then each minute, a note says which ranks are missing.

    Args:
        lasting: time limit of the store's later calls.

    Raises:
        DistributedError: some processes do not come.
        RankError: rank 0 does not come, or its port is taken; only this process knows.
    """
    from torch.distributed import PrefixStore, TCPStore

    deadline = time.monotonic() + MEETING_SECONDS
    at = f"{launch.address}:{launch.port}"
    me = f"Process {launch.rank} of {launch.size}, on {socket.gethostname()}"
    hosts = launch.rank == 0 and not launch.agent_store
    if not hosts:
        for waited in _polls(deadline):
            reason = _cannot_reach(launch)
            if not reason:
                break
            if waited.is_over:
                raise RankError(
                    f"{me}: nobody answers at {at} ({reason}) after {waited}. The first process belongs "
                    f"there. Check MASTER_ADDR and MASTER_PORT, and that all {launch.size} processes were "
                    "started."
                )
            if waited.is_long:
                reporter.note(f"{me}, waits for the first process at {at} ({reason}).")
    try:
        kept = TCPStore(
            launch.address,
            launch.port,
            launch.size,
            is_master=hosts,
            timeout=timedelta(seconds=max(1.0, deadline - time.monotonic())),
            wait_for_workers=False,
            multi_tenant=not launch.agent_store,
        )
        kept.set_timeout(lasting)
        # torchrun keeps it: an earlier run of these processes has left addresses there.
        store = PrefixStore(f"run {next(_RUNS)}", kept)
        store.set(f"rank {launch.rank}", "here")
        missing = [f"rank {rank}" for rank in range(launch.size)]
        for waited in _polls(deadline):
            if store.check(missing):
                return store
            if waited.is_over or waited.is_long:
                missing = [key for key in missing if not store.check([key])]
                who = f"{len(missing)} of {launch.size} processes ({some_of(missing, 8)})"
                if waited.is_over:
                    raise DistributedError(
                        f"{who} did not come to {at} within {waited}. Start all {launch.size}, each with its "
                        "own RANK, as torchrun does. The last checkpoint is untouched."
                    )
                if launch.rank == 0:
                    reporter.note(f"Waiting for {who} at {at}.")
    except RuntimeError as error:
        raise RankError(
            f"{me}: meeting the others at {at} failed ({first_sentence(error)}). If another program uses "
            "that port, choose another MASTER_PORT (torchrun: --master-port). The last checkpoint is "
            "untouched."
        ) from error
    raise AssertionError("the last poll is over")


@dataclass
class _Waited:
    seconds: float
    is_long: bool
    """True when the next note is due."""
    is_over: bool

    def __str__(self) -> str:
        return f"{self.seconds:.0f} s" if self.seconds < 120 else f"{self.seconds / 60:.0f} minutes"


def _polls(deadline: float) -> Iterator[_Waited]:
    """Yield at each poll; the last one ``is_over``."""
    began = time.monotonic()
    word = began + FIRST_WORD_SECONDS
    while True:
        now = time.monotonic()
        is_long = now >= word
        if is_long:
            word = now + NEXT_WORD_SECONDS
        yield _Waited(now - began, is_long, now >= deadline)
        time.sleep(POLL_SECONDS)


def _cannot_reach(launch: Launch) -> str:
    """Reason that the store cannot be reached; empty if it can."""
    try:
        socket.create_connection((launch.address, launch.port), timeout=2.0).close()
    except OSError as error:
        return error.strerror or str(error)
    except UnicodeError:  # a label of more than 63 characters
        return "that is no name of a machine"
    return ""


def first_sentence(error: Exception) -> str:
    """First sentence of a library's error, without its source location and its advice."""
    lines = re.sub(r"^\[\S+\] ", "", str(error).strip()).splitlines()
    return lines[0].split(". ")[0] if lines else type(error).__name__


@contextmanager
def telling_after(seconds: float, say: Callable[[], None]) -> Iterator[None]:
    """Call ``say`` in another thread if this takes longer."""
    import threading

    timer = threading.Timer(seconds, say)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
