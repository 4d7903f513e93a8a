"""A short campaign of kills; benchmarks/kill_campaign.py runs the long one."""

from __future__ import annotations

from pathlib import Path

from kills import make_reference, run_campaign
from struck_runs import KINDS, Ground


def test_runs_of_every_kind_killed_at_random_moments(ground: Ground, tmp_path: Path) -> None:
    """Most of the kills hit a checkpoint half written. What is checked after each: kills.py."""
    campaign = run_campaign(
        ground,
        {kind: make_reference(ground, kind, tmp_path) for kind in KINDS},
        dict.fromkeys(KINDS, 3),
        seed=3,
        in_write_fraction=0.7,
    )
    assert campaign.failures == []
    assert len(campaign.kills) == 3 * len(KINDS)
    assert sum(kill.in_write for kill in campaign.kills) >= 4
    assert set(campaign.ends) == set(KINDS)
    assert campaign.resumes_seen >= len(KINDS)
