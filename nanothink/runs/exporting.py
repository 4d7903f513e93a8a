"""Export of a checkpoint to a model folder for other programs; checkpoints/export.py describes the folder."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nanothink
from nanothink.checkpoints import read_checkpoint
from nanothink.checkpoints.export import CONFIG, EXPORT_VERSION, FILES, OWN_SECTION, check_place, write_export
from nanothink.checkpoints.gguf_export import cuts_as
from nanothink.checkpoints.payload import CheckpointPayload
from nanothink.checkpoints.restore import model_state
from nanothink.config import Config
from nanothink.data.chat import ChatEncoder
from nanothink.data.tokenizer import save_tokenizer
from nanothink.disk import try_to_write
from nanothink.inference.sampling import SamplingConfig
from nanothink.models import COMBINED, shape_sections, training_section
from nanothink.models.contract import Expert, LanguageModel
from nanothink.models.nanothink import NanoThink
from nanothink.reporter import SILENT, Reporter
from nanothink.runs.saved_model import SavedModel
from nanothink.runs.trained_model import TrainedModel
from nanothink.wording import counted


@dataclass(frozen=True)
class Export:
    """Result of ``export_checkpoint``."""

    checkpoint: Path
    folder: Path
    kind: str
    architecture: str | None
    """The class of ``transformers`` that opens it; None: only NanoThink does."""
    n_parameters: int
    files: tuple[str, ...]
    n_bytes: int
    how_to_load: str
    """A line of Python."""
    notes: tuple[str, ...]
    """Weights that did not fit, and parts that are not exported."""


def export_checkpoint(
    checkpoint: Path,
    folder: Path,
    *,
    overwrite: bool = False,
    licence: str | None = None,
    about: Mapping[str, Any] | None = None,
    reporter: Reporter = SILENT,
) -> Export:
    """Write the model of a checkpoint to ``folder``, in float32, whole or not at all.

    Args:
        overwrite: replace an earlier export.
        licence: for the model card, as the Hub calls it; that of the model it was made of when None.
        about: data, scores and settings of the run for the model card (model_card.md).

    Raises:
        CheckpointError: the checkpoint is missing, damaged or something else.
        UsageError: ``folder`` is taken.
        StorageError: it can't be written; nothing is left behind.
    """
    check_place(folder, overwrite=overwrite)  # before a large file is read
    try_to_write(folder.parent)
    payload = read_checkpoint(checkpoint, mmap=True, reporter=reporter)
    saved = SavedModel.of(checkpoint, payload)
    loaded = TrainedModel.of(saved, device="cpu", vector_store=False)
    model = loaded.model.float()
    notes = list(loaded.notes)
    if isinstance(model, NanoThink) and model.store_gate is not None:
        # A share of no use without the texts, which are not this folder's to give away.
        model.store_gate = None
        notes.append(
            "the vector store is not part of the export: its model writes and scores as with "
            "--no-vector-store. To use the vector store, keep the checkpoint"
        )
    model.fold_logit_scale()
    model.joint_gate = None  # other programs have no document cache
    foreign = foreign_config(model)
    architecture = foreign["architectures"][0] if foreign else None
    tokenizer = loaded.tokenizer
    opens_tokenizer = "AutoTokenizer"
    if foreign.get("model_type") == "qwen2" and not cuts_as("qwen2", tokenizer):
        opens_tokenizer = "PreTrainedTokenizerFast"
        notes.append(
            "AutoTokenizer would cut text by the rules of Qwen2, whose architecture this is, and not by "
            f"those of its tokenizer; {opens_tokenizer} has the right tokens"
        )
    eos = tokenizer.eos_id
    ends = sorted(ChatEncoder(tokenizer).end_ids - {eos}) if tokenizer.chat else []
    config = {
        **foreign,
        "vocab_size": model.vocab_size,
        "bos_token_id": tokenizer.start_id,
        "eos_token_id": eos,
        OWN_SECTION: _own_section(payload, loaded.config),
    }
    sampling = SamplingConfig()
    generation = {
        "bos_token_id": tokenizer.start_id,
        "eos_token_id": [eos, *ends] if ends else eos,
        "pad_token_id": eos,
        "do_sample": True,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
    }
    how = (
        f"AutoModelForCausalLM.from_pretrained({str(folder)!r})"
        if architecture
        else f"nanothink.load({str(folder)!r})"
    )

    def fill(into: Path) -> None:
        _write_json(into / CONFIG, config)
        _write_json(into / "generation_config.json", generation)
        save_tokenizer(tokenizer, into, context=model.context_length)
        names = {"name": folder.resolve().name, "opens_tokenizer": opens_tokenizer}
        card = _card(loaded, payload, licence, architecture=architecture, run=about, **names)
        (into / "README.md").write_text(card, "utf-8")

    reporter.progress(f"writing {folder.name}", 0, 0)
    split = loaded.split
    documents = {**split.trained.to_state(), **split.held_out.to_state()}
    write_export(folder, model_state(model), documents, fill, overwrite=overwrite)
    files = tuple(name for name in FILES if (folder / name).exists())
    return Export(
        checkpoint,
        folder,
        model.kind,
        architecture,
        sum(p.numel() for p in model.parameters()),
        files,
        sum((folder / name).stat().st_size for name in files),
        how,
        tuple(notes),
    )


def foreign_config(model: LanguageModel) -> dict[str, Any]:
    """The part of config.json that transformers reads; empty for a kind that it does not have."""
    foreign = model.foreign_config() if isinstance(model, Expert) else {}
    types = {"dtype": "float32", "torch_dtype": "float32", "use_cache": True}  # transformers 5 and 4
    return {**types, **foreign} if foreign else {}


def _own_section(payload: CheckpointPayload, config: Config) -> dict[str, Any]:
    """Enough for ``load``, and nothing about the machine: no paths."""
    section: dict[str, Any] = {
        "format_version": EXPORT_VERSION,
        "version": nanothink.__version__,
        "kind": payload["kind"],
        "step": payload["step"],
        "epoch": payload["epoch"],
        "best_loss": payload["best_loss"],
        "config": _shapes(config.model_dump(mode="json"), payload["kind"]),
        "split": {name: part for name, part in payload["split"].items() if name in ("rule", "domains")},
        "experts": [],
    }
    if payload["kind"] == COMBINED:
        section["experts"] = [
            {"name": e["name"], "kind": e["kind"], "config": _shapes(e["config"], e["kind"])}
            for e in payload["run"]["experts"]
        ]
    return section


def _shapes(config: dict[str, Any], kind: str) -> dict[str, Any]:
    """The settings that describe a model, its precision and its split."""
    # always the transformer's too: its heads must divide the width
    kept = {name: dict(config[name]) for name in {"model", "transformer", *shape_sections(kind)}}
    kept.get("diffuser", {}).pop("transformer", None)
    kept["data"] = {name: config["data"][name] for name in ("val_split", "test_split", "domains")}
    phase = training_section(kind)
    kept[phase] = {"amp_dtype": config[phase]["amp_dtype"]}
    return kept


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", "utf-8")


def _card(loaded: TrainedModel, payload: CheckpointPayload, licence: str | None, **more: Any) -> str:
    """README.md: a model card, as the Hugging Face Hub reads them. ``more`` is for its template."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    model, config, tokenizer, loss = loaded.model, loaded.config, loaded.tokenizer, payload["best_loss"]
    begins = "after its EOS token" if tokenizer.bos_id is None else "with its BOS token"
    facts = {
        "kind": model.kind,
        "architecture": more["architecture"] or "NanoThink's own",
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}, float32",
        "context": "any length" if model.context_length is None else f"{model.context_length:,} tokens",
        "tokenizer": f"{tokenizer.vocab_size:,} entries; a text begins {begins}",
        "domains": ", ".join(config.data.domains) if config.data.domains else "all of the data folder",
        "steps": f"{payload['step']:,} ({counted(payload['epoch'], 'epoch')})",
    }
    if payload["kind"] == COMBINED:
        facts["experts"] = ", ".join(f"{e['name']} ({e['kind']})" for e in payload["run"]["experts"])
    if loss is not None and math.isfinite(loss):
        facts["lowest validation loss"] = f"{loss:.4f} nats a token"
    made = "Trained"
    if isinstance(origin := payload["run"].get("imported"), dict):
        stated = str(origin.get("licence"))
        facts |= {"imported from": str(origin.get("source")), "licence of that": stated}
        made = "Imported" if payload["step"] == 0 else "Trained further"
        if licence is None and origin.get("licence") and re.fullmatch(r"[\w.-]+", stated):
            licence = stated
    environment = Environment(
        loader=PackageLoader("nanothink.runs", ""),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    told = {"facts": facts.items(), "made": made, "version": nanothink.__version__, "licence": licence}
    return environment.get_template("model_card.md").render(told | more)
