"""The teacher of a student: the checkpoint whose predictions an expert learns, found and checked."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from nanothink.config import Config
from nanothink.config.run import ResolvedConfig
from nanothink.data.split import NOTHING, TrainedText
from nanothink.errors import (
    CheckpointError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    UsageError,
    VectorStoreError,
    VectorStoreNotFoundError,
)
from nanothink.models import EXPERTS
from nanothink.models.joint_gate import GATE_PREFIX
from nanothink.reporter import SILENT, Reporter
from nanothink.runs.resuming import ResumePoint, RunSpec
from nanothink.runs.saved_model import SavedModel, expert_entries
from nanothink.runs.vector_store import folder_of, key_entry
from nanothink.suggestions import command, suggest
from nanothink.vector_store.manifest import exists
from nanothink.vector_store.store import read_texts

TEACHER = "teacher"
"""Its name among the parts of a run, and that of its entry in the checkpoints of the student."""

_BLOCK = "model.max_seq_len"


def find_teacher(
    spec: RunSpec, resume_point: ResumePoint | None, reporter: Reporter = SILENT
) -> SavedModel | None:
    """Read the teacher that ``--teacher`` names, or that the resumed run began with; None without one.

    Raises:
        CheckpointError: it is missing, damaged, or not the one that the run began with.
        VectorStoreError: its vector store is missing.
        UsageError: this run cannot have a teacher.
    """
    known = None if resume_point is None else resume_point.payload["run"].get(TEACHER)
    entry = known if isinstance(known, dict) else None
    path = spec.teacher
    if path is None and entry is not None:
        path = Path(str(entry.get("path")))
    if path is None:
        return None
    if EXPERTS[spec.kind].model().base(Config()) is not None:
        raise UsageError(
            f"--teacher: a {spec.kind} has targets of its own. Train a transformer or state_space."
        )
    if spec.init is not None:
        raise UsageError("--teacher and --init: a student starts from random weights. Leave one of them out.")
    if path.resolve() in [
        each.resolve() for each in (spec.store.best, spec.store.interrupted, *spec.store.rolling())
    ]:
        raise UsageError(f"{path} would be replaced by its own student. Give that another name: --name OTHER")
    if resume_point is not None and entry is None:
        raise UsageError(
            f"{resume_point.path} was begun without a teacher. Leave --teacher out to resume it, or start a "
            "new run: leave --resume out."
        )
    name = spec.stem.removesuffix("_expert")
    again = command("pretrain", spec.kind, "--name", name, "--teacher", "PATH", "--resume")
    if not path.exists():
        ways = (
            f"Put it back, or name it where it is now: {again}"
            if entry is not None
            else f"Train one first: {suggest('train-mla')}"
        )
        raise CheckpointNotFoundError(f"The teacher {path} is not there. {ways}")
    found = SavedModel.read(path, reporter)
    if entry is not None and resume_point is not None and entry.get("digest") != teacher_digest(found):
        raise CheckpointError(
            f"{resume_point.path} was trained on the predictions of another teacher than {path}. Put the old "
            f"one back, or name it: {again}"
        )
    if found.config.vector_store.enabled and not exists(folder := folder_of(path)):
        raise VectorStoreNotFoundError(
            f"The teacher {path} was trained with a vector store, and {folder} is not there. Copy that "
            f"folder too, or build it: {suggest('store build -c', path)}"
        )
    return found


def teacher_digest(saved: SavedModel) -> str:
    """Digest of all that its predictions depend on, but for its vector store."""
    digest = hashlib.blake2b(saved.digest.encode(), digest_size=16)
    digest.update(repr(float(saved.payload["run"].get("logit_scale", 1.0))).encode())
    for name, tensor in sorted(saved.payload["model_state"].items()):
        if name.startswith(GATE_PREFIX):
            digest.update(name.encode())
            digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def teacher_entry(saved: SavedModel) -> dict[str, str]:
    """The description of its teacher that a student's checkpoints keep."""
    return {"path": str(saved.path.resolve()), "kind": saved.kind, "digest": teacher_digest(saved)}


def text_in_store(teacher: SavedModel) -> TrainedText:
    """The documents in the teacher's vector store; none without one."""
    if not teacher.config.vector_store.enabled:
        return NOTHING
    entry = key_entry(expert_entries(teacher.payload, teacher.path), teacher.config.vector_store.expert)
    try:
        return read_texts(folder_of(teacher.path), entry.get("digest", ""))
    except VectorStoreError:  # damaged: an error when it is opened
        return NOTHING


def config_of_student(teacher: SavedModel, resolved: ResolvedConfig, reporter: Reporter = SILENT) -> Config:
    """The settings of a new student: its blocks are at most as long as the teacher's.

    Raises:
        CheckpointMismatchError: longer ones were asked for by hand.
    """
    config, longest = resolved.config, teacher.config.model.max_seq_len
    asked, source = config.model.max_seq_len, resolved.sources[_BLOCK]
    if asked <= longest:
        return config
    if source != "default" and not source.startswith("preset "):
        raise CheckpointMismatchError(
            f"{_BLOCK}={asked} is beyond the context of the teacher {teacher.path}. Use at most {longest}: "
            f"--set {_BLOCK}={longest}"
        )
    reporter.note(f"Blocks of {longest} tokens, as the teacher's.")
    return config.model_copy(update={"model": config.model.model_copy(update={"max_seq_len": longest})})
