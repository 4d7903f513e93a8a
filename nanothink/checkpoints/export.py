"""Exports: a model as a folder that other programs open, without training state.

    config.json              what transformers reads; our own settings under the key "nanothink"
    model.safetensors        the weights, under the names that config.json's architecture gives them
    training_documents.st    hashes of the documents it was trained on, in the format of safetensors
    tokenizer.json, tokenizer_config.json, generation_config.json, README.md
    chat_template.jinja      of a model that answers

The weights are the model's state dict as it is: a transformer's is that of ``Qwen3ForCausalLM``, a
state-space model's that of ``MambaForCausalLM``; no other program has the other kinds.

A folder is written whole or not at all; see ``whole_folder`` in disk/write.py.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanothink.checkpoints.archive import damaged
from nanothink.checkpoints.payload import ModelPayload
from nanothink.checkpoints.split_record import SplitRecord
from nanothink.data.tokenizer import load_tokenizer
from nanothink.data.tokenizer_files import CHAT_TEMPLATE
from nanothink.disk import storage_error, whole_folder
from nanothink.errors import CheckpointMismatchError, NanoThinkError, StorageError, TokenizerError, UsageError
from nanothink.suggestions import again

CONFIG, WEIGHTS, TOKENIZER, OWN_SECTION = "config.json", "model.safetensors", "tokenizer.json", "nanothink"
DOCUMENTS = "training_documents.st"
"""Not called .safetensors: other programs load every file of that name as weights."""

FILES = (
    *(CONFIG, WEIGHTS, DOCUMENTS, "generation_config.json"),
    *(TOKENIZER, "tokenizer_config.json", CHAT_TEMPLATE, "README.md"),
)
"""Every file that an export may have."""

EXPORT_VERSION = 3
"""Version of the names of the weights, of our section in config.json and of the split."""


def write_export(
    folder: Path,
    weights: Mapping[str, Tensor],
    documents: Mapping[str, Tensor],
    fill: Callable[[Path], None],
    *,
    overwrite: bool = False,
) -> None:
    """Write an export of ``weights``, whole or not at all.

    Args:
        weights: by name in the file; each with storage of its own.
        documents: the tensors of ``SplitRecord.to_state()``.
        fill: writes the other files of ``FILES`` into the folder that it is given.
        overwrite: replace an earlier export. A folder that holds any other file is never replaced.

    Raises:
        UsageError: something is in the way.
        StorageError: the disk is full, not writable, ...; what was there is intact.
    """
    target = folder.resolve()
    check_place(folder, overwrite=overwrite)
    try:
        with whole_folder(target) as new:
            _save(weights, new / WEIGHTS)
            _save(documents, new / DOCUMENTS)
            fill(new)
            for name in (WEIGHTS, DOCUMENTS):  # safetensors makes them the owner's alone
                (new / name).chmod((new / CONFIG).stat().st_mode)
    except OSError as error:
        raise storage_error(folder, error, False) from error


def check_place(folder: Path, *, overwrite: bool) -> None:
    """Raise UsageError if an export cannot be written to ``folder``."""
    target = folder.resolve()
    if target.exists() and not target.is_dir():
        raise UsageError(f"{folder} is a file; an export is a folder. Name another place: --to DIR.")
    if target == Path.cwd().resolve():
        raise UsageError(f"{folder} is the folder you are in; an export has one of its own: --to NAME.")
    held = {entry.name for entry in os.scandir(target)} if target.is_dir() else set()
    if not held:
        return
    foreign = sorted(held - set(FILES))
    if foreign or CONFIG not in held:
        named = ", ".join((foreign or sorted(held))[:4]) + (", ..." if len(foreign) > 4 else "")
        raise UsageError(
            f"{folder} holds other files ({named}), and an export never replaces those. "
            "Name another folder: --to DIR."
        )
    if not overwrite:
        raise UsageError(
            f"{folder} holds an export already. Replace it: {again('--overwrite')}. Or name another folder: "
            "--to DIR."
        )


def is_export(folder: Path) -> bool:
    """True if ``write_export`` could have written this folder."""
    return (folder / CONFIG).is_file()


def read_export(folder: Path) -> ModelPayload:
    """Read an export as the payload of a model. Runs no code from it.

    Raises:
        CheckpointDamagedError: a file is missing, cut short or not what it should be.
        CheckpointMismatchError: a model folder that NanoThink did not write, or another version of it.
        StorageError: it can't be read.
    """
    for name in (CONFIG, WEIGHTS, DOCUMENTS):
        # Opening a pipe waits for ever, in the library's own code, which no signal interrupts.
        if (folder / name).exists() and not (folder / name).is_file():
            raise damaged(folder, f"{name} is not a regular file")
    try:
        settings = json.loads((folder / CONFIG).read_text("utf-8-sig"))
        own = settings.get(OWN_SECTION) if isinstance(settings, dict) else None
        if not isinstance(own, dict):
            raise CheckpointMismatchError(
                f"{folder} holds a model, but none that NanoThink exported: its {CONFIG} has no section "
                f"'{OWN_SECTION}'. Its own library opens it."
            )
        if (version := own.get("format_version", 1)) != EXPORT_VERSION:
            raise CheckpointMismatchError(
                f"{folder} is an export in format {version}, and this NanoThink reads format "
                f"{EXPORT_VERSION}. Use the NanoThink that wrote it, or export the checkpoint again."
            )
        kind, config, experts, split = _described(own)
        weights = load_file(folder / WEIGHTS)
        documents = load_file(folder / DOCUMENTS)
        split["held_out"] = {name: documents.pop(name) for name in ("val", "test") if name in documents}
        split["trained"] = documents
    except OSError as error:
        if error.errno in (None, errno.ENOENT):  # safetensors raises its own without a number
            raise damaged(folder, f"a file of the export is missing ({error})") from None
        raise StorageError(f"{folder}: cannot be read: {error.strerror or error}.") from error
    except (ValueError, LookupError, RecursionError, SafetensorError) as error:
        raise damaged(folder, f"the export is damaged ({error})") from None
    SplitRecord.from_state(split, folder)
    try:
        if not (folder / TOKENIZER).is_file():  # other forms are not ours, and some want code to be run
            raise TokenizerError(f"{TOKENIZER} is missing")
        tokenizer = load_tokenizer(str(folder))
    except NanoThinkError as error:
        raise damaged(folder, f"its tokenizer can't be used ({error})") from None
    return {
        "kind": kind,
        "model_state": weights,
        "config": config,
        "tokenizer": tokenizer.to_state(),
        "split": split,
        "run": {"experts": experts},
    }


def _described(
    own: dict[str, Any],
) -> tuple[str, dict[str, Any], list[dict[str, Any]], dict[str, Any]]:
    """Kind, settings, experts and split. Raises ValueError or LookupError if one has another form."""
    kind, config, experts, split = own["kind"], own["config"], own["experts"], own["split"]
    named = isinstance(experts, list) and all(
        isinstance(e, dict) and {"name", "kind", "config"} <= e.keys() and isinstance(e["config"], dict)
        for e in experts
    )
    sections = isinstance(config, dict) and all(isinstance(section, dict) for section in config.values())
    if not (isinstance(kind, str) and sections and named and isinstance(split, dict)):
        raise ValueError(f"the section '{OWN_SECTION}' of {CONFIG} does not describe a model")
    return kind, config, experts, split


def _save(weights: Mapping[str, Tensor], path: Path) -> None:
    try:
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path, {"format": "pt"})
    except SafetensorError as error:  # it puts the system's error into words
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
