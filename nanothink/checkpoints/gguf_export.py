"""A model as a GGUF file, which llama.cpp, Ollama and LM Studio run; https://github.com/ggml-org/ggml/docs/gguf.md.

    FILE               weights, settings and tokenizer, written whole or not at all
    FILE.Modelfile     what ``ollama create NAME -f FILE.Modelfile`` reads

llama.cpp cuts text into words by rules of its own, which a file names (``tokenizer.ggml.pre``). A tokenizer
whose rules are not among ``PRE_TOKENIZERS`` is refused: it would get other tokens there than in training.

Mamba there wants A itself in place of its logarithm, a convolution without its middle dimension, twice as
many channels as the model is wide, and everything of its state in float32.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from nanothink.checkpoints.gguf_layout import NAMES, PRE_TOKENIZERS, library, renamed, to_gguf
from nanothink.data.chat import ChatEncoder
from nanothink.data.tokenizer import Tokenizer
from nanothink.disk import storage_error, whole_file, write_whole
from nanothink.errors import CheckpointMismatchError
from nanothink.suggestions import again

Quantization = Literal["f32", "f16", "q8_0"]

_PASSED_THROUGH = "{% for message in messages %}{{ message.content }}{% endfor %}"
"""A chat template that adds nothing, since without one front ends wrap a text in a template of their own."""

_IN_FLOAT32 = ("ssm_a", "ssm_d", "ssm_conv1d", "ssm_x", "ssm_dt", "norm")


@dataclass(frozen=True)
class GgufModel:
    """The contents of a GGUF file: metadata and tensors."""

    name: str
    settings: Mapping[str, Any]
    """Its config.json for ``transformers``, as an export has it."""
    weights: Mapping[str, Tensor]
    """Float32 tensors, by their names in that architecture."""
    tokenizer: Tokenizer
    starts_with_eos: bool
    """A text begins after an EOS, as in training here."""
    licence: str | None = None


def cuts_as(name: str, tokenizer: Tokenizer) -> bool:
    """True if a tokenizer cuts text by the rules that llama.cpp calls ``name``."""
    state = json.loads(tokenizer.to_state()["tokenizer_json"])
    return bool(_without_offsets(state.get("pre_tokenizer") or {}) == PRE_TOKENIZERS[name])


def check_tokenizer(tokenizer: Tokenizer) -> str:
    """llama.cpp's name for how a tokenizer cuts text. Raises CheckpointMismatchError when it has none."""
    state = json.loads(tokenizer.to_state()["tokenizer_json"])
    names = [name for name in PRE_TOKENIZERS if cuts_as(name, tokenizer)]
    model = state["model"]
    if not names or model.get("type") != "BPE" or state.get("normalizer") not in (None, {"type": "NFC"}):
        raise CheckpointMismatchError(
            f"The tokenizer '{tokenizer.name}' cuts text by rules that llama.cpp has no name for, so a GGUF "
            "file would read other tokens than the model learnt. Export it for transformers: "
            f"{again('--format', 'transformers')}"
        )
    return names[0]


def write_gguf(model: GgufModel, path: Path, *, quantization: Quantization = "f32") -> None:
    """Write ``path`` and its Modelfile.

    Args:
        quantization: of the matrices: float32, float16, or 8 bits in groups of 32. Vectors, and whatever
            makes the state of a Mamba, stay in float32.

    Raises:
        CheckpointMismatchError: llama.cpp does not have this tokenizer or architecture.
        UsageError: the package ``gguf`` is not installed.
        StorageError: the disk refuses; what was there is intact.
    """
    gguf = library()
    pre = check_tokenizer(model.tokenizer)
    writer = gguf.GGUFWriter(None, _architecture(model.settings))
    _describe(writer, gguf, model, quantization)
    _add_tokenizer(writer, gguf, model, pre)
    for name, values in _tensors(model):
        kind = _stored_as(gguf, name, values, quantization)
        if kind is None:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    with whole_file(path, explain=storage_error) as file:
        writer.fout, writer.state = [file], gguf.gguf_writer.WriterState.EMPTY
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    write_whole(modelfile_of(path), _modelfile(model, path).encode(), explain=storage_error)


def modelfile_of(path: Path) -> Path:
    """Return the path of the Modelfile beside a GGUF file."""
    return path.with_name(f"{path.name}.Modelfile")


def _architecture(settings: Mapping[str, Any]) -> str:
    known = {
        **dict.fromkeys(("llama", "mistral"), "llama"),
        **{name: name for name in ("qwen2", "qwen3")},
        **dict.fromkeys(("mamba", "falcon_mamba"), "mamba"),
    }
    if (model_type := settings.get("model_type")) not in known:
        raise CheckpointMismatchError(
            "Only a transformer and a state-space model can be a GGUF file, in the shapes of "
            f"{', '.join(known)}. Export it for NanoThink: {again('--format', 'transformers')}"
        )
    if known[model_type] == "mamba" and settings["expand"] != 2:
        raise CheckpointMismatchError(
            "llama.cpp's Mamba has twice as many channels as it is wide, and this model "
            f"{settings['expand']} times (state_space.expand). Export it as a folder: "
            f"{again('--format', 'transformers')}"
        )
    return known[model_type]


def _describe(writer: Any, gguf: Any, model: GgufModel, quantization: Quantization) -> None:
    settings = model.settings
    types = gguf.LlamaFileType
    file_types = {"f32": types.ALL_F32, "f16": types.MOSTLY_F16, "q8_0": types.MOSTLY_Q8_0}
    writer.add_name(model.name)
    if model.licence is not None:
        writer.add_license(model.licence)
    writer.add_file_type(file_types[quantization])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(settings["num_hidden_layers"])
    writer.add_embedding_length(settings["hidden_size"])
    writer.add_vocab_size(settings["vocab_size"])
    if writer.arch == "mamba":
        writer.add_context_length(1 << 20)
        writer.add_feed_forward_length(0)
        writer.add_head_count(0)
        writer.add_ssm_conv_kernel(settings["conv_kernel"])
        writer.add_ssm_inner_size(settings["expand"] * settings["hidden_size"])
        writer.add_ssm_state_size(settings["state_size"])
        writer.add_ssm_time_step_rank(settings["time_step_rank"])
        writer.add_layer_norm_rms_eps(settings["layer_norm_epsilon"])
        writer.add_ssm_dt_b_c_rms(settings["model_type"] == "falcon_mamba")
        return
    writer.add_context_length(settings["max_position_embeddings"])
    writer.add_feed_forward_length(settings["intermediate_size"])
    writer.add_head_count(settings["num_attention_heads"])
    writer.add_head_count_kv(settings["num_key_value_heads"])
    writer.add_key_length(settings["head_dim"])
    writer.add_value_length(settings["head_dim"])
    writer.add_rope_dimension_count(settings["head_dim"])
    writer.add_layer_norm_rms_eps(settings["rms_norm_eps"])
    writer.add_rope_freq_base(settings["rope_theta"])


def _tensors(model: GgufModel) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Weights by llama.cpp's names, in its layouts."""
    architecture = _architecture(model.settings)
    theirs = {ours: name for name, ours in NAMES[architecture].items()}
    for name, tensor in model.weights.items():
        if name == "lm_head.weight" and model.settings["tie_word_embeddings"]:
            continue
        if (called := renamed(name, theirs)) is None:
            raise CheckpointMismatchError(f"llama.cpp has no name for the weight {name} of this model.")
        yield called, to_gguf(architecture, name, tensor.detach().float().numpy(), model.settings)


def _stored_as(gguf: Any, name: str, values: NDArray[np.float32], quantization: Quantization) -> Any:
    """The type of a quantized matrix; None for float32."""
    whole_groups = quantization != "q8_0" or values.shape[-1] % 32 == 0
    if quantization == "f32" or values.ndim != 2 or not whole_groups or any(p in name for p in _IN_FLOAT32):
        return None
    kinds = gguf.GGMLQuantizationType
    return {"f16": kinds.F16, "q8_0": kinds.Q8_0}[quantization]


def _add_tokenizer(writer: Any, gguf: Any, model: GgufModel, pre: str) -> None:
    tokenizer = model.tokenizer
    state = json.loads(tokenizer.to_state()["tokenizer_json"])
    by_id = {number: token for token, number in state["model"]["vocab"].items()}
    added = {token["id"]: token for token in state["added_tokens"]}
    kinds = gguf.TokenType
    tokens, types = [], []
    for number in range(model.settings["vocab_size"]):
        if number in added:
            tokens.append(added[number]["content"])
            types.append(kinds.CONTROL if added[number]["special"] else kinds.USER_DEFINED)
        elif number in by_id:
            tokens.append(by_id[number])
            types.append(kinds.NORMAL)
        else:
            tokens.append(f"[PAD{number}]")
            types.append(kinds.UNUSED)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in state["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    chat = tokenizer.chat
    bos = dict(chat.special_tokens).get("bos_token") if chat else None
    writer.add_bos_token_id(tokenizer.special_ids.get(tokenizer.bos_token or bos or "", tokenizer.eos_id))
    writer.add_eos_token_id(tokenizer.eos_id)
    for end in ChatEncoder(tokenizer).end_ids - {tokenizer.eos_id} if chat else ():
        writer.add_eot_token_id(end)
    writer.add_pad_token_id(tokenizer.eos_id)
    writer.add_add_bos_token(tokenizer.bos_id is not None or model.starts_with_eos)
    writer.add_add_eos_token(False)
    writer.add_chat_template(chat.template if chat else _PASSED_THROUGH)


def _without_offsets(cutter: Any) -> Any:
    """The rules of a pre-tokenizer without ``trim_offsets``, which changes no token."""
    if isinstance(cutter, dict):
        return {key: _without_offsets(value) for key, value in cutter.items() if key != "trim_offsets"}
    return [_without_offsets(step) for step in cutter] if isinstance(cutter, list) else cutter


def _modelfile(model: GgufModel, path: Path) -> str:
    lines = [f"FROM ./{path.name}"]
    if model.tokenizer.chat is None:  # else Ollama takes the one in the file
        lines.append('TEMPLATE "{{ .Prompt }}"')
    if context := model.settings.get("max_position_embeddings"):
        lines.append(f"PARAMETER num_ctx {context}")
    lines += ["PARAMETER temperature 0.8", "PARAMETER top_k 50"]
    return "\n".join(lines) + "\n"
