"""The contents of a run's checkpoints, and the description in its records (config.json)."""

from __future__ import annotations

import platform
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from nanothink import __version__
from nanothink.checkpoints import FORMAT_VERSION, CheckpointPayload, CheckpointStore, Role
from nanothink.checkpoints.restore import gathered, model_state, pack_rng
from nanothink.models import COMBINED
from nanothink.runs.experts import as_entries
from nanothink.runs.initial import INITIAL
from nanothink.runs.preparing import RunSetup
from nanothink.runs.teacher import TEACHER, teacher_entry
from nanothink.training.loop import Run

_OF_THE_RUN = {"name", "state", "logit_scale", "gate_documents", "nanothink_version"}


def save_state(setup: RunSetup, run: Run, store: CheckpointStore, role: Role) -> Path:
    """Write a checkpoint of the run, and return its path. Every process must call it.

    Processes that share the parameters out write a folder together, each its rows. The best state, which
    other commands read, is one file all the same: rank 0 brings it together.
    """
    together = run.processes.size > 1 and setup.config.distributed.shard == "full"
    if together and role != "best":
        payload = checkpoint_payload(setup, run, whole=False)
        return store.write_shards(role, run.state.epoch, payload)
    payload = checkpoint_payload(setup, run)
    path = {"best": store.best, "interrupted": store.interrupted}.get(role) or store.epoch(run.state.epoch)
    if run.processes.is_rank0:
        store.write(path, payload)
    return path


def checkpoint_payload(setup: RunSetup, run: Run, *, whole: bool = True) -> CheckpointPayload:
    """Everything that changes the next step, as plain containers and tensors.

    Args:
        whole: bring tensors that several processes hold together, on rank 0. Every process must call it, and
            the payload of the others is of no use.
    """
    state, keep = run.state, run.processes.is_rank0
    return {
        "format_version": FORMAT_VERSION,
        "kind": run.model.kind,
        "model_state": model_state(run.model, keep=keep) if whole else run.model.state_dict(),
        "optimizer_state": _whole(run.optimizer.state_dict(), keep) if whole else run.optimizer.state_dict(),
        "step": state.step,
        "epoch": state.epoch,
        "position": state.position,
        "amp_scaler": run.scaler.state_dict() if run.scaler is not None else None,
        "rng": pack_rng(),
        "early_stopping": {
            "best_loss": state.best_loss,
            "evals_without_improvement": state.evals_without_improvement,
        },
        "best_loss": state.best_loss,
        "config": setup.config.model_dump(mode="json"),
        "tokenizer": setup.tokenizer.to_state(),
        "data_fingerprint": setup.tokens.fingerprint,
        "split": setup.split.to_state(),
        "run": {
            "name": setup.spec.stem,
            "state": state.to_dict(),
            "logit_scale": run.model.logit_scale,
            "nanothink_version": __version__,
            **built_on(setup),
        },
    }


def _whole(state: Any, keep: bool) -> Any:
    """The same nested containers, tensors that several processes hold brought together; see ``gathered``."""
    if isinstance(state, dict):
        return {name: _whole(value, keep) for name, value in state.items()}
    return gathered(state, keep=keep).cpu() if isinstance(state, torch.Tensor) else state


def built_on(setup: RunSetup) -> dict[str, Any]:
    """Entries about the models that a run builds on: experts, a teacher, the digest of an expert's base."""
    if setup.resume_point is not None:
        earlier = setup.resume_point.payload["run"]
        kept = {name: value for name, value in earlier.items() if name not in _OF_THE_RUN}
        return {**kept, **_teacher(setup)}
    if setup.spec.kind == COMBINED:
        return {"experts": as_entries(setup.parts)}
    if TEACHER in setup.parts:
        return _teacher(setup)
    origin = {}
    if INITIAL in setup.parts and (imported := setup.parts[INITIAL].payload["run"].get("imported")):
        origin = {"imported": imported}  # its licence holds for what is made of it
    return {**{name: part.digest for name, part in setup.parts.items()}, **origin}


def _teacher(setup: RunSetup) -> dict[str, Any]:
    return {TEACHER: teacher_entry(setup.parts[TEACHER])} if TEACHER in setup.parts else {}


def description(setup: RunSetup, run: Run) -> dict[str, Any]:
    """Settings, data, precision and machine of a run, for its records."""
    return {
        "kind": setup.spec.kind,
        "name": setup.spec.stem,
        "command": setup.spec.command,
        "config": setup.config.model_dump(mode="json"),
        "sources": dict(setup.sources),
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "tokenizer": {
            "name": setup.tokenizer.name,
            "vocab_size": setup.tokenizer.vocab_size,
            "fingerprint": setup.tokenizer.fingerprint,
        },
        "data": {
            "fingerprint": setup.tokens.fingerprint,
            "train_tokens": {d: s.n_tokens for d, s in setup.tokens.train.items()},
            "validation_tokens": {d: s.n_tokens for d, s in setup.tokens.val.items()},
            "n_bad_lines": setup.tokens.skipped_records,
            "has_conversations": setup.tokens.has_conversations,
        },
        "precision": {
            "device": str(setup.precision.device),
            "dtype": setup.precision.name,
            "reason": setup.precision.reason,
        },
        "machine": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "nanothink": __version__,
            "platform": platform.platform(),
            "threads": torch.get_num_threads(),
            "processes": run.processes.size,
        },
        "started": datetime.now().astimezone().isoformat(timespec="milliseconds"),
    }
