"""``checkpoints import``: what cannot be represented, is damaged or is not there is refused in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from published_models import GPT2, NEOX, SHAPE, STATES, imported

from nanothink.errors import (
    CheckpointDamagedError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
)
from nanothink.runs.import_model import import_model


@pytest.mark.parametrize(
    ("architecture", "settings", "what"),
    [
        ("Mistral", {**SHAPE, "sliding_window": 30}, "a sliding window of 30 tokens"),
        (
            "Qwen2",
            {
                **SHAPE,
                "head_dim": 12,
                "use_sliding_window": True,
                "sliding_window": 9,
                "max_window_layers": 1,
            },
            "a sliding window of 9 tokens",
        ),
        (
            "Llama",
            {**SHAPE, "hidden_size": 42, "rope_parameters": {"rope_type": "linear", "factor": 2.0}},
            "rotary positions scaled by 'linear'",
        ),
        (
            "Qwen3",
            {**SHAPE, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
            "a sliding window of 9 tokens",
        ),
        *(
            (
                family,
                {**SHAPE, **width, "rope_parameters": {"rope_theta": 777.0, **scaling}},
                f"scaled by '{kind}'",
            )
            for family, width, kind, scaling in (
                ("Qwen3", {}, "yarn", {"rope_type": "yarn", "factor": 4.0}),
                ("Qwen2", {"head_dim": 12}, "dynamic", {"rope_type": "dynamic", "factor": 2.0}),
                ("Mistral", {"sliding_window": None}, "linear", {"rope_type": "linear", "factor": 2.0}),
                (
                    "Llama",
                    {"hidden_size": 42},
                    "llama3",
                    {
                        "rope_type": "llama3",
                        "factor": 8.0,
                        "low_freq_factor": 1.0,
                        "high_freq_factor": 4.0,
                        "original_max_position_embeddings": 36,
                    },
                ),
            )
        ),
        (
            "GPTNeoX",
            {**NEOX, "rope_parameters": {"rope_theta": 9.0, "rope_type": "linear", "factor": 2.0}},
            "scaled by 'linear'",
        ),
        ("GPTNeoX", {**NEOX, "attention_bias": False}, "attention without biases"),
        ("GPTNeoX", {**NEOX, "hidden_act": "relu"}, "the activation relu"),
        ("Llama", {**SHAPE, "hidden_size": 42, "mlp_bias": True}, "biases in the feed-forward"),
        ("Llama", {**SHAPE, "hidden_size": 42, "hidden_act": "gelu"}, "the activation gelu"),
        ("Mamba", {**STATES, "use_bias": True}, "biases in the projections"),
        ("FalconMamba", {**STATES, "use_bias": True}, "biases in the projections"),
        ("Mamba", {**STATES, "use_conv_bias": False}, "a convolution without bias"),
        ("GPT2", {**GPT2, "scale_attn_weights": False}, "scores are not scaled"),
        ("GPT2", {**GPT2, "activation_function": "relu"}, "the activation relu"),
        (
            "Mixtral",
            {**SHAPE, "num_key_value_heads": 3, "num_local_experts": 2},
            "no models of the family 'mixtral'",
        ),
        (
            "Qwen3Moe",
            {**SHAPE, "num_experts": 2, "moe_intermediate_size": 8},
            "no models of the family 'qwen3_moe'",
        ),
        ("GPT2", {**GPT2, "scale_attn_by_inverse_layer_idx": True}, "scaled by the layer's number"),
        ("Gemma", SHAPE, "no models of the family 'gemma'"),
    ],
)
def test_what_cannot_be_represented_is_refused_by_name(
    architecture: str, settings: dict[str, Any], what: str, published: Callable[..., tuple[Path, Any]]
) -> None:
    folder, _ = published(architecture, **settings)
    with pytest.raises(CheckpointMismatchError, match=what):
        imported(folder)
    assert not (folder.parent / "checkpoints" / "published_expert.pt").exists()


def _rewrite(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        settings = json.loads((folder / "config.json").read_text())
        change(settings)
        (folder / "config.json").write_text(json.dumps(settings))

    return damage


def _pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _cut(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_pickled, "unpickles nothing"),
        (_cut, "cannot be read"),
        (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
        (lambda folder: (folder / "config.json").write_text("[1"), "cannot be read"),
        (_rewrite(lambda s: s.update(num_hidden_layers=9, layer_types=None)), "model.layers.* is missing"),
        (_rewrite(lambda s: s.update(num_hidden_layers=1, layer_types=None)), r"the weight model\.layers"),
        (
            _rewrite(lambda s: s.update(hidden_size=16384, num_attention_heads=2, intermediate_size=10**6)),
            "hardly anything in it fits",
        ),
        (_rewrite(lambda s: s.update(intermediate_size=95)), r"has the shape \(.*94.*\), not \(.*95"),
        (_rewrite(lambda s: s.update(num_key_value_heads=5)), "n_kv_heads=5 does not divide"),
        (_rewrite(lambda s: s.update(hidden_size="x")), "do not describe a qwen3"),
        (_rewrite(lambda s: s.update(quantization_config={"bits": 4})), "quantized weights"),
        (_rewrite(lambda s: s.update(model_type="qwen3_moe")), "no models of the family 'qwen3_moe'"),
    ],
)
def test_a_damaged_or_foreign_folder_is_one_line(
    damage: Callable[[Path], None], reason: str, published: Callable[..., tuple[Path, Any]]
) -> None:
    folder, _ = published("Qwen3", **SHAPE)
    damage(folder)
    with pytest.raises((CheckpointDamagedError, CheckpointMismatchError), match=reason):
        imported(folder)
    assert list((folder.parent / "checkpoints").glob("*.pt")) == []


@pytest.mark.parametrize("name", ["absent", "absent.gguf"])
def test_a_source_that_is_not_there_is_said_to_be_missing(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match=f"{name}: there is no such file or folder"):
        imported(tmp_path / name)


def test_code_beside_a_model_is_not_run(published: Callable[..., tuple[Path, Any]]) -> None:
    folder, _ = published("Qwen3", **SHAPE)
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")
    _rewrite(lambda s: s.update(auto_map={"AutoConfig": "evil.Config"}))(folder)
    imported(folder)
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "pytorch_model.bin"])
def test_a_file_of_a_folder_is_answered_with_the_folder(
    name: str, published: Callable[..., tuple[Path, Any]], tmp_path: Path
) -> None:
    folder, _ = published("Qwen3", **SHAPE)
    (folder / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
    with pytest.raises(CheckpointMismatchError, match=f"checkpoints import {folder}`.*unpickles nothing"):
        import_model(str(folder / name), checkpoint_dir=tmp_path / "c")
    (tmp_path / "alone.bin").write_bytes(b"PK\x03\x04")
    with pytest.raises(CheckpointMismatchError, match="is no GGUF file"):
        import_model(str(tmp_path / "alone.bin"), checkpoint_dir=tmp_path / "c")
