"""Shapes of published models, their random weights, and their import."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from nanothink.runs.import_model import ImportedModel, import_model

SHAPE: dict[str, Any] = {
    "hidden_size": 40,
    "intermediate_size": 94,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 14,
    "max_position_embeddings": 72,
    "rms_norm_eps": 3e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 777.0},
    "tie_word_embeddings": False,
}
STATES: dict[str, Any] = {
    "hidden_size": 40,
    "state_size": 5,
    "num_hidden_layers": 3,
    "conv_kernel": 3,
    "expand": 3,
    "time_step_rank": 7,
    "layer_norm_epsilon": 2e-5,
}
NEOX: dict[str, Any] = {
    "hidden_size": 72,
    "intermediate_size": 94,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 72,
    "layer_norm_eps": 3e-4,
}
GPT2: dict[str, Any] = {"n_embd": 42, "n_layer": 3, "n_head": 3, "n_positions": 72, "n_inner": 94}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("Qwen3", SHAPE),
    "qwen3, tied, biased": ("Qwen3", {**SHAPE, "tie_word_embeddings": True, "attention_bias": True}),
    "qwen2": ("Qwen2", {**SHAPE, "head_dim": 12}),
    "llama": ("Llama", {**SHAPE, "hidden_size": 42}),
    "llama, tied, biased": (
        "Llama",
        {**SHAPE, "hidden_size": 42, "tie_word_embeddings": True, "attention_bias": True},
    ),
    "mistral": ("Mistral", {**SHAPE, "num_key_value_heads": 3, "sliding_window": None}),
    "mamba": ("Mamba", STATES),
    "mamba, untied": ("Mamba", {**STATES, "tie_word_embeddings": False}),
    "falcon_mamba": ("FalconMamba", {**STATES, "mixer_rms_eps": 4e-4}),
    "gpt_neox": ("GPTNeoX", NEOX),
    "gpt_neox, in turn, all rotated": (
        "GPTNeoX",
        {
            **NEOX,
            "use_parallel_residual": False,
            "rope_parameters": {"rope_theta": 500.0, "partial_rotary_factor": 1.0, "rope_type": "default"},
        },
    ),
    "gpt2": ("GPT2", GPT2),
}


def randomise(model: nn.Module) -> None:
    """Biases and norms too, which start at zero and one."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith("A_log"):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.15)


def imported(folder: Path, **options: Any) -> ImportedModel:
    return import_model(str(folder), checkpoint_dir=folder.parent / "checkpoints", **options)
