"""The frozen experts that NanoThink combines: found, checked, opened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from nanothink.checkpoints import (
    CheckpointPayload,
    ModelPayload,
    parse_name,
    read_checkpoint,
    restore_model,
)
from nanothink.config import Config
from nanothink.config.run import ResolvedConfig, resolve_config
from nanothink.data.tokenizer import Tokenizer
from nanothink.errors import (
    CheckpointDamagedError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    UsageError,
    counted,
)
from nanothink.models import COMBINED, EXPERT_KINDS, ExpertDescription
from nanothink.models.contract import LanguageModel
from nanothink.models.selective_scan import choose_scan
from nanothink.models.store_gate import VECTOR_STORE
from nanothink.reporter import SILENT, Reporter
from nanothink.runs.frozen import weights_digest
from nanothink.runs.rebuilding import rebuild

_ENDING = "_expert"
MAX_EXPERTS = 64


@dataclass(frozen=True)
class FrozenExpert:
    """A trained expert. Its weights stay on the disk until ``build``."""

    name: str
    path: Path
    payload: CheckpointPayload
    config: Config
    tokenizer: Tokenizer

    @property
    def kind(self) -> str:
        return self.payload["kind"]

    @property
    def tokenizer_setting(self) -> str:
        """What ``data.tokenizer`` was when it was trained."""
        return self.config.data.tokenizer

    @cached_property
    def digest(self) -> str:
        """Of its weights."""
        return weights_digest(self.payload["model_state"])

    def describe(self, device: torch.device) -> ExpertDescription:
        """As it runs on ``device``."""
        return ExpertDescription(self.name, self.kind, scan_that_runs(self.config, device))

    def build(self, device: torch.device, reporter: Reporter = SILENT) -> LanguageModel:
        """The model, on the CPU, to run on ``device``; a note for weights that did not fit."""
        config, vocab_size = self.describe(device).config, self.tokenizer.vocab_size
        model = rebuild(self.kind, config, vocab_size, payload=self.payload, path=self.path)
        report = restore_model(model, self.payload, expect_kind=self.kind, path=self.path)
        for line in report.lines():
            reporter.note(f"{self.path}: {line}")
        return model


def find_experts(
    paths: Sequence[Path] | None, checkpoint_dir: Path, reporter: Reporter = SILENT
) -> tuple[FrozenExpert, ...]:
    """Open the experts that were named, or the three in the checkpoint folder.

    Raises:
        CheckpointError: one is missing (with the command to run), is no expert, or differs from the first in
            tokenizer or width.
        UsageError: one is named twice, or too many are.
    """
    defaults = [checkpoint_dir / f"{kind}{_ENDING}.pt" for kind in EXPERT_KINDS]
    chosen = list(paths or defaults)
    if len({path.resolve() for path in chosen}) < len(chosen):
        raise UsageError(f"--expert names a checkpoint twice: {', '.join(map(str, chosen))}.")
    if len(chosen) > MAX_EXPERTS:
        raise UsageError(f"--expert names {len(chosen)} checkpoints; at most {MAX_EXPERTS} can be combined.")
    if missing := [path for path in chosen if not path.exists()]:
        others = "" if paths else " Or name the experts you have: --expert PATH, repeated."
        raise CheckpointNotFoundError(
            f"NanoThink combines trained experts, and {_listed(missing)} not there. Train first: "
            f"{'; '.join(_command_for(path) for path in missing)}.{others}"
        )
    experts: list[FrozenExpert] = []
    for path in chosen:
        payload = read_checkpoint(path, mmap=True, reporter=reporter)
        if payload["kind"] not in EXPERT_KINDS:
            raise CheckpointMismatchError(
                f"{path} holds a {payload['kind']}, which is no expert. NanoThink combines experts of these "
                f"kinds: {', '.join(EXPERT_KINDS)}."
            )
        name = _name_of(path, [expert.name for expert in experts])
        config = resolve_config(base=payload["config"]).config
        tokenizer = Tokenizer.from_state(payload["tokenizer"])
        expert = FrozenExpert(name, path, payload, config, tokenizer)
        if experts:
            _check_alike(expert, experts[0])
        experts.append(expert)
    return tuple(experts)


def config_for_experts(experts: Sequence[FrozenExpert], resolved: ResolvedConfig) -> Config:
    """The settings of a NanoThink over these experts: width, context and number are theirs.

    Raises:
        CheckpointMismatchError: other ones were asked for by hand.
    """
    config = resolved.config

    def asked(name: str) -> bool:
        source = resolved.sources[name]
        return source != "default" and not source.startswith("preset ")

    width = experts[0].config.model.d_model
    if asked("model.d_model") and config.model.d_model != width:
        raise CheckpointMismatchError(
            f"{experts[0].path} has width {width}, and model.d_model={config.model.d_model} was asked for. "
            "Leave it out: the width of NanoThink is its experts'."
        )
    shortest = min(experts, key=lambda expert: expert.config.model.max_seq_len)
    length = shortest.config.model.max_seq_len
    if asked("model.max_seq_len"):
        if config.model.max_seq_len > length:
            raise CheckpointMismatchError(
                f"{shortest.path} has a context of {length} tokens, and model.max_seq_len="
                f"{config.model.max_seq_len} was asked for. Ask for {length} or less, or train it on longer "
                "blocks."
            )
        length = config.model.max_seq_len
    if asked("mla.n_experts") and config.mla.n_experts != len(experts):
        raise CheckpointMismatchError(
            f"mla.n_experts={config.mla.n_experts} was asked for, not {counted(len(experts), 'expert')}: "
            f"{', '.join(str(expert.path) for expert in experts)}. Name as many by --expert."
        )
    settled: dict[str, Any] = {
        "model": config.model.model_copy(update={"d_model": width, "max_seq_len": length}),
        "mla": config.mla.model_copy(update={"n_experts": len(experts)}),
    }
    for kind in EXPERT_KINDS:  # they describe no part of this model, but must go with its width
        example = next((e for e in experts if e.kind == kind), experts[0])
        settled[kind] = getattr(example.config, kind)
    return config.model_copy(update=settled)


def described(payload: ModelPayload, device: torch.device, path: Path) -> tuple[ExpertDescription, ...]:
    """The experts inside a checkpoint; none in one of a single model.

    Raises:
        CheckpointDamagedError: they are not described as ``as_entries`` does.
    """
    if payload["kind"] != COMBINED:
        return ()
    return tuple(
        ExpertDescription(
            entry["name"],
            entry["kind"],
            scan_that_runs(resolve_config(base=entry["config"]).config, device),
        )
        for entry in entries_of(payload["run"], path)
    )


def entries_of(run: Mapping[str, Any], path: Path) -> list[Mapping[str, Any]]:
    """What a combined model's checkpoint says of its experts: name, kind and config of each, and its digest,
    which an export leaves out.

    Raises:
        CheckpointDamagedError: it is not what ``as_entries`` gives.
    """
    entries: Any = run.get("experts")
    if isinstance(entries, list) and 1 <= len(entries) <= MAX_EXPERTS and all(map(_is_entry, entries)):
        return list(entries)
    raise CheckpointDamagedError(
        f"{path}: what it says of the experts inside it makes no sense. Use another checkpoint"
    )


def _is_entry(entry: Any) -> bool:
    match entry:
        case {"name": str(), "kind": str(kind), "config": dict()}:
            return kind in EXPERT_KINDS
    return False


def as_entries(experts: Sequence[FrozenExpert]) -> list[dict[str, Any]]:
    """What a checkpoint keeps of its experts beside their weights."""
    return [
        {"name": e.name, "kind": e.kind, "config": e.config.model_dump(mode="json"), "digest": e.digest}
        for e in experts
    ]


def check_same_experts(experts: Sequence[FrozenExpert], run: Mapping[str, Any], path: Path) -> None:
    """Refuse to go on from ``path`` when other experts are named than those inside it."""
    inside = entries_of(run, path)
    if [expert.digest for expert in experts] != [entry.get("digest") for entry in inside]:
        raise CheckpointMismatchError(
            f"{path} carries its own experts ({', '.join(entry['name'] for entry in inside)}), and "
            "those named by --expert are not the same. Leave --expert out to go on, or start anew without "
            "--resume."
        )


def scan_that_runs(config: Config, device: torch.device) -> Config:
    """The selective scan of training where this machine has it, else the one that is chosen here."""
    if config.state_space.scan == "auto":  # not settled: there is no such model in this checkpoint
        return config
    try:
        choose_scan(device.type, config.state_space.scan)
    except UsageError:
        scan = config.state_space.model_copy(update={"scan": "auto"})
        return config.model_copy(update={"state_space": scan})
    return config


def _check_alike(expert: FrozenExpert, first: FrozenExpert) -> None:
    if expert.tokenizer.fingerprint != first.tokenizer.fingerprint:
        raise CheckpointMismatchError(
            f"{expert.path} was trained with the tokenizer '{expert.tokenizer.name}' "
            f"({expert.tokenizer.vocab_size} tokens), and {first.path} with '{first.tokenizer.name}' "
            f"({first.tokenizer.vocab_size}). Experts that are combined share one: train it again, with "
            f"--tokenizer {first.tokenizer_setting}."
        )
    if expert.config.model.d_model != first.config.model.d_model:
        raise CheckpointMismatchError(
            f"{expert.path} has width {expert.config.model.d_model}, and {first.path} has "
            f"{first.config.model.d_model}. Experts that are combined share one: train it again, with "
            f"--set model.d_model={first.config.model.d_model}."
        )


def _name_of(path: Path, taken: Sequence[str]) -> str:
    """``code`` of ``code_expert.pt``; numbered where two experts would have the same name."""
    parsed = parse_name(path.name)
    name = (parsed.stem if parsed else path.stem).removesuffix(_ENDING) or path.stem
    number, unique = 1, name
    while unique in taken or unique == VECTOR_STORE:
        number += 1
        unique = f"{name}-{number}"
    return unique


def _command_for(path: Path) -> str:
    if not path.name.endswith(f"{_ENDING}.pt"):
        return f"nanothink pretrain KIND, which makes KIND{_ENDING}.pt"
    name = path.name.removesuffix(f"{_ENDING}.pt")
    what = name if name in EXPERT_KINDS else f"KIND --name {name}"
    folder = "./" if path.parent == Path() else str(path.parent)  # a full stop may follow
    return f"nanothink pretrain {what} --checkpoint-dir {folder}"


def _listed(paths: Sequence[Path]) -> str:
    return " and ".join(map(str, paths)) + (" is" if len(paths) == 1 else " are")
