"""`checkpoints export --format gguf`: llama.cpp predicts what the checkpoint predicts, from the same tokens.

llama.cpp comes in the package xllamacpp, of the extra ``bench``, as a server in this process. Without it
these tests are skipped.
"""

from __future__ import annotations

import json
import random
import re
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from random_checkpoints import write_random_checkpoint

import nanothink as package
from nanothink.cli.app import run
from nanothink.data.tokenizer import load_tokenizer
from nanothink.errors import CheckpointMismatchError
from nanothink.runs.exporting_gguf import export_gguf

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


class LlamaCpp:
    """A model in llama.cpp, asked through its own server."""

    def __init__(self, address: str) -> None:
        self._address = address

    def tokenize(self, text: str) -> list[int]:
        """Ids of a text, no special token among them."""
        found: list[int] = self._ask("tokenize", {"content": text, "parse_special": False})["tokens"]
        return found

    def log_probabilities(self, tokens: Sequence[int], vocab_size: int) -> np.ndarray:
        """(V,) of the token after these, in nats."""
        request = {
            "prompt": list(tokens),
            "n_predict": 1,
            "n_probs": vocab_size,
            "temperature": 1.0,
            "cache_prompt": False,
            # What is drawn does not count, but half a character or EOS would come without probabilities.
            "logit_bias": [[self.tokenize("a")[0], 1000.0]],
        }
        (first,) = self._ask("completion", request)["completion_probabilities"]
        found = np.full(vocab_size, -np.inf)
        for entry in first["top_logprobs"]:
            found[entry["id"]] = entry["logprob"]
        return found

    def _ask(self, what: str, request: dict[str, Any]) -> Any:
        body = json.dumps(request).encode()
        headers = {"Content-Type": "application/json"}
        with urllib.request.urlopen(
            urllib.request.Request(f"{self._address}/{what}", body, headers)
        ) as answer:
            return json.load(answer)


@contextmanager
def llama_cpp(path: Path, context: int = 64) -> Iterator[LlamaCpp]:
    xllamacpp = pytest.importorskip("xllamacpp")
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(path)
    parameters.n_ctx, parameters.n_parallel, parameters.warmup = context, 1, False
    parameters.cpuparams.n_threads = parameters.n_threads_http = 1
    parameters.verbosity = -1
    # As in our model: keys and values in float32, and no kernel that halves them.
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(parameters)
    yield LlamaCpp(server.listening_address)
    del server


@pytest.fixture
def exported(tiny_tokenizer: Path, tmp_path: Path) -> Any:
    """Writes a checkpoint with random weights and a GGUF file of it; gives both."""

    def write(shape: str, quantization: Any = "f32") -> tuple[Path, Path]:
        kind, settings = SHAPES[shape]
        tokenizer = load_tokenizer(str(tiny_tokenizer))
        path = write_random_checkpoint(tmp_path / "a.pt", tokenizer, kind, **settings)
        return path, export_gguf(path, tmp_path / "out" / "a.gguf", quantization=quantization).file

    return write


def divergence(expected: np.ndarray, found: np.ndarray) -> float:
    """Kullback-Leibler divergence in nats."""
    return float((np.exp(expected) * (expected - found)).sum())


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


def texts(n: int = 300) -> list[str]:
    """Texts of letters, digits, signs, CJK, emoji and odd white space, as they come."""
    words = "time, light,stone,水の中,日本語,한국어,🌊,👩\u200d👧,é,e\u0301,ß,Ω,١٢٣,123,ﬁ,½,don't,'s,'LL"
    signs = "_ # < |> <|endoftext|> x=1; . , !?"
    spaces = [" ", "  ", "\n", "\n\n", "\t", "\r\n", "\u3000", "\u00a0", "\u200b", "\u0085", "\u2028"]
    pieces = [*words.split(","), *signs.split(" "), *spaces]
    drawn = random.Random(0)
    return ["".join(drawn.choices(pieces, k=drawn.randint(1, 24))) for _ in range(n)]


def test_llama_cpp_reads_the_same_tokens(exported: Any) -> None:
    checkpoint, file = exported("mamba")
    ours = package.load(checkpoint).tokenizer
    with llama_cpp(file) as theirs:
        wrong = [text for text in texts() if theirs.tokenize(text) != ours.encode(text)]
    assert wrong == []


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
