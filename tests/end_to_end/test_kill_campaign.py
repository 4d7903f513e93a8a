"""A short campaign of kills; benchmarks/kill_campaign.py runs the long one."""

from __future__ import annotations

from pathlib import Path

from kills import make_reference, run_campaign
from struck_runs import Ground


def test_a_run_killed_at_random_moments(ground: Ground, tmp_path: Path) -> None:
    """Most of the kills hit a checkpoint half written. What is checked after each: kills.py.

    One kind: test_exact_resume.py has the others.
    """
    slowly = 0.0001
    campaign = run_campaign(
        ground,
        {"transformer": make_reference(ground, "transformer", tmp_path, write_seconds=slowly)},
        {"transformer": 4},
        seed=3,
        in_write_fraction=0.8,
        write_seconds=slowly,
    )
    assert campaign.failures == []
    assert len(campaign.kills) == 4
    assert any(kill.in_write for kill in campaign.kills)
    assert campaign.ends
    assert campaign.resumes_seen
