"""Tokenizers of strangers: only data is read, no code is run, and any editor may have saved them."""

from __future__ import annotations

import builtins
import io
import json
from fnmatch import fnmatch
from pathlib import Path

import pytest

from nanothink.data.hub import DATA_FILES
from nanothink.data.tokenizer import Tokenizer, load_tokenizer, save_tokenizer, train_tokenizer
from nanothink.errors import TokenizerError

TEXT = "The quick brown fox jumps over the lazy dog, and the dog's day is done. Hello world! " * 20
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "world", "##s"]
TOKENIZER = "tokenization_evil.EvilTokenizer"
MAPS = [{"AutoTokenizer": [TOKENIZER, None]}, {"AutoTokenizer": [None, TOKENIZER]}, [TOKENIZER, None]]


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return train_tokenizer([TEXT], 400, n_bytes=len(TEXT))


def evil(folder: Path) -> Path:
    """Code that leaves a file behind, under every name that transformers might ask for. That file."""
    mark = folder.parent / "code was run"
    code = f"open({str(mark)!r}, 'w')\nclass EvilTokenizer: pass\nclass EvilConfig: pass\n"
    for name in ("tokenization_evil", "configuration_evil", "tokenizer", "evil", "__init__"):
        (folder / f"{name}.py").write_text(code)
    return mark


def agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is asked is answered with yes."""
    monkeypatch.setattr("sys.stdin", io.StringIO("yes\n" * 100))
    monkeypatch.setattr(builtins, "input", lambda _prompt="": "yes")


@pytest.mark.parametrize("data_file", [None, "vocab.txt", "tokenizer.model"])
@pytest.mark.parametrize("auto_map", MAPS)
def test_code_that_comes_with_a_tokenizer_is_never_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, auto_map: object, data_file: str | None
) -> None:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    mark = evil(folder)
    config = {"auto_map": auto_map, "tokenizer_class": "EvilTokenizer", "model_type": "evil"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    config["auto_map"] = {"AutoConfig": "configuration_evil.EvilConfig", "AutoTokenizer": [TOKENIZER, None]}
    (folder / "config.json").write_text(json.dumps(config))
    if data_file:
        (folder / data_file).write_text("\n".join(WORDS))
    agree(monkeypatch)
    with pytest.raises(TokenizerError, match="is never run"):
        load_tokenizer(str(folder))
    assert not mark.exists()


def test_code_beside_a_tokenizer_json_is_never_run(
    trained: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tokenizer(trained, tmp_path / "tokenizer")
    mark = evil(folder)
    settings = {"auto_map": MAPS[0], "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    agree(monkeypatch)
    assert load_tokenizer(str(folder)).fingerprint == trained.fingerprint
    assert not mark.exists()


def test_transformers_sees_the_data_files_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    asked: dict[str, object] = {}

    def from_pretrained(folder: str, **options: object) -> object:
        asked.update(options, files=sorted(path.name for path in Path(folder).iterdir()))
        raise ValueError(f"no such thing in {folder}")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", from_pretrained)
    for name in ("vocab.txt", "spiece.model", "a.py", "tokenizer.py", "tokenizer.pkl", "vocab.pickle"):
        (tmp_path / name).write_text("x")
    with pytest.raises(TokenizerError, match=f"in {tmp_path}: no such thing in {tmp_path}$"):
        load_tokenizer(str(tmp_path))
    assert asked.pop("files") == ["spiece.model", "vocab.txt"]
    assert asked == {"local_files_only": True, "trust_remote_code": False}


def test_nothing_that_could_hold_code_is_fetched() -> None:
    for name in ("tokenizer.py", "tokenization_x.py", "tokenizer.pkl", "vocab.pickle", "tokenizer/x.json"):
        assert not any(fnmatch(name, pattern) for pattern in DATA_FILES)
    assert not any(char in name for name in DATA_FILES for char in "*?[")


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_byte_order_mark_is_no_part_of_a_tokenizer(trained: Tokenizer, tmp_path: Path, end: str) -> None:
    state = json.loads(trained.to_state()["tokenizer_json"])
    folders = {name: tmp_path / name for name in ("whole", "gpt2")}
    for folder in folders.values():
        folder.mkdir()
        (folder / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}', "utf-8-sig")
    (folders["whole"] / "tokenizer.json").write_text(json.dumps(state), "utf-8-sig")
    vocabulary = {**state["model"]["vocab"], "<|endoftext|>": trained.eos_id}
    (folders["gpt2"] / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), "utf-8-sig")
    merges = ["#version: 0.2", *(" ".join(pair) for pair in state["model"]["merges"])]
    (folders["gpt2"] / "merges.txt").write_bytes((end.join(merges) + end).encode("utf-8-sig"))
    for folder in folders.values():
        loaded = load_tokenizer(str(folder))
        assert (loaded.encode(TEXT), loaded.eos_id) == (trained.encode(TEXT), trained.eos_id)


def test_an_absurd_vocabulary_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text('{"a": 4000000000}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(TokenizerError, match=r"vocab\.json is not a tokenizer.*the id of a token"):
        load_tokenizer(str(tmp_path))
