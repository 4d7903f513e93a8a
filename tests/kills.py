"""Real runs killed at random moments, again and again, and what must hold after each kill.

A chain is one run that is killed, resumed by a bare ``--resume``, killed again, and at last left to end.
After each kill: every checkpoint file verifies, none that was there before is gone or older than it was, and
``--resume`` takes the rolling one. When the run ends, it ends as the one that was
never interrupted did, to the bit.
"""

from __future__ import annotations

import os
import random
import re
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from reports import Told
from struck_runs import Ended, FreshProcess, Ground, Running, assert_same_run, stem

from nanothink.checkpoints import CheckpointStore, verify_checkpoint
from nanothink.errors import NanoThinkError
from nanothink.training.recording import ENDING

LONGEST_CHAIN = 6
"""Kills after which a run is left to end, so that ends are compared often."""

SAVE_EVERY_SECONDS = 0.5
WRITE_SECONDS = 0.0005
"""What each write of up to 4 KiB takes longer; a checkpoint of these runs has 100 to 250 of them."""


@dataclass(frozen=True)
class Kill:
    kind: str
    fresh: bool
    """A new Python, not a fork of one that has imported everything; its writes are not slowed down."""
    in_write: bool
    """A checkpoint was half written."""
    step: int | None
    """Of the state that was left; None when there was none yet."""


@dataclass
class Campaign:
    kills: list[Kill] = field(default_factory=list)
    ends: list[str] = field(default_factory=list)
    """Kinds of the runs that were killed at least once, ended, and were compared."""
    resumes_seen: int = 0
    """Resumed runs that lived long enough to say what they go on from."""
    failures: list[str] = field(default_factory=list)

    def of(self, kind: str) -> list[Kill]:
        return [kill for kill in self.kills if kill.kind == kind]


class Chain:
    """One run, killed and resumed until it ends."""

    def __init__(
        self,
        ground: Ground,
        campaign: Campaign,
        kind: str,
        reference: Path,
        number: int,
        write_seconds: float,
    ) -> None:
        self.kind, self.reference, self.write_seconds = kind, reference, write_seconds
        self.n_kills = 0
        self._ground, self._campaign = ground, campaign
        self._folder = reference.with_name(f"{kind}-{number}")
        self._store = CheckpointStore(self._folder, stem(kind))
        self._records = self._folder / "runs" / stem(kind)
        self._arguments = [
            *ground.typed(kind, self._folder, save_every_seconds=SAVE_EVERY_SECONDS),
            "--resume",
        ]

    def start(self, *, fresh: bool) -> Running:
        if fresh:
            return FreshProcess(self._arguments)
        return self._ground.server.start(self._arguments, write_seconds=self.write_seconds)

    def is_writing(self) -> bool:
        try:
            return any(name.endswith(".tmp") and ".pt." in name for name in os.listdir(self._folder))
        except FileNotFoundError:
            return False

    def kill(self, process: Running, before: dict[Path, int], *, fresh: bool) -> bool:
        """Kill the run and look at what it left. False when it had just ended by itself."""
        process.send(signal.SIGKILL)
        ended = process.wait()
        if ended.code != -signal.SIGKILL:
            return False
        self.n_kills += 1
        self._check_origin(ended, before)
        after = self.state()
        # Killed when all was done and the rolling file away: there is nothing left to go on with.
        done = self._store.interrupted not in after and (self._records / ENDING).is_file()
        for path, step in before.items():
            if after.get(path, -1) < step and not (done and path == self._store.interrupted):
                self._fail(f"{path} had step {step} and has {after.get(path, 'gone')}")
        skipped: list[str] = []
        newest = self._store.newest(Told(skipped.append))
        if skipped:
            self._fail(f"{skipped}")
        if done:
            right = newest is not None and after[newest] == max(after.values())
        else:
            right = newest == (self._store.interrupted if after else None)
        if not right:
            self._fail(f"--resume would take {newest}, but there are {after}")
        self._campaign.kills.append(
            Kill(self.kind, fresh, self.is_writing(), after.get(self._store.interrupted))
        )
        return True

    def finish(self, process: Running, before: dict[Path, int]) -> None:
        """Let the run end, and compare."""
        ended = process.wait()
        if ended.code != 0:
            self._fail(f"it ended with {ended.code}: {ended.stderr[-1500:]}")
            return
        self._check_origin(ended, before)
        if not self.n_kills:
            return
        try:
            assert_same_run(self.reference, self._folder, stem(self.kind))
        except AssertionError as difference:
            self._fail(f"after {self.n_kills} kills it is not the run that was never killed: {difference}")
        self._campaign.ends.append(self.kind)

    def state(self) -> dict[Path, int]:
        """Step of every checkpoint file; one that does not verify is a failure."""
        steps = {}
        for path in self._store.existing():
            try:
                steps[path] = verify_checkpoint(path).step
            except NanoThinkError as error:
                self._fail(f"unusable: {error}")
        return steps

    def _check_origin(self, ended: Ended, before: dict[Path, int]) -> None:
        """The run went on from the rolling file, or a finished one, if it got so far as to say."""
        if "Traceback" in ended.stderr:
            self._fail(ended.stderr[-1500:])
        said = re.search(r"Resuming from (\S+): epoch \d+, step (\d+)\.", ended.stderr)
        if said is not None:
            self._campaign.resumes_seen += 1
            done = self._store.interrupted not in before
            if int(said[2]) != before.get(Path(said[1])) or (
                int(said[2]) != max(before.values()) if done else Path(said[1]) != self._store.interrupted
            ):
                self._fail(f"it went on from {said[1]}, step {said[2]}, but there were {before}")
        elif before and "starting a new run" in ended.stderr:
            self._fail(f"it started anew, but there were {before}")

    def _fail(self, what: str) -> None:
        self._campaign.failures.append(f"{self._folder} (kill {self.n_kills}): {what}")


def run_campaign(
    ground: Ground,
    references: dict[str, tuple[Path, float]],
    kills: dict[str, int],
    *,
    seed: int = 0,
    in_write_fraction: float = 0.2,
    n_fresh: int = 0,
    write_seconds: float = WRITE_SECONDS,
    on_kill: Callable[[Campaign], None] = lambda _: None,
) -> Campaign:
    """Kill runs of each kind as often as ``kills`` says.

    Args:
        references: by kind, what ``make_reference`` gives. The runs go beside the one never interrupted.
        in_write_fraction: kills that wait, from their random moment on, for a write to be under way.
        n_fresh: of each kind's kills, so many hit fresh processes.
        write_seconds: what each write of up to 4 KiB takes longer; as in the references.
    """
    chance, campaign = random.Random(seed), Campaign()
    for kind, n_kills in kills.items():
        reference, seconds = references[kind]
        chains: Iterator[Chain] = (
            Chain(ground, campaign, kind, reference, n, write_seconds) for n in range(10**6)
        )
        chain = next(chains)
        for nth in _until(lambda kind=kind, n=n_kills: len(campaign.of(kind)) >= n):  # type: ignore[misc]
            if len(campaign.failures) > 5 or nth > 20 * n_kills:
                return campaign
            fresh = len(campaign.of(kind)) < n_fresh
            before = chain.state()
            started = time.monotonic()
            process = chain.start(fresh=fresh)
            starting_up = ground.server.start_up_seconds if fresh else 0.0
            ended = chain.n_kills >= LONGEST_CHAIN or process.has_ended(
                chance.uniform(0.0, seconds + starting_up)
            )
            if not ended and chance.random() < in_write_fraction:
                while not chain.is_writing() and not (ended := process.has_ended(0.0005)):
                    pass
                ended = ended or process.has_ended(chance.uniform(0.0, 0.002 if fresh else 0.1))
            if not ended and chain.kill(process, before, fresh=fresh):
                on_kill(campaign)
            else:
                chain.finish(process, before)
                if not (chain.n_kills or fresh):  # the machine is busier, or less, than it was
                    seconds = time.monotonic() - started
                chain = next(chains)
        if chain.n_kills:
            before = chain.state()
            chain.finish(chain.start(fresh=False), before)
    return campaign


def _until(done: Callable[[], bool]) -> Iterator[int]:
    n = 0
    while not done():
        yield n
        n += 1


def make_reference(
    ground: Ground, kind: str, workspace: Path, *, write_seconds: float = WRITE_SECONDS
) -> tuple[Path, float]:
    """The run that is never interrupted, and how long it takes with slow writes."""
    folder = workspace / f"{kind}-uninterrupted"
    arguments = ground.typed(kind, folder, save_every_seconds=SAVE_EVERY_SECONDS)
    started = time.monotonic()
    ended = ground.server.run(arguments, write_seconds=write_seconds)
    assert ended.code == 0, ended.stderr
    return folder, time.monotonic() - started
