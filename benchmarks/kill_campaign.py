"""Training runs of every kind of model, killed by SIGKILL at random moments and resumed until they end.

What must hold after each kill, and at the end, stands in tests/kills.py; a short
campaign is part of the tests. Most of the kills find a checkpoint half written, since writes are slow;
some hit fresh processes with nothing slowed down.

    python benchmarks/kill_campaign.py                  200 kills (a quarter of an hour)
    python benchmarks/kill_campaign.py --kills 20 --kinds diffuser
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from kills import Campaign, make_reference, run_campaign
from side_by_side import machine
from struck_runs import KINDS, CommandServer, Ground


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200, help="in all")
    parser.add_argument("--fresh", type=int, default=8, help="of them, in fresh processes")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    each = -(-options.kills // len(options.kinds))
    started = time.monotonic()

    told: set[str] = set()

    def progress(campaign: Campaign) -> None:
        for failure in campaign.failures:
            if failure not in told:
                print(f"FAILED {failure}", file=sys.stderr)
                told.add(failure)
        n_done, seconds = len(campaign.kills), time.monotonic() - started
        eta = seconds / n_done * (each * len(options.kinds) - n_done)
        print(
            f"{n_done} kills, {len(campaign.ends)} ends compared, {len(campaign.failures)} failures, "
            f"{seconds:.0f} s, ETA {eta:.0f} s",
            file=sys.stderr,
            flush=True,
        )

    server = CommandServer()
    with tempfile.TemporaryDirectory(prefix="kill-campaign-") as folder:
        try:
            ground = Ground.make(server, Path(folder))
            campaign = run_campaign(
                ground,
                {kind: make_reference(ground, kind, Path(folder)) for kind in options.kinds},
                dict.fromkeys(options.kinds, each),
                seed=options.seed,
                n_fresh=options.fresh // len(options.kinds),
                on_kill=progress,
            )
        finally:
            server.close()
    print(f"{machine()}; seed {options.seed}; {time.monotonic() - started:.0f} s\n")
    print(table(campaign, options.kinds))
    for failure in campaign.failures:
        print(f"\nFAILED {failure}")
    return 1 if campaign.failures else 0


def table(campaign: Campaign, kinds: list[str]) -> str:
    heads = "kind | kills | during a write | before the first checkpoint | fresh processes | ends compared"
    lines = [f"| {heads} |", f"|{'---|' * 6}"]
    for name in [*kinds, "all"]:
        kills = campaign.kills if name == "all" else campaign.of(name)
        ends = [end for end in campaign.ends if name in ("all", end)]
        numbers = (
            len(kills),
            sum(kill.in_write for kill in kills),
            sum(kill.step is None for kill in kills),
            sum(kill.fresh for kill in kills),
            len(ends),
        )
        lines.append(f"| {name} | {' | '.join(map(str, numbers))} |")
    lines.append(
        f"\nResumed runs that said where they go on from, each time the rolling file: "
        f"{campaign.resumes_seen}. Failures: {len(campaign.failures)}."
    )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
