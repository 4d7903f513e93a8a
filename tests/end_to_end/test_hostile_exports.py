"""Exports from a stranger: each is refused in one sentence, and none fills the memory."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import nanothink
from nanothink.cli.app import run
from nanothink.errors import NanoThinkError

SMALL = [
    *("--set", "model.d_model=16", "--set", "model.max_seq_len=16", "--set", "transformer.n_layers=1"),
    *("--set", "transformer.n_heads=2", "--set", "train_expert.batch_size=2"),
    *("--set", "train_expert.amp_dtype=float32", "--set", "train_expert.sample_tokens=0"),
    *("--set", "train_expert.eval_max_tokens=64"),
]


@pytest.fixture(scope="module")
def good(tiny_corpus: Path, tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of a model after two steps."""
    folder = tmp_path_factory.mktemp("good")
    where = ("--data-dir", tiny_corpus, "--tokenizer", tiny_tokenizer, "--checkpoint-dir", folder)
    assert run(["pretrain", "transformer", *map(str, where), *SMALL, "--max-steps", "2"]) == 0
    out = folder / "export"
    assert run(["checkpoints", "export", str(folder / "transformer_expert.pt"), "--to", str(out)]) == 0
    return out


def changed(value: Any, place: tuple[Any, ...], new: Any) -> Any:
    """A copy of nested dicts and lists with the value at ``place`` replaced."""
    if not place:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[place[0]] = changed(copy[place[0]] if len(place) > 1 else None, place[1:], new)
    return copy


Forge = Callable[[Path], object]


def replaced(name: str, *changes: tuple[str, Any]) -> Forge:
    """Change values of a JSON file; a place is written with dots."""

    def forge(export: Path) -> None:
        content = json.loads((export / name).read_text())
        for place, new in changes:
            content = changed(content, tuple(place.split(".")), new)
        (export / name).write_text(json.dumps(content))

    return forge


def settings(*changes: tuple[str, Any]) -> Forge:
    return replaced("config.json", *((f"nanothink.{place}", new) for place, new in changes))


def tokenizer(*changes: tuple[str, Any]) -> Forge:
    return replaced("tokenizer.json", *changes)


def spoil_weights(export: Path) -> None:
    weights = load_file(export / "model.safetensors")
    spoilt = {name: torch.full_like(tensor, float("nan")) for name, tensor in weights.items()}
    save_file(spoilt, export / "model.safetensors", {"format": "pt"})


def deeply_nested(export: Path) -> None:
    (export / "tokenizer.json").write_text("[" * 100_000)


LARGEST = {"n_layers": 256, "n_heads": 1, "ffn_mult": 64.0}
DOUBLING = [{"type": "Replace", "pattern": {"String": "l"}, "content": "ll"}] * 40
HOSTILE: dict[str, tuple[Forge, str]] = {
    "a width of a billion": (settings(("config.model.d_model", 10**9)), "model.d_model"),
    "the largest width": (settings(("config.model.d_model", 16384)), "hardly anything in it fits"),
    "the largest of everything": (
        settings(
            ("config.model", {"d_model": 16384, "max_seq_len": 1 << 20}), ("config.transformer", LARGEST)
        ),
        "hardly anything in it fits",
    ),
    "more layers than weights": (
        settings(("config.transformer.n_layers", 256)),
        "hardly anything in it fits",
    ),
    "another class": (settings(("kind", "os.system")), "no model called"),
    "settings that are no sections": (settings(("config.model", 5)), "does not describe a model"),
    "a combined model without experts": (settings(("kind", "nanothink_mla")), "makes no sense"),
    "a combined model of strings": (
        settings(("kind", "nanothink_mla"), ("experts", ["x"] * 3)),
        "does not describe a model",
    ),
    "a token id of 32 bits": (tokenizer(("model.vocab.zzz", 2**32 - 1)), "id of a token"),
    "a token id far beyond the vocabulary": (tokenizer(("model.vocab.zzz", 10**7)), "and only"),
    "two tokens of one id": (tokenizer(("model.vocab.zzz", 5)), "same id"),
    "a normalizer that doubles a text forty times": (
        tokenizer(("normalizer", {"type": "Sequence", "normalizers": DOUBLING})),
        "times as long",
    ),
    "a decoder that doubles a text forty times": (
        tokenizer(("decoder", {"type": "Sequence", "decoders": DOUBLING})),
        "times as long",
    ),
    "a table of 8 GB in eleven bytes": (
        tokenizer(("normalizer", {"type": "Precompiled", "precompiled_charsmap": "/////wAAAAAAAAA="})),
        "shorter than it says",
    ),
    "a table that makes the library panic": (
        tokenizer(("normalizer", {"type": "Precompiled", "precompiled_charsmap": "BAAAAP////8AAAAA"})),
        "is not a tokenizer",
    ),
    "a tokenizer nested a hundred thousand deep": (
        deeply_nested,
        "not JSON",
    ),
    "an end of text of ten megabytes": (
        replaced("tokenizer_config.json", ("eos_token", "x" * 10**7)),
        "too long",
    ),
    "weights that are not finite": (spoil_weights, "not finite"),
}


def test_hostile_exports_are_refused_within_the_memory_of_a_good_one(good: Path, tmp_path: Path) -> None:
    """All of them in one process with 4 GB of addresses, of which torch alone takes most of one."""
    paths = []
    for i, (forge, _) in enumerate(HOSTILE.values()):
        paths.append(str(shutil.copytree(good, tmp_path / f"export{i}")))
        forge(Path(paths[-1]))
    child = f"""
import contextlib, io, json, re, resource
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
from nanothink.cli.app import run
def peak():
    return int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read()).group(1)) >> 10
def generate(path):
    with contextlib.redirect_stderr(io.StringIO()) as said:
        return run(["generate", "hello", "-n", "2", "--checkpoint", path]), said.getvalue()
code, said = generate({str(good)!r})
assert code == 0, said
before = peak()
answers = [generate(path) for path in {paths!r}]
print("\\n" + json.dumps([answers, before, peak()]))
"""
    ended = subprocess.run(
        [sys.executable, "-c", child],
        capture_output=True,
        text=True,
        env={**os.environ, "RUST_BACKTRACE": "0"},
    )
    assert ended.returncode == 0, ended.stderr
    answers, before, after = json.loads(ended.stdout.splitlines()[-1])
    accepted = [
        f"{name}: exit code {code}, {said[:300]!r}"
        for (name, (_, reason)), (code, said) in zip(HOSTILE.items(), answers, strict=True)
        if code not in (1, 2) or reason not in " ".join(said.split()) or "Traceback" in said
    ]
    assert not accepted, "\n".join(accepted)
    assert after - before < 100, f"{before} MB, then {after} MB"


def places(value: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [place] if place else []
    if isinstance(value, dict):
        for key in value:
            found += places(value[key], (*place, key))
    return found


ODD = [
    *(None, "", "[/red]\x1b[31m../../x", "\ud800", -5, True, 10**9, 10**30, float("nan"), float("inf")),
    *([], {}, [1, "a"], {"a": {"b": 1}}),
]


def test_an_export_with_any_value_in_any_place_opens_or_is_refused(good: Path, tmp_path: Path) -> None:
    export = shutil.copytree(good, tmp_path / "export")
    written = json.loads((export / "config.json").read_text())
    chance, raised = random.Random(0), []
    for _ in range(60):
        place, new = chance.choice(places(written)), chance.choice(ODD)
        (export / "config.json").write_text(json.dumps(changed(written, place, new)))
        try:
            nanothink.load(export)
        except NanoThinkError:
            pass
        except Exception as error:
            raised.append(f"{place} = {new!r}: {error!r}")
    assert not raised, "\n".join(raised)
