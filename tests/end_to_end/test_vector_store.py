"""The vector store as a person uses it: trained with, added to, asked, compacted, left out, lost, damaged."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import nanothink as package
from nanothink.checkpoints.file import read_checkpoint
from nanothink.cli.app import run
from nanothink.cli.render.progress import BarReporter
from nanothink.data.corpus import find_corpus
from nanothink.data.split import SplitRule
from nanothink.data.tokens import tokenise
from nanothink.errors import VectorStoreNotFoundError
from nanothink.models.nanothink import NanoThink
from nanothink.vector_store.building import held_out_texts
from nanothink.vector_store.contents import VectorStore
from nanothink.vector_store.manifest import read_manifest

STEM = "nanothink_mla"
WORDS = ["time", "light", "stone", "water", "letter", "garden", "river", "wind", "moon", "winter"]
TRAINING = {"batch_size": 4, "sample_tokens": 0, "amp_dtype": "float32", "warmup_steps": 3}
SHAPE = {
    **tiny.SHAPE,
    "mla.n_heads": 2,
    "mla.n_layers": 1,
    **{f"train_{phase}.{name}": value for phase in ("expert", "mla") for name, value in TRAINING.items()},
    "train_mla.fit": "full",
    "train_mla.grad_accum_steps": 1,
    "train_mla.eval_max_tokens": 300,
    "train_mla.eval_every_steps": 10,
    "vector_store.n_neighbours": 8,
}


def settings(**changed: Any) -> list[str]:
    values = SHAPE | {name.replace("__", "."): value for name, value in changed.items()}
    return [part for name, value in values.items() for part in ("--set", f"{name}={value}")]


@pytest.fixture(scope="module")
def corpus(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny corpus, and a domain that is in no training: chants, whose sentences come again and again."""
    folder = tmp_path_factory.mktemp("remembered") / "corpus"
    shutil.copytree(tiny_corpus, folder)
    rng = random.Random(7)
    lines = [" ".join(rng.choice(WORDS) for _ in range(9)) + "." for _ in range(6)]
    (folder / "chants").mkdir()
    texts = [" ".join(rng.choice(lines) for _ in range(8)) + f" {i}." for i in range(30)]
    (folder / "chants" / "texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return folder


@pytest.fixture(scope="module")
def typed(
    corpus: Path, tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., list[str]]:
    """What to type to train NanoThink into a folder, with a memory."""
    experts = tmp_path_factory.mktemp("experts")
    where = ["--data-dir", str(corpus), "--domains", "letters,manuals", "--max-steps", "30"]
    for kind in ("transformer", "state_space"):
        told = ["--checkpoint-dir", str(experts), "--tokenizer", str(tiny_tokenizer), *settings()]
        assert run(["pretrain", kind, *where, *told]) == 0
    named = [
        part for e in ("transformer", "state_space") for part in ("--expert", str(experts / f"{e}_expert.pt"))
    ]

    def command(folder: Path, *more: str | Path, **changed: Any) -> list[str]:
        told = ["--checkpoint-dir", str(folder), *named, *settings(**changed)]
        return ["train-mla", "--use-vector-store", *where, *told, *map(str, more)]

    return command


@pytest.fixture(scope="module")
def trained(typed: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run. Read only."""
    folder = tmp_path_factory.mktemp("nanothink")
    assert run(typed(folder)) == 0
    return folder


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "copy"
    shutil.copytree(trained, folder)
    return folder


def bits(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    capsys.readouterr()
    assert run(["eval", *map(str, arguments), "--json"]) == 0
    (scored,) = json.loads(capsys.readouterr().out)["checkpoints"]
    return scored


def store_of(folder: Path) -> VectorStore:
    model = package.load(folder / f"{STEM}.pt").model
    assert isinstance(model, NanoThink)
    assert isinstance(model.vector_store, VectorStore)
    return model.vector_store


def test_it_is_built_says_its_cost_and_holds_no_validation_text(
    typed: Callable[..., list[str]], tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert run(typed(tmp_path)) == 0
    opened = map(os.path.realpath, Path("/proc/self/fd").iterdir())
    assert not [path for path in opened if "neighbours-" in path and path.startswith(str(tmp_path))]
    said = capsys.readouterr().err
    assert "Building the vector store" in said
    assert "of memory and" in said
    assert "neighbours of" in said
    assert said.index("That takes about") < said.index("step 1/30")
    store = store_of(tmp_path)
    loaded = package.load(tmp_path / f"{STEM}.pt")
    tokens = tokenise(find_corpus(corpus, ("letters", "manuals")), loaded.tokenizer, split=SplitRule(0.1))
    assert store.index.n_keys == sum(stream.n_tokens for stream in tokens.train.values())
    assert (store.documents_of(held_out_texts(tokens)) == -1).all()
    lines = [
        json.loads(line) for line in (tmp_path / "runs" / STEM / "metrics.jsonl").read_text().splitlines()
    ]
    weights = [line["weight_vector_store"] for line in lines if line["event"] == "train"]
    assert all(0 < weight < 1 for weight in weights)
    (step_10,) = [line for line in lines if line["event"] == "validation" and line["step"] == 10]
    assert set(step_10["routing"]["letters"]["weights"]) == {"transformer", "state_space", "vector_store"}


def test_interrupted_it_goes_on_to_the_same_bits(
    typed: Callable[..., list[str]], trained: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "nanothink", *typed(tmp_path)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("step 10/"):
                process.send_signal(signal.SIGINT)
                break
        process.stderr.read()
        assert process.wait(120) == 130
    generation = read_manifest(tmp_path / f"{STEM}.store")["generation"]
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / f"{STEM}.store").glob("neighbours-*/*")}
    assert kept
    time.sleep(0.01)
    assert run(["resume", "--checkpoint-dir", str(tmp_path)]) == 0
    assert read_manifest(tmp_path / f"{STEM}.store")["generation"] == generation
    assert {p: p.stat().st_mtime_ns for p in kept} == kept  # nothing was searched again
    one, other = (read_checkpoint(f / f"{STEM}.pt")["model_state"] for f in (trained, tmp_path))
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    assert {n for n in one if n.startswith("store_gate.")} != set()


def test_a_domain_is_learnt_without_training(
    copied: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copied / f"{STEM}.pt"
    on_chants = [path, "--data-dir", corpus, "--domains", "chants"]
    before = bits(capsys, *on_chants)
    alone = bits(capsys, *on_chants, "--no-vector-store")
    weights = path.read_bytes()
    told = ["--domains", "chants", "--checkpoint-dir", str(copied)]
    assert run(["store", "add", str(corpus), *told, "--dry-run", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert run(["store", "add", str(corpus), *told, "--json"]) == 0
    out, said = capsys.readouterr()
    assert "Adding to the vector store" in said
    added = json.loads(out)
    assert added["keys_by_domain"]["chants"] == planned["n_new_keys"] > 0
    assert path.read_bytes() == weights
    after = bits(capsys, *on_chants)
    assert after["overall"]["bits_per_byte"] < 0.9 * before["overall"]["bits_per_byte"]
    assert after["overall"]["bits_per_byte"] < 0.9 * alone["overall"]["bits_per_byte"]
    assert set(after["routing"]["chants"]["weights"]) == {"transformer", "state_space", "vector_store"}
    assert set(alone["routing"]["chants"]["weights"]) == {"transformer", "state_space"}
    assert run(["store", "add", str(corpus), *told]) == 1  # all of it is known now
    assert "nothing new to put in" in capsys.readouterr().err
    # What is in the memory is not scored unasked.
    assert run(["eval", *map(str, on_chants), "--split", "train"]) == 1
    assert "in the vector store of" in capsys.readouterr().err


def test_it_is_looked_at_and_asked(trained: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--checkpoint-dir", str(trained)]
    capsys.readouterr()
    assert run(["store", "info", *where, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["owner"]["kind"] == "state_space"
    assert sum(facts["keys_by_domain"].values()) == facts["n_keys"] == facts["n_tokens"]
    assert run(["store", "info", *where]) == 0
    assert "bytes a key" in capsys.readouterr().out
    store = store_of(trained)
    number = int(store.contents.documents["end"][0]) + 20  # inside the second document
    prompt = package.load(trained / f"{STEM}.pt").tokenizer.decode(store.passage(number, 20))
    assert run(["store", "search", prompt, "-k", "5", *where, "--json"]) == 0
    hits = json.loads(capsys.readouterr().out)["found"]
    assert len(hits) == 5
    assert sum(one["weight"] for one in hits) == pytest.approx(1, abs=1e-5)
    for one in hits:
        path, _, line = one["source"].rpartition(":")
        text = json.loads((corpus / path).read_text().splitlines()[int(line) - 1])["text"]
        assert one["before"] in text
    assert run(["store", "search", prompt, *where]) == 0
    assert "texts.jsonl:" in capsys.readouterr().out
    assert run(["store", "search", "", *where]) == 2


def test_its_share_is_shown_token_by_token(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = trained / f"{STEM}.pt"
    told = [
        "generate",
        "time light",
        "-c",
        str(path),
        "-n",
        "12",
        "--seed",
        "3",
        "--ignore-eos",
        "--show-routing",
    ]
    capsys.readouterr()
    assert run([*told, "--json"]) == 0
    (sample,) = json.loads(capsys.readouterr().out)["samples"]
    model = package.load(path)
    x = torch.tensor([[*model.tokenizer.encode("time light"), *(t["token"] for t in sample["tokens"])]])
    first = len(model.tokenizer.encode("time light"))
    routing = model.routing(x)[0, first - 1 :]
    assert model.model.components == ("transformer", "state_space", "vector_store")
    differences = [
        abs(mine - other)
        for token, weights in zip(sample["tokens"], routing, strict=False)
        for mine, other in zip(token["weights"].values(), weights.tolist(), strict=True)
    ]
    told_of = torch.tensor([list(token["weights"].values()) for token in sample["tokens"]])
    routers = [model.model.router_weights(trust) for trust in (told_of, routing[: len(told_of)])]  # type: ignore[operator]
    torch.testing.assert_close(
        routers[0], routers[1], rtol=0, atol=1e-4
    )  # the experts' shares among themselves
    # of the store: of more equally near neighbours than are asked for, rounding decides which are taken, and
    # the gate sees how far they agree
    assert sorted(differences)[len(differences) // 2] < 1e-4
    assert run(told) == 0
    assert capsys.readouterr().out.splitlines()[0].split("\t") == [
        "token",
        "expert",
        "transformer",
        "state_space",
        "vector_store",
    ]
    assert run([*told, "--no-vector-store"]) == 0
    assert "vector_store" not in capsys.readouterr().out.splitlines()[0]


def test_without_it_the_model_says_so_and_works_when_told_to(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copied / f"{STEM}.pt"
    shutil.rmtree(copied / f"{STEM}.store")
    capsys.readouterr()
    for command in (["generate", "x", "-n", "3", "-c", str(path)], ["eval", str(path)]):
        assert run(command) == 1
        said = capsys.readouterr().err
        assert "trained with a vector store" in said
        assert f"nanothink store build -c {path}" in said
        assert "--no-vector-store" in said
        assert run([*command, "--no-vector-store"]) == 0
    with pytest.raises(VectorStoreNotFoundError):
        package.load(path)
    assert package.load(path, vector_store=False).generate("x", max_new_tokens=3) is not None
    capsys.readouterr()
    assert run(["store", "build", "--checkpoint-dir", str(copied), "--dry-run"]) == 0
    assert not (copied / f"{STEM}.store").exists()
    assert run(["store", "build", "--checkpoint-dir", str(copied)]) == 0
    assert run(["store", "build", "--checkpoint-dir", str(copied)]) == 2
    assert run(["generate", "x", "-n", "3", "-c", str(path)]) == 0


def test_one_of_another_model_is_refused(
    copied: Path, typed: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    assert run(typed(other, "--set", "vector_store.expert=transformer")) == 0
    shutil.rmtree(copied / f"{STEM}.store")
    shutil.copytree(other / f"{STEM}.store", copied / f"{STEM}.store")
    capsys.readouterr()
    assert run(["eval", str(copied / f"{STEM}.pt")]) == 1
    assert "belongs to another model" in capsys.readouterr().err
    assert run(typed(copied, "--overwrite")) == 0  # a new run with --overwrite replaces it
    assert "built again" in capsys.readouterr().err


def test_a_damaged_one_is_named(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = next((copied / f"{STEM}.store").glob("index-*"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    capsys.readouterr()
    for command in (
        ["store", "info", "--checkpoint-dir", str(copied)],
        ["eval", str(copied / f"{STEM}.pt")],
    ):
        assert run(command) == 1
        assert path.name in capsys.readouterr().err


def test_it_is_made_smaller(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--checkpoint-dir", str(copied)]
    capsys.readouterr()
    assert run(["store", "compact", "--similarity", "0.9", "--max-tokens", "500", *where, "--json"]) == 0
    done = json.loads(capsys.readouterr().out)
    assert done["after"]["n_keys"] == done["before"]["n_keys"] - done["after"]["n_merged"]
    assert done["after"]["n_merged"] > 0
    assert done["bits_per_byte"]["after"] == pytest.approx(done["bits_per_byte"]["before"], rel=0.1)
    # with the documents that the joint gate was fitted on, which compacting scores too
    scored = bits(capsys, copied / f"{STEM}.pt", "--max-tokens", "500", "--allow-seen")
    assert scored["overall"]["bits_per_byte"] == pytest.approx(done["bits_per_byte"]["after"], abs=1e-6)
    assert run(["store", "compact", "--max-tokens", "500", *where]) == 0
    assert "bits per byte, all" in capsys.readouterr().out


def test_what_compacting_is_at_is_told(
    copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told: dict[str, list[tuple[int, int]]] = {}
    heard = lambda self, label, *at: told.setdefault(label, []).append(at)  # noqa: E731
    monkeypatch.setattr(BarReporter, "progress", heard)
    assert run(["store", "compact", "--max-tokens", "500", "--checkpoint-dir", str(copied)]) == 0
    changing = ("comparing keys", "writing", "checksums")
    stages = ("evaluating before", *(f"vector store: {step}" for step in changing), "evaluating after")
    assert [label for label in told if label in stages] == list(stages)
    # Opened to be compacted, for the score before, again when it is written, and for the score after.
    verified = told["vector store: verifying"]
    assert sum(done == total for done, total in verified) == 4
    done, total = told["vector store: checksums"][-1]
    files = (p for p in (copied / f"{STEM}.store").glob("*-*.*") if p.is_file())
    assert done == total == sum(p.stat().st_size for p in files)


def test_without_faiss_everything_else_works(
    trained: Path,
    typed: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    path = str(trained / f"{STEM}.pt")
    assert run(["generate", "x", "-n", "3", "-c", path, "--no-vector-store"]) == 0
    assert run(["eval", path, "--no-vector-store"]) == 0
    assert run([part for part in typed(tmp_path) if part != "--use-vector-store"]) == 0
    assert run(["generate", "x", "-n", "3", "-c", str(tmp_path / f"{STEM}.pt")]) == 0
    capsys.readouterr()
    for command in (["eval", path], typed(tmp_path / "new"), ["store", "info", "-c", path]):
        assert run(command) == 2
        assert "pip install faiss-cpu" in capsys.readouterr().err


def test_the_text_that_is_validated_on_is_not_in_it(copied: Path, typed: Callable[..., list[str]]) -> None:
    """Also where another split of the same text would hold out what is in it."""
    told = ["--overwrite", "--set", "data.val_split=0.4"]
    assert run(typed(copied, *told)) == 0
    loaded = package.load(copied / f"{STEM}.pt")
    assert len(loaded.split.held_out.val)
    assert loaded.trained_text.holds(loaded.split.held_out.val).sum() == 0


def test_a_model_without_one_is_trained_on_with_one(
    typed: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([part for part in typed(tmp_path) if part != "--use-vector-store"]) == 0
    path = str(tmp_path / f"{STEM}.pt")
    before = set(read_checkpoint(Path(path))["model_state"])
    capsys.readouterr()
    assert run(["store", "build", "-c", path]) == 1
    said = capsys.readouterr().err
    suggested = re.search(r"`nanothink (resume \S+ --set vector_store.enabled=true .+?)`", said)
    assert suggested
    assert run(suggested[1].split()) == 0
    after = set(read_checkpoint(Path(path))["model_state"])
    assert {name.partition(".")[0] for name in after - before} == {"store_gate", "joint_gate"}
    model = package.load(path).model
    assert isinstance(model, NanoThink)
    assert model.components[-1] == "vector_store"
