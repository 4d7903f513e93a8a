"""The vocabulary of GGUF files: names of weights, layouts of some, and rules for cutting text.

Export (gguf_export.py) and import (gguf_import.py) read the same tables. Names of weights stand without
``.weight`` and ``.bias``; N is the number of a layer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nanothink.errors import UsageError
from nanothink.suggestions import install

_TRANSFORMER = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "blk.N.attn_norm": "model.layers.N.input_layernorm",
    "blk.N.attn_q": "model.layers.N.self_attn.q_proj",
    "blk.N.attn_k": "model.layers.N.self_attn.k_proj",
    "blk.N.attn_v": "model.layers.N.self_attn.v_proj",
    "blk.N.attn_q_norm": "model.layers.N.self_attn.q_norm",
    "blk.N.attn_k_norm": "model.layers.N.self_attn.k_norm",
    "blk.N.attn_output": "model.layers.N.self_attn.o_proj",
    "blk.N.ffn_norm": "model.layers.N.post_attention_layernorm",
    "blk.N.ffn_gate": "model.layers.N.mlp.gate_proj",
    "blk.N.ffn_up": "model.layers.N.mlp.up_proj",
    "blk.N.ffn_down": "model.layers.N.mlp.down_proj",
}
_MAMBA = {
    "token_embd": "backbone.embeddings",
    "output_norm": "backbone.norm_f",
    "output": "lm_head",
    "blk.N.attn_norm": "backbone.layers.N.norm",
    "blk.N.ssm_in": "backbone.layers.N.mixer.in_proj",
    "blk.N.ssm_conv1d": "backbone.layers.N.mixer.conv1d",
    "blk.N.ssm_x": "backbone.layers.N.mixer.x_proj",
    "blk.N.ssm_dt": "backbone.layers.N.mixer.dt_proj",
    "blk.N.ssm_a": "backbone.layers.N.mixer.A_log",
    "blk.N.ssm_d": "backbone.layers.N.mixer.D",
    "blk.N.ssm_out": "backbone.layers.N.mixer.out_proj",
}
NAMES: Mapping[str, Mapping[str, str]] = {
    "llama": _TRANSFORMER,
    "qwen2": _TRANSFORMER,
    "qwen3": _TRANSFORMER,
    "mamba": _MAMBA,
}
"""Names of weights in a GGUF file and in ``transformers``, by architecture."""

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_BYTES_ALONE = {**_BYTE_LEVEL, "use_regex": False}
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split(numbers: str) -> dict[str, Any]:
    pattern = {"Regex": _WORDS % numbers}
    cut = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [cut, _BYTES_ALONE]}


PRE_TOKENIZERS: Mapping[str, dict[str, Any]] = {
    "gpt-2": _BYTE_LEVEL,
    "smollm": {
        "type": "Sequence",
        "pretokenizers": [{"type": "Digits", "individual_digits": True}, _BYTE_LEVEL],
    },
    "qwen2": _split(r"\p{N}"),
    "llama-bpe": _split(r"\p{N}{1,3}"),
}
"""The ``pre_tokenizer`` of a tokenizer.json, by llama.cpp's name for it."""


def library() -> Any:
    """The package ``gguf``. Raises UsageError without it."""
    try:
        import gguf
    except ImportError:
        raise UsageError(f"GGUF files need an extra: {install('nanothink[gguf]')}") from None
    return gguf


class Fields:
    """The metadata of a file, by key."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self._fields = fields

    def get(self, key: str, default: Any = None) -> Any:
        return self._fields[key].contents() if key in self._fields else default

    def __getitem__(self, key: str) -> Any:
        if key not in self._fields:
            raise ValueError(f"it lacks {key}")
        return self.get(key)


def renamed(name: str, table: Mapping[str, str]) -> str | None:
    """A weight's name by a table, with the number of its layer and its ending; None: it has none."""
    layer = re.search(r"\.(\d+)\.", name)
    bare = name if layer is None else name.replace(f".{layer[1]}.", ".N.", 1)
    stem, ending = re.fullmatch(r"(.*?)(\.weight|\.bias)?", bare).groups("")  # type: ignore[union-attr]
    found = table.get(stem)
    return None if found is None else found.replace(".N.", f".{layer[1] if layer else ''}.") + ending


def neighbours_paired(values: NDArray[Any], n_heads: int) -> NDArray[Any]:
    """Rows of queries or keys as llama.cpp's Llama rotates them: features 2k and 2k + 1 of a head."""
    halves: NDArray[Any] = values.reshape(n_heads, 2, -1, *values.shape[1:])
    paired: NDArray[Any] = halves.swapaxes(1, 2).reshape(values.shape)
    return paired


def halves_paired(values: NDArray[Any], n_heads: int) -> NDArray[Any]:
    """The inverse of ``neighbours_paired``: features k and k + K/2, as ``transformers`` has them."""
    pairs: NDArray[Any] = values.reshape(n_heads, -1, 2, *values.shape[1:])
    halves: NDArray[Any] = pairs.swapaxes(1, 2).reshape(values.shape)
    return halves


def rotated_heads(architecture: str, name: str, settings: Mapping[str, Any]) -> int | None:
    """Heads of a weight (by our name) whose rows are in another order in a GGUF file; None: they are not."""
    if architecture != "llama":
        return None
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
    of = next((heads[part] for part in heads if f".{part}." in name), None)
    return None if of is None else int(settings[of])


def to_gguf(architecture: str, name: str, values: NDArray[Any], settings: Mapping[str, Any]) -> NDArray[Any]:
    """A weight (by our name) in the layout of a GGUF file, float32."""
    if name.endswith("A_log"):
        values = -np.exp(values)
    elif name.endswith("conv1d.weight"):
        values = values.squeeze(1)
    elif (n_heads := rotated_heads(architecture, name, settings)) is not None:
        values = neighbours_paired(values, n_heads)
    return np.ascontiguousarray(values, dtype=np.float32)


def from_gguf(
    architecture: str, name: str, values: NDArray[Any], settings: Mapping[str, Any]
) -> NDArray[np.float32]:
    """The inverse of ``to_gguf``."""
    if name.endswith("A_log"):
        values = np.log(-values)
    elif name.endswith("conv1d.weight"):
        values = values[:, None, :]
    elif (n_heads := rotated_heads(architecture, name, settings)) is not None:
        values = halves_paired(values, n_heads)
    return np.ascontiguousarray(values, dtype=np.float32)
