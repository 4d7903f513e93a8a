"""One checkpoint file: what comes back, and damage that is found."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import time
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reports import Told

from nanothink.checkpoints import (
    FORMAT_VERSION,
    archive,
    read_checkpoint,
    read_summary,
    verify_checkpoint,
    write_checkpoint,
)
from nanothink.errors import (
    CheckpointDamagedError,
    CheckpointMismatchError,
)


def same(a: Any, b: Any) -> bool:
    """Equal to the bit and to the type."""
    if isinstance(a, torch.Tensor):
        if a.dtype != b.dtype or a.shape != b.shape or not a.numel():
            return a.dtype == b.dtype and a.shape == b.shape
        return bool(
            torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))
        )
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@pytest.mark.parametrize("mmap", [False, True])
def test_round_trip_is_bit_equal(tmp_path, make_payload, mmap):
    payload = make_payload(
        model_state={
            "float32": torch.randn(5, 3),
            "bfloat16": torch.randn(7).bfloat16(),
            "float16": torch.tensor([1.5, float("nan"), float("inf"), -0.0]).half(),
            "int8": torch.tensor([-128, 127], dtype=torch.int8),
            "float8": torch.randn(4).to(torch.float8_e4m3fn),
            "bool": torch.tensor([True, False]),
            "scalar": torch.tensor(3, dtype=torch.int64),
            "empty": torch.zeros(0, 4),
            "parameter": torch.nn.Parameter(torch.randn(2)).data,
        }
    )
    path = tmp_path / "deep" / "er" / "naïve ü.pt"
    write_checkpoint(path, payload)
    read = read_checkpoint(path, mmap=mmap)
    assert same(read, payload)
    assert os.listdir(path.parent) == [path.name]


def test_loads_without_nanothink(written, make_payload):
    assert same(torch.load(written, weights_only=True), make_payload())


def test_scalars_of_numpy_and_containers_with_attributes_become_plain(tmp_path, make_payload):
    state = torch.nn.Linear(2, 3).state_dict()
    assert type(state) is OrderedDict
    payload = make_payload(
        model_state=state, best_loss=np.float64(1.5), run={"finished": True, "t": np.float64(2)}
    )
    write_checkpoint(tmp_path / "a.pt", payload)
    read = read_checkpoint(tmp_path / "a.pt")
    assert type(read["best_loss"]) is float
    assert type(read["run"]["t"]) is float
    assert same(read["model_state"], dict(state))


def test_tied_tensors_are_stored_once_and_views_alone(tmp_path, make_payload):
    matrix, big = torch.randn(100, 100), torch.randn(100_000)
    payload = make_payload(
        model_state={"a": matrix, "b": matrix, "row": big[10:20], "wide": torch.ones(1).expand(9)}
    )
    write_checkpoint(tmp_path / "a.pt", payload)
    read = read_checkpoint(tmp_path / "a.pt")["model_state"]
    assert read["a"].data_ptr() == read["b"].data_ptr()
    assert same(read, payload["model_state"])
    assert (tmp_path / "a.pt").stat().st_size < 60_000
    assert verify_checkpoint(tmp_path / "a.pt").n_parameters == 10_000 + 10 + 9


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"run": {"path": Path("x")}}, r"payload\['run'\]\['path'\] is a PosixPath"),
        ({"run": {"array": np.zeros(2)}}, "ndarray"),
        ({"optimizer_state": {(1, 2): 0}}, "key"),
        ({"model_state": {"a": torch.zeros(2, device="meta")}}, "can't be saved"),
        ({"step": 1.0}, "'step' makes no sense .*valid integer"),
        ({"step": True}, "'step' makes no sense .*valid integer"),
        ({"model_state": {"a": 1}}, "'model_state.a' makes no sense .*Tensor"),
        ({"tokenizer": {"a": 1}}, "'tokenizer.a' makes no sense .*string"),
    ],
)
def test_a_payload_that_would_not_load_again_is_not_written(written, make_payload, changes, complaint):
    before = written.read_bytes()
    with pytest.raises(TypeError, match=complaint):
        write_checkpoint(written, make_payload(**changes))
    assert written.read_bytes() == before


def test_summary(written):
    for summary in (verify_checkpoint(written), read_summary(written)):
        assert (summary.path, summary.kind, summary.name) == (written, "transformer", "first")
        assert (summary.step, summary.epoch, summary.position, summary.best_loss) == (7, 2, 224, 3.25)
        assert summary.n_parameters == 2 * 24 * 16
        assert summary.n_bytes == written.stat().st_size
        assert summary.modified == written.stat().st_mtime
        assert summary.format_version == FORMAT_VERSION


def test_a_summary_is_the_same_without_torch_reading_the_file(tmp_path, make_payload):
    table = torch.randn(6, 4)
    weights = {
        "table": table,
        "head": table,  # tied: counted once
        "turned": table.t().contiguous(),
        "of no numbers": torch.zeros(0, 3),
        "single": torch.tensor(1.0),
        "parameter": torch.nn.Parameter(torch.ones(5)).detach(),
        **{str(dtype): torch.ones(7, dtype=dtype) for dtype in (torch.bfloat16, torch.uint16, torch.bool)},
    }
    path = tmp_path / "a_expert.pt"
    write_checkpoint(path, make_payload(model_state=weights))
    assert read_summary(path) == verify_checkpoint(path)
    assert read_summary(path).n_parameters == 24 + 24 + 1 + 5 + 3 * 7


def test_a_listing_imports_no_torch(tmp_path, make_payload):
    write_checkpoint(tmp_path / "a_expert.pt", make_payload())
    (tmp_path / "b_expert.pt").write_bytes(b"PK")
    code = (
        "import sys; from nanothink.cli.app import run;"
        f"code = run(['checkpoints', 'ls', '--json', '--checkpoint-dir', {str(tmp_path)!r}]);"
        "heavy = {'torch', 'numpy', 'tokenizers', 'safetensors'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    sound, damaged = json.loads(done.stdout)["checkpoints"]
    assert (sound["step"], sound["n_parameters"]) == (7, 768)
    assert damaged["reason"]


def test_summary_reads_no_tensor_data(tmp_path, make_payload):
    path = tmp_path / "large.pt"
    write_checkpoint(path, make_payload(model_state={"a": torch.zeros(16_000_000)}))

    def best_seconds(action: Any) -> float:
        times = []
        for _ in range(5):
            started = time.perf_counter()
            action(path)
            times.append(time.perf_counter() - started)
        return min(times)

    assert best_seconds(read_summary) < best_seconds(verify_checkpoint) / 3


def test_weights_that_are_not_finite_are_found_and_named(tmp_path, make_payload):
    path = tmp_path / "a.pt"
    odd = torch.zeros(3, 5_000_000)
    odd[2, -1] = float("inf")  # in the last of several pieces
    write_checkpoint(path, make_payload(model_state={"sound": torch.ones(4), "odd": odd.T}))
    with pytest.raises(CheckpointDamagedError, match=r"1 tensor of 2 hold numbers .* finite \(odd\)"):
        verify_checkpoint(path)
    assert read_checkpoint(path)["step"] == 7  # as it was written, all the same


@pytest.mark.parametrize("read", [verify_checkpoint, read_checkpoint])
def test_reading_says_how_far_it_is(tmp_path, make_payload, read):
    path = tmp_path / "a.pt"
    write_checkpoint(path, make_payload(model_state={"a": torch.zeros(3_000_000)}))
    heard: list[tuple[str, int, int]] = []
    read(path, reporter=Told(progress=lambda *said: heard.append(said)))
    assert len(heard) > 1
    assert heard == sorted(heard)
    label, done, total = heard[-1]
    assert label == "verifying a.pt"
    assert done == total
    assert 0 <= path.stat().st_size - total < 500  # the comment


def test_every_truncation_is_detected(written):
    whole = written.read_bytes()
    lengths = {*range(0, len(whole), 97), *range(64), *range(len(whole) - 300, len(whole))}
    for length in sorted(lengths):
        written.write_bytes(whole[:length])
        with pytest.raises(CheckpointDamagedError, match=r"transformer_expert\.pt"):
            verify_checkpoint(written)
    written.write_bytes(whole + b"\0")
    with pytest.raises(CheckpointDamagedError):
        verify_checkpoint(written)


def test_a_file_is_verified_once_unless_it_changes(written, make_payload, monkeypatch):
    digests = []
    really = archive._digest_of

    def digest(*given):
        digests.append(1)
        return really(*given)

    monkeypatch.setattr(archive, "_digest_of", digest)

    def n_digests(read):
        digests.clear()
        read(written)
        return len(digests)

    assert [n_digests(read_checkpoint) for _ in range(2)] == [1, 1]  # it may change within the same tick
    long_ago = time.time() - 10
    os.utime(written, (long_ago, long_ago))
    time.sleep(0.2)  # the time of that change itself cannot be set
    assert [n_digests(verify_checkpoint) for _ in range(2)] == [1, 1]
    assert [n_digests(read_checkpoint) for _ in range(2)] == [0, 0]
    write_checkpoint(written, make_payload(step=8))
    assert n_digests(read_checkpoint) == 1
    time.sleep(0.2)
    assert [n_digests(read_checkpoint) for _ in range(2)] == [1, 0]
    with open(written, "r+b") as file:
        file.seek(1000)
        file.write(b"?")
    os.utime(written, (long_ago, long_ago))
    with pytest.raises(CheckpointDamagedError, match="digest differs"):
        read_checkpoint(written)


def test_a_damaged_summary_is_an_error_of_a_listing_too(written, make_payload):
    whole = written.read_bytes()
    for there, other in (
        (b'"step": 7', b'"step": x'),
        (b'"step": 7', b'"stop": 7'),
        (b'"kind": "transformer"', b'"kind":  7777777777.5'),
        (b'"n_parameters": 768', b'"n_parameters": -.5'),
        (b'"epoch": 2,', b'"epoch":-2,'),
    ):
        assert whole.count(there) == 1
        written.write_bytes(whole.replace(there, other))
        with pytest.raises(CheckpointDamagedError, match="its summary is damaged"):
            read_summary(written)
    newer = f'"format_version": {FORMAT_VERSION}'.encode()
    written.write_bytes(whole.replace(newer, newer[:-1] + b"9"))
    with pytest.raises(CheckpointMismatchError, match="newer NanoThink"):
        read_summary(written)
    torch.save(make_payload(), written)
    without = read_summary(written)
    write_checkpoint(written, make_payload())
    assert replace(without, n_bytes=0, modified=0) == replace(read_summary(written), n_bytes=0, modified=0)


def test_every_flipped_byte_is_detected(written):
    whole = bytearray(written.read_bytes())
    for offset in {*range(0, len(whole), 23), *range(128), *range(len(whole) - 400, len(whole))}:
        bit = 1 << offset % 8
        whole[offset] ^= bit
        written.write_bytes(whole)
        with pytest.raises(CheckpointDamagedError):
            verify_checkpoint(written)
        whole[offset] ^= bit
    written.write_bytes(whole)
    verify_checkpoint(written)


def test_a_swap_of_two_blocks_is_detected(written):
    whole = bytearray(written.read_bytes())
    whole[1000:1016], whole[1016:1032] = whole[1016:1032], whole[1000:1016]
    written.write_bytes(whole)
    with pytest.raises(CheckpointDamagedError, match="SHA-256"):
        verify_checkpoint(written)


def test_a_file_saved_by_plain_torch_is_held_to_its_crcs(tmp_path, make_payload):
    path = tmp_path / "foreign.pt"
    torch.save(make_payload(), path)
    assert same(read_checkpoint(path), make_payload())
    whole = bytearray(path.read_bytes())
    weight = make_payload()["model_state"]["head.weight"].numpy().tobytes()
    whole[whole.index(weight) + 5] ^= 4
    path.write_bytes(whole)
    torch.load(path, weights_only=True)  # torch itself notices nothing: that is why we look
    with pytest.raises(CheckpointDamagedError, match="CRC"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"\0" * 5000, "not a checkpoint"),
        (b"hello", "not a checkpoint"),
        (b"PK\3\4" + b"x" * 3000, "cut short"),
        (b"PK\5\6" + b"\0" * 18, "not a checkpoint"),
        (pickle.dumps({"a": 1}), "bare pickle"),
    ],
)
def test_what_is_no_checkpoint_is_called_so(tmp_path, content, reason):
    path = tmp_path / "a.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointDamagedError, match=reason) as caught:
        read_checkpoint(path)
    assert "nanothink checkpoints ls" in str(caught.value)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.pt")
    with pytest.raises(CheckpointDamagedError, match="pipe"):
        read_checkpoint(tmp_path / "a.pt")
