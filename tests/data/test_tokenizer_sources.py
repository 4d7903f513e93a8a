"""Tokenizers of the Hub, and the stand-in of whoever is offline: found out quickly, fetched once, kept."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import write_domain
from reports import Told
from stand_in_hub import serving

from nanothink.data.corpus import find_corpus
from nanothink.data.split import SplitRule
from nanothink.data.tokenizer import (
    Tokenizer,
    load_tokenizer,
    resolve_tokenizer,
    save_tokenizer,
)
from nanothink.errors import BadRecordsError, TokenizerError

# --- the Hub -----------------------------------------------------------------------------------


_LOAD = """
import sys
from nanothink.data import hub
from nanothink.data.tokenizer import load_tokenizer
from nanothink.errors import TokenizerError
hub._ANSWER_SECONDS = 0.5
try: print(load_tokenizer(sys.argv[1]).fingerprint)
except TokenizerError as error: print(type(error).__name__, error)
print(hub.availability(sys.argv[1]))
"""


def _load_in_a_process(name: str, home: Path, **environment: str) -> subprocess.Popen[str]:
    """``load_tokenizer`` and ``availability``; a new process, since the Hub's settings are read once."""
    outside = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")}
    return subprocess.Popen(
        [sys.executable, "-c", _LOAD, name],
        env=outside | {"HF_HOME": str(home), "no_proxy": "127.0.0.1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_offline_is_found_out_quickly(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = server.getsockname()[1]
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts and never answers
        cases: list[tuple[dict[str, str], str]] = [
            ({"HF_HUB_OFFLINE": "1"}, "offline mode is enabled"),
            ({"HF_ENDPOINT": f"http://127.0.0.1:{closed}"}, "refused"),
            ({"HF_ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}"}, "timed out"),
        ]
        started = [_load_in_a_process("no-such-tokenizer", tmp_path, **extra) for extra, _ in cases]
        told = [process.communicate(timeout=60)[0].splitlines() for process in started]
    for (error, where), (_, reason) in zip(told, cases, strict=True):
        assert error.startswith("TokenizerUnreachableError Tokenizer 'no-such-tokenizer' is neither a local")
        assert reason in error
        assert where.startswith("neither cached nor reachable (")
        assert reason in where


def test_downloaded_once_then_from_the_cache(tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = save_tokenizer(tokenizer, tmp_path / "tokenizer")
    files = {path.name: path.read_bytes() for path in folder.iterdir()} | {"model.safetensors": b"x" * 1000}

    def load(name: str, endpoint: str) -> tuple[str, str, str]:
        process = _load_in_a_process(name, tmp_path / "hf", HF_ENDPOINT=endpoint)
        output, errors = process.communicate(timeout=60)
        told, where = output.splitlines()
        return told, where, errors

    with serving(files) as endpoint:
        first = load("me/mine", endpoint)
        unknown = load("me/other", endpoint)
    assert first == (tokenizer.fingerprint, "in the Hugging Face cache", "")  # no bars of somebody else's
    assert unknown[0].startswith("TokenizerError There is no tokenizer 'me/other'")
    assert unknown[1] == "not cached yet; the Hugging Face Hub answers"
    assert not list((tmp_path / "hf").rglob("model.safetensors"))
    assert load("me/mine", endpoint)[0] == tokenizer.fingerprint  # the server is gone
    assert load("me/other", endpoint)[0].startswith("TokenizerUnreachableError")


# --- the stand-in ------------------------------------------------------------------------------


NAME = "gpt2-is-not-here"  # gpt2 itself may lie in the cache of whoever runs the tests


@pytest.fixture
def corpus_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("nanothink.data.tokenizer.REPLACEABLE", NAME)
    for domain, word in (("a", "apple"), ("b", "banana")):
        write_domain(tmp_path / domain, [f"{word} number {i} is a {word} indeed. " * 3 for i in range(30)])
    return tmp_path


def test_offline_a_stand_in_is_trained_and_kept(corpus_root: Path) -> None:
    notes: list[str] = []
    told: list[str] = []
    one = resolve_tokenizer(
        NAME,
        find_corpus(corpus_root, ["a"]),
        split=SplitRule(0.1),
        reporter=Told(notes.append, lambda stage, *_: told.append(stage)),
    )
    stages = ("reading", "counting words", "merging")
    assert list(dict.fromkeys(told)) == ["validating", *(f"tokenizer: {stage}" for stage in stages)]
    assert len(notes) == 1
    assert "'gpt2-is-not-here' is neither cached nor reachable" in notes[0]
    assert len(one.encode(" banana")) == 1  # of the domain that was not selected
    folder = corpus_root / ".nanothink" / "tokenizer"
    assert load_tokenizer(str(folder)).fingerprint == one.fingerprint

    # From then on it is that one, for other domains and for a corpus that has changed.
    write_domain(corpus_root / "c", [f"cherry {i} " * 50 for i in range(50)])
    before = (folder / "tokenizer.json").stat().st_mtime_ns
    for name, domains in ((NAME, ["b"]), (NAME, None), (NAME, ["c"])):
        again = resolve_tokenizer(
            name, find_corpus(corpus_root, domains), split=SplitRule(0.05), reporter=Told(notes.append)
        )
        assert again.fingerprint == one.fingerprint
        assert str(folder) in notes[-1]
        assert not any("held out" in note for note in notes)
    for rule in (SplitRule(0.2), SplitRule(0.1, 0.1)):  # which may hold out text that it was trained on
        resolve_tokenizer(NAME, find_corpus(corpus_root), split=rule, reporter=Told(notes.append))
        assert "data.val_split=0.1 and data.test_split=0.0, so also on text that is held out" in notes[-1]
    assert (folder / "tokenizer.json").stat().st_mtime_ns == before


def test_only_the_default_is_ever_replaced(corpus_root: Path) -> None:
    with pytest.raises(TokenizerError, match="tokenzer"):
        resolve_tokenizer("tokenzer", find_corpus(corpus_root), split=SplitRule(0.1))
    assert not (corpus_root / ".nanothink" / "tokenizer").exists()


def test_a_refused_corpus_leaves_no_stand_in(corpus_root: Path) -> None:
    with (corpus_root / "a" / "broken.jsonl").open("w") as file:
        file.write('{"text": ""}\n')
    corpus, notes = find_corpus(corpus_root), list[str]()
    with pytest.raises(BadRecordsError, match=r"broken\.jsonl:1"):
        resolve_tokenizer(NAME, corpus, split=SplitRule(0.1), reporter=Told(notes.append))
    assert not (corpus_root / ".nanothink" / "tokenizer").exists()
    assert resolve_tokenizer(
        NAME, corpus, split=SplitRule(0.1), skip_bad_records=True, reporter=Told(notes.append)
    )


def test_a_damaged_stand_in_is_trained_again(corpus_root: Path) -> None:
    notes: list[str] = []
    corpus = find_corpus(corpus_root)
    one = resolve_tokenizer(NAME, corpus, split=SplitRule(0.1), reporter=Told(notes.append))
    (corpus_root / ".nanothink" / "tokenizer" / "tokenizer.json").write_text("{")
    again = resolve_tokenizer(NAME, corpus, split=SplitRule(0.1), reporter=Told(notes.append))
    assert again.fingerprint == one.fingerprint
    assert any("damaged" in note for note in notes)


def test_paths_are_never_replaced_by_a_stand_in(corpus_root: Path, tokenizer: Tokenizer) -> None:
    corpus = find_corpus(corpus_root)
    notes: list[str] = []
    with pytest.raises(TokenizerError, match="no tokenizer at"):
        resolve_tokenizer("./typo", corpus, split=SplitRule(0.1), reporter=Told(notes.append))
    folder = save_tokenizer(tokenizer, corpus_root / "kept")
    assert (
        resolve_tokenizer(str(folder), corpus, split=SplitRule(0.1), reporter=Told(notes.append)).fingerprint
        == tokenizer.fingerprint
    )
    assert notes == []
    assert not (corpus_root / ".nanothink" / "tokenizer").exists()


def test_a_data_root_that_cannot_be_written_to(corpus_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(corpus_root / ".nanothink", ignore_errors=True)
    (corpus_root / ".nanothink").write_text("in the way")
    cache = corpus_root.parent / f"{corpus_root.name}-cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    notes: list[str] = []
    corpus = find_corpus(corpus_root)
    one = resolve_tokenizer(NAME, corpus, split=SplitRule(0.1), reporter=Told(notes.append))
    assert str(cache) in notes[-1]
    again = resolve_tokenizer(NAME, corpus, split=SplitRule(0.1), reporter=Told(notes.append))
    assert again.fingerprint == one.fingerprint
    assert (corpus_root / ".nanothink").read_text() == "in the way"
