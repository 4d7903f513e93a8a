"""Checkpoints from a stranger, through the commands: refused in a sentence, whatever they ask for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanothink.cli.app import run

SMALL = [
    *("--set", "model.d_model=16", "--set", "model.max_seq_len=16", "--set", "transformer.n_layers=1"),
    *("--set", "transformer.n_heads=2", "--set", "train_expert.batch_size=2"),
    *("--set", "train_expert.amp_dtype=float32", "--set", "train_expert.sample_tokens=0"),
    *("--set", "train_expert.eval_max_tokens=64"),
]


@pytest.fixture(scope="module")
def good(tiny_corpus: Path, tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What is in a checkpoint after two steps."""
    folder = tmp_path_factory.mktemp("good")
    where = ("--data-dir", tiny_corpus, "--tokenizer", tiny_tokenizer, "--checkpoint-dir", folder)
    assert run(["pretrain", "transformer", *map(str, where), *SMALL, "--max-steps", "2"]) == 0
    payload: dict[str, Any] = torch.load(folder / "transformer_expert.pt", weights_only=True)
    return payload


Said = Callable[[], str]


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Said:
    return lambda: "".join(capsys.readouterr())


def changed(value: Any, place: tuple[Any, ...], new: Any) -> Any:
    """A copy of nested dicts and lists with the value at ``place`` replaced."""
    if not place:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[place[0]] = changed(copy[place[0]] if len(place) > 1 else None, place[1:], new)
    return copy


def tokenizer_with(payload: dict[str, Any], **parts: Any) -> dict[str, Any]:
    state = json.loads(payload["tokenizer"]["tokenizer_json"])
    for name, value in parts.items():
        place = tuple(name.split("__"))
        state = changed(state, place, value)
    return changed(payload, ("tokenizer", "tokenizer_json"), json.dumps(state))


DOUBLING = [{"type": "Replace", "pattern": {"String": "l"}, "content": "ll"}] * 40
ABSURD: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "a width of a billion": (lambda p: changed(p, ("config", "model", "d_model"), 10**9), "model.d_model"),
    "the largest width there is": (
        lambda p: changed(p, ("config", "model", "d_model"), 16384),
        "hardly anything in it fits",
    ),
    "the largest of everything": (
        lambda p: changed(
            changed(p, ("config", "model"), {"d_model": 16384, "max_seq_len": 1 << 20}),
            ("config", "transformer"),
            {"n_layers": 256, "n_heads": 1, "ffn_mult": 64.0},
        ),
        "hardly anything in it fits",
    ),
    "more layers than weights": (
        lambda p: changed(p, ("config", "transformer", "n_layers"), 256),
        "hardly anything in it fits",
    ),
    "another class": (lambda p: changed(p, ("kind",), "os.system"), "no model called"),
    "settings that are no sections": (lambda p: changed(p, ("config", "model"), 5), "not made of sections"),
    "a combined model without experts": (lambda p: changed(p, ("kind",), "nanothink_mla"), "makes no sense"),
    "a combined model of strings": (
        lambda p: changed(changed(p, ("kind",), "nanothink_mla"), ("run", "experts"), ["x"] * 3),
        "makes no sense",
    ),
    "an id beyond all": (lambda p: tokenizer_with(p, model__vocab__zzz=2**32 - 1), "id of a token"),
    "an id far beyond the vocabulary": (lambda p: tokenizer_with(p, model__vocab__zzz=10**7), "and only"),
    "two tokens of one id": (lambda p: tokenizer_with(p, model__vocab__zzz=5), "same id"),
    "a text that doubles forty times": (
        lambda p: tokenizer_with(p, normalizer={"type": "Sequence", "normalizers": DOUBLING}),
        "times as long",
    ),
    "a decoder that doubles forty times": (
        lambda p: tokenizer_with(p, decoder={"type": "Sequence", "decoders": DOUBLING}),
        "times as long",
    ),
    "a table of 8 GB in eleven bytes": (
        lambda p: tokenizer_with(
            p, normalizer={"type": "Precompiled", "precompiled_charsmap": "/////wAAAAAAAAA="}
        ),
        "shorter than it says",
    ),
    "a table that makes the library panic": (
        lambda p: tokenizer_with(
            p, normalizer={"type": "Precompiled", "precompiled_charsmap": "BAAAAP////8AAAAA"}
        ),
        "is not a tokenizer",
    ),
    "a tokenizer nested a hundred thousand deep": (
        lambda p: changed(p, ("tokenizer", "tokenizer_json"), "[" * 100_000),
        "not JSON",
    ),
    "a tokenizer that names a file": (
        lambda p: changed(p, ("tokenizer", "tokenizer_json"), "/etc/passwd"),
        "not JSON",
    ),
    "an end of text of ten megabytes": (
        lambda p: changed(p, ("tokenizer", "eos_token"), "x" * 10**7),
        "too long",
    ),
    "weights that are no numbers": (
        lambda p: changed(
            p, ("model_state",), {k: torch.full_like(v, float("nan")) for k, v in p["model_state"].items()}
        ),
        "not finite",
    ),
}


@pytest.mark.parametrize("name", ABSURD)
def test_generating_from_it_is_refused(name: str, good: dict[str, Any], tmp_path: Path, said: Said) -> None:
    forge, reason = ABSURD[name]
    torch.save(forge(good), tmp_path / "a.pt")
    said()
    assert run(["generate", "hello", "-n", "2", "--checkpoint", str(tmp_path / "a.pt")]) in (1, 2)
    answer = said()
    assert reason in answer


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (None, "makes no sense"),
        ({"name": "x", "kind": "transformer"}, "makes no sense"),
        ({"name": "x", "kind": "transformer", "config": {}}, "hardly anything in it fits"),
        (
            {
                "name": "x",
                "kind": "transformer",
                "config": {"model": {"d_model": 16384}, "transformer": {"n_layers": 256, "n_heads": 1}},
            },
            "hardly anything in it fits",
        ),
    ],
)
def test_experts_that_are_not_inside(
    entry: Any, reason: str, good: dict[str, Any], tmp_path: Path, said: Said
) -> None:
    """Asked for by the commands that look for one of them alone."""
    torch.save(good, tmp_path / "transformer_expert.pt")
    forged = changed(good, ("kind",), "nanothink_mla")
    if entry is not None:
        forged = changed(forged, ("run", "experts"), [entry])
    path = str(tmp_path / "nanothink_mla.pt")
    torch.save(forged, path)
    said()
    assert run(["store", "info", "-c", path]) == 1
    assert reason in " ".join(said().split())
    if reason == "makes no sense":
        expert = ("--expert", str(tmp_path / "transformer_expert.pt"))
        own = ("--checkpoint-dir", str(tmp_path))
        assert run(["train-mla", "--resume", path, *expert, *own]) == 1
        assert reason in " ".join(said().split())


def test_memory_stays_where_it_was(good: dict[str, Any], tmp_path: Path) -> None:
    """All of them in one process that may take 4 GB of addresses; torch alone takes most of one."""
    paths = []
    for i, (forge, _) in enumerate(ABSURD.values()):
        paths.append(str(tmp_path / f"{i}.pt"))
        torch.save(forge(good), paths[-1])
    torch.save(good, tmp_path / "good.pt")
    child = f"""
import json, re, resource
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
from nanothink.cli.app import run
peak = lambda: int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read()).group(1)) >> 10
codes = [run(["generate", "hello", "-n", "2", "--checkpoint", {str(tmp_path / "good.pt")!r}])]
before = peak()
for path in {paths!r}:
    codes.append(run(["generate", "hello", "-n", "2", "--checkpoint", path]))
print("\\n" + json.dumps([codes, before, peak()]))
"""
    ended = subprocess.run(
        [sys.executable, "-c", child],
        capture_output=True,
        text=True,
        env={**os.environ, "RUST_BACKTRACE": "0"},
    )
    assert ended.returncode == 0, ended.stderr
    assert "Traceback" not in ended.stderr
    codes, before, after = json.loads(ended.stdout.splitlines()[-1])
    assert codes[0] == 0
    assert set(codes[1:]) <= {1, 2}
    assert after - before < 100, f"{before} MB, then {after} MB"


def places(value: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [place] if place else []
    if isinstance(value, dict) and len(place) < 5:
        for key in value:
            found += places(value[key], (*place, key))
    return found


ODD = [
    *(None, "", "[/red]\x1b[31m../../x", "\ud800", -5, True, 10**9, 10**30, float("nan"), float("inf")),
    *([], {}, [1, "a"], {"a": {"b": 1}}, torch.zeros(3), torch.tensor([])),
]


@settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_entry_may_be_anything(
    data: st.DataObject, good: dict[str, Any], tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Shown, listed, resumed: each either works or is refused, and nothing is raised."""
    top = data.draw(st.sampled_from(sorted(good)))
    inside = [(top, *place) for place in places(good[top])] if isinstance(good[top], dict) else []
    place = data.draw(st.sampled_from([(top,), *inside]))
    new = data.draw(st.sampled_from(range(len(ODD))))
    folder = tmp_path_factory.mktemp("odd")
    path = str(folder / "transformer_expert.pt")
    torch.save(changed(good, place, ODD[new]), path)
    own = ["--checkpoint-dir", str(folder)]
    for command in (
        ["checkpoints", "show", path],
        ["checkpoints", "show", path, "--json"],
        ["checkpoints", "ls", *own],
        [
            "pretrain",
            "transformer",
            "--resume",
            path,
            "--max-steps",
            "3",
            "--data-dir",
            str(tiny_corpus),
            *own,
        ],
    ):
        assert run(command) in (0, 1, 2)
