"""The experts that NanoThink combines: found, and checked against one another."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from nanothink.checkpoints import ModelPayload, parse_name
from nanothink.config import Config
from nanothink.config.run import ResolvedConfig
from nanothink.errors import CheckpointMismatchError, CheckpointNotFoundError, UsageError
from nanothink.models import EXPERTS
from nanothink.models.store_gate import VECTOR_STORE
from nanothink.reporter import SILENT, Reporter
from nanothink.runs.saved_model import MAX_EXPERTS, SavedModel, expert_entries
from nanothink.suggestions import suggest
from nanothink.wording import counted

_ENDING = "_expert"


def find_experts(
    paths: Sequence[Path] | None, checkpoint_dir: Path, reporter: Reporter = SILENT
) -> dict[str, SavedModel]:
    """Read the experts that were named, or the one of each kind in the checkpoint folder; by name.

    Raises:
        CheckpointError: one is missing (with the command to run), is no expert, or differs from the first in
            tokenizer or width.
        UsageError: one is named twice, or too many are.
    """
    defaults = [checkpoint_dir / f"{kind}{_ENDING}.pt" for kind in EXPERTS]
    chosen = list(paths or defaults)
    if len({path.resolve() for path in chosen}) < len(chosen):
        raise UsageError(f"--expert names a checkpoint twice: {', '.join(map(str, chosen))}.")
    if len(chosen) > MAX_EXPERTS:
        raise UsageError(f"--expert names {len(chosen)} checkpoints; at most {MAX_EXPERTS} can be combined.")
    if missing := [path for path in chosen if not path.exists()]:
        others = "" if paths else " Or name the experts you have: --expert PATH, repeated."
        raise CheckpointNotFoundError(
            f"NanoThink combines trained experts, and {_listed(missing)} not there. Train first: "
            f"{'; '.join(_command_for(path, named=bool(paths)) for path in missing)}.{others}"
        )
    experts: dict[str, SavedModel] = {}
    for path in chosen:
        expert = SavedModel.read(path, reporter)
        if expert.kind not in EXPERTS:
            raise CheckpointMismatchError(
                f"{path} holds a {expert.kind}, which is no expert. NanoThink combines experts of these "
                f"kinds: {', '.join(EXPERTS)}."
            )
        if experts:
            _check_alike(expert, next(iter(experts.values())))
        experts[_name_of(path, experts)] = expert
    return experts


def config_for_experts(experts: Mapping[str, SavedModel], resolved: ResolvedConfig) -> Config:
    """The settings of a NanoThink over these experts: their context and number, the first one's width.

    Raises:
        CheckpointMismatchError: other ones were asked for by hand.
    """
    config, parts = resolved.config, list(experts.values())

    def asked(name: str) -> bool:
        source = resolved.sources[name]
        return source != "default" and not source.startswith("preset ")

    width = parts[0].config.model.d_model
    if asked("model.d_model") and config.model.d_model != width:
        raise CheckpointMismatchError(
            f"{parts[0].path} has width {width}, and model.d_model={config.model.d_model} was asked for. "
            "Leave it out: the width of NanoThink is its first expert's."
        )
    shortest = min(parts, key=lambda expert: expert.config.model.max_seq_len)
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
            f"{', '.join(str(expert.path) for expert in parts)}. Name as many by --expert."
        )
    settled: dict[str, Any] = {
        "model": config.model.model_copy(update={"d_model": width, "max_seq_len": length}),
        "mla": config.mla.model_copy(update={"n_experts": len(experts)}),
    }
    for kind, entry in EXPERTS.items():  # they describe no part of this model, but must go with its width
        of_width = (e for e in parts if e.kind == kind and e.config.model.d_model == width)
        example = next(of_width, parts[0])
        settled |= {section: getattr(example.config, section) for section in entry.sections[:1]}
    return config.model_copy(update=settled)


def as_entries(experts: Mapping[str, SavedModel]) -> list[Mapping[str, Any]]:
    """The description of its experts that a checkpoint keeps beside their weights."""
    return [
        {"name": name, "kind": e.kind, "config": e.config.model_dump(mode="json"), "digest": e.digest}
        for name, e in experts.items()
    ]


def check_same_experts(experts: Mapping[str, SavedModel], payload: ModelPayload, path: Path) -> None:
    """Refuse to resume ``path`` when other experts are named than those inside it."""
    inside = expert_entries(payload, path)
    if [expert.digest for expert in experts.values()] != [entry.get("digest") for entry in inside]:
        raise CheckpointMismatchError(
            f"{path} carries its own experts ({', '.join(entry['name'] for entry in inside)}), and "
            "those named by --expert are not the same. Leave --expert out to resume, or start anew without "
            "--resume."
        )


def _check_alike(expert: SavedModel, first: SavedModel) -> None:
    if expert.tokenizer.fingerprint != first.tokenizer.fingerprint:
        raise CheckpointMismatchError(
            f"{expert.path} was trained with the tokenizer '{expert.tokenizer.name}' "
            f"({expert.tokenizer.vocab_size} tokens), and {first.path} with '{first.tokenizer.name}' "
            f"({first.tokenizer.vocab_size}). Experts that are combined share one: train it again, with "
            f"--tokenizer {first.config.data.tokenizer}."
        )


def _name_of(path: Path, taken: Container[str]) -> str:
    """``code`` of ``code_expert.pt``; numbered where two experts would have the same name."""
    parsed = parse_name(path.name)
    name = (parsed.stem if parsed else path.stem).removesuffix(_ENDING) or path.stem
    number, unique = 1, name
    while unique in taken or unique == VECTOR_STORE:
        number += 1
        unique = f"{name}-{number}"
    return unique


def _command_for(path: Path, *, named: bool) -> str:
    if not path.name.endswith(f"{_ENDING}.pt"):
        return f"{suggest('pretrain transformer')}, which makes transformer{_ENDING}.pt"
    name = path.name.removesuffix(f"{_ENDING}.pt")
    what = [name] if name in EXPERTS else ["transformer", "--name", name]
    return suggest("pretrain", *what, *(["--checkpoint-dir", path.parent] if named else []))


def _listed(paths: Sequence[Path]) -> str:
    return " and ".join(map(str, paths)) + (" is" if len(paths) == 1 else " are")
