"""Checkpoints: files that are whole or not there, found, verified, restored."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from nanothink.checkpoints.file import (
    CheckpointSummary,
    read_checkpoint,
    read_summary,
    verify_checkpoint,
    write_checkpoint,
)
from nanothink.checkpoints.names import CheckpointName, Role, parse_name, validate_name
from nanothink.checkpoints.payload import FORMAT_VERSION, CheckpointPayload, ModelPayload
from nanothink.checkpoints.store import CheckpointStore, DamagedEntry, list_checkpoints, prune

if TYPE_CHECKING:
    from nanothink.checkpoints.export import check_place, is_export, read_export, write_export
    from nanothink.checkpoints.restore import (
        LoadReport,
        gathered,
        model_state,
        pack_rng,
        restore_model,
        unpack_rng,
    )
    from nanothink.checkpoints.split_record import SplitRecord

__all__ = [
    "FORMAT_VERSION",
    "CheckpointName",
    "CheckpointPayload",
    "CheckpointStore",
    "CheckpointSummary",
    "DamagedEntry",
    "LoadReport",
    "ModelPayload",
    "Role",
    "SplitRecord",
    "check_place",
    "gathered",
    "is_export",
    "list_checkpoints",
    "model_state",
    "pack_rng",
    "parse_name",
    "prune",
    "read_checkpoint",
    "read_export",
    "read_summary",
    "restore_model",
    "unpack_rng",
    "validate_name",
    "verify_checkpoint",
    "write_checkpoint",
    "write_export",
]

_NEED_TORCH = {
    **dict.fromkeys(("check_place", "is_export", "read_export", "write_export"), "export"),
    **dict.fromkeys(("LoadReport", "gathered", "model_state", "pack_rng"), "restore"),
    **dict.fromkeys(("restore_model", "unpack_rng"), "restore"),
    "SplitRecord": "split_record",
}


def __getattr__(name: str) -> Any:
    """Import on first use what imports torch: a listing needs none."""
    if name in _NEED_TORCH:
        return getattr(importlib.import_module(f"nanothink.checkpoints.{_NEED_TORCH[name]}"), name)
    raise AttributeError(f"module 'nanothink.checkpoints' has no attribute '{name}'")
