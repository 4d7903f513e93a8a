"""A short campaign of kills; benchmarks/kill_campaign.py runs the long one."""

from __future__ import annotations

from pathlib import Path

from kills import make_reference, run_campaign
from struck_runs import KINDS, Ground


def test_runs_of_every_kind_killed_at_random_moments(ground: Ground, tmp_path: Path) -> None:
    """Most of the kills hit a checkpoint half written. What is checked after each: kills.py."""
    slowly = 0.0001
    campaign = run_campaign(
        ground,
        {kind: make_reference(ground, kind, tmp_path, write_seconds=slowly) for kind in KINDS},
        dict.fromkeys(KINDS, 2),
        seed=3,
        in_write_fraction=0.8,
        write_seconds=slowly,
    )
    assert campaign.failures == []
    assert len(campaign.kills) == 2 * len(KINDS)
    assert sum(kill.in_write for kill in campaign.kills) >= 3
    assert set(campaign.ends) == set(KINDS)
    assert campaign.resumes_seen >= len(KINDS)
