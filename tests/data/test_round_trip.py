"""Every text comes back byte for byte from its tokens, or the tokenizer is refused with what it loses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from nanothink.data.corpus import find_corpus
from nanothink.data.encoding import EOS, TextLostError, Tokenizer
from nanothink.data.split import SplitRule
from nanothink.data.tokenizer import save_tokenizer, train_tokenizer
from nanothink.data.tokens import tokenise

TEXT = "The quick brown fox jumps over the lazy dog, and the dog's day is done. Hello world! " * 20
HOSTILE = st.text(
    st.one_of(
        st.characters(exclude_categories=["Cs"]),
        st.sampled_from("\0\n\r\t \x85\u200b😀e\u0301é\ufeff▁Ġ<|endoftext|>"),
    ),
    max_size=60,
)
LETTERS = [chr(code) for code in range(33, 127)]


def byte_level(change: Callable[[tokenizers.Tokenizer], object] = lambda _: None) -> tokenizers.Tokenizer:
    """GPT-2's kind, with ``change`` made to it."""
    backend = tokenizers.Tokenizer.from_str(LEARNT)
    change(backend)
    return backend


LEARNT = train_tokenizer([TEXT], 400, n_bytes=len(TEXT)).to_state()["tokenizer_json"]


def edited(**changes: object) -> tokenizers.Tokenizer:
    """The same, with other values in its model."""
    state = json.loads(LEARNT)
    state["model"] |= changes
    return tokenizers.Tokenizer.from_str(json.dumps(state))


def without(char: str) -> tokenizers.Tokenizer:
    """The same without the token of one byte, or what is made of it."""
    state = json.loads(LEARNT)
    model = state["model"]
    kept = [token for token in sorted(model["vocab"], key=model["vocab"].get) if char not in token]
    model["vocab"] = {token: i for i, token in enumerate(kept)}
    model["merges"] = [pair for pair in model["merges"] if char not in "".join(pair)]
    state["added_tokens"] = []
    return tokenizers.Tokenizer.from_str(json.dumps(state))


def word_piece() -> tokenizers.Tokenizer:
    vocabulary = ["[UNK]", "Hello", "world", *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    backend = tokenizers.Tokenizer(
        models.WordPiece({token: i for i, token in enumerate(vocabulary)}, unk_token="[UNK]")
    )
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece(cleanup=False)
    return backend


def unigram(**options: bool) -> tokenizers.Tokenizer:
    pieces = [("<unk>", 0.0), ("▁", -2.0), *((letter, -3.0) for letter in [*LETTERS, "\n", "é"])]
    if options.get("byte_fallback"):
        pieces += [(f"<0x{value:02X}>", -9.0) for value in range(256)]
    backend = tokenizers.Tokenizer(models.Unigram(pieces, 0, **options))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps)
    return backend


def split(pattern: str, behavior: str) -> pre_tokenizers.PreTokenizer:
    cutter = pre_tokenizers.Split(Regex(pattern), behavior)
    return pre_tokenizers.Sequence([cutter, pre_tokenizers.ByteLevel(False, use_regex=False)])


PROVEN = {
    "as trained": byte_level(),
    "cut by another pattern": byte_level(
        lambda b: setattr(b, "pre_tokenizer", split(r"\p{L}+|\p{N}{1,3}|\s+", "isolated"))
    ),
    "cut and merged": byte_level(lambda b: setattr(b, "pre_tokenizer", split(r"\s", "merged_with_next"))),
    "not cut": byte_level(
        lambda b: setattr(b, "pre_tokenizer", pre_tokenizers.ByteLevel(False, use_regex=False))
    ),
    "more special tokens": byte_level(lambda b: b.add_special_tokens(["<s>", " the", "é"])),
    "no merges": edited(merges=[]),
}
UNPROVEN = {
    "a normaliser": (byte_level(lambda b: setattr(b, "normalizer", normalizers.NFC())), "e\u0301"),
    "lower case": (byte_level(lambda b: setattr(b, "normalizer", normalizers.Replace("Z", "z"))), "Zoo"),
    "blanks removed": (byte_level(lambda b: setattr(b, "pre_tokenizer", split(r"\t", "removed"))), "a\tb"),
    "blanks collapsed": (
        byte_level(lambda b: setattr(b, "normalizer", normalizers.Replace(Regex(" +"), " "))),
        "def f(x):\n    return x",
    ),
    "an added token that takes blanks": (
        byte_level(lambda b: b.add_tokens([AddedToken("fox", lstrip=True, rstrip=True)])),
        "a  fox  b",
    ),
    "an added token that reads as a byte": (byte_level(lambda b: b.add_tokens(["é"])), "café"),
    "a byte that is missing": (without("z"), "lazy"),
    "half of Unicode missing": (without("å"), "漢字 å"),
    "unknown words": (word_piece(), "你好世界"),
    "unknown characters": (unigram(), "Hello 漢"),
    "the sign of a blank": (unigram(byte_fallback=True), "a▁b"),
    "another decoder": (byte_level(lambda b: setattr(b, "decoder", decoders.Fuse())), "a b"),
}


@pytest.mark.parametrize("backend", PROVEN.values(), ids=PROVEN)
def test_what_is_proven_holds(backend: tokenizers.Tokenizer) -> None:
    tokenizer = Tokenizer(backend, "proven")
    assert tokenizer.lossless

    @settings(max_examples=150, deadline=None)
    @given(text=HOSTILE)
    def comes_back(text: str) -> None:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.eos_id not in ids
        assert tokenizer.encode_batch([text])[0].tolist() == ids

    comes_back()


def _made(backend: tokenizers.Tokenizer) -> Tokenizer:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tokenizer, "_check", lambda self: None)  # it would refuse some of them at once
        return Tokenizer(backend, "odd")


@pytest.mark.parametrize(("backend", "text"), UNPROVEN.values(), ids=UNPROVEN)
def test_a_text_that_is_lost_is_found(backend: tokenizers.Tokenizer, text: str) -> None:
    tokenizer = _made(backend)
    assert not tokenizer.lossless
    with pytest.raises(TextLostError, match="tokenizer 'odd' loses text") as error:
        tokenizer.encode_batch(["Hello", text])
    assert error.value.index == 1
    assert error.value.loss == tokenizer.loss(text)
    with pytest.raises(TextLostError):
        tokenizer.encode_exactly(text)


def test_what_comes_back_is_taken_though_it_is_not_proven() -> None:
    backend, _ = UNPROVEN["the sign of a blank"]
    tokenizer = Tokenizer(backend, "unigram")
    texts = ["Hello world", "  two  blanks ", "日本語 😀\r\n\tx", "e\u0301", "<|endoftext|>"]
    assert [tokenizer.decode(ids.tolist()) for ids in tokenizer.encode_batch(texts)] == texts
    assert [tokenizer.loss(text) for text in texts] == [None] * 5


def test_a_text_that_spells_the_end_of_a_document_is_found() -> None:
    vocabulary = {**json.loads(LEARNT)["model"]["vocab"], "Ġ.": 400}
    merges = [*json.loads(LEARNT)["model"]["merges"], ["Ġ", "."]]
    tokenizer = Tokenizer(edited(vocab=vocabulary, merges=merges), "spelt", "Ġ.")
    assert not tokenizer.lossless  # the model makes this token of text
    with pytest.raises(TextLostError, match="becomes the end of a document"):
        tokenizer.encode_batch(["a . b"])
    assert EOS in vocabulary
    assert not _made(edited(ignore_merges=True)).lossless  # and this one of a word that spells it


@pytest.mark.parametrize(
    ("text", "back", "said"),
    [
        ("abc", "abd", "'abc' becomes 'abd' (character 3)"),
        ("abc", "ab", "'abc' becomes 'ab' (character 3)"),
        ("a\nb", "a b", r"'a\nb' becomes 'a b' (character 2)"),
        ("x" * 50 + "Z" + "y" * 50, "x" * 50 + "z" + "y" * 50, f"'...{'x' * 20}Z{'y' * 19}...' becomes"),
    ],
)
def test_the_first_difference_is_shown(text: str, back: str, said: str) -> None:
    from nanothink.data.round_trip import difference

    assert difference(text, back).startswith(said)


def _corpus(root: Path, texts: list[str]) -> Path:
    (root / "zh").mkdir(parents=True)
    lines = [json.dumps({"text": text}) for text in texts]
    (root / "zh" / "a.jsonl").write_text("\n".join(lines) + "\n")
    return root


@pytest.mark.parametrize("given_split", [SplitRule(0.1), None])
def test_tokenising_names_file_and_line_and_keeps_nothing(
    tmp_path: Path, given_split: SplitRule | None
) -> None:
    texts = [f"Hello world {i}" for i in range(30)]
    tokenizer = Tokenizer(unigram(), "unigram")
    corpus = find_corpus(_corpus(tmp_path / "data", [*texts, "Hello 漢", "Hello 字"]))
    with pytest.raises(TextLostError) as error:
        tokenise(corpus, tokenizer, split=given_split)
    assert str(error.value).startswith(
        f"{tmp_path}/data/zh/a.jsonl:31: tokenizer 'unigram' loses text: 'Hello 漢'"
    )
    assert not list((tmp_path / "data" / ".nanothink").rglob("*.tokens"))
    assert tokenise(find_corpus(_corpus(tmp_path / "good", texts)), tokenizer, split=given_split).train


def test_tokens_kept_before_texts_were_checked_are_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = Tokenizer(unigram(), "unigram")
    corpus = find_corpus(_corpus(tmp_path / "data", ["Hello world", "Hello 漢"]))
    for module in ("token_files", "token_writer"):
        monkeypatch.setattr(f"nanothink.data.{module}.FORMAT", 3)
    monkeypatch.setattr(Tokenizer, "_check_losses", lambda *_: None)
    tokenise(corpus, tokenizer, split=None)
    monkeypatch.undo()
    with pytest.raises(TextLostError, match=r"a\.jsonl:2"):
        tokenise(corpus, tokenizer, split=None)


def test_training_evaluation_and_memory_refuse_a_tokenizer_that_loses_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from nanothink.cli.app import run

    monkeypatch.chdir(tmp_path)
    _corpus(tmp_path / "good", [f"Hello world {i}" for i in range(30)])
    _corpus(tmp_path / "bad", [*(f"Hello world {i}" for i in range(30)), "Hello 漢"])
    save_tokenizer(Tokenizer(unigram(), "unigram"), tmp_path / "unigram")
    small = ["--set", "model.d_model=16", "--set", "model.max_seq_len=32", "--set", "transformer.n_heads=1"]
    small += ["--set", "transformer.n_layers=1", "--max-steps", "1", "--tokenizer", "unigram"]
    assert run(["data", "inspect", "bad", "--tokenizer", "unigram"]) == 1
    assert run(["pretrain", "transformer", "--data-dir", "bad", *small]) == 1
    assert not list(tmp_path.rglob("*.pt"))
    assert run(["pretrain", "transformer", "--data-dir", "good", *small]) == 0
    assert run(["eval", "--data-dir", "bad"]) == 1
    expert = ["--expert", "checkpoints/transformer_expert.pt"]
    assert run(["store", "build", *expert, "--data-dir", "bad"]) == 1
    said = capsys.readouterr().err
    assert said.count("bad/zh/a.jsonl:31: tokenizer 'unigram' loses text: 'Hello 漢' becomes") == 4
    assert run(["generate", "Hello 漢", "-n", "2"]) == 0
    assert "warning: The tokenizer loses a part of the prompt: 'Hello 漢' becomes" in capsys.readouterr().err
    assert run(["generate", "Hello world", "-n", "2"]) == 0
    assert "warning" not in capsys.readouterr().err
