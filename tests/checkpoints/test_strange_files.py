"""Checkpoints that are not there, that belong to something else, and pickles that would run code."""

from __future__ import annotations

import hashlib
import math
import os
import pickle
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from nanothink.checkpoints import (
    FORMAT_VERSION,
    read_checkpoint,
    read_summary,
    verify_checkpoint,
)
from nanothink.errors import (
    CheckpointDamagedError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
)


def test_missing_file_names_what_is_there(written):
    with pytest.raises(CheckpointNotFoundError, match=r"Did you mean 'transformer_expert.pt'\?") as caught:
        read_checkpoint(written.with_name("transfomer_expert.pt"))
    assert "holds transformer_expert.pt" in str(caught.value)
    with pytest.raises(CheckpointNotFoundError, match="nor its folder"):
        read_checkpoint(written.parent / "no" / "a.pt")
    with pytest.raises(CheckpointNotFoundError, match=r"is a folder.*transformer_expert\.pt"):
        read_checkpoint(written.parent)
    with pytest.raises(CheckpointNotFoundError, match="no such checkpoint"):
        read_checkpoint(written / "a.pt")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"model_state": {}}, "its entry 'kind' makes no sense .Field required"),
        ([1, 2], "holds a list"),
        (torch.zeros(3), "holds a Tensor"),
    ],
)
def test_a_sound_file_of_something_else_is_a_mismatch(tmp_path, content, reason):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(CheckpointMismatchError, match=reason):
        read_checkpoint(tmp_path / "a.pt")


@pytest.mark.parametrize(
    "key", ["kind", "model_state", "position", "amp_scaler", "rng", "tokenizer", "split", "run"]
)
def test_each_entry_is_required_with_its_type(tmp_path, make_payload, key):
    payload: dict[str, Any] = dict(make_payload())
    path = tmp_path / "a.pt"
    torch.save({**payload, key: 1.5}, path)
    with pytest.raises(CheckpointMismatchError, match=f"'{key}' makes no sense .Input should be"):
        read_checkpoint(path)
    del payload[key]
    torch.save(payload, path)
    with pytest.raises(CheckpointMismatchError, match=f"'{key}' makes no sense .Field required"):
        read_summary(path)


def test_a_newer_format_asks_for_an_upgrade(tmp_path, make_payload):
    torch.save({"format_version": FORMAT_VERSION + 1, "entirely": "different"}, tmp_path / "a.pt")
    with pytest.raises(CheckpointMismatchError, match=r"newer NanoThink.*Upgrade"):
        read_checkpoint(tmp_path / "a.pt")
    torch.save(make_payload(format_version=0), tmp_path / "a.pt")
    with pytest.raises(CheckpointMismatchError, match="'format_version' makes no sense"):
        read_checkpoint(tmp_path / "a.pt")


def test_an_older_format_is_refused_in_a_line(tmp_path, make_payload):
    payload: dict[str, Any] = dict(make_payload(format_version=1))
    del payload["split"]
    torch.save(payload, tmp_path / "a.pt")
    for read in (read_checkpoint, verify_checkpoint, read_summary):
        with pytest.raises(CheckpointMismatchError, match=r"an earlier NanoThink \(format 1.*train it again"):
            read(tmp_path / "a.pt")


ROW = torch.arange(3)

FORGED_SPLITS = [
    ("rule", {"val_split": math.nan, "test_split": 0.0, "seed": 42}, "leave nothing to train on"),
    ("rule", {"val_split": 0.6, "test_split": 0.6, "seed": 42}, "leave nothing to train on"),
    ("rule", {"val_split": 0.1, "test_split": 0.0, "seed": "42"}, "its seed is an integer"),
    ("rule", [0.1], "a split rule has the keys"),
    ("domains", [1], "not a list of names"),
    ("trained", {"keys": ROW}, "trained text has the parts"),
    ("trained.keys", ROW.float(), "not a row of 64-bit integers"),
    ("trained.keys", ROW.reshape(3, 1), "not a row of 64-bit integers"),
    ("trained.keys", [1, 2], "not a row of 64-bit integers"),
    ("trained.keys", ROW.flip(0), "not sorted"),
    ("trained.head_chars", ROW, "not a length for each"),
    ("held_out", {"val": ROW}, "held-out text has the parts"),
    ("held_out.test", torch.zeros(3, dtype=torch.int64), "not sorted"),
    ("more", 1, "other parts"),
]


@pytest.mark.parametrize(("place", "value", "reason"), FORGED_SPLITS)
def test_a_forged_split_is_refused(tmp_path, make_payload, place, value, reason):
    payload = make_payload()
    *outer, last = place.split(".")
    inner = payload["split"]
    for name in outer:
        inner = inner[name]
    inner[last] = value
    torch.save(payload, tmp_path / "a.pt")
    with pytest.raises(CheckpointDamagedError, match=f"its split makes no sense.*{reason}"):
        read_checkpoint(tmp_path / "a.pt")


class Payload:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def seal(path: Path) -> None:
    """Give a forged zip a digest that fits: the digest finds accidents, not malice."""
    whole = path.read_bytes()
    comment = b"nanothink-sha256:" + hashlib.sha256(whole).hexdigest().encode()
    path.write_bytes(whole[:-2] + struct.pack("<H", len(comment)) + comment)


@pytest.mark.parametrize("sealed", [False, True])
@pytest.mark.parametrize("wrapping", ["bare", "zip", "zip, protocol 4"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol 4")
def test_a_pickle_that_would_run_code_is_refused_unrun(tmp_path, make_payload, wrapping, sealed):
    marker, path = tmp_path / "marker", tmp_path / "a.pt"
    evil = {**make_payload(), "run": {"x": Payload(os.system, f"touch '{marker}'")}}
    if wrapping == "bare":
        path.write_bytes(pickle.dumps(evil["run"]))
    else:
        torch.save(evil, path, pickle_protocol=4 if "4" in wrapping else 2)
    if sealed and wrapping != "bare":
        seal(path)
    for read in (read_checkpoint, verify_checkpoint, read_summary):
        with pytest.raises(CheckpointDamagedError, match="run code"):
            read(path)
    assert not marker.exists()
    if wrapping != "bare":
        torch.load(path, weights_only=False)
        assert marker.exists(), "the attack itself must work, or the test shows nothing"


def test_the_refusal_names_what_would_be_called(tmp_path):
    torch.save({"x": Payload(os.system, "true")}, tmp_path / "a.pt")
    with pytest.raises(CheckpointDamagedError, match=r"GLOBAL posix\.system") as caught:
        read_checkpoint(tmp_path / "a.pt")
    assert "weights_only" not in str(caught.value)  # torch's own advice is to load it without protection


def test_torchscript_is_refused(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "a.pt")
    with pytest.raises(CheckpointDamagedError, match="TorchScript"):
        read_checkpoint(tmp_path / "a.pt")


def test_garbage_in_a_file_without_a_digest_never_escapes_as_another_error(tmp_path, make_payload):
    path, chance = tmp_path / "a.pt", random.Random(0)
    torch.save(make_payload(), path)
    whole = path.read_bytes()
    n_refused = 0
    for _ in range(200):
        forged = bytearray(whole)
        for _ in range(chance.randint(1, 8)):
            # pickle (at the start) and directory (at the end), where a byte means most
            where = chance.choice((chance.randrange(2500), len(whole) - 1 - chance.randrange(1500)))
            forged[where] = chance.randrange(256)
        path.write_bytes(forged)
        try:
            read_checkpoint(path)
        except (CheckpointDamagedError, CheckpointMismatchError):
            n_refused += 1
    assert n_refused > 150
