"""The vector store on the disk: written whole or not at all, opened only for the expert it belongs to.

    <checkpoint>.store/
        manifest.json                  what belongs to it, with the size and digest of every file
        index-<generation>.faiss       the keys (index.py), under the numbers of their tokens
        tokens-<generation>.npy        the text: token n is what followed key n
        documents-<generation>.npy     where each document of it ends, and where it comes from
        heldout-<generation>.npy       hashes of the validation and test texts of all data that went in
        heads-<generation>.npy         hashes of texts of which only the head may be in it, and its length
        merged-<generation>.npy        keys that others stand for (compact.py)
        neighbours-<...>/              neighbours of the training blocks (neighbours.py)
        lock                           held while a process writes

A change writes a new generation of files beside the old one and then replaces the manifest, in one rename. A
kill at any point leaves the old store or the new one; the next change removes files that no manifest names.
Digests are verified before FAISS or numpy read a file, and nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from nanothink.config import VectorStoreConfig
from nanothink.data.split import NOTHING, TrainedText
from nanothink.disk import (
    locked,
    make_folder,
    scratch_folder,
    storage_error,
    sync_folder,
    sync_tree,
)
from nanothink.errors import (
    StorageError,
    VectorStoreDamagedError,
    VectorStoreMismatchError,
    VectorStoreNotFoundError,
)
from nanothink.reporter import SILENT, Reporter
from nanothink.vector_store.contents import DOCUMENT, Contents, Owner, VectorStore, trained_text
from nanothink.vector_store.index import NeighbourIndex, damaged, rebuild
from nanothink.vector_store.manifest import FORMAT, MANIFEST, ROLES, read_manifest, write_manifest


def open_store(
    folder: Path,
    settings: VectorStoreConfig,
    *,
    owner: Owner | None = None,
    writable: bool = False,
    reporter: Reporter = SILENT,
) -> VectorStore:
    """Open the store in ``folder``, every byte of it verified.

    Args:
        owner: refuse a store of another expert or tokenizer; None takes any.
        writable: keep the index in memory, so that it can change; else it is searched where it lies.

    Raises:
        VectorStoreError: it is missing, damaged, or another model's.
        UsageError: FAISS is not installed.
    """
    manifest = read_manifest(folder)
    found = Owner(**manifest["owner"])
    if owner is not None:
        check_owner(folder, found, owner)
    n_bytes = sum(int(facts["bytes"]) for facts in manifest["files"].values())
    advance = reporter.counter("vector store: verifying", n_bytes)
    paths = {role: _verified(folder, role, facts, advance) for role, facts in manifest["files"].items()}
    contents = Contents(
        tokens=_map(paths["tokens"], "<u2", "<u4"),
        documents=_map(paths["documents"], DOCUMENT),
        domains=tuple(manifest["domains"]),
        files=tuple(manifest["sources"]),
        held_out=np.asarray(_map(paths["heldout"], "<u8")),
        heads=np.asarray(_map(paths["heads"], "<u8", columns=2)),
        merged=np.asarray(_map(paths["merged"], "<i8", columns=2)),
    )
    _check_documents(paths["documents"], contents)
    kind = manifest["index"]["kind"]
    index = NeighbourIndex.read(paths["index"], kind, settings.n_probe, writable=writable)
    if index.width != found.width or index.n_keys + len(contents.merged) != len(contents.tokens):
        raise damaged(paths["index"], "it does not go with the tokens beside it")
    return VectorStore(
        folder,
        found,
        index,
        contents,
        n_neighbours=settings.n_neighbours,
        generation=manifest["generation"],
    )


def read_texts(folder: Path, digest: str) -> TrainedText:
    """The texts in the store of ``folder``, without its index; none if it belongs to another expert.

    Args:
        digest: of the key expert's weights.

    Raises:
        VectorStoreError: it is missing or damaged.
    """
    manifest = read_manifest(folder)
    if manifest["owner"]["digest"] != digest:
        return NOTHING
    documents, heads = (
        _verified(folder, role, manifest["files"][role], lambda _: None) for role in ("documents", "heads")
    )
    return trained_text(_map(documents, DOCUMENT), _map(heads, "<u8", columns=2))


def check_owner(folder: Path, found: Owner, wanted: Owner) -> None:
    """Refuse a store whose keys are another expert's states.

    Raises:
        VectorStoreMismatchError: they are.
    """
    for what, has, needs in (
        ("expert", found.digest, wanted.digest),
        ("tokenizer", found.tokenizer, wanted.tokenizer),
        ("width", found.width, wanted.width),
    ):
        if has != needs:
            raise VectorStoreMismatchError(
                f"{folder} belongs to another model: its {what} is not this one's (its keys are states of "
                f"'{found.expert}', a {found.kind}; this model asks by '{wanted.expert}', a {wanted.kind}). "
                f"Build this model's own: {rebuild(folder)}"
            )


def write_store(
    folder: Path,
    owner: Owner,
    index: NeighbourIndex,
    contents: Contents,
    *,
    reporter: Reporter = SILENT,
) -> None:
    """Make this the store in ``folder``, in place of any that was there.

    Raises:
        StorageError: the disk refused; what was there is intact.
    """
    try:
        make_folder(folder, within=folder.parent)
    except OSError as error:
        raise storage_error(folder, error) from error
    with locked(folder, reporter):
        _sweep(folder)
        generation = secrets.token_hex(6)
        names = {role: f"{role}-{generation}.{'faiss' if role == 'index' else 'npy'}" for role in ROLES}
        try:
            with scratch_folder(folder / "generation", blamed=folder) as scratch:
                n_bytes = index.n_bytes + contents.tokens.nbytes + contents.documents.nbytes
                written = reporter.counter("vector store: writing", n_bytes)
                index.write(scratch / names["index"], written)
                np.save(scratch / names["tokens"], contents.tokens)
                np.save(scratch / names["documents"], contents.documents)
                np.save(scratch / names["heldout"], contents.held_out)
                np.save(scratch / names["heads"], contents.heads)
                np.save(scratch / names["merged"], contents.merged)
                sync_tree(scratch)
                written(n_bytes)
                files = {}
                n_bytes = sum(path.stat().st_size for path in scratch.iterdir())
                advance = reporter.counter("vector store: checksums", n_bytes)
                for role, name in names.items():
                    digest = _digest(scratch / name, advance)
                    files[role] = {"name": name, "bytes": (scratch / name).stat().st_size, "digest": digest}
                for name in names.values():
                    os.rename(scratch / name, folder / name)
            sync_folder(folder)
            manifest = {
                "format": FORMAT,
                "generation": generation,
                "owner": asdict(owner),
                "index": {"kind": index.kind, "lists": index.n_lists, "keys": index.n_keys},
                "tokens": len(contents.tokens),
                "domains": list(contents.domains),
                "sources": list(contents.files),
                "files": files,
            }
            write_manifest(folder, manifest)
        except OSError as error:
            raise storage_error(folder, error) from error
        finally:
            _sweep(folder)


def store_bytes(folder: Path) -> int:
    """Size of the store's own files."""
    return sum(facts["bytes"] for facts in read_manifest(folder)["files"].values())


def _sweep(folder: Path) -> None:
    """Remove files of other generations than the manifest's. Only for the holder of the lock."""
    try:
        manifest = read_manifest(folder)
        kept = {facts["name"] for facts in manifest["files"].values()}
        generation = manifest["generation"]
    except (VectorStoreDamagedError, VectorStoreNotFoundError, VectorStoreMismatchError):
        kept, generation = set(), ""
    for path in folder.iterdir():
        role = path.name.partition("-")[0]
        if role in ROLES and path.name not in kept:
            path.unlink(missing_ok=True)
        elif role == "neighbours" and not (generation and path.name.startswith(f"neighbours-{generation}")):
            shutil.rmtree(path, ignore_errors=True)


def _verified(folder: Path, role: str, facts: Mapping[str, Any], on_bytes: Callable[[int], None]) -> Path:
    path = folder / str(facts["name"])
    if path.parent != folder:
        raise damaged(folder / MANIFEST, f"it places {role} elsewhere")
    try:
        if path.stat().st_size != facts["bytes"]:
            raise damaged(path, f"it has {path.stat().st_size} bytes of {facts['bytes']}")
        if _digest(path, on_bytes) != facts["digest"]:
            raise damaged(path, "its digest does not match")
    except FileNotFoundError:
        raise damaged(path, "it is missing") from None
    except OSError as error:
        raise StorageError(f"Cannot read {path}: {error.strerror}. Check the disk.") from error
    return path


def _map(path: Path, *dtypes: DTypeLike, columns: int | None = None) -> NDArray[Any]:
    """The array in ``path``: of one of these types, of numbers or of rows of ``columns`` numbers.

    Raises:
        VectorStoreDamagedError: it is anything else.
    """
    try:
        with open(path, "rb") as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else None
            shape, _, dtype = read(file) if read is not None else ((), False, np.dtype(object))
        wanted = (columns,) if columns is not None else ()
        known = [np.dtype(dtype) for dtype in dtypes]
        if dtype not in known or not shape or shape[1:] != wanted:
            raise damaged(path, f"it holds {dtype} of shape {shape}, and not what belongs there")
        # An empty stretch cannot be mapped.
        array: NDArray[Any] = np.load(path, mmap_mode="r" if all(shape) else None, allow_pickle=False)
    except (ValueError, OverflowError, EOFError) as error:
        raise damaged(path, str(error)) from None
    return array


def _check_documents(path: Path, contents: Contents) -> None:
    """Refuse places of documents that lead outside of the tokens, or to no domain or file."""
    documents, ends = contents.documents, contents.documents["end"]
    outside = len(documents) and (
        ends[0] < 0
        or bool((np.diff(ends) < 0).any())
        or ends[-1] > len(contents.tokens)
        or any(
            documents[part].min() < 0 or documents[part].max() >= len(names)
            for part, names in (("domain", contents.domains), ("file", contents.files))
        )
    )
    if outside:
        raise damaged(path, "its documents do not go with the tokens beside it")


def _digest(path: Path, on_bytes: Callable[[int], None] = lambda n: None) -> str:
    hashed = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            hashed.update(block)
            on_bytes(len(block))
    return hashed.hexdigest()
