"""A published model from a GGUF file, as llama.cpp reads it: settings, weights and tokenizer in one.

Weights are mapped, and each is brought to float32 when it is used, so that no second copy of the model is in
memory. Quantized ones come as llama.cpp would compute with them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanothink.checkpoints.families import FAMILIES
from nanothink.checkpoints.gguf_layout import NAMES, Fields, from_gguf, library, renamed
from nanothink.checkpoints.gguf_tokenizer import read_tokenizer
from nanothink.checkpoints.published import PublishedModel, refused, settings_of
from nanothink.errors import CheckpointDamagedError, CheckpointMismatchError, NanoThinkError

_SIZES = {
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "max_position_embeddings": "context_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
_STATE_SIZES = {
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "conv_kernel": "ssm.conv_kernel",
    "state_size": "ssm.state_size",
    "time_step_rank": "ssm.time_step_rank",
    "layer_norm_epsilon": "attention.layer_norm_rms_epsilon",
}


def is_gguf(path: Path) -> bool:
    """True if a file begins as GGUF files do, whatever its name (Ollama keeps them by their digest)."""
    try:
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    except OSError as error:
        raise CheckpointDamagedError(f"{path}: cannot be read ({error.strerror})") from None


def read_gguf(path: Path) -> PublishedModel:
    """The model of a GGUF file.

    Raises:
        CheckpointMismatchError: an architecture, a tokenizer or a type that NanoThink does not read.
        CheckpointDamagedError: the file is cut short or no GGUF file.
        UsageError: the package ``gguf`` is not installed.
    """
    gguf = library()
    try:
        reader = gguf.GGUFReader(path)
        return _read(gguf, Fields(reader.fields), reader.tensors, path)
    except NanoThinkError:
        raise
    except Exception as error:  # the reader trusts the file: whatever numpy and Python say of nonsense in it
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise CheckpointDamagedError(f"{path}: is no sound GGUF file ({reason}). Fetch it again") from None


class _Weights(Mapping[str, Tensor]):
    """Weights by our names, float32, made when they are asked for."""

    def __init__(self, gguf: Any, architecture: str, tensors: Mapping[str, Any], settings: Any) -> None:
        self._gguf, self._architecture, self._tensors = gguf, architecture, tensors
        self._settings = settings.to_dict()

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        values = self._gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        return torch.from_numpy(from_gguf(self._architecture, name, values, self._settings))

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _read(gguf: Any, fields: Fields, tensors: Any, path: Path) -> PublishedModel:
    architecture = fields["general.architecture"]
    if architecture not in NAMES:
        raise CheckpointMismatchError(
            f"{path}: NanoThink imports no GGUF files of the architecture {architecture!r:.60}; it imports "
            f"{', '.join(NAMES)}."
        )
    named = {renamed(tensor.name, NAMES[architecture]) or tensor.name: tensor for tensor in tensors}
    if "rope_freqs.weight" in named:
        raise refused(path, "rotary positions scaled by 'llama3' (rope_freqs)")
    if foreign := [name for name, tensor in named.items() if name == tensor.name]:
        raise refused(path, f"the weight {foreign[0]}")
    types = [tensor.tensor_type.name for tensor in tensors]
    known = gguf.quants._type_traits.keys() | {gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16}
    if odd := [tensor.tensor_type.name for tensor in tensors if tensor.tensor_type not in known]:
        raise refused(path, f"weights of the type {odd[0]}")
    model_type, given = _settings(fields, architecture, path)
    given["tie_word_embeddings"] = "lm_head.weight" not in named
    settings = settings_of(model_type, given, str(path))
    return PublishedModel(
        model_type,
        FAMILIES[model_type],
        settings,
        _Weights(gguf, architecture, named, settings),
        sum(int(tensor.n_elements) for tensor in tensors),
        read_tokenizer(fields, path),
        fields.get("general.license"),
        max(set(types), key=types.count).lower(),
    )


def _settings(fields: Fields, architecture: str, path: Path) -> tuple[str, dict[str, Any]]:
    """``model_type`` and config of ``transformers``."""
    if fields.get(f"{architecture}.rope.scaling.type", "none") != "none":
        raise refused(path, f"rotary positions scaled by '{fields[f'{architecture}.rope.scaling.type']}'")
    if float(fields.get("rope.scale_linear", fields.get(f"{architecture}.rope.scale_linear", 1.0))) != 1.0:
        raise refused(path, "rotary positions scaled by 'linear'")
    if fields.get(f"{architecture}.expert_count"):
        raise refused(path, "a mixture of experts")
    sizes = _STATE_SIZES if architecture == "mamba" else _SIZES
    given = {name: fields[f"{architecture}.{key}"] for name, key in sizes.items()}
    if lists := [name for name, value in given.items() if isinstance(value, list)]:
        raise refused(path, f"layers that differ in {lists[0]}")
    if window := fields.get(f"{architecture}.attention.sliding_window"):
        given |= {"use_sliding_window": True, "sliding_window": window}
    given["vocab_size"] = len(fields["tokenizer.ggml.tokens"])
    if architecture == "mamba":
        given["expand"] = fields["mamba.ssm.inner_size"] // given["hidden_size"]
        return ("falcon_mamba" if fields.get("mamba.ssm.dt_b_c_rms") else "mamba"), given
    heads, width = given["num_attention_heads"], given["hidden_size"]
    given["num_key_value_heads"] = fields.get(f"{architecture}.attention.head_count_kv", heads)
    given["head_dim"] = head = fields.get(f"{architecture}.attention.key_length", width // heads)
    if (rotated := fields.get(f"{architecture}.rope.dimension_count", head)) != head:
        raise refused(path, f"rotation of {rotated} of the {head} features of a head")
    theta = fields.get(f"{architecture}.rope.freq_base", 10_000.0)
    given["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
    if architecture == "llama" and width % heads:
        return "mistral", {**given, "sliding_window": None}
    return architecture, given
