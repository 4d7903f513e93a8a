"""A checkpoint as a folder that several processes write together: PyTorch's distributed checkpoint, sealed.

    __<rank>_<n>.distcp   rows of the tensors, as that process held them
    .metadata             whose rows of which tensor are where
    state.pt              everything else of the payload
    manifest.json         summary, and size and SHA-256 of every file; written last

All files are written and synced in a folder with a temporary name, which rank 0 renames when the manifest is
there. So the folder is whole or not there, as a file is (file.py), and no process holds more than its own
rows. Any number of processes read it, each what it needs.

``.metadata`` is a pickle, read with an allow-list of the classes that it is made of: it runs no code.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from nanothink.checkpoints.archive import damaged
from nanothink.checkpoints.manifest import MANIFEST, STATE, digest_of, read_manifest
from nanothink.checkpoints.payload import CheckpointPayload, plain, summary_of, tensor_bytes
from nanothink.disk import sync_tree, whole_folder
from nanothink.disk.write import RawFile
from nanothink.errors import StorageError
from nanothink.reporter import SILENT, Reporter

WEIGHTS = "model_state."
"""Beginning of the keys of weights and buffers; the others are moments."""

_CHUNK = 1 << 26
_ROWS = re.compile(r"__(\d+)_\d+\.distcp")

Explain = Callable[[Path, OSError, int], StorageError]


def write_shards(
    choose: Callable[[], Path],
    payload: CheckpointPayload,
    *,
    explain: Explain,
    before_replace: Callable[[], None] | None = None,
    after: Callable[[Path], None] | None = None,
) -> Path:
    """Write ``payload`` to a folder, whole or not at all, and return its path. Every process must call it.

    Args:
        choose: gives the folder's path; called on rank 0.
        payload: the same in all processes but for the rows of its distributed tensors.
        explain: makes the error for a disk that refuses, from the bytes needed.
        before_replace: called on rank 0 when everything is on the disk, just before the folder appears.
        after: called on rank 0 with the folder's path once it is there.

    Raises StorageError in all processes, the old state intact.
    """
    tensors, rest = _split(payload)
    needed = tensor_bytes(rest) + sum(t.numel() * t.element_size() for t in tensors.values())
    with ExitStack() as stack:

        def begin() -> tuple[Path, Path]:
            path = choose()
            return path, stack.enter_context(whole_folder(path))

        path, scratch = _by_rank0(begin)
        try:
            save(tensors, storage_writer=_Writer(scratch), checkpoint_id=scratch)
        except CheckpointException as error:
            causes = [cause for cause, _ in error.failures.values()]
            refusal = next((cause for cause in causes if isinstance(cause, OSError)), None)
            if refusal is None:
                raise
            raise explain(path, refusal, needed) from error
        files = _gathered({name: digest_of(scratch / name) for name in _own_rows(scratch)})

        def seal() -> None:
            try:
                _seal(scratch, rest, tensors, files)
                sync_tree(scratch)
                if before_replace is not None:
                    before_replace()
            except OSError as error:
                raise explain(path, error, needed) from error
            stack.close()  # renames
            if after is not None:
                after(path)

        _by_rank0(seal)
        return cast(Path, path)


def _seal(
    scratch: Path, rest: Mapping[str, Any], tensors: Mapping[str, Tensor], files: dict[str, Any]
) -> None:
    values = cast("dict[str, Any]", plain(dict(rest), "payload"))
    content = io.BytesIO()  # torch.save would hide the error of a disk
    torch.save(values, content)
    (scratch / STATE).write_bytes(content.getbuffer())
    for name in (".metadata", STATE):
        files[name] = digest_of(scratch / name)
    n_parameters = sum(t.numel() for key, t in tensors.items() if key.startswith(WEIGHTS))
    summary = {**summary_of(values), "n_parameters": n_parameters}
    (scratch / MANIFEST).write_text(json.dumps({"summary": summary, "files": files}, indent=1))


class _Writer(FileSystemWriter):
    """PyTorch's writer, which gives the error of a disk that refuses; its own is about positions."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, sync_files=True)
        self.fs = self._disk = _Disk()

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Any:
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            raise self._disk.failure or error from None


class _Disk(FileSystem):
    failure: OSError | None = None

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        with _WholeWrites(path, mode) as file:
            try:
                yield file
            finally:
                self.failure = file.failure or self.failure


class _WholeWrites(RawFile):
    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        at = 0
        while at < len(view):
            at += super().write(view[at : at + _CHUNK])
        return at


def _by_rank0(work: Callable[[], Any]) -> Any:
    """Run ``work`` on rank 0; return its result, or raise its error, in every process."""
    if torch.distributed.get_rank() != 0:
        return _broadcast((None, None))
    try:
        done: tuple[Any, Exception | None] = work(), None
    except (StorageError, OSError) as error:
        done = None, error
    return _broadcast(done)


def _broadcast(done: tuple[Any, Exception | None]) -> Any:
    box: list[Any] = [(done[0], str(done[1]) if done[1] is not None else None)]
    torch.distributed.broadcast_object_list(box, src=0)
    if done[1] is not None:
        raise done[1]
    result, failure = box[0]
    if failure is not None:
        raise StorageError(failure)
    return result


def _gathered(own: Mapping[str, Any]) -> dict[str, Any]:
    """Entries of all processes together, on rank 0; elsewhere empty."""
    n, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    parts: list[Any] = [None] * n
    torch.distributed.gather_object(dict(own), parts if rank == 0 else None)
    return {name: entry for part in parts if part for name, entry in part.items()}


def _own_rows(scratch: Path) -> list[str]:
    rank = torch.distributed.get_rank()
    names = (entry.name for entry in os.scandir(scratch))
    return sorted(n for n in names if (match := _ROWS.fullmatch(n)) and int(match[1]) == rank)


def _split(payload: CheckpointPayload) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of model and optimizer by key, and the payload without them."""
    tensors = {weight_key(name): tensor for name, tensor in payload["model_state"].items()}
    rest: dict[str, Any] = {**payload, "model_state": {}, "optimizer_state": {}}
    for optimizer, state in payload["optimizer_state"].items():
        steps: dict[int, Any] = {}
        for key, index, name, value in _moments(optimizer, state):
            if value.ndim:
                tensors[key] = value
            else:
                steps.setdefault(index, {})[name] = value
        rest["optimizer_state"][optimizer] = {**state, "state": steps}
    return tensors, rest


def _moments(optimizer: str, state: Mapping[str, Any]) -> Iterator[tuple[str, int, str, Tensor]]:
    """Key in the folder, number of the parameter, name of the moment, and the moment."""
    for group in state["param_groups"]:
        for parameter, index in zip(group["names"], group["params"], strict=True):
            for name, value in state["state"].get(index, {}).items():
                yield moment_key(optimizer, parameter, name), index, name, value


def weight_key(name: str) -> str:
    """Key of a weight or buffer in the folder."""
    return f"{WEIGHTS}{name}"


def moment_key(optimizer: str, parameter: str, moment: str) -> str:
    """Key of a moment in the folder."""
    return f"optimizer_state.{optimizer}.{parameter}.{moment}"


def read_shards(
    path: Path,
    *,
    weights: bool = False,
    moments: bool = False,
    verified: bool = False,
    reporter: Reporter = SILENT,
) -> Any:
    """The payload in the folder, as it was given to ``write_shards``.

    Args:
        weights: read the model's tensors; else they have shape and type alone, and ``fill`` reads them.
        moments: the same of the optimizer's.
        verified: the files are known to be sound, and are not read for that again.

    Raises CheckpointDamagedError; OSError.
    """
    files = read_manifest(path)["files"]
    total = sum(n_bytes for n_bytes, _ in files.values())
    done = 0
    for name, (n_bytes, digest) in files.items():
        here = path / name
        if not here.is_file() or here.stat().st_size != n_bytes:
            raise damaged(path, f"its file {name} is missing or was cut short")

        def seen(n_read: int) -> None:
            nonlocal done
            done += n_read
            reporter.progress(f"verifying {path.name}", done, total)

        if not verified and digest_of(here, seen)[1] != digest:
            raise damaged(path, f"its file {name} is not what was written (the SHA-256 digest differs)")
    try:
        rest = torch.load(path / STATE, map_location="cpu", weights_only=True)
        stored = _Reader(path).stored()
        _joined(rest, stored)
    except OSError:
        raise
    except Exception as error:  # KeyError, TypeError, UnpicklingError, ... by where the damage is
        raise damaged(path, f"it does not load ({error!s:.200})") from None
    held = {
        key: torch.empty(meta.shape, dtype=meta.dtype)
        for key, meta in stored.items()
        if (weights if key.startswith(WEIGHTS) else moments)
    }
    fill(path, held)
    return _joined(rest, {**stored, **held})


def weights_of(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Name and values of each tensor of the model, one after another."""
    for key, meta in _Reader(path).stored().items():
        if key.startswith(WEIGHTS):
            held = torch.empty(meta.shape, dtype=meta.dtype)
            fill(path, {key: held})
            yield key.removeprefix(WEIGHTS), held


def fill(path: Path, wanted: Mapping[str, Tensor]) -> None:
    """Read tensors by key into those given; of distributed ones, the rows of this process alone."""
    if wanted:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # every process reads by itself, and is meant to
            load(dict(wanted), storage_reader=_Reader(path), no_dist=True)


def _joined(rest: Any, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Inverse of ``_split``."""
    payload = {**rest, "model_state": {}, "optimizer_state": {}}
    for key, tensor in tensors.items():
        if key.startswith(WEIGHTS):
            payload["model_state"][key.removeprefix(WEIGHTS)] = tensor
    for optimizer, state in rest["optimizer_state"].items():
        moments = {index: dict(named) for index, named in state["state"].items()}
        prefixes = {
            moment_key(optimizer, name, ""): index
            for group in state["param_groups"]
            for name, index in zip(group["names"], group["params"], strict=True)
        }
        for key, tensor in tensors.items():
            parameter, dot, name = key.rpartition(".")
            if (index := prefixes.get(parameter + dot)) is not None:
                moments.setdefault(index, {})[name] = tensor
        payload["optimizer_state"][optimizer] = {**state, "state": moments}
    return payload


class _Unpickler(pickle.Unpickler):
    """Loads what PyTorch's ``Metadata`` is made of, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        of_types = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if of_types or (module, name) in _OF_METADATA:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"its .metadata would run code: it names {module}.{name}")


_OF_METADATA = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "Metadata",
            "TensorStorageMetadata",
            "ChunkStorageMetadata",
            "TensorProperties",
            "MetadataIndex",
            "StorageMeta",
            "_MEM_FORMAT_ENCODING",
        )
    ),
}


class _Reader(FileSystemReader):
    """PyTorch's reader, which runs no code of a folder's and reads no file outside it."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        folder = Path(self.path)
        with (folder / ".metadata").open("rb") as file:
            found = _Unpickler(file).load()
        if not isinstance(found, Metadata) or not isinstance(found.storage_data, dict):
            raise pickle.UnpicklingError("its .metadata describes no checkpoint")
        names = {info.relative_path for info in found.storage_data.values()}
        kinds = {type(entry) for entry in found.state_dict_metadata.values()}
        if any(os.path.basename(name) != name for name in names) or kinds - {TensorStorageMetadata}:
            raise pickle.UnpicklingError("its .metadata describes more than tensors in this folder")
        return found

    def stored(self) -> dict[str, Tensor]:
        """Shape and type of every tensor in the folder."""
        entries = self.read_metadata().state_dict_metadata
        return {
            key: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
            for key, entry in entries.items()
            if isinstance(entry, TensorStorageMetadata)
        }
