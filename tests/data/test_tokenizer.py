"""Tokenizers: the same ids from every source, nothing lost, nothing injected, never dead offline."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import orjson
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from reports import Told

from nanothink.data.corpus import find_corpus
from nanothink.data.split import SplitRule
from nanothink.data.tokenizer import (
    Tokenizer,
    TokenizerUnreachableError,
    fitting_vocab_size,
    load_tokenizer,
    save_tokenizer,
    train_on_corpus,
    train_tokenizer,
)
from nanothink.data.tokens import tokenise
from nanothink.errors import DataError, TokenizerError

TEXT = "The quick brown fox jumps over the lazy dog, and the dog's day is done. Hello world! " * 20
HOSTILE = st.text(
    st.one_of(
        st.characters(exclude_categories=["Cs"]), st.sampled_from("\0\n\r\t \x85\u200b😀<|endoftext|>")
    ),
    max_size=60,
)


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return train_tokenizer([TEXT], 400, n_bytes=len(TEXT))


@pytest.fixture
def gpt2(shared_data: Path) -> Path:
    return shared_data / "tokenizers" / "gpt2"


def _domain(root: Path, name: str, texts: list[str]) -> None:
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"text": text}) for text in texts]
    (folder / "a.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


# --- what a tokenizer promises -----------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(text=HOSTILE)
def test_decode_gives_every_text_back(trained: Tokenizer, text: str) -> None:
    ids = trained.encode(text)
    assert trained.decode(ids) == text
    assert trained.encode_batch([text, text])[1].tolist() == ids
    assert trained.eos_id not in ids
    assert all(0 <= i < trained.vocab_size for i in ids)


@pytest.mark.parametrize("text", ["<|endoftext|>", "a<|endoftext|>b", "<|endoftext|><|endoftext|>"])
def test_a_text_that_spells_the_end_is_not_the_end(trained: Tokenizer, text: str) -> None:
    assert trained.eos_id not in trained.encode(text)
    assert trained.eos_id not in trained.encode_batch([text])[0]
    assert trained.decode(trained.encode(text)) == text
    assert trained.decode([trained.eos_id]) == "<|endoftext|>"


def test_an_eos_that_is_an_ordinary_added_token_is_made_special(trained: Tokenizer) -> None:
    state = trained.to_state()
    content = orjson.loads(state["tokenizer_json"])
    content["added_tokens"][0]["special"] = False
    changed = Tokenizer.from_state({**state, "tokenizer_json": orjson.dumps(content).decode()})
    assert changed.eos_id not in changed.encode("a<|endoftext|>b")


def test_state_travels_as_strings(trained: Tokenizer) -> None:
    state = trained.to_state()
    assert all(isinstance(value, str) for value in state.values())
    again = Tokenizer.from_state(state)
    assert again.to_state() == state
    assert (again.name, again.eos_id, again.vocab_size) == (trained.name, trained.eos_id, trained.vocab_size)
    assert again.fingerprint == trained.fingerprint
    assert again.encode(TEXT) == trained.encode(TEXT)


def test_fingerprint_is_the_identity_not_the_name(trained: Tokenizer) -> None:
    state = trained.to_state()
    assert Tokenizer.from_state({**state, "name": "other"}).fingerprint == trained.fingerprint
    other = Tokenizer.from_state({**state, "eos_token": "<end>"})
    assert other.fingerprint != trained.fingerprint
    assert other.vocab_size == trained.vocab_size + 1 == other.eos_id + 1


@pytest.mark.parametrize("state", [{}, {"name": "x", "eos_token": "y", "tokenizer_json": "{"}])
def test_a_broken_state_is_a_clear_error(state: dict[str, str]) -> None:
    with pytest.raises(TokenizerError, match="saved tokenizer"):
        Tokenizer.from_state(state)


def test_truncation_padding_dropout_and_added_bos_are_taken_out(trained: Tokenizer) -> None:
    state = trained.to_state()
    backend = tokenizers.Tokenizer.from_str(state["tokenizer_json"])
    backend.enable_truncation(3)
    backend.enable_padding(length=50)
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        "<|endoftext|> $A", special_tokens=[("<|endoftext|>", trained.eos_id)]
    )
    backend.model.dropout = 0.9
    cleaned = Tokenizer(backend, "x", "<|endoftext|>")
    assert cleaned.encode(TEXT) == trained.encode(TEXT)
    assert cleaned.fingerprint == trained.fingerprint


def test_a_tokenizer_that_loses_text_is_refused(trained: Tokenizer) -> None:
    backend = tokenizers.Tokenizer.from_str(trained.to_state()["tokenizer_json"])
    backend.normalizer = tokenizers.normalizers.Lowercase()
    with pytest.raises(TokenizerError, match="hello world"):
        Tokenizer(backend, "lower")
    one_token = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"<|endoftext|>": 0}, merges=[]))
    with pytest.raises(TokenizerError, match="loses text"):
        Tokenizer(one_token, "one")


def test_a_tokenizer_whose_eos_can_be_spelt_is_refused() -> None:
    vocab = [("<unk>", 0.0), ("</s>", 0.0), *((c, -1.0) for c in "Hello world</s>abc")]
    backend = tokenizers.Tokenizer(tokenizers.models.Unigram([*dict(vocab).items()], unk_id=0))
    backend.decoder = tokenizers.decoders.Fuse()
    with pytest.raises(TokenizerError, match="spells '</s>'"):
        Tokenizer(backend, "unigram", "</s>")


def test_lone_surrogates_are_a_clear_error(trained: Tokenizer) -> None:
    for encode in (trained.encode, lambda text: trained.encode_batch([text])):
        with pytest.raises(TokenizerError, match="Character 3 "):
            encode("ab\ud800")


def test_ids_out_of_range_are_a_clear_error(trained: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match=f"0 and {trained.vocab_size - 1}"):
        trained.decode([-1])
    assert trained.decode(np.array(trained.encode("Hello"))) == "Hello"


def test_tokenizers_without_the_fast_path_give_the_same_from_batches(trained: Tokenizer) -> None:
    backend = tokenizers.Tokenizer.from_str(trained.to_state()["tokenizer_json"])
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.Digits(), tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    other = Tokenizer(backend, "digits")
    assert other._words is None
    texts = [TEXT, "", "12 345 é"]
    assert [ids.tolist() for ids in other.encode_batch(texts)] == [other.encode(text) for text in texts]


# --- training ----------------------------------------------------------------------------------


def test_training_is_deterministic(trained: Tokenizer, tmp_path: Path) -> None:
    """In fresh processes with other hash seeds and thread counts: ties must not fall by chance."""
    script = (
        "import sys; from nanothink.data.tokenizer import train_tokenizer\n"
        "texts = ['ab cd ef gh ij kl mn op ' * 3, 'ba dc fe hg ji lk nm po ' * 3]\n"
        "print(train_tokenizer(texts, 300, n_bytes=150).fingerprint)"
    )
    prints = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for threads, seed in (("1", "0"), ("4", "1"), ("4", "2"))
    }
    assert len(prints) == 1


def test_training_answers_a_signal_before_its_end() -> None:
    n_drawn, n_texts = 0, 50_000

    def texts() -> Iterator[str]:
        nonlocal n_drawn
        for n_drawn in range(n_texts):
            if n_drawn == 1000:
                os.kill(os.getpid(), signal.SIGINT)
            yield TEXT

    with pytest.raises(KeyboardInterrupt):
        train_tokenizer(texts(), 400, n_bytes=n_texts * len(TEXT))
    assert n_drawn < n_texts - 1


def test_what_the_texts_raise_reaches_who_trains() -> None:
    def texts() -> Iterator[str]:
        yield TEXT
        raise TokenizerError("no more")

    with pytest.raises(TokenizerError, match="no more"):
        train_tokenizer(texts(), 400, n_bytes=len(TEXT))


def test_a_small_corpus_gives_a_small_vocabulary(trained: Tokenizer) -> None:
    tiny = train_tokenizer(["ab"], 5000, n_bytes=2)
    assert tiny.vocab_size == 257
    assert tiny.decode(tiny.encode("漢字 😀\0")) == "漢字 😀\0"
    assert trained.vocab_size <= 400
    with pytest.raises(TokenizerError, match="257"):
        train_tokenizer(["ab"], 256, n_bytes=2)


def test_vocabulary_grows_with_the_corpus() -> None:
    sizes = [fitting_vocab_size(n) for n in (0, 1, 100_000, 10**6, 10**7, 10**9, 10**12)]
    assert sizes == sorted(sizes)
    assert sizes[2] == 1024
    assert sizes[-1] == 32768
    assert all(size % 64 == 0 and size >= 257 for size in sizes)


def test_training_sees_the_training_split_only(tmp_path: Path) -> None:
    words = [f"{a}{b}q{b}{a}" for a in "bcdfghjklm" for b in "aeiouvwxyz"]
    texts = [f" {word}" * 8 for word in words]
    _domain(tmp_path, "a", texts)
    _domain(tmp_path, "single", [" onlyonetext" * 20 + " secrettail" * 5])
    corpus = find_corpus(tmp_path)
    told: dict[str, list[tuple[int, int]]] = {}
    trained = train_on_corpus(
        corpus,
        vocab_size=4000,
        split=SplitRule(0.2, 0.2),
        reporter=Told(progress=lambda stage, *at: told.setdefault(stage, []).append(at)),
    )
    tokens = tokenise(corpus, trained, split=SplitRule(0.2, 0.2))
    held_out_lines = [side["a"].documents().lines for side in (tokens.val, tokens.test)]
    held_out = np.isin(np.arange(1, len(texts) + 1), np.concatenate(held_out_lines))
    learnt = [len(trained.encode(f" {word}")) == 1 for word in words]
    assert 20 < held_out.sum() < 60
    assert min(map(len, held_out_lines)) > 5
    assert learnt == (~held_out).tolist()
    assert len(trained.encode(" onlyonetext")) == 1
    assert len(trained.encode(" secrettail")) > 1
    assert list(told) == [f"tokenizer: {stage}" for stage in ("reading", "counting words", "merging")]
    assert (
        told["tokenizer: reading"][-1]
        == told["tokenizer: counting words"][-1]
        == (corpus.n_bytes, corpus.n_bytes)
    )
    assert told["tokenizer: merging"][-1] == (4000, 4000)


def test_nothing_to_train_on(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.jsonl").write_text("not json\n")
    with pytest.raises(DataError, match="nothing to train"):
        train_on_corpus(find_corpus(tmp_path), split=SplitRule(0.1))


# --- files -------------------------------------------------------------------------------------


def test_saved_and_loaded_again(trained: Tokenizer, tmp_path: Path) -> None:
    folder = save_tokenizer(trained, tmp_path / "new" / "tokenizer")
    for name in (folder, folder / "tokenizer.json"):
        loaded = load_tokenizer(str(name))
        assert loaded.fingerprint == trained.fingerprint
        assert loaded.name == str(name)
    assert sorted(path.name for path in folder.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    assert save_tokenizer(trained, folder) == folder  # over itself


def test_transformers_reads_what_was_saved(trained: Tokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(str(save_tokenizer(trained, tmp_path)))
    text = "Hello world, it's 12 o'clock.\n\n  Naïve café 😀"
    assert theirs(text)["input_ids"] == trained.encode(text)
    assert theirs.eos_token_id == trained.eos_id


def test_another_eos_is_saved_too(trained: Tokenizer, tmp_path: Path) -> None:
    save_tokenizer(trained, tmp_path)
    other = Tokenizer.from_state({**trained.to_state(), "eos_token": "<end>"})
    save_tokenizer(other, tmp_path)
    assert load_tokenizer(str(tmp_path)).fingerprint == other.fingerprint


@pytest.mark.parametrize("config", [{"eos_token": "<end>"}, {"eos_token": {"content": "<end>"}}])
@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
def test_eos_comes_from_the_files_beside(
    trained: Tokenizer, tmp_path: Path, name: str, config: dict[str, object]
) -> None:
    (tmp_path / "tokenizer.json").write_text(trained.to_state()["tokenizer_json"])
    assert load_tokenizer(str(tmp_path)).eos_id == trained.eos_id  # found among the special tokens
    (tmp_path / name).write_text(json.dumps(config))
    assert load_tokenizer(str(tmp_path)).decode([load_tokenizer(str(tmp_path)).eos_id]) == "<end>"


def test_a_tokenizer_without_eos_gets_one(tmp_path: Path) -> None:
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    (tmp_path / "vocab.json").write_text(json.dumps({c: i for i, c in enumerate(alphabet)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    loaded = load_tokenizer(str(tmp_path))
    assert (loaded.eos_id, loaded.vocab_size) == (256, 257)


def test_gpt2_as_transformers_has_it(gpt2: Path) -> None:
    from transformers import GPT2TokenizerFast

    ours = load_tokenizer(str(gpt2))
    theirs = GPT2TokenizerFast(vocab=str(gpt2 / "vocab.json"), merges=str(gpt2 / "merges.txt"))
    assert ours.encode("Hello world") == [15496, 995]
    assert (ours.eos_id, ours.vocab_size) == (50256, 50257)
    assert ours._words is not None
    for text in (TEXT, "  It's\n\n\t12³ “naïve” 漢字😀 \u3000x", " ".join(map(chr, range(33, 3000)))):
        assert ours.encode(text) == theirs(text)["input_ids"] == ours.encode_batch([text])[0].tolist()


def test_gpt2_needs_no_transformers(gpt2: Path) -> None:
    """Importing transformers or torch would cost seconds at every start."""
    script = (
        "import sys; from nanothink.data.tokenizer import load_tokenizer; load_tokenizer(sys.argv[1])\n"
        "print([name for name in ('torch', 'transformers', 'huggingface_hub') if name in sys.modules])"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, str(gpt2)], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "name", ["no/such/place", "./gpt3", "missing.json", "/nowhere/at/all", "~/nothing here", "", "a/b/"]
)
def test_a_path_that_is_not_there_is_named(name: str) -> None:
    with pytest.raises(TokenizerError, match="no tokenizer at") as caught:
        load_tokenizer(name)
    assert not isinstance(caught.value, TokenizerUnreachableError)


def test_a_misspelt_folder_beside_a_real_one_is_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tokenizers").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TokenizerError, match="no tokenizer at tokenizers/gpt3"):
        load_tokenizer("tokenizers/gpt3")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "needs tokenizer.json"),
        ({"notes.txt": b"x"}, "needs tokenizer.json"),
        ({"tokenizer.json": b"{}"}, "not a tokenizer"),
        ({"tokenizer.json": b"\xff\xfe"}, "not UTF-8"),
        ({"vocab.json": b"[]", "merges.txt": b"x"}, "make no tokenizer"),
        ({"vocab.json": b"{}", "merges.txt": b""}, "loses text"),
        ({"tokenizer.json": b"TOKENIZER", "tokenizer_config.json": b"{"}, "not valid JSON"),
    ],
)
def test_broken_folders(trained: Tokenizer, tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    for name, content in files.items():
        real = trained.to_state()["tokenizer_json"].encode()
        (tmp_path / name).write_bytes(content.replace(b"TOKENIZER", real))
    with pytest.raises(TokenizerError, match=message):
        load_tokenizer(str(tmp_path))


def test_a_disk_that_refuses(trained: Tokenizer, tmp_path: Path) -> None:
    from nanothink.errors import StorageError

    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="Cannot write"):
        save_tokenizer(trained, tmp_path / "file" / "folder")
