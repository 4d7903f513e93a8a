"""Held out means held out: what any part of a model was trained on is never scored as held-out text."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import made_up_texts, write_domain
from tiny import SHAPE

import nanothink as package
from nanothink.checkpoints import read_checkpoint
from nanothink.checkpoints.split_record import SplitRecord
from nanothink.cli.app import run
from nanothink.data.corpus import find_corpus
from nanothink.data.split import SplitRule, text_key
from nanothink.data.tokens import tokenise

SMALL = {
    **SHAPE,
    "mla.n_heads": 2,
    "mla.n_layers": 1,
    "diffuser.n_layers": 1,
    "diffuser.denoiser_layers": 1,
    "diffuser.training_steps": 8,
    "diffuser.inference_steps": 4,
    "vector_store.n_neighbours": 4,
    **{
        f"train_{phase}.{name}": value
        for phase in ("expert", "diffuser", "mla")
        for name, value in {"amp_dtype": "float32", "sample_tokens": 0, "batch_size": 4}.items()
    },
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Letters and manuals, which have a text in common, and a book of one text. Read only."""
    root = tmp_path_factory.mktemp("held-out") / "data"
    letters, manuals = made_up_texts(0, 40), made_up_texts(1, 20)
    (book,) = (" ".join(made_up_texts(2, 12)),)
    write_domain(root / "letters", [*letters, book])
    write_domain(root / "manuals", [*manuals, letters[3]])
    write_domain(root / "book", [book])
    return root


@pytest.fixture(scope="module")
def train(data: Path, tiny_tokenizer: Path) -> Callable[..., int]:
    def call(folder: Path, *words: str | Path, where: Path = data, **changed: Any) -> int:
        """``pretrain KIND``, or ``train-mla``, of 3 steps."""
        settings = [f"{name}={value}" for name, value in {**SMALL, **changed}.items()]
        told = [part for setting in settings for part in ("--set", setting)]
        known = ["--data-dir", where, "--checkpoint-dir", folder, "--max-steps", "3"]
        tokenizer = [] if words[0] == "train-mla" else ["--tokenizer", tiny_tokenizer]
        return run([str(part) for part in (*words, *known, *tokenizer, *told)])

    return call


def set_by_hand(**fractions: float) -> dict[str, float]:
    return {f"data.{name}": value for name, value in fractions.items()}


@pytest.fixture(scope="module")
def experts(train: Callable[..., int], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformer that holds out a hundredth, and a state-space model that holds out a fifth. Read only."""
    folder = tmp_path_factory.mktemp("experts")
    assert train(folder, "pretrain", "transformer", **set_by_hand(val_split=0.01)) == 0
    assert train(folder, "pretrain", "state_space", **set_by_hand(val_split=0.2)) == 0
    return folder


def named(experts: Path) -> list[str]:
    paths = (str(experts / f"{kind}_expert.pt") for kind in ("transformer", "state_space"))
    return [part for path in paths for part in ("--expert", path)]


def record_of(path: Path) -> SplitRecord:
    return SplitRecord.from_state(read_checkpoint(path)["split"], path)


def scored(capsys: pytest.CaptureFixture[str], *words: object) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert run(["eval", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)["checkpoints"]


def error_of(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    capsys.readouterr()
    assert run(list(map(str, words))) == 1
    return " ".join(capsys.readouterr().err.split())


def validated(folder: Path, stem: str) -> list[dict[str, Any]]:
    lines = (folder / "runs" / stem / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["event"] == "validation"]


def test_a_combined_model_holds_out_what_its_experts_held_out(
    experts: Path, train: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An expert that held out less than the others must not spoil the figure of what is built on it."""
    by_experts = [record_of(experts / f"{kind}_expert.pt") for kind in ("transformer", "state_space")]
    inherited, by_hand = tmp_path / "inherited", tmp_path / "by-hand"
    assert train(inherited, "train-mla", *named(experts)) == 0
    capsys.readouterr()
    assert train(by_hand, "train-mla", *named(experts), **set_by_hand(val_split=0.2)) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "documents that data.val_split=0.2 would hold out stay in training" in said
    for folder, fraction in ((inherited, 0.01), (by_hand, 0.2)):
        record = record_of(folder / "nanothink_mla.pt")
        assert record.rule == SplitRule(fraction)
        for part in by_experts:
            assert part.trained.holds(record.held_out.val).sum() == 0
            assert np.isin(part.trained.keys, record.trained.keys).all()
        during = min(validated(folder, "nanothink_mla"), key=lambda line: line["loss"])
        (after,) = scored(capsys, folder / "nanothink_mla.pt")
        assert after["overall"]["loss"] == pytest.approx(during["loss"], abs=1e-12)
        assert after["seen_documents"] == 0
    # Side by side, too, the text is what none of them was trained on.
    figures = scored(capsys, by_hand / "nanothink_mla.pt", *experts.glob("*.pt"))
    assert {figure["overall"]["bytes"] for figure in figures} == {after["overall"]["bytes"]}


def test_a_diffuser_inherits_the_split_of_its_transformer(
    experts: Path, train: Callable[..., int], tmp_path: Path
) -> None:
    transformer = experts / "transformer_expert.pt"
    assert train(tmp_path, "pretrain", "diffuser", "--transformer", transformer) == 0
    record, inherited = record_of(tmp_path / "diffuser_expert.pt"), record_of(transformer)
    assert record.rule == inherited.rule == SplitRule(0.01)
    assert np.array_equal(record.trained.keys, inherited.trained.keys)
    assert record.trained.heads == inherited.trained.heads


def test_a_resumed_run_never_validates_on_what_it_was_trained_on(
    experts: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(experts, folder)
    path = folder / "transformer_expert.pt"
    before, (first,) = record_of(path), validated(folder, "transformer_expert")
    more = ["--set", "data.val_split=0.5", "--max-steps", "5"]
    assert run(["resume", str(path), *more]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "documents that data.val_split=0.5 would hold out stay in training" in said
    after, second = record_of(path), validated(folder, "transformer_expert")[-1]
    assert after.rule == SplitRule(0.5)
    assert np.array_equal(after.trained.keys, before.trained.keys)
    assert second["tokens"] == first["tokens"]
    # On other data the old text stays trained on, and best is found anew.
    other = tmp_path / "other"
    write_domain(other / "letters", made_up_texts(0, 40)[:20] + made_up_texts(5, 20))
    capsys.readouterr()
    assert run(["resume", str(path), "--data-dir", str(other), "--max-steps", "7"]) == 0
    assert "The next evaluation writes a new best checkpoint" in " ".join(capsys.readouterr().err.split())
    last = record_of(path)
    assert after.trained.holds(last.held_out.val).sum() == 0
    assert np.isin(after.trained.keys, last.trained.keys).all()
    assert len(last.trained.keys) > len(after.trained.keys)


def test_text_that_was_trained_on_is_refused_by_name(
    experts: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = experts / "state_space_expert.pt"
    copy = tmp_path / "copy"  # in another order, with the line ends and the blanks of another system
    for file in data.glob("*/*.jsonl"):
        texts = [json.loads(line)["text"] for line in file.read_text().splitlines()]
        write_domain(copy / f"a {file.parent.name}", [f"{t.replace(' ', '  ')}\r\n" for t in texts[::-1]])
    n_documents = sum(len(file.read_text().splitlines()) for file in data.glob("*/*.jsonl"))
    n_trained = n_documents - len(record_of(path).held_out.val)
    for words in (["--split", "all"], ["--split", "all", "--data-dir", copy], ["--split", "train"]):
        error = error_of(capsys, "eval", path, *words)
        if "all" in words:
            assert f"{n_trained} of {n_documents} documents were trained on by {path}" in error
        assert "/texts.jsonl:" in error
        command = shlex.split(error.split("Score what is held out: `")[1].split("`")[0])
        assert command[:3] == ["nanothink", "eval", str(path)]
    assert run(command[1:]) == 0  # as it stands
    (marked,) = scored(capsys, path, "--split", "all", "--data-dir", copy, "--allow-seen")
    assert marked["seen_documents"] == n_trained
    (sample,) = scored(capsys, path, "--split", "all", "--allow-seen", "--max-tokens", "300")
    assert 0 < sample["seen_documents"] < n_trained
    assert run(["eval", str(path), "--split", "train", "--allow-seen", "--max-tokens", "300"]) == 0
    assert "seen in training" in " ".join(capsys.readouterr().out.split())
    both = [str(experts / f"{kind}_expert.pt") for kind in ("transformer", "state_space")]
    assert run(["eval", *both, "--split", "train", "--allow-seen", "--max-tokens", "300"]) == 0
    assert "seen" in capsys.readouterr().out.split()
    # What is new to the model is scored as it stands.
    write_domain(tmp_path / "new" / "poems", made_up_texts(8, 5))
    (figure,) = scored(capsys, path, "--data-dir", tmp_path / "new", "--split", "all")
    assert (figure["seen_documents"], figure["overall"]["bytes"]) == (
        0,
        sum(len(text) for text in made_up_texts(8, 5)),
    )
    # In Python.
    loaded = package.load(path)
    known, unknown = made_up_texts(0, 40), made_up_texts(8, 5)
    assert (
        sum(map(loaded.trained_on, known))
        == loaded.split.trained.holds(np.array([text_key(text) for text in known], np.uint64)).sum()
    )
    assert not any(map(loaded.trained_on, unknown))


def test_nothing_is_left_to_score_or_validate_on(
    experts: Path, train: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = package.load(experts / "transformer_expert.pt")
    known = [text for text in made_up_texts(0, 40) if loaded.trained_on(text)]
    write_domain(tmp_path / "known" / "letters", known)
    path = experts / "transformer_expert.pt"
    error = error_of(capsys, "eval", path, "--data-dir", tmp_path / "known")
    assert f"were trained on by {path} (letters/texts.jsonl:1" in error
    capsys.readouterr()
    assert train(tmp_path, "train-mla", *named(experts), where=tmp_path / "known") == 1
    error = " ".join(capsys.readouterr().err.split())
    assert f"were trained on by {path}" in error
    assert "letters/texts.jsonl:1" in error


def test_nothing_is_left_to_train_on(
    experts: Path, train: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = experts / "state_space_expert.pt"
    held_out = package.load(path).split.held_out.val
    texts = [text for text in made_up_texts(0, 40) if text_key(text) in held_out]
    write_domain(tmp_path / "held" / "letters", texts)
    assert train(tmp_path, "train-mla", "--expert", path, where=tmp_path / "held") == 1
    error = " ".join(capsys.readouterr().err.split())
    assert "nothing to train on: all its documents are held out" in error
    (figure,) = scored(capsys, path, "--data-dir", tmp_path / "held")
    assert figure["overall"]["bytes"] == sum(map(len, texts))


def test_a_domain_alone_is_the_same_text_as_among_the_others(
    experts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = experts / "state_space_expert.pt"
    (whole,) = scored(capsys, path)
    for domain in ("letters", "manuals", "book"):
        (alone,) = scored(capsys, path, "--domains", domain)
        assert alone["domains"] == {domain: whole["domains"][domain]}


def test_the_test_side_is_seen_by_nothing(
    data: Path, train: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fractions = set_by_hand(val_split=0.2, test_split=0.2)
    assert train(tmp_path, "pretrain", "transformer", **fractions) == 0
    path = tmp_path / "transformer_expert.pt"
    (figure,) = scored(capsys, path, "--split", "test")
    tokens = tokenise(find_corpus(data), package.load(path).tokenizer, split=SplitRule(0.2, 0.2))
    assert {domain: score["tokens"] for domain, score in figure["domains"].items()} == {
        domain: stream.n_tokens for domain, stream in tokens.test.items() if stream.n_tokens
    }
    record = record_of(path)
    assert len(record.held_out.test) > 0
    assert record.trained.holds(record.held_out.test).sum() == 0
    assert np.intersect1d(record.held_out.test, record.held_out.val).size == 0
    (during,) = validated(tmp_path, "transformer_expert")
    assert during["tokens"] == sum(stream.n_tokens for stream in tokens.val.values())
    # What is built on it holds the same text out.
    told = ["--expert", path]
    assert train(tmp_path, "train-mla", *told) == 0
    (combined,) = scored(capsys, tmp_path / "nanothink_mla.pt", "--split", "test")
    assert combined["overall"]["tokens"] == figure["overall"]["tokens"]
    capsys.readouterr()
    assert run(["checkpoints", "show", str(path)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"val_split 0.2, test_split 0.2, seed 42; trained on {record.n_documents} documents" in shown


def test_a_model_without_a_test_side_says_so(experts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["eval", str(experts / "transformer_expert.pt"), "--split", "test"]) == 2
    assert "data.test_split=0" in capsys.readouterr().err


def test_a_vector_store_is_part_of_the_model(
    experts: Path, train: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("faiss")
    assert train(tmp_path, "train-mla", "--use-vector-store", *named(experts)) == 0
    path, other = tmp_path / "nanothink_mla.pt", tmp_path / "other"
    (poem,) = (" ".join(made_up_texts(3, 12)),)
    write_domain(other / "poem", [poem])  # a single text, of which the head goes in
    write_domain(other / "songs", made_up_texts(4, 10))
    where = ["--data-dir", other, "--split", "all"]
    assert scored(capsys, path, *where)[0]["seen_documents"] == 0
    assert run(["store", "add", str(other), "--checkpoint-dir", str(tmp_path)]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "documents held out by data.val_split=0.01: not put in" in said
    error = error_of(capsys, "eval", path, *where, "--domains", "poem")
    assert f"1 of 1 document was in the vector store of {path} (poem/texts.jsonl:1)" in error
    assert "--no-vector-store" in error
    assert scored(capsys, path, *where, "--no-vector-store")[0]["seen_documents"] == 0
    (marked,) = scored(capsys, path, *where, "--allow-seen")
    assert marked["seen_documents"] > 1
    (tail,) = scored(capsys, path, "--data-dir", other, "--domains", "poem")
    assert tail["overall"]["bytes"] < 0.1 * len(poem)
    # Another run with that store, on the text that is in it.
    folder = tmp_path / "again"
    shutil.copytree(tmp_path / "nanothink_mla.store", folder / "nanothink_mla.store")
    told = ["train-mla", "--use-vector-store", *named(experts)]
    assert train(folder, *told, where=other, **set_by_hand(val_split=0.5)) == 0
    assert "the vector store" in " ".join(capsys.readouterr().err.split())
    record, inside = record_of(folder / "nanothink_mla.pt"), package.load(path).seen_by()
    in_store = inside[f"the vector store of {path}"]
    assert in_store.holds(record.held_out.val).sum() == 0


def test_an_export_says_what_it_was_trained_on(
    experts: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, folder = experts / "state_space_expert.pt", tmp_path / "exported"
    assert run(["checkpoints", "export", str(path), "--to", str(folder)]) == 0
    one, other = package.load(path).split, package.load(folder).split
    assert (one.rule, one.domains) == (other.rule, other.domains)
    assert one.trained == other.trained
    (ours,), (theirs,) = scored(capsys, path), scored(capsys, folder, "--data-dir", data)
    assert ours["overall"] == theirs["overall"]
    assert "were trained on by" in error_of(capsys, "eval", folder, "--data-dir", data, "--split", "all")
    (folder / "training_documents.st").write_bytes(b"?" * 40)
    assert "is damaged" in error_of(capsys, "eval", folder, "--data-dir", data)
    (folder / "training_documents.st").unlink()
    assert "a file of the export is missing" in error_of(capsys, "eval", folder, "--data-dir", data)
