"""`pretrain --teacher`: a student of NanoThink with its vector store; its targets; exact resume."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from repeating_corpus import repeating_corpus
from struck_runs import Ground, assert_same_run, metrics
from tiny import SHAPE, settings

import nanothink as package
from nanothink.checkpoints import read_checkpoint
from nanothink.checkpoints.split_record import SplitRecord
from nanothink.cli.app import run
from nanothink.data.tokens import IGNORE
from nanothink.runs.preparing import RunSetup, prepare
from nanothink.runs.resuming import RunSpec
from nanothink.runs.saved_model import SavedModel
from nanothink.runs.teaching import Teacher, Teaching, make_targets

SETTINGS = {
    **SHAPE,
    "data.val_split": 0.3,
    "train_expert.batch_size": 4,
    "train_expert.sample_tokens": 0,
    "train_expert.amp_dtype": "float32",
    "train_expert.log_every_steps": 1,
}
OF_PHASE_2 = {
    "mla.n_heads": 2,
    "train_mla.sample_tokens": 0,
    "train_mla.amp_dtype": "float32",
    "document_cache.fit_steps": 250,  # so that the teacher heeds its store
}
STUDENT = {
    **SETTINGS,
    "distillation.top_k": 8,
    "distillation.versions": 2,
    "distillation.written_fraction": 0.25,
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return repeating_corpus(tmp_path_factory.mktemp("corpus"), n_texts=30)


@pytest.fixture(scope="module")
def teacher(corpus: Path, tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A NanoThink with a vector store and a joint gate."""
    folder = tmp_path_factory.mktemp("teacher")
    where = ["--data-dir", str(corpus), "--checkpoint-dir", str(folder)]
    for kind in ("transformer", "state_space"):
        arguments = [*where, "--tokenizer", str(tiny_tokenizer), "--max-steps", "40", *settings(SETTINGS)]
        assert run(["pretrain", kind, *arguments]) == 0
    experts = [
        part for kind in ("transformer", "state_space") for part in ("--expert", f"{folder}/{kind}_expert.pt")
    ]
    fit = ["--use-vector-store", "--set", "train_mla.fit=gate", *settings(OF_PHASE_2)]
    assert run(["train-mla", *where, *experts, *fit]) == 0
    return folder / "nanothink_mla.pt"


@pytest.fixture
def student(corpus: Path, teacher: Path, tmp_path: Path) -> Callable[..., int]:
    """Trains a student into the folder ``runs``."""

    def train(*options: str, kind: str = "transformer", of: Path = teacher) -> int:
        where = ["--data-dir", str(corpus), "--checkpoint-dir", str(tmp_path / "runs")]
        named = ["--teacher", str(of), "--name", "student", *where, *settings(STUDENT)]
        return run(["pretrain", kind, *named, *options])

    return train


@pytest.fixture
def prepared(corpus: Path, teacher: Path, tmp_path: Path) -> Callable[..., RunSetup]:
    """Prepares the run of a student, with further settings."""
    from nanothink.config.run import resolve_config

    def prepared(**sets: object) -> RunSetup:
        own = {**STUDENT, "data.data_dir": corpus, **{f"train_expert.{name}": sets[name] for name in sets}}
        assignments = [f"{name}={value}" for name, value in own.items()]
        spec = RunSpec("transformer", tmp_path / "runs", teacher=teacher)
        return prepare(spec, lambda base: resolve_config(base=base, assignments=assignments))

    return prepared


@pytest.fixture
def setup(prepared: Callable[..., RunSetup]) -> RunSetup:
    return prepared(max_epochs=1)


@pytest.mark.parametrize("kind", ["transformer", "state_space"])
def test_a_student_learns_from_its_teacher_and_holds_out_what_that_held_out(
    kind: str, student: Callable[..., int], teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert student("--max-steps", "30", "--json", kind=kind) == 0
    best = tmp_path / "runs" / "student_expert.pt"
    assert json.loads(capsys.readouterr().out)["checkpoint"] == str(best)
    payload, taught_by = read_checkpoint(best), read_checkpoint(teacher)
    assert payload["kind"] == kind
    assert payload["run"]["teacher"]["path"] == str(teacher)
    assert payload["tokenizer"] == taught_by["tokenizer"]
    own, its = (SplitRecord.from_state(each["split"], best) for each in (payload, taught_by))
    assert own.rule == its.rule
    assert np.array_equal(own.trained.keys, its.trained.keys)
    recorded = [m for m in metrics(tmp_path / "runs", "student_expert") if m["event"] == "train"]
    assert recorded[-1]["divergence"] < 0.7 * recorded[0]["divergence"]
    assert recorded[-1]["loss"] == pytest.approx(recorded[-1]["divergence"], rel=1e-6)
    assert run(["checkpoints", "show", str(best)]) == 0
    assert f"{teacher} (nanothink_mla)" in capsys.readouterr().out
    assert package.load(best).generate("a", max_new_tokens=3)


def test_what_fits_a_student_to_its_text_is_not_what_fits_a_model_of_its_own(
    prepared: Callable[..., RunSetup],
) -> None:
    training = prepared(fit_to_text=True).training
    assert (training.dropout, training.weight_decay_tables, training.max_epochs) == (0.0, 0.0, 16)
    assert prepared(fit_to_text=True, dropout=0.2).training.dropout == 0.2


def test_the_store_answers_from_other_documents_alone(setup: RunSetup, teacher: Path) -> None:
    """With the document itself it would give away the token that follows."""
    teaching = Teaching.of(setup)
    asked = Teacher.open(SavedModel.read(teacher), setup.precision)
    numbers = range(setup.batches.n_blocks)
    texts, own = teaching.corpus_group(numbers)
    of_each = []
    for keys in (own, np.zeros_like(own)):  # 0: the hash of no document
        found = asked.predict(texts[:, :-1], keys, setup.tokenizer.vocab_size)
        says = found.tokens == texts[:, 1:, None]
        of_each.append((found.probabilities * says).sum(-1))
    assert torch.allclose(found.probabilities.sum(-1), torch.ones(1), atol=1e-4)
    assert of_each[1].mean() > 1.2 * of_each[0].mean()
    assert asked.store is not None
    documents = asked.store.documents_of(own.reshape(-1))
    assert (documents >= 0).all()
    queries = torch.nn.functional.normalize(torch.randn(len(documents), 32), dim=-1)
    _, found_numbers = asked.store.search_elsewhere(queries.numpy(), own.reshape(-1), 8)
    there = found_numbers >= 0
    assert there.any()
    assert (asked.store.document(found_numbers) != documents[:, None])[there].all()


def test_the_teacher_writes_on_from_training_text_and_the_same_each_time(setup: RunSetup) -> None:
    kept = []
    for _ in range(2):
        taught = make_targets(setup)
        written = [p for p in range(setup.plan.n_blocks) if taught.order.source(p)[0]]
        assert len(written) == setup.n_written > 0
        assert abs(len(written) - setup.plan.n_blocks / 4) < 1
        inputs, targets = zip(*(taught._block(position) for position in written), strict=True)
        soft = taught.soft_targets(written)
        kept.append((torch.stack(inputs), torch.stack(targets), soft.tokens, soft.probabilities))
        taught.close()
        shutil.rmtree(taught.on_corpus.folder.parent)
    for one, other in zip(*kept, strict=True):
        assert torch.equal(one, other)
    begun = kept[0][0][:, : taught.n_prompt]
    text = [setup.batches.read(position, 1)[0][0] for position in range(setup.batches.n_blocks)]
    heads = {tuple(block[: taught.n_prompt].tolist()) for block in text}
    assert all(tuple(row.tolist()) in heads for row in begun)
    assert (kept[0][1][:, : taught.n_prompt - 1] == IGNORE).all()
    assert (kept[0][1][:, taught.n_prompt - 1 :] >= 0).all()
    assert torch.equal(kept[0][0][:, taught.n_prompt :], kept[0][1][:, taught.n_prompt - 1 : -1])


def test_each_pass_over_the_text_reads_its_next_version(prepared: Callable[..., RunSetup]) -> None:
    """The first version is the text; in others the teacher has drawn some tokens after those before them."""
    setup = prepared(max_epochs=3)
    taught = make_targets(setup)
    corpus = setup.batches
    redrawn: list[tuple[float, tuple[int, ...]]] = []
    for position in range(3 * setup.plan.n_blocks):
        written, at = taught.order.source(position)
        if written:
            continue
        (read,), (own,) = (part.clone() for part in corpus.read(at, 1))
        inputs, targets = taught._block(position)
        assert torch.equal(targets, own)
        first = taught.on_corpus.soft_targets([corpus.number(at)]).tokens[0]
        other = (inputs != read).nonzero()[:, 0]
        if corpus.passes(at) % 2 == 0:
            assert len(other) == 0
        elif bool((targets >= 0).all()):
            redrawn.append((len(other) / len(inputs), tuple(inputs.tolist())))
            assert 0 not in other
            assert all(inputs[t] in first[t - 1] for t in other)
    shares, texts = zip(*redrawn, strict=True)
    assert 0.03 < sum(shares) / len(shares) < 0.2  # 0.15, and a draw may be the same token
    assert len(set(texts)) > 1
    taught.close()


def test_a_damaged_block_of_targets_is_made_again(setup: RunSetup) -> None:
    taught = make_targets(setup)
    before = taught.soft_targets([0, 1])
    taught.close()
    path = taught.on_corpus.folder / "targets.bin"
    content = bytearray(path.read_bytes())
    content[: len(content) // 2] = bytes(len(content) // 2)
    path.write_bytes(content)
    again = make_targets(setup)
    after = again.soft_targets([0, 1])
    again.close()
    assert torch.equal(before.tokens, after.tokens)
    assert torch.equal(before.probabilities, after.probabilities)


def test_a_dry_run_counts_the_targets_and_makes_none(
    student: Callable[..., int], corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(corpus / ".nanothink" / "targets", ignore_errors=True)
    assert student("--max-steps", "3", "--dry-run", "--json") == 0
    counted = json.loads(capsys.readouterr().out)
    assert counted["targets_bytes"] > 1000
    assert counted["seconds"] > counted["time"]["targets_seconds"] > 0
    assert not (corpus / ".nanothink" / "targets").exists()


@pytest.fixture
def wrong(teacher: Path, tmp_path: Path) -> dict[str, Path]:
    """Teachers that cannot be used."""
    bare = tmp_path / "bare.pt"
    shutil.copy(teacher, bare)
    return {
        "missing": tmp_path / "none.pt",
        "no store": bare,
        "itself": tmp_path / "runs" / "student_expert.pt",
    }


@pytest.mark.parametrize(
    ("which", "kind", "options", "expected"),
    [
        ("missing", "transformer", (), "is not there. Train one first: `nanothink train-mla"),
        ("no store", "transformer", (), "bare.store is not there"),
        ("right", "diffuser", (), "has targets of its own"),
        ("itself", "transformer", (), "would be replaced by its own student"),
        ("right", "transformer", ("--init", "x.pt"), "--teacher and --init"),
        ("right", "transformer", ("--set", "model.max_seq_len=64"), "--set model.max_seq_len=32"),
        ("right", "transformer", ("--tokenizer", "OTHER"), "Leave --tokenizer out"),
    ],
)
def test_what_cannot_work_is_refused(
    which: str,
    kind: str,
    options: tuple[str, ...],
    expected: str,
    student: Callable[..., int],
    wrong: dict[str, Path],
    teacher: Path,
    corpus: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if "OTHER" in options:
        where = ["--data-dir", str(corpus), "--out", str(tmp_path / "other")]
        assert run(["tokenizer", "train", *where, "--vocab-size", "300"]) == 0
        options = ("--tokenizer", str(tmp_path / "other"))
    assert student("--max-steps", "2", *options, kind=kind, of=wrong.get(which, teacher)) > 0
    assert expected in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "runs" / "student_expert_interrupted.pt").exists()


def test_a_resumed_student_needs_its_own_teacher(
    student: Callable[..., int], teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(teacher.parent, tmp_path / "copy")
    copy = tmp_path / "copy" / teacher.name
    assert student("--max-steps", "2", of=copy) == 0
    where = ["resume", str(tmp_path / "runs" / "student_expert.pt"), "--max-steps", "4"]
    shutil.rmtree(tmp_path / "copy")
    assert run(where) > 0
    assert "Put it back, or name it where it is now" in capsys.readouterr().err
    assert student("--max-steps", "4", "--resume", of=teacher.with_name("transformer_expert.pt")) > 0
    assert "predictions of another teacher" in capsys.readouterr().err
    assert student("--max-steps", "4", "--resume", of=teacher) == 0
    assert read_checkpoint(tmp_path / "runs" / "student_expert.pt")["run"]["teacher"]["path"] == str(teacher)


def test_resumed_at_every_moment_it_is_the_same_run(ground: Ground, tmp_path: Path) -> None:
    """Killed while the teacher predicts and writes too: what is missing then is made in the same groups."""
    targets = ground.corpus / ".nanothink" / "targets"
    made = {"kind": "transformer", "max_epochs": 2, "eval_every_steps": 8}
    taught_by = ["--teacher", str(ground.experts / "state_space_expert.pt"), "--name", "student"]
    taught_by += settings({"distillation.written_fraction": 0.5, "distillation.versions": 2})

    def typed(folder: Path) -> list[str]:
        words = ground.typed(folder=folder, **made)  # type: ignore[arg-type]
        at = words.index("--tokenizer")
        return [*words[:at], *words[at + 2 :], *taught_by]

    moments = [
        {"call": "nanothink.training.distillation:TeacherTargets.write", "nth": 20, "signals": ["SIGKILL"]},
        {"call": "nanothink.training.distillation:TeacherTargets.write", "nth": 40, "signals": ["SIGKILL"]},
        {"event": "StepDone", "having": {"step": 3}, "signals": ["SIGTERM"]},
        {"event": "StepDone", "having": {"step": 13}, "signals": ["SIGKILL"]},
    ]
    for n, strike in enumerate(moments):
        ended = ground.server.run([*typed(tmp_path / "struck"), *(["--resume"] if n else [])], strike=strike)
        assert ended.code in (-9, 130), ended.stderr
    ended = ground.server.run(["resume", "--checkpoint-dir", str(tmp_path / "struck")])
    assert ended.code == 0, ended.stderr
    shutil.rmtree(targets)
    assert ground.server.run(typed(tmp_path / "whole")).code == 0
    shutil.rmtree(targets)
    assert_same_run(tmp_path / "whole", tmp_path / "struck", "student_expert")
