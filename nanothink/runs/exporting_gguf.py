"""A checkpoint as a GGUF file. What the file is: checkpoints/gguf_export.py."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nanothink.checkpoints import read_checkpoint
from nanothink.checkpoints.gguf_export import (
    GgufModel,
    Quantization,
    check_tokenizer,
    modelfile_of,
    write_gguf,
)
from nanothink.checkpoints.restore import model_state
from nanothink.data.chat import PLAIN
from nanothink.disk import try_to_write
from nanothink.errors import CheckpointMismatchError, UsageError
from nanothink.reporter import SILENT, Reporter
from nanothink.runs.exporting import foreign_config
from nanothink.runs.saved_model import SavedModel
from nanothink.runs.trained_model import TrainedModel
from nanothink.suggestions import again, command


@dataclass(frozen=True)
class GgufExport:
    """What ``export_gguf`` wrote."""

    checkpoint: Path
    file: Path
    modelfile: Path
    kind: str
    n_parameters: int
    quantization: Quantization
    n_bytes: int
    notes: tuple[str, ...]
    """What of the checkpoint did not fit its model."""


def export_gguf(
    checkpoint: Path,
    file: Path,
    *,
    quantization: Quantization = "f32",
    overwrite: bool = False,
    reporter: Reporter = SILENT,
) -> GgufExport:
    """Write the model of a checkpoint to ``file``, and a Modelfile beside it.

    Raises:
        CheckpointError: the checkpoint is missing, damaged or something else, or llama.cpp cannot run it.
        UsageError: ``file`` is taken, or the package ``gguf`` is not installed.
        StorageError: it can't be written; what was there is intact.
    """
    if file.is_dir():
        raise UsageError(f"{file} is a folder; a GGUF file is one file: --to {file / 'model.gguf'}")
    if file.exists() and not overwrite:
        raise UsageError(
            f"{file} is there already. Replace it: {again('--overwrite')}. Or name another file: --to FILE."
        )
    try_to_write(file.parent)
    payload = read_checkpoint(checkpoint, mmap=True, reporter=reporter)
    loaded = TrainedModel.of(SavedModel.of(checkpoint, payload), device="cpu", vector_store=False)
    model = loaded.model.float()
    check_tokenizer(loaded.tokenizer)
    settings = foreign_config(model)
    if not settings:
        raise CheckpointMismatchError(
            f"{checkpoint} holds a {model.kind}, and a GGUF file can only hold a transformer or a "
            "state-space model, of a shape that llama.cpp runs. Export it as a folder: "
            + command("checkpoints export", checkpoint, "--to", file.with_suffix(""))
        )
    model.fold_logit_scale()
    model.joint_gate = None  # other programs have no document cache
    imported = payload["run"].get("imported")
    origin = imported if isinstance(imported, dict) else {}
    reporter.progress(f"writing {file.name}", 0, 0)
    write_gguf(
        GgufModel(
            file.stem,
            {**settings, "vocab_size": model.vocab_size},
            model_state(model),
            loaded.tokenizer,
            starts_with_eos=(not origin or payload["step"] > 0) and loaded.tokenizer.chat in (None, PLAIN),
            licence=origin.get("licence"),
        ),
        file,
        quantization=quantization,
    )
    return GgufExport(
        checkpoint,
        file,
        modelfile_of(file),
        model.kind,
        sum(p.numel() for p in model.parameters()),
        quantization,
        file.stat().st_size,
        loaded.notes,
    )
