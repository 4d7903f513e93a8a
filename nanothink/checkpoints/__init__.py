"""Checkpoints: files that are whole or not there, found, verified, restored.

    run  → restore: model_state, pack_rng → payload.CheckpointPayload → file.write_checkpoint → one .pt file
    file → file.read_checkpoint → payload → restore: restore_model, unpack_rng → run

``store`` names, finds, locks and prunes the files of one run; ``archive`` is the container, with its digest;
``shards`` is the folder that several processes write together in place of a file.

All imported here needs no torch, so that a listing is quick; ``restore``, ``export``, ``split_record`` do.
"""

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
