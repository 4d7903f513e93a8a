"""``checkpoints import``: a published model gives the logits and the text that transformers gives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stand_in_hub import serving
from torch import nn

import nanothink as package
from nanothink.checkpoints import read_checkpoint, write_checkpoint
from nanothink.checkpoints.split_record import SplitRecord
from nanothink.cli.app import run
from nanothink.data.split import HeldOutText, SplitRule, TrainedText
from nanothink.data.tokenizer import load_tokenizer, save_tokenizer
from nanothink.errors import (
    CheckpointDamagedError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    UsageError,
)
from nanothink.models.decoding import steps_by
from nanothink.models.joint_gate import GATE_PREFIX
from nanothink.runs.exporting import export_checkpoint
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


@pytest.fixture
def published(tiny_tokenizer: Path, tmp_path: Path) -> Callable[..., tuple[Path, Any]]:
    """Writes a random model of a family as ``transformers`` does; gives its folder and the model itself."""
    import transformers

    def write(architecture: str, padding: int = 0, **settings: Any) -> tuple[Path, Any]:
        tokenizer = load_tokenizer(str(tiny_tokenizer))
        config = getattr(transformers, f"{architecture}Config")(
            vocab_size=tokenizer.vocab_size + padding,
            bos_token_id=tokenizer.eos_id,
            eos_token_id=tokenizer.eos_id,
            pad_token_id=None,
            **settings,
        )
        name = f"{architecture}LMHeadModel" if architecture == "GPT2" else f"{architecture}ForCausalLM"
        torch.manual_seed(0)
        model = getattr(transformers, name)(config).eval()
        randomise(model)
        folder = tmp_path / "published"
        model.save_pretrained(folder)
        save_tokenizer(tokenizer, folder)
        (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
        return folder, model

    return write


def randomise(model: nn.Module) -> None:
    """Biases and norms too, which start at zero and one."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith("A_log"):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.15)


def imported(folder: Path, **options: Any) -> ImportedModel:
    return import_model(str(folder), checkpoint_dir=folder.parent / "checkpoints", **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_greedy_text_equal_those_of_transformers(
    family: str, published: Callable[..., tuple[Path, Any]]
) -> None:
    architecture, settings = FAMILIES[family]
    folder, theirs = published(architecture, padding=5, **settings)
    done = imported(folder)
    assert (done.path.name, done.family) == ("published_expert.pt", family.partition(",")[0])
    assert (done.licence, done.n_cut_rows) == ("apache-2.0", 5)
    ours = package.load(done.path)
    assert ours.notes == ()
    n_tokens = ours.tokenizer.vocab_size
    x = torch.randint(n_tokens, (3, 61), generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        expected = theirs(x).logits[..., :n_tokens]
    assert expected.std() > 0.1  # or equal logits would say nothing
    torch.testing.assert_close(ours.logits(x), expected, rtol=0, atol=1e-4)

    tokens = ours.tokenizer.encode("time light stone")
    for _ in range(20):
        with torch.inference_mode():
            tokens.append(int(theirs(torch.tensor([tokens])).logits[0, -1, :n_tokens].argmax()))
    start = len(ours.tokenizer.encode("time light stone"))
    (written,) = ours.continue_tokens([tokens[:start]], temperature=0.0, max_new_tokens=20, stop_at_eos=False)
    assert written == tokens[start:]


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


def test_a_window_that_no_context_leaves_is_no_window(published: Callable[..., tuple[Path, Any]]) -> None:
    folder, theirs = published("Mistral", **{**SHAPE, "sliding_window": 30})
    ours = package.load(imported(folder, context=30).path)
    assert ours.model.context_length == 30
    x = torch.randint(ours.tokenizer.vocab_size, (2, 30), generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        torch.testing.assert_close(ours.logits(x), theirs(x).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", [name for name in FAMILIES if not name.startswith("gpt")])
def test_an_export_of_it_is_the_published_model_again(
    family: str, published: Callable[..., tuple[Path, Any]]
) -> None:
    from transformers import AutoModelForCausalLM

    architecture, settings = FAMILIES[family]
    folder, theirs = published(architecture, **settings)
    export_checkpoint(imported(folder).path, folder.parent / "out")
    again = AutoModelForCausalLM.from_pretrained(folder.parent / "out")
    assert "license: apache-2.0" in (folder.parent / "out" / "README.md").read_text()
    x = torch.randint(theirs.config.vocab_size, (2, 61), generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        torch.testing.assert_close(again.eval()(x).logits, theirs(x).logits, rtol=0, atol=1e-4)


def test_an_export_of_ours_comes_back_with_what_it_was_trained_on(
    published: Callable[..., tuple[Path, Any]],
) -> None:
    folder, _ = published("Qwen3", **SHAPE)
    own = folder.parent / "own.pt"
    payload = read_checkpoint(imported(folder).path)
    known = SplitRecord(SplitRule(0.2), ("a",), TrainedText(np.arange(3, dtype=np.uint64)), HeldOutText())
    payload["split"] = known.to_state()
    write_checkpoint(own, payload)
    export_checkpoint(own, folder.parent / "out")
    again = package.load(imported(folder.parent / "out").path)
    assert (again.split.rule, again.split.trained) == (known.rule, known.trained)


def test_shards_and_half_precision_are_read(published: Callable[..., tuple[Path, Any]]) -> None:
    from transformers import AutoModelForCausalLM

    folder, theirs = published("Llama", **{**SHAPE, "hidden_size": 42})
    (folder / "model.safetensors").unlink()
    theirs.bfloat16().save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    done = imported(folder)
    payload = read_checkpoint(done.path)
    half = {name for name, weight in payload["model_state"].items() if weight.dtype is torch.bfloat16}
    assert len(half) == 7 * SHAPE["num_hidden_layers"]  # tables and norms are float32
    assert done.matrix_type == "bfloat16"
    entry = payload["run"]["imported"]
    assert (entry["stored_as"], entry["family"], entry["source"]) == ("bfloat16", "llama", str(folder))
    loaded = package.load(done.path)
    assert loaded.notes == ()
    ours = dict(loaded.model.named_parameters())
    for name, parameter in theirs.named_parameters():
        assert ours[name].dtype is (torch.bfloat16 if name in half else torch.float32)
        assert torch.equal(ours[name].float(), parameter.float()[: ours[name].shape[0]]), name

    x = torch.randint(loaded.tokenizer.vocab_size, (2, 40), generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        wide = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)  # with exact rotary tables
        expected = wide(x).logits[..., : loaded.tokenizer.vocab_size]
        torch.testing.assert_close(loaded.logits(x), expected, rtol=0, atol=1e-4)
        for way in ("compiled", "plain", "model"):
            with steps_by(way):
                state, stepped = loaded.model.start(2), []
                for token in x.T:
                    stepped.append(loaded.model.step(token[:, None], state))
            torch.testing.assert_close(torch.stack(stepped, 1), expected, rtol=0, atol=1e-4)
        export_checkpoint(done.path, folder.parent / "out")
        again = AutoModelForCausalLM.from_pretrained(folder.parent / "out")
        torch.testing.assert_close(again(x).logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("options", [(), ("--lora", "2")])
def test_bfloat16_matrices_stay_so_under_adapters_and_inside_nanothink(
    options: tuple[str, ...],
    published: Callable[..., tuple[Path, Any]],
    tiny_corpus: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Training all weights needs float32; the base of adapters and a frozen expert keep what they are."""

    def counted(*line: str) -> int:
        """Bytes of weights by ``--dry-run``."""
        capsys.readouterr()
        assert run([*line, "--dry-run", "--json"]) == 0
        return int(json.loads(capsys.readouterr().out)["memory"]["weights"])

    def saved(path: Path) -> int:
        weights = read_checkpoint(path)["model_state"]
        return sum(weight.nbytes for name, weight in weights.items() if not name.startswith(GATE_PREFIX))

    folder, theirs = published("Qwen3", **SHAPE)
    theirs.bfloat16().save_pretrained(folder)
    start = imported(folder).path
    where = ["--data-dir", str(tiny_corpus), "--checkpoint-dir", str(tmp_path / "c"), "--max-steps", "2"]
    quick = [f"train_expert.{part}" for part in ("batch_size=2", "sample_tokens=4", "lr=0.01")]
    settings = [part for setting in (*quick, "model.max_seq_len=32") for part in ("--set", setting)]
    line = ["pretrain", "transformer", "--init", str(start), *where, *settings, *options]
    n_bytes = counted(*line)
    assert run(line) == 0
    assert n_bytes == saved(tmp_path / "c" / "transformer_expert.pt")
    assert counted("pretrain", "transformer", "--resume", *where, *settings, *options) == n_bytes
    trained = read_checkpoint(tmp_path / "c" / "transformer_expert.pt")["model_state"]
    before = read_checkpoint(start)["model_state"]
    for name, weight in before.items():
        assert trained[name].dtype is (weight.dtype if options else torch.float32)
        assert torch.equal(trained[name], weight) is bool(options)
    assert package.load(tmp_path / "c" / "transformer_expert.pt").notes == ()
    if options:
        small = ["--set", "train_mla.batch_size=2", "--set", "train_mla.sample_tokens=0"]
        small += ["--set", "model.max_seq_len=32", "--set", "train_mla.fit=full", "--set", "mla.n_heads=2"]
        line = ["train-mla", "--expert", str(start), *where, *small]
        n_bytes = counted(*line)
        assert run(line) == 0
        assert n_bytes == saved(tmp_path / "c" / "nanothink_mla.pt")
        inside = read_checkpoint(tmp_path / "c" / "nanothink_mla.pt")["model_state"]
        assert all(torch.equal(inside[f"experts.0.{name}"], weight) for name, weight in before.items())
        loaded = package.load(tmp_path / "c" / "nanothink_mla.pt")
        assert loaded.notes == ()
        assert isinstance(loaded.generate("time", max_new_tokens=3), str)


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


def test_a_name_on_the_hub_is_fetched_once(
    published: Callable[..., tuple[Path, Any]], tmp_path: Path
) -> None:
    folder, theirs = published("Qwen3", **SHAPE)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    files |= {"pytorch_model.bin": b"pickle", "modeling_mine.py": b"raise SystemExit"}

    def fetch(name: str, endpoint: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "nanothink", "checkpoints", "import", "me/mine", "--name", name]
        where = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
        environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        return subprocess.run(
            line, cwd=tmp_path, env=environment | where, capture_output=True, text=True, check=False
        )

    with serving(files) as endpoint:
        first = fetch("first", endpoint)
    assert first.returncode == 0, first.stderr
    assert fetch("second", endpoint).returncode == 0  # the server is gone
    assert not [path for path in (tmp_path / "hf").rglob("*") if path.suffix in (".bin", ".py")]
    ours = package.load(tmp_path / "checkpoints" / "second_expert.pt")
    x = torch.randint(ours.tokenizer.vocab_size, (2, 30), generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        torch.testing.assert_close(ours.logits(x), theirs(x).logits, rtol=0, atol=1e-4)


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


def test_an_earlier_checkpoint_is_replaced_on_request_alone(
    published: Callable[..., tuple[Path, Any]],
) -> None:
    folder, _ = published("Qwen3", **SHAPE)
    first = imported(folder)
    with pytest.raises(UsageError, match="--overwrite"):
        imported(folder)
    assert imported(folder, name="other").path.name == "other_expert.pt"
    assert imported(folder, overwrite=True).path == first.path
    assert len(list((first.path.parent / "replaced").rglob("*.pt"))) == 1


def test_commands_take_an_imported_model(
    published: Callable[..., tuple[Path, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = published("Llama", **{**SHAPE, "hidden_size": 42})
    checkpoints, data = tmp_path / "c", tmp_path / "data"
    (data / "a").mkdir(parents=True)
    lines = [json.dumps({"text": f"time light stone {n} water"}) for n in range(40)]
    (data / "a" / "a.jsonl").write_text("\n".join(lines))
    where = ["--checkpoint-dir", str(checkpoints)]
    assert run(["checkpoints", "import", str(folder), "--name", "their", *where, "--json"]) == 0
    path = json.loads(capsys.readouterr().out)["path"]
    assert path == str(checkpoints / "their_expert.pt")
    assert run(["checkpoints", "show", path]) == 0
    shown = capsys.readouterr().out
    assert "apache-2.0" in shown
    assert "what it was trained on is unknown" in shown
    assert run(["checkpoints", "verify", path]) == 0
    assert run(["generate", "time", "-c", path, "-n", "4"]) == 0
    capsys.readouterr()
    assert run(["eval", path, "--data-dir", str(data), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["checkpoints"]
    assert (row["trained_text_known"], row["seen_documents"]) == (False, 0)
    assert run(["eval", path, "--data-dir", str(data)]) == 0
    assert "trained on is unknown" in " ".join(capsys.readouterr().out.split())


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
