"""A model as a checkpoint or an export has it: read, verified, and built on request.

Every way to a model goes through here: ``nanothink.load``, the experts that NanoThink combines, the
transformer that a diffuser learns from, and the one expert whose states a vector store is made of.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from nanothink.checkpoints import ModelPayload, read_checkpoint
from nanothink.checkpoints.export import read_export
from nanothink.checkpoints.restore import restore_model
from nanothink.checkpoints.split_record import SplitRecord
from nanothink.config import Config
from nanothink.config.run import resolve_config
from nanothink.data.tokenizer import Tokenizer
from nanothink.errors import CheckpointDamagedError, CheckpointMismatchError
from nanothink.models import COMBINED, EXPERTS, ExpertDescription, known_kind
from nanothink.models.contract import LanguageModel
from nanothink.models.joint_gate import GATE_PREFIX
from nanothink.reporter import SILENT, Reporter
from nanothink.runs.rebuilding import rebuild

MAX_EXPERTS = 64


@dataclass(frozen=True)
class SavedModel:
    """A model on the disk. Its weights stay in the mapped file until ``build``."""

    path: Path
    payload: ModelPayload
    config: Config
    """Settings of its training."""
    tokenizer: Tokenizer
    must_fit: str | None = None
    """Advice in the error of ``build`` about weights that do not fit; None: they are only reported."""

    @classmethod
    def read(cls, path: Path, reporter: Reporter = SILENT) -> SavedModel:
        """Read and verify a checkpoint.

        Raises:
            CheckpointError: the file is missing, damaged, or something else.
        """
        return cls.of(path, read_checkpoint(path, mmap=True, reporter=reporter))

    @classmethod
    def read_export(cls, folder: Path) -> SavedModel:
        """Read an export. Raises as ``read``.

        All its weights must fit: another program may have changed the export, and without biases that it
        added, for example, the model would be another one.
        """
        return cls.of(folder, read_export(folder), must_fit="Export the checkpoint again")

    @classmethod
    def of(cls, path: Path, payload: ModelPayload, *, must_fit: str | None = None) -> SavedModel:
        """The model of a payload that was read from ``path``."""
        config = resolve_config(base=payload["config"]).config
        return cls(path, payload, config, Tokenizer.from_state(payload["tokenizer"]), must_fit)

    @property
    def kind(self) -> str:
        return self.payload["kind"]

    @cached_property
    def digest(self) -> str:
        """Digest of the weights."""
        return weights_digest(self.payload["model_state"])

    @cached_property
    def split(self) -> SplitRecord:
        """The rule of its split, and the documents that it was trained on."""
        return SplitRecord.from_state(self.payload["split"], self.path)

    def runnable_config(self, device: torch.device) -> Config:
        """``config`` without what ``device`` cannot follow; see ``Expert.runnable``."""
        return _runnable(self.kind, self.config, device)

    def described(self, name: str, device: torch.device) -> ExpertDescription:
        """An expert called ``name``, as it runs on ``device``."""
        return ExpertDescription(name, self.kind, self.runnable_config(device))

    def expert(self, name: str) -> SavedModel:
        """One of the experts inside a combined model."""
        entries = expert_entries(self.payload, self.path)
        number = [entry["name"] for entry in entries].index(name)
        prefix, entry = f"experts.{number}.", entries[number]
        weights = {
            key.removeprefix(prefix): tensor
            for key, tensor in self.payload["model_state"].items()
            if key.startswith(prefix)
        }
        own: ModelPayload = {
            **self.payload,
            "kind": entry["kind"],
            "config": entry["config"],
            "model_state": weights,
            "run": {},
        }
        return SavedModel.of(self.path, own, must_fit="Use another checkpoint")

    def build(self, device: torch.device) -> tuple[LanguageModel, tuple[str, ...]]:
        """The frozen model, in evaluation mode, still on the CPU; and a line for all that did not fit it.

        Args:
            device: where it is to run.

        Raises:
            CheckpointMismatchError: its weights are not those of the model that its settings describe.
        """
        model = rebuild(
            self.kind,
            self.runnable_config(device),
            self.tokenizer.vocab_size,
            experts_inside(self.payload, device, self.path),
            payload=self.payload,
            path=self.path,
        )
        report = restore_model(model, self.payload, expect_kind=self.kind, path=self.path)
        if self.must_fit and not report.complete:
            raise CheckpointMismatchError(
                f"{self.path}: its weights are not those of the {self.kind} that its settings describe: "
                f"{'. '.join(report.lines())}. {self.must_fit}"
            )
        return model.eval().requires_grad_(False), tuple(report.lines())


def experts_inside(payload: ModelPayload, device: torch.device, path: Path) -> tuple[ExpertDescription, ...]:
    """The experts inside a combined model, as they run on ``device``; none in another model.

    Raises:
        CheckpointDamagedError: the checkpoint does not describe them.
    """
    if payload["kind"] != COMBINED:
        return ()
    return tuple(
        ExpertDescription(
            entry["name"],
            entry["kind"],
            _runnable(entry["kind"], resolve_config(base=entry["config"]).config, device),
        )
        for entry in expert_entries(payload, path)
    )


def expert_entries(payload: ModelPayload, path: Path) -> list[Mapping[str, Any]]:
    """Name, kind, config and digest of each expert inside a combined model. An export leaves out the digest.

    Raises:
        CheckpointDamagedError: the checkpoint holds no such list.
    """
    entries: Any = payload["run"].get("experts")
    if isinstance(entries, list) and 1 <= len(entries) <= MAX_EXPERTS and all(map(_is_entry, entries)):
        return list(entries)
    raise CheckpointDamagedError(
        f"{path}: its description of the experts inside it makes no sense. Use another checkpoint"
    )


def _is_entry(entry: Any) -> bool:
    match entry:
        case {"name": str(), "kind": str(kind), "config": dict()}:
            return kind in EXPERTS
    return False


def _runnable(kind: str, config: Config, device: torch.device) -> Config:
    return config if kind == COMBINED else EXPERTS[known_kind(kind)].model().runnable(config, device)


def weights_digest(weights: Mapping[str, torch.Tensor]) -> str:
    """Digest of weights on the CPU, by which models are told apart; a joint gate is none of them."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(weights.items()):
        if name.startswith(GATE_PREFIX):
            continue
        digest.update(name.encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
