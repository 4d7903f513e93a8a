"""GGUF files whose tokenizer is SentencePiece's, as those of TinyLlama and Mistral: llama.cpp reads the same
tokens from them as the import does."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from llama_server import llama_cpp, texts

import nanothink as package
from nanothink.data.tokenizer import Tokenizer
from nanothink.errors import CheckpointMismatchError
from nanothink.runs.import_model import import_model

pytest.importorskip("gguf")

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
Piece = tuple[str, float, int]
"""Text, score and type of a token."""


@pytest.fixture(scope="module")
def pieces(corpus_words: list[str]) -> list[Piece]:
    """A vocabulary as SentencePiece trains it: special tokens, bytes, merges by rank, and letters last."""
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=900, show_progress=False)
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    trained.pre_tokenizer = tokenizers.pre_tokenizers.Split("▁", "merged_with_next")
    trained.train_from_iterator([*corpus_words, *texts(200), "▁" * 16, "aaaa abababa " * 9], trainer)
    ordered = sorted(trained.get_vocab().items(), key=lambda pair: pair[1])
    merged = [text for text, _ in ordered if len(text) > 1]
    letters = [text for text, _ in ordered if len(text) == 1]
    scored = [(text, -float(rank), NORMAL) for rank, text in enumerate([*merged, *letters])]
    special: list[Piece] = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL)]
    octets: list[Piece] = [(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)]
    return [*special, *octets, *scored, ("<think>", -1000.0, USER_DEFINED), ("<pad>", 0.0, UNUSED)]


@pytest.fixture(scope="module")
def corpus_words() -> list[str]:
    drawn = random.Random(1)
    words = ["the", "time", "of", "a", "light", "stone", "that", "another", "mountain", "naïve", "café"]
    return [" ".join(drawn.choices(words, k=12)) for _ in range(200)]


def write(path: Path, pieces: list[Piece], **fields: Any) -> Path:
    """A random Llama with this vocabulary."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    width, drawn = 32, np.random.default_rng(0)
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(48)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([text for text, _, _ in pieces])
    writer.add_token_scores([score for _, score, _ in pieces])
    writer.add_token_types([kind for _, _, kind in pieces])
    for name, value in fields.items():
        add = writer.add_bool if isinstance(value, bool) else writer.add_uint32
        add(f"tokenizer.ggml.{name}", value)
    shapes = {
        "token_embd": (len(pieces), width),
        "output_norm": (width,),
        "output": (len(pieces), width),
        "blk.0.attn_norm": (width,),
        **{f"blk.0.attn_{part}": (width, width) for part in ("q", "k", "v", "output")},
        "blk.0.ffn_norm": (width,),
        "blk.0.ffn_gate": (48, width),
        "blk.0.ffn_up": (48, width),
        "blk.0.ffn_down": (width, 48),
    }
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", drawn.standard_normal(shape, np.float32) * 0.1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def imported(file: Path, folder: Path) -> Tokenizer:
    return package.load(import_model(str(file), checkpoint_dir=folder).path, device="cpu").tokenizer


def odd_texts() -> list[str]:
    """Texts of few letters, where merges meet, beside those of all kinds of characters."""
    drawn = random.Random(2)
    runs = ["".join(drawn.choices(letters, k=drawn.randint(1, 30))) for letters in ["ab", "a ", "the "] * 100]
    return [*texts(), *runs, "a<think>b <think> c", " <s>", "\u2581x", "", " "]


@pytest.mark.bench
@pytest.mark.parametrize("prefix", [{}, {"add_space_prefix": False, "add_bos_token": False}])
def test_llama_cpp_reads_the_same_tokens(
    prefix: Mapping[str, Any], pieces: list[Piece], tmp_path: Path
) -> None:
    file = write(tmp_path / "a.gguf", pieces, **prefix)
    model = package.load(import_model(str(file), checkpoint_dir=tmp_path).path, device="cpu")
    ours, tokens = model.tokenizer, model.tokenizer.encode_prompt("the time of naïve 水")
    with llama_cpp(file) as theirs:
        wrong = [text for text in odd_texts() if theirs.tokenize(text) != ours.encode(text)]
        found = theirs.log_probabilities(tokens, len(pieces))[: ours.vocab_size]
    assert wrong == []
    expected = model.logits(torch.tensor([tokens]))[0, -1].double().log_softmax(-1).numpy()
    np.testing.assert_allclose(found - found.max(), expected - expected.max(), rtol=0, atol=1e-3)


def test_texts_begin_with_bos_and_come_back(pieces: list[Piece], tmp_path: Path) -> None:
    ours = imported(write(tmp_path / "a.gguf", pieces), tmp_path)
    assert (ours.bos_token, ours.eos_token, ours.vocab_size) == ("<s>", "</s>", len(pieces) - 1)
    again = Tokenizer.from_state(ours.to_state())
    for text in texts():
        if "\u2581" not in text:
            assert ours.decode(ours.encode_exactly(text)) == text
        assert again.encode_prompt(text) == [ours.bos_id, *ours.encode(text)]
    assert ours.loss("a\u2581b") == "'a\u2581b' becomes 'a b' (character 2)"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda pieces: [(text, -1.0, kind) for text, _, kind in pieces], "pieces the same score"),
        (lambda pieces: [piece for piece in pieces if piece[0] != "<0x7F>"], "no token for 1 byte"),
        (lambda pieces: [*pieces, ("thes", 0.0, UNUSED)], "the unused piece 'thes'"),
        (lambda pieces: [*pieces, ("aҖ", -1e6, NORMAL)], "from 'Җ', which is no token"),
    ],
)
def test_what_merges_cannot_say_is_refused_by_name(
    change: Any, reason: str, pieces: list[Piece], tmp_path: Path
) -> None:
    file = write(tmp_path / "a.gguf", change(pieces))
    with pytest.raises(CheckpointMismatchError, match=reason):
        import_model(str(file), checkpoint_dir=tmp_path)
    assert list(tmp_path.glob("*.pt")) == []
