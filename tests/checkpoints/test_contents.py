"""Pickles written by hand: what would crash, hang or fill memory is refused before torch sees it."""

from __future__ import annotations

import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from nanothink.checkpoints import archive, contents, read_checkpoint, verify_checkpoint
from nanothink.checkpoints.contents import check_pickle
from nanothink.checkpoints.file import read_summary
from nanothink.errors import CheckpointDamagedError

READERS = (read_checkpoint, verify_checkpoint, read_summary)


def forge(path: Path, pickled: bytes) -> Path:
    """What torch.save would write, with another list of contents."""
    torch.save({"a": torch.zeros(4)}, path)
    with zipfile.ZipFile(path) as whole:
        members = [(name, whole.read(name)) for name in whole.namelist()]
    with zipfile.ZipFile(path, "w") as whole:
        for name, data in members:
            whole.writestr(name, pickled if name.endswith("data.pkl") else data)
    return path


def refused(path: Path, reason: str) -> None:
    for read in READERS:
        with pytest.raises(CheckpointDamagedError, match=reason):
            read(path)


def tensor(storage: str = "FloatStorage", numbers: int = 4, first: int = 0, *shape: int, **odd: Any) -> bytes:
    """Instructions for one tensor; key 0 of the file has four float32."""
    shape, stride = shape or (4,), odd.get("stride", (1,) * len(shape or (4,)))

    def integers(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(b"\x8a\x08" + struct.pack("<q", n) for n in values) + b"t"

    def text(value: str) -> bytes:
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    identity = b"(" + text("storage") + f"ctorch\n{storage}\n".encode() + text(odd.get("key", "0"))
    identity += text("cpu") + b"\x8a\x08" + struct.pack("<q", numbers) + b"tQ"
    start = b"\x8a\x08" + struct.pack("<q", first)
    arguments = (
        b"(" + identity + start + integers(shape) + integers(stride) + b"\x89ccollections\nOrderedDict\n)Rt"
    )
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"R"


def test_the_tensor_by_hand_is_one(tmp_path: Path) -> None:
    """Or the refusals below would show nothing."""
    path = forge(tmp_path / "a.pt", b"\x80\x02" + tensor() + b".")
    assert torch.equal(torch.load(path, weights_only=True), torch.zeros(4))
    for good in (
        tensor(),
        tensor("FloatStorage", 4, 1, 3),
        tensor("FloatStorage", 4, 0, 2, 2, stride=(2, 1)),
    ):
        check_pickle(b"\x80\x02" + good + b".", {"0": 16}, RuntimeError)


@pytest.mark.parametrize(
    ("pickled", "reason"),
    [
        (tensor("FloatStorage", 10**12), "has not the data"),
        (tensor("DoubleStorage", 4), "has not the data"),
        (tensor("FloatStorage", 4, 0, 10**12), "not the data for it"),
        (tensor("FloatStorage", 4, 2, 3), "not the data for it"),
        (tensor("FloatStorage", 4, 0, 2, stride=(10**12,)), "not the data for it"),
        (tensor("FloatStorage", 4, 0, 10**6, stride=(0,)), "not the data for it"),
        (tensor("FloatStorage", 4, -1), "makes no sense"),
        (tensor("FloatStorage", 4, 0, 4, stride=(-1,)), "makes no sense"),
        (tensor(key="99"), "has not the data"),
        (tensor("QUInt8Storage", 4), "would run code"),
        (b"ctorch.storage\nUntypedStorage\n\x8a\x06\0\0\0\0\0\x01\x85R", "built in another way"),
        (b"ccollections\nOrderedDict\n]\x85R", "built in another way"),
        (b"}K\x01]s", None),
        (b"}]K\x01s", "neither a string nor an integer"),
        (b"}G\0\0\0\0\0\0\0\0K\x01s", "neither a string nor an integer"),
        (b"K\x01K\x02a", "a list is due"),
        (b"0", "instruction POP"),
        (b"\x8f", "instruction EMPTY_SET"),
        (b"t", "lacks its mark"),
        (b"\x87", "lacks its values"),
        (b"h\x07", "damaged"),
    ],
)
def test_what_no_checkpoint_needs_is_refused(pickled: bytes, reason: str | None) -> None:
    whole = b"\x80\x02" + pickled + b"."
    if reason is None:
        check_pickle(whole, {"0": 16}, RuntimeError)
        return
    with pytest.raises(RuntimeError, match=reason):
        check_pickle(whole, {"0": 16}, RuntimeError)


def test_types_have_the_sizes_that_torch_gives_them() -> None:
    sizes = {getattr(torch, name): size for name, size in contents._DTYPES.items()}
    assert sizes == {dtype: dtype.itemsize for dtype in sizes}


def test_a_sketch_has_what_would_be_built(tmp_path: Path) -> None:
    values = {"a": [1, 2.5, None, True, ("x", {"y": ()})], 3: OrderedDict(z=torch.zeros(2, 3)[1:])}
    path = tmp_path / "a.pt"
    torch.save(values, path)
    with path.open("rb") as file:
        sketch = archive.check_archive(file, path, thorough=False)
    found = sketch.pop(3).pop("z")
    assert sketch == {"a": values["a"]}
    assert (found.shape, found.stride, found.first, found.numel()) == ((1, 3), (3, 1), 3, 3)


def test_a_key_that_would_crash_the_process_when_it_is_hashed(tmp_path: Path) -> None:
    """``torch.load(weights_only=True)`` of this file ends by a segmentation fault (with PyTorch 2.13)."""
    path = forge(tmp_path / "a.pt", b"\x80\x02})" + b"\x85" * 200_000 + b"K\x01s.")
    refused(path, "nested without end")


@pytest.mark.timeout(20)
def test_a_key_that_would_take_years_to_hash(tmp_path: Path) -> None:
    doubled = b"".join(b"h\0h\0\x86q\0" for _ in range(90)).replace(b"h\0h\0", b"h\0h\0", 1)
    path = forge(tmp_path / "a.pt", b"\x80\x02}(K\x01q\0" + doubled + b"tK\x01s.")
    refused(path, "neither a string nor an integer")


@pytest.mark.timeout(60)
def test_a_list_of_contents_beyond_all_measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contents, "_MAX_INSTRUCTIONS", 10_000)
    refused(forge(tmp_path / "a.pt", b"\x80\x02(" + b"}" * 10_000 + b"l."), "more than 10,000 instructions")
    path = forge(tmp_path / "b.pt", b"\x80\x02X" + struct.pack("<I", 65 * 2**20) + b"a" * (65 * 2**20) + b".")
    refused(path, "beyond all measure")


def test_a_second_directory_that_only_one_reader_of_zip_sees(tmp_path: Path) -> None:
    """Python's reader shifts the offsets of a zip with something in front of it, PyTorch's does not."""
    evil, good = tmp_path / "evil.pt", tmp_path / "good.pt"
    forge(evil, pickle.dumps({"x": 1}, protocol=2))
    torch.save({"x": 2}, good)
    both = tmp_path / "both.pt"
    both.write_bytes(evil.read_bytes() + good.read_bytes())
    refused(both, "directory is not where|records do not agree")


def test_an_end_record_hidden_in_the_digest(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({"x": 1}, path)
    whole = path.read_bytes()
    comment = b"nanothink-sha256:" + (whole[-22:] + b"0" * 64)[:64]
    path.write_bytes(whole[:-2] + struct.pack("<H", len(comment)) + comment)
    refused(path, "its end is missing")


@pytest.mark.parametrize(
    "name", ["a/DATA.PKL", "b/data.pkl", "a/data/x", "a/data/0/../1", "a/code/x.py", "a"]
)
def test_parts_that_torch_save_does_not_write(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.pt"
    torch.save({"x": 1}, path)
    with zipfile.ZipFile(path, "a") as whole:
        whole.writestr(name, b"x")
    refused(path, "not one that torch.save wrote|leads out|TorchScript|twice")


def test_a_directory_of_a_million_parts_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "_MAX_DIRECTORY_BYTES", 100)
    torch.save({"x": 1}, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", "zip directory takes")


def test_what_torch_save_writes_passes(tmp_path: Path) -> None:
    base = torch.arange(24.0)
    module = torch.nn.Linear(3, 2)
    values = {
        "views": [base[4:], base.view(4, 6).t(), base.view(4, 6)[:, 1:3], base[:0], base.sum()],
        "types": [base.to(t) for t in (torch.bool, torch.uint8, torch.int16, torch.bfloat16, torch.float64)],
        "new type": base.to(torch.uint16),
        "parameters": dict(module.named_parameters()),
        "state": module.state_dict(),
        "plain": (None, True, -1, 2**70, 1.5, "é", [(), ((1, 2), 3)], {1: "x"}),
    }
    torch.save(values, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as whole:
        sizes = {info.filename.rpartition("/")[2]: info.file_size for info in whole.infolist()}
        check_pickle(whole.read("a/data.pkl"), sizes, RuntimeError)
