"""Checkpoints: files that are whole or not there, found, verified, restored."""

from nanothink.checkpoints.export import check_place, is_export, read_export, write_export
from nanothink.checkpoints.file import (
    CheckpointSummary,
    Progress,
    read_checkpoint,
    read_summary,
    verify_checkpoint,
    write_checkpoint,
)
from nanothink.checkpoints.names import CheckpointName, Role, parse_name, validate_name
from nanothink.checkpoints.payload import FORMAT_VERSION, CheckpointPayload, ModelPayload
from nanothink.checkpoints.restore import LoadReport, model_state, pack_rng, restore_model, unpack_rng
from nanothink.checkpoints.split_record import SplitRecord
from nanothink.checkpoints.store import CheckpointStore, DamagedEntry, list_checkpoints, prune

__all__ = [
    "FORMAT_VERSION",
    "CheckpointName",
    "CheckpointPayload",
    "CheckpointStore",
    "CheckpointSummary",
    "DamagedEntry",
    "LoadReport",
    "ModelPayload",
    "Progress",
    "Role",
    "SplitRecord",
    "check_place",
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
