"""``generate``: prompts from anywhere, the same text for a seed, and the Python interface."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_run import Said, as_json

import nanothink
from nanothink.cli.app import run


def test_a_text_that_ends_at_once_is_no_riddle(
    pretrain: Callable[..., int], tmp_path: Path, said: Said
) -> None:
    (tmp_path / "data" / "letters").mkdir(parents=True)
    lines = "".join(json.dumps({"text": letter}) + "\n" for letter in "abcdefghij" * 20)
    (tmp_path / "data" / "letters" / "a.jsonl").write_text(lines)
    fast = ("--max-steps", "60", "--set", "train_expert.lr=0.003")
    assert pretrain(tmp_path, *fast, data=tmp_path / "data") == 0
    letters = list("abcdefghij")
    texts = nanothink.load(tmp_path / "transformer_expert.pt").generate(
        letters, temperature=0.0, max_new_tokens=2
    )
    ended = letters[texts.index("")]  # of the nine or so that it has read
    command = ["generate", ended, "-n", "2", "-t", "0", "--checkpoint-dir", str(tmp_path)]
    said()
    assert run(command) == 0
    printed, spoken = said()
    assert printed == f"{ended}\n"
    assert "--ignore-eos" in spoken
    assert run([*command, "--ignore-eos"]) == 0
    printed, spoken = said()
    assert printed != f"{ended}\n"
    assert "--ignore-eos" not in spoken


@pytest.fixture
def piped(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], None]:
    """Standard input holds these bytes from now on."""

    def pipe(given: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given), encoding="utf-8"))

    return pipe


def test_a_prompt_from_standard_input_is_taken_byte_for_byte(
    trained: Path, piped: Callable[[bytes], None], said: Said
) -> None:
    for mark in (b"", b"\xef\xbb\xbf"):  # a byte-order mark is no part of the text
        piped(mark + b"erste Zeile\r\nzweite\r\n")
        assert run(["generate", "-", "-n", "1", "--checkpoint-dir", str(trained), "--json"]) == 0
        assert as_json(said)["samples"][0]["prompt"] == "erste Zeile\r\nzweite\r\n"


def test_a_prompt_that_is_not_utf8_is_one_error(
    trained: Path, piped: Callable[[bytes], None], said: Said
) -> None:
    piped("café".encode("latin-1"))
    for prompt, where in (("-", "Standard input"), ("caf\udce9", "The prompt")):
        assert run(["generate", prompt, "-n", "1", "--checkpoint-dir", str(trained)]) == 2
        printed, spoken = said()
        assert printed == ""
        assert f"{where} is not UTF-8 at byte 4" in spoken


def test_generation_repeats_by_seed_and_works_anywhere(
    trained: Path, said: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command = [
        "generate",
        "time light",
        "-c",
        str(trained / "transformer_expert.pt"),
        "-n",
        "50",
        "--ignore-eos",
    ]
    texts = set()
    for _ in range(2):
        assert run([*command, "--seed", "3"]) == 0
        texts.add(said()[0])
    assert len(texts) == 1
    assert texts.pop().startswith("time light")  # 50 tokens reach past the context of 32
    assert run([*command, "--seed", "4", "moon", "--json"]) == 0
    samples = as_json(said)["samples"]
    assert [s["prompt"] for s in samples] == ["time light", "moon"]
    assert all(s["text"] for s in samples)


@pytest.mark.parametrize(
    "bad", [["--temperature", "-1"], ["--top-p", "2"], ["--top-k", "-3"], ["-n", "0"], ["--seed", "-1"]]
)
def test_a_bad_sampling_value_is_wrong_usage(bad: list[str], trained: Path, said: Said) -> None:
    assert run(["generate", "x", "--checkpoint-dir", str(trained), *bad]) == 2
    output, errors = said()
    assert output == ""
    assert errors.startswith("error: ")


def test_the_python_interface(trained: Path) -> None:
    loaded = nanothink.load(trained / "transformer_expert.pt")
    assert loaded.kind == "transformer"
    assert loaded.config.model.d_model == 32
    tokens = torch.tensor([loaded.tokenizer.encode("time light stone")])
    logits = loaded.logits(tokens)
    assert logits.shape == (1, tokens.shape[1], loaded.tokenizer.vocab_size)
    assert logits.dtype is torch.float32
    one = loaded.generate("moon", max_new_tokens=5, seed=1)
    assert loaded.generate(["moon"], max_new_tokens=5, seed=1) == [one]
