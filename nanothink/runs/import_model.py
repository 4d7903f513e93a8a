"""A published model as a checkpoint of ours: ``nanothink checkpoints import``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from nanothink.checkpoints import FORMAT_VERSION, CheckpointStore, ModelPayload, validate_name
from nanothink.checkpoints.export import OWN_SECTION, read_export
from nanothink.checkpoints.families import UnsupportedError, our_names, place_weights
from nanothink.checkpoints.gguf_import import is_gguf, read_gguf
from nanothink.checkpoints.published import PublishedModel, read_published, refused
from nanothink.checkpoints.restore import model_state, pack_rng
from nanothink.checkpoints.split_record import UNKNOWN_TEXT
from nanothink.checkpoints.store import REPLACED_FOLDER
from nanothink.config.run import resolve_config
from nanothink.data.hub import model_folder
from nanothink.data.tokenizer_files import looks_like_path
from nanothink.errors import CheckpointDamagedError, CheckpointMismatchError, ConfigError, UsageError
from nanothink.models.contract import LanguageModel
from nanothink.models.low_rank import keep_bfloat16
from nanothink.reporter import SILENT, Reporter
from nanothink.runs.rebuilding import rebuild
from nanothink.suggestions import again, suggest


@dataclass(frozen=True)
class ImportedModel:
    """What ``import_model`` wrote."""

    path: Path
    source: str
    family: str
    """``model_type`` of ``transformers``."""
    kind: str
    n_parameters: int
    matrix_type: str
    """Type of the matrices in its checkpoint: float32, or bfloat16 as they were published."""
    n_bytes: int
    vocab_size: int
    n_cut_rows: int
    """Rows of the embedding table that no token of the tokenizer uses, and which were left out."""
    context_length: int | None
    licence: str | None
    answers: bool
    """It has a chat template."""


def import_model(
    source: str,
    *,
    name: str | None = None,
    context: int | None = None,
    checkpoint_dir: Path,
    overwrite: bool = False,
    reporter: Reporter = SILENT,
) -> ImportedModel:
    """Make ``checkpoint_dir/NAME_expert.pt`` of a published model.

    Its matrices stay bfloat16 where they were published so; all else is float32.

    Args:
        source: a folder in ``transformers``' format, a GGUF file, or a name of the Hugging Face Hub.
        name: NAME; the last part of ``source`` when None.
        context: a shorter context than the model's own, in tokens.
        overwrite: replace a checkpoint of that name.

    Raises:
        CheckpointError: nothing is there, it is damaged, or no model of ours can represent it.
        TokenizerError: its tokenizer cannot be used.
        UsageError: the name is taken, or is none.
        StorageError: the checkpoint cannot be written.
    """
    folder = Path(source).expanduser()
    name = validate_name(f"{name or _name_of(source)}_expert")
    store = CheckpointStore(checkpoint_dir, name)
    if (old := store.existing()) and not overwrite:
        raise UsageError(
            f"{old[0]} is there already. Give this model another name: --name NAME. Or put it in that one's "
            f"place: {again('--overwrite')} (what is there is moved to {checkpoint_dir / REPLACED_FOLDER})"
        )
    reporter.progress("reading", 0, 0)
    if not folder.exists() and not looks_like_path(source):
        reporter.progress("fetching", 0, 0)
        folder = model_folder(source)
    if folder.is_file() and folder.suffix.lower() != ".gguf" and not is_gguf(folder):
        inside = (folder.parent / "config.json").is_file()
        whole = f": {suggest('checkpoints import', folder.parent)}" if inside else " with its config.json"
        raise CheckpointMismatchError(
            f"{folder}: is no GGUF file. A model in transformers' format is imported by its folder{whole}. "
            "NanoThink reads safetensors there, and unpickles nothing."
        )
    found = read_gguf(folder) if folder.is_file() else read_published(folder)
    model, config = _ours(found, folder, context)
    n_rows = _n_rows(found)
    vocab_size = found.tokenizer.vocab_size
    entry: dict[str, Any] = {
        "source": source,
        "family": found.model_type,
        "licence": found.licence,
        "stored_as": found.stored_as,
    }
    own = OWN_SECTION in found.settings.to_dict()  # an export of ours says what its model was trained on
    split = read_export(folder)["split"] if own else UNKNOWN_TEXT.to_state()
    reporter.progress("writing", 0, 0)
    with store.lock():
        store.guard_new_run(overwrite=overwrite)
        store.write(
            store.best,
            {
                "format_version": FORMAT_VERSION,
                "kind": model.kind,
                "model_state": model_state(model),
                "optimizer_state": {},
                "step": 0,
                "epoch": 0,
                "position": 0,
                "amp_scaler": None,
                "rng": pack_rng(),
                "early_stopping": {},
                "best_loss": None,
                "config": config,
                "tokenizer": found.tokenizer.to_state(),
                "data_fingerprint": "",
                "split": split,
                "run": {"name": name, "imported": entry},
            },
        )
    return ImportedModel(
        store.best,
        source,
        found.model_type,
        model.kind,
        sum(p.numel() for p in model.parameters()),
        "bfloat16" if any(p.dtype is torch.bfloat16 for p in model.parameters()) else "float32",
        store.best.stat().st_size,
        vocab_size,
        n_rows - vocab_size,
        model.context_length,
        found.licence,
        found.tokenizer.chat is not None,
    )


def _ours(found: PublishedModel, source: Path, context: int | None) -> tuple[LanguageModel, dict[str, Any]]:
    """The model with its weights, and its settings."""
    own_context = getattr(found.settings, "max_position_embeddings", None)
    if context is not None:
        if own_context is not None and context > own_context:
            raise UsageError(f"--context {context}: the model was trained with {own_context} tokens.")
        if own_context is not None:
            found.settings.max_position_embeddings = context
    try:
        sections = found.family.sections(found.settings)
        if context is not None:
            sections["model"]["max_seq_len"] = context
        sections["data"] = {"tokenizer": found.tokenizer.name}
        if found.stored_as == "bfloat16":  # so it is scored in the type of its training
            sections["train_expert"] = {"amp_dtype": "bfloat16"}
        config = resolve_config(base=sections).config
        vocab_size = found.tokenizer.vocab_size
        if vocab_size > _n_rows(found):
            raise UnsupportedError(
                f"a tokenizer of {vocab_size:,} tokens over a table of {_n_rows(found):,} embeddings"
            )
        numbers = torch.empty(1).expand(found.n_numbers)  # as many as the file has, without their memory
        payload = cast("ModelPayload", {"model_state": {"": numbers}})
        model = rebuild(found.family.kind, config, vocab_size, payload=payload, path=source)
        if isinstance(found.weights, dict):  # mapped, in the types of the file
            keep_bfloat16(model, _by_our_names(found, found.weights))
        place_weights(found.family, found.settings, found.weights, dict(model.state_dict()))
    except UnsupportedError as error:
        raise refused(source, str(error)) from None
    except ConfigError as error:
        raise refused(source, f"its settings: {error}") from None
    except ValueError as error:
        raise CheckpointDamagedError(
            f"{source}: its weights are not those that its settings describe: {error}. Fetch the model again"
        ) from None
    return model, config.model_dump(mode="json")


def _by_our_names(found: PublishedModel, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    tied = bool(found.settings.tie_word_embeddings)
    named = our_names(found.family, list(weights), tied=tied)
    return {target: weights[name] for name, _, targets in named for target in targets}


def _n_rows(found: PublishedModel) -> int:
    return int(found.settings.vocab_size)


def _name_of(source: str) -> str:
    """The last part of a folder, a file or a Hub name, in the letters that a checkpoint's name may have."""
    name = Path(source).expanduser().resolve().name.removesuffix(".gguf")
    return re.sub(r"[^\w.-]+", "-", name).strip(".-") or "imported"
