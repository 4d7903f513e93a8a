from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import pickle
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
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
    CheckpointNotFoundError,
    StorageError,
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


@pytest.fixture
def written(tmp_path, make_payload):
    path = tmp_path / "transformer_expert.pt"
    write_checkpoint(path, make_payload())
    return path


# --- round trip ---------------------------------------------------------------------------------------


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
        ({"step": 1.0}, "'step' is a float"),
        ({"step": True}, "'step' is a bool"),
        ({"model_state": {"a": 1}}, "no tensor"),
        ({"tokenizer": {"a": 1}}, "no text"),
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


# --- damage -------------------------------------------------------------------------------------------


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


# --- what isn't there, what belongs to something else --------------------------------------------------


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
        ({"model_state": {}}, "'format_version' is missing"),
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
    with pytest.raises(CheckpointMismatchError, match=f"'{key}' is a float"):
        read_checkpoint(path)
    del payload[key]
    torch.save(payload, path)
    with pytest.raises(CheckpointMismatchError, match=f"'{key}' is missing"):
        read_summary(path)


def test_a_newer_format_asks_for_an_upgrade(tmp_path, make_payload):
    torch.save({"format_version": FORMAT_VERSION + 1, "entirely": "different"}, tmp_path / "a.pt")
    with pytest.raises(CheckpointMismatchError, match=r"newer NanoThink.*Upgrade"):
        read_checkpoint(tmp_path / "a.pt")
    torch.save(make_payload(format_version=0), tmp_path / "a.pt")
    with pytest.raises(CheckpointMismatchError, match="'format_version' is 0"):
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


# --- more than tensors and plain values ---------------------------------------------------------------


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


# --- killed in the middle -----------------------------------------------------------------------------

KILL_POINTS = [
    *(("byte", at) for at in (0, 1, 300, 2_500, 6_000)),
    ("byte", "seal"),
    ("byte", -1),
    ("before", "fsync", 1),
    ("after", "fsync", 1),
    ("before", "replace", 1),
    ("after", "replace", 1),
    ("after", "fsync", 2),
]


@pytest.mark.parametrize("point", KILL_POINTS, ids=lambda point: "-".join(map(str, point)))
def test_killed_during_a_write(tmp_path, make_payload, crash_server, point):
    target, source = tmp_path / "a.pt", tmp_path / "new.pt"
    write_checkpoint(target, make_payload(seed=1))
    write_checkpoint(source, make_payload(seed=2))
    old, new = target.read_bytes(), source.read_bytes()
    if point == ("byte", "seal"):  # all but that
        point = ("byte", new.index(b"nanothink-sha256:") - 2)
    elif point[0] == "byte" and point[1] < 0:
        point = ("byte", len(new) + point[1])
    crash_server.start("write", target=str(target), source=str(source), point=list(point))
    crash_server.kill(crash_server.answer()["paused"])

    renamed = tuple(point[:2]) == ("after", "replace") or tuple(point) == ("after", "fsync", 2)
    assert target.read_bytes() == (new if renamed else old)
    assert verify_checkpoint(target).step == (9 if renamed else 8)
    orphans = [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]
    assert len(orphans) == (0 if renamed else 1)

    write_checkpoint(target, make_payload(seed=3))
    assert sorted(os.listdir(tmp_path)) == ["a.pt", "new.pt"]
    assert verify_checkpoint(target).step == 10


def test_killed_at_random_moments_of_endless_writing(tmp_path, make_payload, crash_server):
    target, sources = tmp_path / "a.pt", [tmp_path / "1.pt", tmp_path / "2.pt"]
    for seed, source in enumerate(sources):
        write_checkpoint(source, make_payload(seed=seed))
    allowed = {source.read_bytes() for source in sources}
    write_checkpoint(target, make_payload(seed=0))
    chance, n_orphans = random.Random(1), 0
    for _ in range(15):
        crash_server.start("write_slowly_for_ever", target=str(target), sources=[str(s) for s in sources])
        pid = crash_server.answer()["paused"]
        time.sleep(chance.uniform(0.001, 0.06))
        crash_server.kill(pid)
        assert target.read_bytes() in allowed
        verify_checkpoint(target)
        n_orphans += any(name.endswith(".tmp") for name in os.listdir(tmp_path))
    assert n_orphans >= 5, "too few of the kills fell into a write to show anything"


def test_the_temporary_file_of_a_living_writer_is_left_alone(tmp_path, make_payload, crash_server):
    target, source = tmp_path / "a.pt", tmp_path / "new.pt"
    write_checkpoint(source, make_payload())
    crash_server.start("write", target=str(target), source=str(source), point=["byte", 1000])
    pid = crash_server.answer()["paused"]
    write_checkpoint(target, make_payload())
    assert sum(name.endswith(".tmp") for name in os.listdir(tmp_path)) == 1
    crash_server.kill(pid)


def test_an_interrupt_inside_a_write_comes_through_and_leaves_nothing(written, make_payload, monkeypatch):
    before, really_write = written.read_bytes(), os.write

    def interrupted_write(descriptor: int, data: Any) -> int:
        signal.raise_signal(signal.SIGINT)
        return really_write(descriptor, data)

    monkeypatch.setattr(os, "write", interrupted_write)
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(written, make_payload(seed=5))
    assert written.read_bytes() == before
    assert os.listdir(written.parent) == [written.name]


def test_a_complete_new_file_exists_before_the_old_one_goes(written, make_payload):
    before, seen = written.read_bytes(), []

    def look() -> None:
        (temporary,) = written.parent.glob(".*.tmp")
        shutil.copy(temporary, written.parent / "copy.pt")
        seen.append((verify_checkpoint(written.parent / "copy.pt").step, written.read_bytes() == before))

    write_checkpoint(written, make_payload(seed=5), before_replace=look)
    assert seen == [(12, True)]


# --- disks that say no --------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [0, 1_000, 5_000, -100, -1])
def test_a_write_cut_short_by_a_limit(tmp_path, make_payload, crash_server, limit):
    target, source = tmp_path / "a.pt", tmp_path / "new.pt"
    write_checkpoint(target, make_payload(seed=1))
    write_checkpoint(source, make_payload(seed=2))
    old = target.read_bytes()
    limit = limit if limit >= 0 else source.stat().st_size + limit
    answer = crash_server.run("write_with_file_limit", target=str(target), source=str(source), limit=limit)
    assert answer["error"] == "StorageError"
    assert "limit is reached" in answer["message"]
    assert "intact" in answer["message"]
    assert target.read_bytes() == old
    assert sorted(os.listdir(tmp_path)) == ["a.pt", "new.pt"]


@pytest.mark.parametrize("largest", [1, 700, 1 << 30])
def test_short_writes_make_the_same_file(tmp_path, make_payload, monkeypatch, largest):
    """A disk may take less than it is given; what is left is given again."""
    write_checkpoint(tmp_path / "whole.pt", make_payload())
    really_write, chance = os.write, random.Random(0)

    def short_write(descriptor: int, data: Any) -> int:
        return really_write(descriptor, bytes(data[: chance.randint(1, largest)]))

    monkeypatch.setattr(os, "write", short_write)
    write_checkpoint(tmp_path / "short.pt", make_payload())
    assert (tmp_path / "short.pt").read_bytes() == (tmp_path / "whole.pt").read_bytes()


REFUSALS = {
    errno.ENOSPC: "the disk is full.*Make room",
    errno.EDQUOT: "your disk quota is used up.*Make room",
    errno.EROFS: "the disk is read-only.*Choose another --checkpoint-dir",
    errno.EACCES: "no permission to write there.*Give yourself write access",
    errno.EPERM: "no permission to write there.*Give yourself write access",
    errno.EIO: "the disk reports: Input/output error.*Check the disk",
    errno.ESTALE: "the disk reports: Stale file handle.*Check the disk",
}


@pytest.mark.parametrize("call", ["open", "write", "fsync", "replace"])
@pytest.mark.parametrize("number", REFUSALS, ids=errno.errorcode.get)
def test_a_refusal_at_any_point_leaves_the_old_file(written, make_payload, monkeypatch, call, number):
    before, really = written.read_bytes(), getattr(os, call)
    n_calls = 0

    def refuse(*arguments: Any) -> Any:
        nonlocal n_calls
        n_calls += 1
        if n_calls > (5 if call == "write" else 0):  # not the first write: something is half there
            raise OSError(number, os.strerror(number))
        return really(*arguments)

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(StorageError, match=REFUSALS[number].replace(".*", "(?s:.*)")) as caught:
        write_checkpoint(written, make_payload(seed=5))
    monkeypatch.undo()
    assert "The checkpoint that was there is intact" in str(caught.value)
    assert str(written) in str(caught.value)
    assert written.read_bytes() == before
    assert os.listdir(written.parent) == [written.name]


def test_a_disk_that_takes_nothing_is_not_asked_for_ever(written, make_payload, monkeypatch):
    monkeypatch.setattr(os, "write", lambda descriptor, data: 0)
    with pytest.raises(StorageError, match="intact"):
        write_checkpoint(written, make_payload(seed=5))
    monkeypatch.undo()
    assert verify_checkpoint(written).step == 7


def test_a_folder_that_cannot_be_synced_is_said_of_a_file_that_is_there(written, make_payload, monkeypatch):
    really_fsync, n_calls = os.fsync, 0

    def refuse_the_folder(descriptor: int) -> None:
        nonlocal n_calls
        n_calls += 1
        if n_calls == 2:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        really_fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse_the_folder)
    with pytest.raises(StorageError, match="The new file is complete, but might not survive a power cut"):
        write_checkpoint(written, make_payload(seed=5))
    assert verify_checkpoint(written).step == 12


def test_a_full_disk(tmp_path, make_payload, server_in_own_mounts):
    disk, small, large = tmp_path / "disk", tmp_path / "small.pt", tmp_path / "large.pt"
    disk.mkdir()
    write_checkpoint(small, make_payload())
    write_checkpoint(large, make_payload(model_state={"a": torch.zeros(100_000)}))
    answer = server_in_own_mounts.run(
        "write_to_small_disk", folder=str(disk), sources=[str(small), str(large)], kilobytes=200
    )
    assert answer["error"] == "StorageError"
    for part in ("disk is full", "bytes are needed", "bytes are free", "intact", "checkpoints prune"):
        assert part in answer["message"]
    assert answer["intact"]
    assert answer["files"] == ["a.pt"]


def test_a_read_only_disk(tmp_path, make_payload, server_in_own_mounts):
    disk, source = tmp_path / "disk", tmp_path / "new.pt"
    disk.mkdir()
    write_checkpoint(source, make_payload())
    answer = server_in_own_mounts.run("write_to_read_only_disk", folder=str(disk), source=str(source))
    assert answer["error"] == "StorageError"
    assert "read-only" in answer["message"]


def test_no_permission(make_payload, crash_server):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        target, source = folder / "a.pt", folder / "new.pt"
        write_checkpoint(target, make_payload(seed=1))
        write_checkpoint(source, make_payload(seed=2))
        old = target.read_bytes()
        folder.chmod(0o555)
        answer = crash_server.run("write_as_nobody", target=str(target), source=str(source))
        folder.chmod(0o755)
        assert answer["error"] == "StorageError"
        assert "no permission" in answer["message"]
        assert target.read_bytes() == old


def test_something_in_the_way(tmp_path, make_payload):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="in the way"):
        write_checkpoint(tmp_path / "file" / "a.pt", make_payload())
    (tmp_path / "b.pt").mkdir()
    with pytest.raises(StorageError, match="in the way"):
        write_checkpoint(tmp_path / "b.pt", make_payload())
    assert sorted(os.listdir(tmp_path)) == ["b.pt", "file"]
