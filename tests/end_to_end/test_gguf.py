"""`checkpoints export --format gguf`: llama.cpp predicts what the checkpoint predicts, from the same tokens.

llama.cpp comes in the package xllamacpp, of the extra ``bench``, as a server in this process. Tests that ask
it are of ``make test-bench``.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llama_server import divergence, llama_cpp, texts
from random_checkpoints import write_random_checkpoint

import nanothink as package
from nanothink.checkpoints.file import read_checkpoint, write_checkpoint
from nanothink.cli.app import run
from nanothink.data.tokenizer import load_tokenizer
from nanothink.errors import CheckpointDamagedError, CheckpointMismatchError
from nanothink.models.joint_gate import DOCUMENT_CACHE, GATE_PREFIX, JointGate, n_expert_features
from nanothink.runs.exporting_gguf import export_gguf
from nanothink.runs.import_model import import_model

pytest.importorskip("gguf")

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("transformer", {"transformer__rope_theta": 777.0}),
    "qwen3, tied, grouped": (
        "transformer",
        {"transformer__tie_embeddings": True, "transformer__n_kv_heads": 1, "transformer__head_dim": 24},
    ),
    "llama": (
        "transformer",
        {"transformer__qk_norm": False, "transformer__n_heads": 4, "transformer__n_kv_heads": 2},
    ),
    "qwen2": ("transformer", {"transformer__qk_norm": False, "transformer__attention_bias": "qkv"}),
    "mamba": ("state_space", {}),
    "mamba, tied": ("state_space", {"state_space__tie_embeddings": True, "state_space__norm_eps": 1e-5}),
    "falcon_mamba": ("state_space", {"state_space__mixer_norm_eps": 1e-6}),
}
PROMPTS = [
    "time light stone",
    "water 7.",
    " two  spaces\n\nand",
    "Ünïcødé 水",
    "a",
    "don't , stop . time " * 3,
]


@pytest.fixture
def exported(tiny_tokenizer: Path, tmp_path: Path) -> Any:
    """Writes a checkpoint with random weights and a GGUF file of it; gives both."""

    def write(shape: str, quantization: Any = "f32") -> tuple[Path, Path]:
        kind, settings = SHAPES[shape]
        tokenizer = load_tokenizer(str(tiny_tokenizer))
        path = write_random_checkpoint(tmp_path / "a.pt", tokenizer, kind, **settings)
        return path, export_gguf(path, tmp_path / "out" / "a.gguf", quantization=quantization).file

    return write


@pytest.mark.bench
@pytest.mark.parametrize("quantization", ["f32", "q8_0"])
@pytest.mark.parametrize("shape", SHAPES)
def test_llama_cpp_predicts_the_same(shape: str, quantization: str, exported: Any) -> None:
    checkpoint, file = exported(shape, quantization)
    ours = package.load(checkpoint, device="cpu")
    n_tokens = ours.tokenizer.vocab_size
    with llama_cpp(file) as theirs:
        for prompt in PROMPTS:
            tokens = [ours.tokenizer.eos_id, *ours.tokenizer.encode(prompt)]
            expected = ours.logits(torch.tensor([tokens]))[0, -1].double().log_softmax(-1).numpy()
            found = theirs.log_probabilities(tokens, n_tokens)
            if quantization == "f32":
                np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)
                assert found.argmax() == expected.argmax()
            else:
                assert divergence(expected, found) < 0.01


@pytest.mark.bench
def test_llama_cpp_reads_the_same_tokens(exported: Any) -> None:
    checkpoint, file = exported("mamba")
    ours = package.load(checkpoint).tokenizer
    with llama_cpp(file) as theirs:
        wrong = [text for text in texts() if theirs.tokenize(text) != ours.encode(text)]
    assert wrong == []


@pytest.mark.parametrize("quantization", ["f32", "f16", "q8_0"])
@pytest.mark.parametrize("shape", [name for name in SHAPES if name != "qwen2"])
def test_a_file_is_imported_as_what_it_was_made_of(
    shape: str, quantization: str, exported: Any, tmp_path: Path
) -> None:
    checkpoint, file = exported(shape, quantization)
    done = import_model(str(file), name="back", checkpoint_dir=tmp_path / "c")
    ours, again = package.load(checkpoint, device="cpu"), package.load(done.path, device="cpu")
    assert again.notes == ()
    assert not again.trained_text.complete
    assert [again.tokenizer.encode(text) for text in texts(50)] == [
        ours.tokenizer.encode(text) for text in texts(50)
    ]
    assert again.tokenizer.eos_id == ours.tokenizer.eos_id
    x = torch.randint(ours.tokenizer.vocab_size, (2, 40), generator=torch.Generator().manual_seed(5))
    expected, found = ours.logits(x), again.logits(x)
    tolerance = {"f32": 2e-5, "f16": 0.02, "q8_0": 0.3}[quantization]  # A goes through exp and log
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def _changed(**changes: Any) -> Any:
    """Writes a GGUF file with other metadata; None leaves a key out."""

    def write(file: Path, into: Path) -> None:
        import gguf

        reader = gguf.GGUFReader(file)
        writer = gguf.GGUFWriter(into, changes.get("general_architecture", "qwen3"))
        for key, field in reader.fields.items():
            kinds = field.types
            name = key.replace(".", "_")
            if key.startswith("GGUF.") or key == "general.architecture" or changes.get(name, 0) is None:
                continue
            value = changes.get(name, field.contents())
            writer.add_key_value(key, value, kinds[0], kinds[1] if len(kinds) > 1 else None)
        if "expert_count" in changes:
            writer.add_expert_count(changes["expert_count"])
        if "sliding_window" in changes:
            writer.add_sliding_window(changes["sliding_window"])
        for tensor in reader.tensors:
            writer.add_tensor(changes.get("names", {}).get(tensor.name, tensor.name), tensor.data)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    return write


def _cut(file: Path, into: Path) -> None:
    into.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_cut, "no sound GGUF file"),
        (lambda file, into: into.write_bytes(b"GGUF"), "no sound GGUF file"),
        (lambda file, into: into.write_text("hello"), "no sound GGUF file"),
        (_changed(general_architecture="gemma"), "architecture 'gemma'"),
        (_changed(qwen3_embedding_length=None), "lacks qwen3.embedding_length"),
        (_changed(qwen3_embedding_length=64), "due|not those|lm_head"),
        (_changed(expert_count=8), "mixture of experts"),
        (_changed(sliding_window=9), "a sliding window of 9 tokens"),
        (_changed(tokenizer_ggml_pre="odd"), "tokenizer is of a kind"),
        (_changed(tokenizer_ggml_model="t5"), "tokenizer is of a kind"),
        (_changed(tokenizer_ggml_model="llama"), "no token for 256 bytes"),
        (_changed(names={"output_norm.weight": "rope_freqs.weight"}), "scaled by 'llama3'"),
    ],
)
def test_a_damaged_or_foreign_file_is_one_line(
    damage: Any, reason: str, exported: Any, tmp_path: Path
) -> None:
    _, file = exported("qwen3")
    damage(file, tmp_path / "b.gguf")
    with pytest.raises((CheckpointDamagedError, CheckpointMismatchError), match=reason):
        import_model(str(tmp_path / "b.gguf"), checkpoint_dir=tmp_path / "c")
    assert list(tmp_path.glob("c/*.pt")) == []


def test_a_text_begins_after_eos_there_too(exported: Any) -> None:
    import gguf

    checkpoint, file = exported("qwen3")
    fields = gguf.GGUFReader(file).fields
    eos = package.load(checkpoint).tokenizer.eos_id
    assert fields["tokenizer.ggml.bos_token_id"].contents() == eos
    assert fields["tokenizer.ggml.eos_token_id"].contents() == eos
    assert fields["tokenizer.ggml.add_bos_token"].contents() is True
    assert fields["tokenizer.ggml.token_type"].contents()[eos] == gguf.TokenType.CONTROL
    assert "{{ message.content }}" in fields["tokenizer.chat_template"].contents()
    modelfile = file.with_name("a.gguf.Modelfile").read_text()
    assert modelfile.startswith("FROM ./a.gguf\n")
    assert "num_ctx 48" in modelfile


@pytest.mark.parametrize(
    ("kind", "settings", "what"),
    [
        ("state_space", {"state_space__expand": 3}, "twice as many channels"),
        ("diffuser", {}, "transformer or a state-space model"),
        ("transformer", {"transformer__norm": "layer"}, "transformer or a state-space model"),
    ],
)
def test_what_llama_cpp_lacks_is_refused(
    kind: str, settings: dict[str, Any], what: str, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    path = write_random_checkpoint(tmp_path / "a.pt", load_tokenizer(str(tiny_tokenizer)), kind, **settings)
    with pytest.raises(CheckpointMismatchError, match=re.escape(what)):
        export_gguf(path, tmp_path / "a.gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


@pytest.mark.parametrize("kind", ["transformer", "state_space"])
def test_the_joint_gate_that_every_run_ends_with_stays_behind(
    kind: str, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    path = write_random_checkpoint(tmp_path / "a.pt", load_tokenizer(str(tiny_tokenizer)), kind)
    without = export_gguf(path, tmp_path / "a.gguf").file.read_bytes()
    payload = read_checkpoint(path)
    vocab_size = load_tokenizer(str(tiny_tokenizer)).vocab_size
    features = torch.rand(9, n_expert_features(1) + 6)
    gate = JointGate.start(
        (DOCUMENT_CACHE,), features, torch.zeros(vocab_size), n_hidden=3, generator=torch.Generator()
    )
    weights = {f"{GATE_PREFIX}{name}": weight for name, weight in gate.weights.items()}
    write_checkpoint(path, {**payload, "model_state": {**payload["model_state"], **weights}})
    assert package.load(path, device="cpu").model.joint_gate is not None
    assert export_gguf(path, tmp_path / "a.gguf", overwrite=True).file.read_bytes() == without


def test_a_tokenizer_of_other_rules_is_refused(tiny_tokenizer: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    state = json.loads((tiny_tokenizer / "tokenizer.json").read_text())
    digits = {"type": "Split", "pattern": {"Regex": "[0-9]{2}"}, "behavior": "Isolated", "invert": False}
    state["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, state["pre_tokenizer"]]}
    (folder / "tokenizer.json").write_text(json.dumps(state))
    path = write_random_checkpoint(tmp_path / "a.pt", load_tokenizer(str(folder)), "transformer")
    with pytest.raises(CheckpointMismatchError, match="cuts text by rules"):
        export_gguf(path, tmp_path / "a.gguf")


def test_the_command_replaces_a_file_on_request_alone(
    exported: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, file = exported("mamba")
    before = file.read_bytes()
    line = ["checkpoints", "export", str(checkpoint), "--format", "gguf", "--to"]
    assert run([*line, str(file)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert file.read_bytes() == before
    assert run([*line, str(file), "--overwrite", "--quantize", "f16", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["file"], said["quantization"], said["kind"]) == (str(file), "f16", "state_space")
    assert said["n_bytes"] == file.stat().st_size < len(before)
    assert sorted(p.name for p in file.parent.iterdir()) == ["a.gguf", "a.gguf.Modelfile"]
    assert run([*line, str(tmp_path)]) == 2
    assert "is a folder" in capsys.readouterr().err
    assert (
        run(["checkpoints", "export", str(checkpoint), "--quantize", "f16", "--to", str(tmp_path / "x")]) == 2
    )
    assert "--format gguf" in capsys.readouterr().err
