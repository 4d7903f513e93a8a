from __future__ import annotations

import pytest

from nanothink.checkpoints.names import (
    CheckpointName,
    parse_name,
    validate_name,
)
from nanothink.errors import UsageError


@pytest.mark.parametrize(
    ("file_name", "expected"),
    [
        ("transformer_expert.pt", CheckpointName("transformer_expert", "best")),
        ("transformer_expert_epoch15.pt", CheckpointName("transformer_expert", "epoch", 15)),
        ("transformer_expert_epoch0.pt", CheckpointName("transformer_expert", "epoch", 0)),
        ("nanothink_mla_interrupted.pt", CheckpointName("nanothink_mla", "interrupted")),
        ("a_epoch_expert.pt", CheckpointName("a_epoch_expert", "best")),
        ("a_epoch3_expert.pt", CheckpointName("a_epoch3_expert", "best")),
        ("a_interrupted_expert_epoch5.pt", CheckpointName("a_interrupted_expert", "epoch", 5)),
        ("v1.2_expert.pt", CheckpointName("v1.2_expert", "best")),
        ("a.pt.txt", None),
        ("a.txt", None),
        (".a.pt", None),
        (".pt", None),
        (".a.pt.host.12.tmp", None),
    ],
)
def test_parse_name(file_name, expected):
    assert parse_name(file_name) == expected


@pytest.mark.parametrize(
    "name", ["a", "code", "v1.2", "my-run_3", "_x", "epoch5", "a_epoch", "interrupted", "größe"]
)
def test_good_names(name):
    assert validate_name(name) == name
    for suffix, role in (("", "best"), ("_epoch12", "epoch"), ("_interrupted", "interrupted")):
        parsed = parse_name(f"{name}{suffix}.pt")
        assert parsed is not None
        assert (parsed.stem, parsed.role) == (name, role)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("", "empty"),
        ("a.pt", "without the ending"),
        ("a/b", "path separator"),
        ("..\\b", "path separator"),
        ("..", "begin with"),
        (".hidden", "for example 'hidden'"),
        ("--resume", "for example 'resume'"),
        ("my run", "for example 'my-run'"),
        ("a\nb", "for example 'a-b'"),
        ("a\n", "for example 'a'"),
        ("x_interrupted", "'_interrupted'"),
        ("x_epoch5", "'_epoch5'"),
        ("x_epoch007", "'_epoch007'"),
        ("x" * 300, "too long"),
    ],
)
def test_bad_names(name, reason):
    with pytest.raises(UsageError, match=reason):
        validate_name(name)
