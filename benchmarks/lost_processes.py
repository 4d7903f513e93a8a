"""A process of a training run is lost: when are the others gone, and does the run resume to the same bits?

    python benchmarks/lost_processes.py
    python benchmarks/lost_processes.py --only "rank 1 stops answering" --timeout 1800

Two processes under torchrun (gloo, CPU) train a tiny transformer. In each case one is killed, fails, or stops
answering, in a step or with its rows of a checkpoint written and nothing else. Then two processes resume;
the weights at the end are compared with those of a run that nothing happened to. ``--timeout`` takes the
place of the half hour after which a process that lives and does not answer ends a run.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from side_by_side import machine, plain_environment

from nanothink.checkpoints import CheckpointStore, read_checkpoint

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from struck_runs import make_corpus, typed

STEM, AT_STEP = "transformer_expert", 6  # its rolling state is then that of step 4, or a new one
SAVE = "a save, its rows written"
WAITING = 600  # seconds for a run to end


@dataclass(frozen=True)
class Case:
    rank: int
    how: str
    """A signal that it gets, "exception" or "disk full"."""
    during: str = "a step"

    @property
    def name(self) -> str:
        said = {"SIGKILL": "is killed", "SIGSTOP": "stops answering", "exception": "raises an exception"}
        return f"rank {self.rank} {said.get(self.how, 'finds its disk full')}"


CASES = (
    Case(1, "SIGKILL"),
    Case(1, "SIGKILL", SAVE),
    Case(0, "SIGKILL"),
    Case(0, "SIGKILL", SAVE),
    Case(1, "exception"),
    Case(0, "exception"),
    Case(1, "disk full", "a save"),
    Case(1, "SIGSTOP"),
    Case(0, "SIGSTOP"),
)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", help="cases whose name has this in it")
    parser.add_argument("--timeout", type=float, default=20, help="seconds")
    options = parser.parse_args()
    # PYTHON_EXEC is what torchrun starts.
    environment = {**plain_environment(), "OMP_NUM_THREADS": "1", "PYTHON_EXEC": sys.executable}
    all_same = True
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_corpus(folder / "corpus")
        command = [sys.executable, "-m", "nanothink", "tokenizer", "train", "--vocab-size", "320"]
        place = ["--data-dir", str(folder / "corpus"), "--out", str(folder / "tokenizer")]
        subprocess.run([*command, *place], env=environment, check=True, stdout=subprocess.DEVNULL)

        def words(run: str) -> list[str]:
            return typed(
                "transformer", folder / "corpus", folder / "tokenizer", folder, folder / run, max_epochs=1
            )

        whole = start(folder, environment, words("whole"))
        assert whole.wait(WAITING) == 0, (folder / "said").read_text()[-4000:]
        print(machine())
        heads = (
            "what happens",
            "during",
            "the other is gone after",
            "torchrun after",
            "resumed from",
            "same end",
        )
        print(f"| {' | '.join(heads)} |")
        print("|---|---|---:|---:|---:|---|")
        for number, case in enumerate(CASES):
            if options.only and options.only not in case.name:
                continue
            run = f"run{number}"
            struck = folder / "struck"
            struck.unlink(missing_ok=True)
            asked = {"rank": case.rank, "how": case.how, "during": case.during, "struck": str(struck)}
            launcher = start(folder, environment, words(run), {**asked, "timeout": options.timeout})
            other, launched = seconds_to_end(launcher, struck, 1 - case.rank)
            left = CheckpointStore(folder / run, STEM).newest()
            step = read_checkpoint(left)["step"] if left is not None else "none"
            resumed = start(folder, environment, [*words(run), "--resume"])
            assert resumed.wait(WAITING) == 0, (folder / "said").read_text()[-4000:]
            same = weights(folder / run).keys() == weights(folder / "whole").keys() and all(
                torch.equal(tensor, weights(folder / run)[name])
                for name, tensor in weights(folder / "whole").items()
            )
            all_same &= same
            cells = (
                case.name,
                case.during,
                f"{other:.1f} s",
                f"{launched:.1f} s",
                step,
                "yes" if same else "NO",
            )
            print(f"| {' | '.join(map(str, cells))} |", flush=True)
    return 0 if all_same else 1


def weights(run: Path) -> dict[str, torch.Tensor]:
    return dict(read_checkpoint(CheckpointStore(run, STEM).best)["model_state"])


def start(
    folder: Path, environment: dict[str, str], arguments: list[str], case: dict[str, Any] | None = None
) -> subprocess.Popen[bytes]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    with (folder / "said").open("ab") as said:
        return subprocess.Popen(
            [*launcher, __file__, "--be-one-of-two", json.dumps(case), *arguments],
            env=environment,
            stdout=said,
            stderr=said,
        )


def seconds_to_end(launcher: subprocess.Popen[bytes], struck: Path, other: int) -> tuple[float, float]:
    """Until the process of rank ``other`` is gone, and until torchrun is."""
    while not struck.exists():
        assert launcher.poll() is None, "the run ended before anything happened to it"
        time.sleep(0.01)
    began = float(struck.read_text())
    pid = int(struck.with_name(f"pid{other}").read_text())
    gone = 0.0
    while launcher.poll() is None:
        if not gone and not _lives(pid):
            gone = time.monotonic() - began
        time.sleep(0.01)
    ended = time.monotonic() - began
    return gone or ended, ended


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def be_one_of_two(case: dict[str, Any] | None, arguments: list[str]) -> None:
    """Be a process of the run; ``case`` happens in one of them."""
    from nanothink.checkpoints import shards
    from nanothink.cli.app import run as run_command
    from nanothink.training import distributed, loop

    rank = int(os.environ["RANK"])
    if case is not None:
        struck = Path(case["struck"])
        struck.with_name(f"pid{rank}").write_text(str(os.getpid()))
        distributed.TIMEOUT = timedelta(seconds=case["timeout"])

        def strike() -> None:
            aside = struck.with_name("striking")
            aside.write_text(str(time.monotonic()))
            aside.rename(struck)
            if case["how"] == "exception":
                raise ValueError("a fault in the code")
            if case["how"] == "disk full":
                resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
                return
            os.kill(os.getpid(), getattr(signal, case["how"]))

        def counted(do: Callable[..., Any], nth: int, *, first: bool) -> Callable[..., Any]:
            calls = 0

            def called(*given: Any, **named: Any) -> Any:
                nonlocal calls
                calls += 1
                if first and calls == nth:
                    strike()
                done = do(*given, **named)
                if not first and calls == nth:
                    strike()
                return done

            return called

        if rank == case["rank"] and case["during"] == "a step":
            loop.take_step = counted(loop.take_step, AT_STEP, first=True)
        elif rank == case["rank"]:  # the third: at the start, at step 4, at step 8
            first = case["how"] == "disk full"
            shards.save = counted(shards.save, 3, first=first)
    sys.exit(run_command(arguments))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--be-one-of-two"]:
        be_one_of_two(json.loads(sys.argv[2]), sys.argv[3:])
    else:
        sys.exit(main())
