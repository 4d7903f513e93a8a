"""Families of published models: what their settings and the names of their weights mean here.

A family is data: the kind of our model, a function from its settings (those of ``transformers``' config
class, which has filled in its defaults) to our sections, and rules for the names of its weights. What our
models cannot represent is refused by name; nothing is passed over.

Shapes: D model width, H heads, K width of a head.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nanothink.suggestions import again

Settings = Any
"""A config object of ``transformers``."""

Sections = dict[str, dict[str, Any]]
"""Settings of ours, by section of ``Config``."""

_BLOCK_LENGTH = 1024
"""``model.max_seq_len`` of a model that has no context of its own."""


class UnsupportedError(Exception):
    """Something in a published model that ours cannot represent, in words."""


@dataclass(frozen=True)
class Rule:
    """Names of weights that match ``pattern`` become ``targets``, one for each part that ``cut`` makes."""

    pattern: str
    targets: tuple[str, ...]
    cut: Callable[[Tensor, Settings], Sequence[Tensor]] = lambda tensor, settings: (tensor,)


@dataclass(frozen=True)
class Family:
    """A ``model_type`` of ``transformers``."""

    kind: str
    sections: Callable[[Settings], Sections]
    rules: tuple[Rule, ...]
    ignored: str = r".*rotary_emb\.inv_freq"
    """Names of weights that are no weights: tables and masks that older files carry along."""


def our_names(
    family: Family, names: Sequence[str], *, tied: bool
) -> Iterator[tuple[str, Rule, tuple[str, ...]]]:
    """Name, rule and our names of the parts of each weight of a file.

    Args:
        tied: the head is the embedding table; a head that the file has beside it is passed over.

    Raises:
        UnsupportedError: a weight has no place in our model.
    """
    for name in names:
        if re.fullmatch(family.ignored, name) or (tied and name in ("lm_head.weight", "embed_out.weight")):
            continue
        for rule in family.rules:
            if match := re.fullmatch(rule.pattern, name):
                yield name, rule, tuple(match.expand(target) for target in rule.targets)
                break
        else:
            raise UnsupportedError(f"the weight {name}")


def _refuse_unless(condition: bool, what: str) -> None:
    if not condition:
        raise UnsupportedError(what)


def _rope(settings: Settings) -> dict[str, Any]:
    rope = settings.rope_parameters
    kind = rope.get("rope_type", "default")
    _refuse_unless(kind == "default", f"rotary positions scaled by '{kind}'")
    return {"rope_theta": float(rope["rope_theta"])}


def _model(settings: Settings) -> dict[str, Any]:
    window = getattr(settings, "sliding_window", None)
    context = settings.max_position_embeddings
    if window is not None and context > window:
        raise UnsupportedError(
            f"attention in a sliding window of {window:,} tokens; with no more context than that it is "
            f"attention as usual: {again('--context', window)}"
        )
    return {"d_model": settings.hidden_size, "max_seq_len": context}


def _gated(settings: Settings) -> Sections:
    """Llama and what came of it: RMS norms, rotary positions, SwiGLU."""
    _refuse_unless(settings.hidden_act == "silu", f"the activation {settings.hidden_act} in the feed-forward")
    _refuse_unless(not getattr(settings, "mlp_bias", False), "biases in the feed-forward")
    biased = getattr(settings, "attention_bias", False)
    return {
        "model": _model(settings),
        "transformer": {
            "n_layers": settings.num_hidden_layers,
            "n_heads": settings.num_attention_heads,
            "n_kv_heads": settings.num_key_value_heads,
            "head_dim": getattr(settings, "head_dim", None)
            or settings.hidden_size // settings.num_attention_heads,
            "ffn_dim": settings.intermediate_size,
            "tie_embeddings": settings.tie_word_embeddings,
            "norm_eps": settings.rms_norm_eps,
            "qk_norm": False,
            "attention_bias": "all" if biased else "none",
            **_rope(settings),
        },
    }


def _qwen2(settings: Settings) -> Sections:
    sections = _gated(settings)
    sections["transformer"]["attention_bias"] = "qkv"
    return sections


def _qwen3(settings: Settings) -> Sections:
    sections = _gated(settings)
    sections["transformer"]["qk_norm"] = True
    return sections


def _mamba(settings: Settings) -> Sections:
    _refuse_unless(settings.hidden_act == "silu", f"the activation {settings.hidden_act} in the mixer")
    _refuse_unless(not settings.use_bias, "biases in the projections of the mixer")
    _refuse_unless(settings.use_conv_bias, "a convolution without bias")
    expand, rest = divmod(settings.intermediate_size, settings.hidden_size)
    _refuse_unless(not rest, "a mixer whose channels are no multiple of the model width")
    return {
        # Heads are of no use to it, but have to fit the width.
        "model": {"d_model": settings.hidden_size, "max_seq_len": _BLOCK_LENGTH},
        "transformer": {"n_heads": 1, "head_dim": 64},
        "state_space": {
            "n_layers": settings.num_hidden_layers,
            "d_state": settings.state_size,
            "expand": expand,
            "conv_width": settings.conv_kernel,
            "delta_rank": int(settings.time_step_rank),
            "tie_embeddings": settings.tie_word_embeddings,
            "norm_eps": settings.layer_norm_epsilon,
            "mixer_norm_eps": getattr(settings, "mixer_rms_eps", None),
        },
    }


_GELUS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}


def _gelu(name: str) -> str:
    _refuse_unless(name in _GELUS, f"the activation {name} in the feed-forward")
    return _GELUS[name]


def _gpt_neox(settings: Settings) -> Sections:
    _refuse_unless(settings.attention_bias, "attention without biases")
    fraction = float(settings.rope_parameters.get("partial_rotary_factor", 1.0))
    n_rotated = int(settings.hidden_size // settings.num_attention_heads * fraction)
    _refuse_unless(n_rotated >= 2 and n_rotated % 2 == 0, f"rotation of {n_rotated} features of a head")
    return {
        "model": _model(settings),
        "transformer": {
            "n_layers": settings.num_hidden_layers,
            "n_heads": settings.num_attention_heads,
            "head_dim": settings.hidden_size // settings.num_attention_heads,
            "ffn_dim": settings.intermediate_size,
            "feed_forward": _gelu(settings.hidden_act),
            "tie_embeddings": settings.tie_word_embeddings,
            "rotary_fraction": fraction,
            "norm": "layer",
            "norm_eps": settings.layer_norm_eps,
            "qk_norm": False,
            "attention_bias": "all",
            "parallel": settings.use_parallel_residual,
            **_rope(settings),
        },
    }


def _gpt2(settings: Settings) -> Sections:
    _refuse_unless(settings.scale_attn_weights, "attention whose scores are not scaled")
    _refuse_unless(
        not settings.scale_attn_by_inverse_layer_idx,
        "attention whose scores are scaled by the layer's number",
    )
    _refuse_unless(not settings.add_cross_attention, "cross-attention")
    return {
        "model": _model(settings),
        "transformer": {
            "n_layers": settings.num_hidden_layers,
            "n_heads": settings.num_attention_heads,
            "head_dim": settings.hidden_size // settings.num_attention_heads,
            "ffn_dim": settings.n_inner or 4 * settings.hidden_size,
            "feed_forward": _gelu(settings.activation_function),
            "tie_embeddings": settings.tie_word_embeddings,
            "rotary_fraction": 0.0,
            "norm": "layer",
            "norm_eps": settings.layer_norm_epsilon,
            "qk_norm": False,
            "attention_bias": "all",
        },
    }


def _transposed(tensor: Tensor, settings: Settings) -> Sequence[Tensor]:
    return (tensor.t(),)


def _thirds(tensor: Tensor, settings: Settings) -> Sequence[Tensor]:
    """(D, 3 H K) or (3 H K): queries, keys and values, transposed."""
    return (tensor.t() if tensor.dim() == 2 else tensor).chunk(3)


def _thirds_of_heads(tensor: Tensor, settings: Settings) -> Sequence[Tensor]:
    """(H 3 K, ...): each head has its query, its key and its value."""
    heads = tensor.view(settings.num_attention_heads, 3, -1, *tensor.shape[1:])
    return [heads[:, part].flatten(0, 1) for part in range(3)]


_QKV = tuple(rf"model.layers.\1.self_attn.{part}_proj.\2" for part in "qkv")
_NEOX, _GPT2 = r"gpt_neox\.layers\.(\d+)\.", r"(?:transformer\.)?h\.(\d+)\."

_AS_IT_STANDS = (Rule(r"((?:model|backbone|lm_head)\..*)", (r"\1",)),)

FAMILIES: Mapping[str, Family] = {
    "llama": Family("transformer", _gated, _AS_IT_STANDS),
    "mistral": Family("transformer", _gated, _AS_IT_STANDS),
    "qwen2": Family("transformer", _qwen2, _AS_IT_STANDS),
    "qwen3": Family("transformer", _qwen3, _AS_IT_STANDS),
    "mamba": Family("state_space", _mamba, _AS_IT_STANDS),
    "falcon_mamba": Family("state_space", _mamba, _AS_IT_STANDS),
    "gpt_neox": Family(
        "transformer",
        _gpt_neox,
        (
            Rule(r"gpt_neox\.embed_in\.weight", ("model.embed_tokens.weight",)),
            Rule(_NEOX + r"((?:input|post_attention)_layernorm\..*)", (r"model.layers.\1.\2",)),
            Rule(_NEOX + r"attention\.query_key_value\.(weight|bias)", _QKV, _thirds_of_heads),
            Rule(_NEOX + r"attention\.dense\.(weight|bias)", (r"model.layers.\1.self_attn.o_proj.\2",)),
            Rule(_NEOX + r"mlp\.dense_h_to_4h\.(weight|bias)", (r"model.layers.\1.mlp.up_proj.\2",)),
            Rule(_NEOX + r"mlp\.dense_4h_to_h\.(weight|bias)", (r"model.layers.\1.mlp.down_proj.\2",)),
            Rule(r"gpt_neox\.final_layer_norm\.(weight|bias)", (r"model.norm.\1",)),
            Rule(r"(?:embed_out|lm_head)\.weight", ("lm_head.weight",)),
        ),
        r".*(rotary_emb\.inv_freq|attention\.(bias|masked_bias))",
    ),
    "gpt2": Family(
        "transformer",
        _gpt2,
        (
            Rule(r"(?:transformer\.)?wte\.weight", ("model.embed_tokens.weight",)),
            Rule(r"(?:transformer\.)?wpe\.weight", ("model.embed_positions.weight",)),
            Rule(_GPT2 + r"ln_1\.(weight|bias)", (r"model.layers.\1.input_layernorm.\2",)),
            Rule(_GPT2 + r"ln_2\.(weight|bias)", (r"model.layers.\1.post_attention_layernorm.\2",)),
            Rule(_GPT2 + r"attn\.c_attn\.(weight|bias)", _QKV, _thirds),
            Rule(_GPT2 + r"attn\.c_proj\.(weight)", (r"model.layers.\1.self_attn.o_proj.\2",), _transposed),
            Rule(_GPT2 + r"attn\.c_proj\.(bias)", (r"model.layers.\1.self_attn.o_proj.\2",)),
            Rule(_GPT2 + r"mlp\.c_fc\.(weight)", (r"model.layers.\1.mlp.up_proj.\2",), _transposed),
            Rule(_GPT2 + r"mlp\.c_fc\.(bias)", (r"model.layers.\1.mlp.up_proj.\2",)),
            Rule(_GPT2 + r"mlp\.c_proj\.(weight)", (r"model.layers.\1.mlp.down_proj.\2",), _transposed),
            Rule(_GPT2 + r"mlp\.c_proj\.(bias)", (r"model.layers.\1.mlp.down_proj.\2",)),
            Rule(r"(?:transformer\.)?ln_f\.(weight|bias)", (r"model.norm.\1",)),
            Rule(r"lm_head\.weight", ("lm_head.weight",)),
        ),
        r".*\.attn\.(bias|masked_bias)",
    ),
}
"""Families by the ``model_type`` of config.json."""


def place_weights(
    family: Family,
    settings: Settings,
    weights: Mapping[str, Tensor],
    into: Mapping[str, Tensor],
) -> None:
    """Copy the weights of a file into ours, one at a time, so that no second copy of the model is in memory.

    A weight may have more rows than ours where those are of no token: tables padded to a round number.

    Args:
        weights: by their names in the file; read as they are asked for.
        into: our parameters by name.

    Raises:
        UnsupportedError: a weight has no place in our model.
        ValueError: a weight is missing or has another shape than the settings ask for.
    """
    missing = set(into)
    tied = bool(settings.tie_word_embeddings)
    for name, rule, targets in our_names(family, list(weights), tied=tied):
        for target, part in zip(targets, rule.cut(weights[name], settings), strict=True):
            if target not in into:
                raise UnsupportedError(f"the weight {name}")
            own = into[target]
            if target in ("model.embed_tokens.weight", "backbone.embeddings.weight", "lm_head.weight"):
                part = part[: own.shape[0]]
            if target == "model.embed_positions.weight":  # a shorter context was asked for
                part = part[: own.shape[0]]
            if part.shape != own.shape:
                raise ValueError(f"{name} has the shape {tuple(part.shape)}, not {tuple(own.shape)}")
            with torch.no_grad():
                own.copy_(part)
            missing.discard(target)
    if tied:
        missing.discard("lm_head.weight")
    if missing:
        raise ValueError(f"{min(missing)} is missing")
