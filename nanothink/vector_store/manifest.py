"""The manifest of a vector store: what belongs to it, with the size and digest of every file."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import orjson
from pydantic import ConfigDict, Field, TypeAdapter, with_config
from typing_extensions import TypedDict  # pydantic asks for it before Python 3.12

from nanothink.disk import storage_error, write_whole
from nanothink.errors import StorageError, VectorStoreMismatchError, VectorStoreNotFoundError
from nanothink.vector_store.index import Kind, damaged, rebuild
from nanothink.wording import fault

FORMAT = 2
SUFFIX = ".store"
MANIFEST = "manifest.json"

Role = Literal["index", "tokens", "documents", "heldout", "heads", "merged"]
ROLES: tuple[Role, ...] = ("index", "tokens", "documents", "heldout", "heads", "merged")

_Count = Annotated[int, Field(ge=0)]


class _OwnerFacts(TypedDict):
    expert: str
    kind: str
    digest: str
    tokenizer: str
    width: _Count
    block_length: _Count


class _IndexFacts(TypedDict):
    kind: Kind
    lists: _Count
    keys: _Count


class _FileFacts(TypedDict):
    name: Annotated[str, Field(pattern=r"^[^\x00]+$")]
    bytes: _Count
    digest: str


@with_config(ConfigDict(strict=True, extra="forbid"))
class _Manifest(TypedDict):
    """Contents of manifest.json."""

    format: int
    generation: Annotated[str, Field(pattern=r"^\w+$")]
    owner: _OwnerFacts
    index: _IndexFacts
    tokens: _Count
    domains: list[str]
    sources: list[str]
    files: Annotated[dict[Role, _FileFacts], Field(min_length=len(ROLES))]
    digest: str


_MANIFESTS = TypeAdapter(_Manifest)


def store_folder(checkpoint_dir: Path, stem: str) -> Path:
    """Folder of the vector store of a run."""
    return checkpoint_dir / f"{stem}{SUFFIX}"


def exists(folder: Path) -> bool:
    """True if the folder holds a store."""
    return (folder / MANIFEST).exists()


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read and verify the manifest of a store; the other files are not read.

    Raises:
        VectorStoreError: there is none, or the manifest is damaged.
        StorageError: it cannot be read.
    """
    path = folder / MANIFEST
    try:
        manifest = orjson.loads(path.read_bytes())
    except FileNotFoundError:
        raise VectorStoreNotFoundError(
            f"There is no vector store in {folder}. If the model was copied, copy that folder too; or build "
            f"it: {rebuild(folder)}"
        ) from None
    except OSError as error:
        raise StorageError(
            f"Cannot read {path}: {error.strerror}. Check the disk and who may read it."
        ) from error
    except orjson.JSONDecodeError as error:
        raise damaged(path, str(error)) from None
    if not isinstance(manifest, dict) or manifest.get("digest") != digest_of(manifest):
        raise damaged(path, "its digest does not match")
    if manifest.get("format") != FORMAT:
        raise VectorStoreMismatchError(
            f"{folder} has format {manifest.get('format')}, and this NanoThink reads {FORMAT}. Build it "
            f"again: {rebuild(folder)}"
        )
    if wrong := fault(_MANIFESTS, manifest):
        raise damaged(path, wrong)
    return manifest


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Replace the manifest, whole or not at all. Raises StorageError."""
    sealed = orjson.dumps({**manifest, "digest": digest_of(manifest)})
    write_whole(folder / MANIFEST, sealed, explain=storage_error)


def digest_of(manifest: Mapping[str, Any]) -> str:
    """Digest of all entries but the digest."""
    body = {name: value for name, value in manifest.items() if name != "digest"}
    return hashlib.blake2b(orjson.dumps(body, option=orjson.OPT_SORT_KEYS), digest_size=16).hexdigest()
