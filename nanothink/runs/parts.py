"""The trained models that a run builds on: NanoThink's experts, or the base of an expert."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanothink.config import Config
from nanothink.config.run import ResolvedConfig
from nanothink.errors import CheckpointError, CheckpointMismatchError, CheckpointNotFoundError
from nanothink.models import COMBINED, EXPERTS
from nanothink.models.contract import FrozenBase
from nanothink.reporter import Reporter
from nanothink.runs.experts import check_same_experts, config_for_experts, find_experts
from nanothink.runs.initial import INITIAL, check_no_adapters, find_initial
from nanothink.runs.regularising import width_is_fitted
from nanothink.runs.resuming import ResumePoint, RunSpec
from nanothink.runs.saved_model import SavedModel
from nanothink.runs.teacher import TEACHER, find_teacher
from nanothink.suggestions import again, suggest


def find_parts(
    spec: RunSpec, resolved: ResolvedConfig, resume_point: ResumePoint | None, reporter: Reporter
) -> dict[str, SavedModel]:
    """The models that a run builds on, by name: NanoThink's experts; an expert's base, weights or teacher.

    Empty for an expert that learns from text alone, and if the checkpoint that is resumed contains them.

    Raises:
        CheckpointError: one is missing or does not fit, or is not the one that the run began with.
    """
    if spec.kind == COMBINED:
        if resume_point is None:
            experts = find_experts(spec.experts, spec.checkpoint_dir, reporter)
            config_for_experts(experts, resolved)
            return experts
        if spec.experts:
            named = find_experts(spec.experts, spec.checkpoint_dir, reporter)
            check_same_experts(named, resume_point.payload, resume_point.path)
        return {}
    if (teacher := find_teacher(spec, resume_point, reporter)) is not None:
        return {TEACHER: teacher}
    if spec.init is not None and resume_point is None:
        return {INITIAL: find_initial(spec, resolved.config, reporter)}
    if resume_point is None:
        check_no_adapters(spec.kind, resolved)
    base = EXPERTS[spec.kind].model().base(resolved.config)
    if base is None or (resume_point is not None and not base.at_every_step):
        return {}
    any_width = resume_point is None and width_is_fitted(spec.kind, resolved.config, resolved.sources)
    found = _find_base(spec.kind, base, resolved.config, spec.checkpoint_dir, reporter, any_width=any_width)
    if resume_point is not None:
        _check_same_base(base, found, resume_point.payload["run"], resume_point.path)
    return {base.kind: found}


def _find_base(
    kind: str,
    base: FrozenBase,
    config: Config,
    checkpoint_dir: Path,
    reporter: Reporter,
    *,
    any_width: bool,
) -> SavedModel:
    """Read the model that the settings name, or the one of its kind in the checkpoint folder.

    Args:
        kind: that of the expert to be trained.
        base: the model that it builds on.
        config: the expert's settings.
        any_width: the expert takes the width of the model.

    Raises:
        CheckpointError: it is missing, of another kind, width or context; with the command to run.
    """
    path = Path(base.path) if base.path is not None else checkpoint_dir / f"{base.kind}_expert.pt"
    width, length = config.model.d_model, config.model.max_seq_len
    if not path.exists():
        raise CheckpointNotFoundError(
            f"A {kind} learns from a trained {base.kind}, and {path} is not there. Train one first: "
            f"{suggest('pretrain', base.kind)}. Or name one: {base.option} PATH."
        )
    found = SavedModel.read(path, reporter)
    if found.kind != base.kind:
        raise CheckpointMismatchError(
            f"{path} holds a {found.kind}, and a {kind} learns from a {base.kind}. Name one: "
            f"{base.option} PATH. Or train one: "
            + suggest("pretrain", base.kind, "--name", f"{base.kind}_{width}")
        )
    own = found.config.model
    if own.d_model != width and not any_width:
        raise CheckpointMismatchError(
            f"{path} has width {own.d_model}, and this one would have {width}. Give it the same: "
            f"{again('--set', f'model.d_model={own.d_model}')}. Or train another {base.kind}, and name it "
            f"with {base.option}: {suggest('pretrain', base.kind, '--name', f'{base.kind}_{width}')}"
        )
    if base.at_every_step and own.max_seq_len < length:
        raise CheckpointMismatchError(
            f"{path} has a context of {own.max_seq_len} tokens, and this {kind}'s targets would be its "
            f"states over {length}. Use a shorter one: "
            + suggest("pretrain", kind, "--set", f"model.max_seq_len={own.max_seq_len}")
        )
    return found


def _check_same_base(base: FrozenBase, found: SavedModel, run: Mapping[str, Any], path: Path) -> None:
    """Refuse to resume ``path`` with another model than its run began with."""
    if run.get(base.kind) != found.digest:
        raise CheckpointError(
            f"{path} was trained against another {base.kind} than {found.path}, and its targets are that "
            f"one's hidden states. Put the old one back, or name it: --set {base.setting}=PATH"
        )
