"""The manifest of a checkpoint in a folder (shards.py): read without torch, for listings."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from nanothink.checkpoints.archive import damaged

SUFFIX = ".dcp"
MANIFEST, STATE = "manifest.json", "state.pt"

_CHUNK = 1 << 22


def is_shards(path: Path) -> bool:
    """True for a folder of this kind, whole or not."""
    return path.name.endswith(SUFFIX) and path.is_dir()


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest: ``summary`` and ``files``. Raises CheckpointDamagedError; OSError."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        sound = isinstance(manifest["summary"], dict) and all(
            type(n_bytes) is int and type(digest) is str and name == os.path.basename(name)
            for name, (n_bytes, digest) in manifest["files"].items()
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, FileNotFoundError) as error:
        raise damaged(path, f"its {MANIFEST} is missing or damaged ({error})") from None
    if not sound or not {STATE, ".metadata"} <= manifest["files"].keys():
        raise damaged(path, f"its {MANIFEST} is damaged")
    return cast("dict[str, Any]", manifest)


def digest_of(path: Path, seen: Callable[[int], None] = lambda n_bytes: None) -> list[Any]:
    """Size and SHA-256 of a file."""
    digest, n_bytes = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            n_bytes += len(chunk)
            seen(len(chunk))
    return [n_bytes, digest.hexdigest()]
