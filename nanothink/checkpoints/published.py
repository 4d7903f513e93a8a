"""A published model as it lies on the disk: a folder in ``transformers``' format.

Settings, weights and tokenizer are data and are read as such: JSON and safetensors. Files that would have to
be unpickled and code that comes with a model are never touched.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from nanothink.checkpoints.families import FAMILIES, Family, Settings
from nanothink.data.tokenizer import Tokenizer, load_tokenizer
from nanothink.errors import CheckpointDamagedError, CheckpointMismatchError, CheckpointNotFoundError

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_FLOATS = {"torch.float32", "torch.float16", "torch.bfloat16", "torch.float64"}
_MAX_JSON_BYTES = 64 * 2**20


@dataclass(frozen=True)
class PublishedModel:
    """A model of another library, read but not yet ours."""

    model_type: str
    family: Family
    settings: Settings
    weights: Mapping[str, Tensor]
    """Weights by name; on the disk until they are used."""
    n_numbers: int
    """In all weights."""
    tokenizer: Tokenizer
    licence: str | None
    """Name of the licence in the model card or metadata."""
    stored_as: str
    """The type that most of its weights are stored in."""


def read_published(folder: Path) -> PublishedModel:
    """A folder with config.json, safetensors and a tokenizer.

    Raises:
        CheckpointMismatchError: a family or a form that NanoThink does not read.
        CheckpointDamagedError: a file is missing, cut short or not what it should be.
        TokenizerError: its tokenizer cannot be used.
    """
    given = _json(folder, CONFIG)
    model_type = str(given.get("model_type"))
    family = _family_of(folder, model_type)
    if given.get("quantization_config"):
        raise refused(folder, "quantized weights (quantization_config); import the model they were made of")
    settings = settings_of(model_type, given, str(folder))
    weights = _weights(folder)
    types = [str(tensor.dtype) for tensor in weights.values()]
    if odd := set(types) - _FLOATS:
        raise refused(folder, f"weights of type {min(odd).removeprefix('torch.')}")
    return PublishedModel(
        model_type,
        family,
        settings,
        weights,
        sum(tensor.numel() for tensor in weights.values()),
        load_tokenizer(str(folder)),
        _licence(folder),
        max(set(types), key=types.count).removeprefix("torch."),
    )


def refused(source: Path, what: str) -> CheckpointMismatchError:
    return CheckpointMismatchError(f"{source}: NanoThink's models cannot represent {what}.")


def settings_of(model_type: str, given: Mapping[str, Any], source: str) -> Settings:
    """The config object of ``transformers``, with its defaults filled in and old names renewed."""
    from transformers import CONFIG_MAPPING

    own = {name: value for name, value in given.items() if name not in ("auto_map", "model_type")}
    try:
        return CONFIG_MAPPING[model_type](**own)
    except Exception as error:  # whatever its validators raise
        reason = " ".join(str(error).split())[:300]
        raise CheckpointDamagedError(
            f"{source}: its settings do not describe a {model_type}: {reason}"
        ) from None


def _family_of(folder: Path, model_type: str) -> Family:
    if model_type not in FAMILIES:
        raise CheckpointMismatchError(
            f"{folder}: NanoThink imports no models of the family {model_type!r:.60}; it imports "
            f"{', '.join(FAMILIES)}."
        )
    return FAMILIES[model_type]


def _json(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    if not path.is_file():
        if not folder.exists():
            raise CheckpointNotFoundError(f"{folder}: there is no such file or folder")
        raise CheckpointDamagedError(
            f"{folder}: {name} is missing. A model to import is a folder in transformers' format: {CONFIG}, "
            f"{WEIGHTS} and a tokenizer, a Hub name, or a GGUF file"
        )
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise ValueError("it is too large")
        content = json.loads(path.read_text("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointDamagedError(f"{path}: cannot be read ({error})") from None
    if not isinstance(content, dict):
        raise CheckpointDamagedError(f"{path}: holds no JSON object")
    return content


def _weights(folder: Path) -> dict[str, Tensor]:
    """All weights of a folder; mapped, not read."""
    files = [WEIGHTS] if (folder / WEIGHTS).is_file() else _shards(folder)
    weights: dict[str, Tensor] = {}
    for name in files:
        if not (folder / name).is_file():
            raise CheckpointDamagedError(f"{folder}: {name} is missing. Fetch the model again")
        try:
            weights.update(load_file(folder / name))
        except (OSError, SafetensorError) as error:
            raise CheckpointDamagedError(f"{folder / name}: cannot be read ({error})") from None
    return weights


def _shards(folder: Path) -> list[str]:
    if not (folder / INDEX).is_file():
        pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
        if pickled:
            raise CheckpointMismatchError(
                f"{folder}: its weights are pickled ({pickled[0]}), and NanoThink unpickles nothing of "
                "others. Save it again with transformers: model.save_pretrained(FOLDER), and import that."
            )
        raise CheckpointDamagedError(f"{folder}: {WEIGHTS} is missing")
    by_weight = _json(folder, INDEX).get("weight_map")
    names = set(by_weight.values()) if isinstance(by_weight, dict) else set()
    if not names or not all(isinstance(n, str) and re.fullmatch(r"[\w.-]+\.safetensors", n) for n in names):
        raise CheckpointDamagedError(f"{folder / INDEX}: names no safetensors files")
    return sorted(names)


def _licence(folder: Path) -> str | None:
    """Licence named in the head of the model card, else the first line of a licence file."""
    for name, pattern in (("README.md", r"(?m)^license:\s*[\"']?([^\s\"'#]+)"), ("LICENSE", r"\s*(\S.*)")):
        path = folder / name
        if path.is_file():
            with path.open(encoding="utf-8", errors="replace") as file:
                if found := re.search(pattern, file.read(4096)):
                    return found[1].strip()[:100]
    return None
