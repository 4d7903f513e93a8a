"""The checkpoint that a new run starts from: its weights, shape and tokenizer, not its training state.

Text that it was trained on stays in training, and the rule of its split is kept, as for all models that a run
builds on (inherited_split.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nanothink.config import Config, TrainConfig, TrainExpertConfig
from nanothink.config.run import ResolvedConfig, flatten, set_by_hand
from nanothink.errors import CheckpointMismatchError, UsageError
from nanothink.models import EXPERTS, shape_sections, training_of
from nanothink.models.contract import LanguageModel
from nanothink.models.low_rank import add_adapters, largest_rank
from nanothink.reporter import SILENT, Reporter
from nanothink.runs.resuming import RunSpec
from nanothink.runs.saved_model import SavedModel
from nanothink.suggestions import again, suggest

INITIAL = "init"
"""Name of this checkpoint among the parts of a run."""

_BLOCK = "model.max_seq_len"
_FREE = {_BLOCK, "state_space.scan"}
"""Settings of a shape that no weight depends on."""


FINE_TUNING = {
    "optimizer": "adamw",
    "lr": 1e-4,
    "lr_matrices": 1.0,
    "lr_embeddings": 1.0,
    "lr_head": 1.0,
    "lr_other": 1.0,
    "max_epochs": 3,
    "fit_to_text": False,
}
"""Training of a published model where nothing else is asked for. The rates of a model that starts from random
weights, whose tables are of another scale, undo in a step what it knows (docs/log.md)."""

_ADAPTERS = ("lora_rank", "lora_alpha")


def with_adapters(model: LanguageModel, training: TrainConfig) -> LanguageModel:
    """``model``, frozen under low-rank adapters if the settings ask for them."""
    if isinstance(training, TrainExpertConfig) and training.lora_rank is not None:
        add_adapters(model, training.lora_rank, training.lora_scale)
    return model


def check_no_adapters(kind: str, resolved: ResolvedConfig) -> None:
    """Raise UsageError if adapters are asked for where there is no model to adapt."""
    training = training_of(kind, resolved.config)
    if isinstance(training, TrainExpertConfig) and training.lora_rank is not None:
        raise UsageError(
            f"{resolved.sources['train_expert.lora_rank']}: low-rank adapters belong to a trained model, "
            "which stays as it is. Name it: --init PATH."
        )


def check_same_adapters(before: Mapping[str, Any], training: TrainConfig) -> None:
    """Raise UsageError if a resumed run would have other adapters than its checkpoint."""
    own = before.get(training.section, {})
    for name in _ADAPTERS if isinstance(training, TrainExpertConfig) else ():
        if (was := own.get(name)) != (now := getattr(training, name)):
            raise UsageError(
                f"train_expert.{name} was {was} when this run began, and cannot become {now}. Leave it out, "
                "or start a new run from its checkpoint: --init PATH --name OTHER"
            )


def find_initial(spec: RunSpec, config: Config, reporter: Reporter = SILENT) -> SavedModel:
    """Read the checkpoint that ``--init`` names.

    Raises:
        CheckpointError: it is missing, damaged or of another kind.
    """
    assert spec.init is not None
    if (base := EXPERTS[spec.kind].model().base(config)) is not None:
        raise UsageError(f"--init: a {spec.kind} starts from its {base.kind}, which {base.option} names.")
    found = SavedModel.read(spec.init, reporter)
    if found.kind != spec.kind:
        raise CheckpointMismatchError(
            f"{spec.init} holds a {found.kind}, not a {spec.kind}. Train it further by: "
            + suggest("pretrain", found.kind, "--init", spec.init, "--name", f"{found.kind}_further")
        )
    return found


def _check_rank(initial: SavedModel, resolved: ResolvedConfig) -> None:
    training = training_of(initial.kind, resolved.config)
    if not isinstance(training, TrainExpertConfig) or training.lora_rank is None:
        return
    most = largest_rank((name, tensor.shape) for name, tensor in initial.payload["model_state"].items())
    if training.lora_rank > most:
        raise UsageError(
            f"{resolved.sources['train_expert.lora_rank']}: adapters of rank {training.lora_rank} are not "
            f"low-rank in {initial.path}, whose smallest matrix has {most} rows or columns. Use at most "
            f"{most}; 8 is usual."
        )


def config_of_initial(initial: SavedModel, resolved: ResolvedConfig, reporter: Reporter = SILENT) -> Config:
    """The settings of a run that starts from ``initial``: its shape is that model's.

    Blocks may be shorter than its context, which then is theirs. A published model gets the rates of
    ``FINE_TUNING``, whatever a preset says.

    Raises:
        UsageError: another shape is asked for, or blocks beyond its context.
    """
    # always the transformer too: its heads must divide the width
    sections = dict.fromkeys(("model", "transformer", *shape_sections(initial.kind)))
    own, asked = flatten(initial.config), flatten(resolved.config)
    for name, source in resolved.sources.items():
        named = name.partition(".")[0] in sections and name not in _FREE
        if named and set_by_hand(source) and asked[name] != own[name]:
            raise UsageError(
                f"{name} is {own[name]} in {initial.path}, whose weights this run starts from, and "
                f"{asked[name]} from {source}. Leave it out."
            )
    _check_rank(initial, resolved)
    length, longest = asked[_BLOCK], own[_BLOCK]
    if length > longest and set_by_hand(resolved.sources[_BLOCK]):
        raise UsageError(
            f"{_BLOCK}={length} is beyond the context of {initial.path}. Use at most {longest}: "
            f"{again('--set', f'{_BLOCK}={longest}')}"
        )
    if length > longest:
        reporter.note(f"Blocks of {longest:,} tokens, not of {length}: {initial.path} has no longer context.")
    elif length < longest:
        reporter.note(
            f"Blocks of {length} tokens: the new model's context. {initial.path} has one of {longest:,}; for "
            f"longer blocks: --set {_BLOCK}=N"
        )
    free = {_BLOCK: min(length, longest), **{name: asked[name] for name in _FREE - {_BLOCK}}}
    update: dict[str, Any] = {}
    training = training_of(initial.kind, resolved.config)
    if "imported" in initial.payload["run"]:
        rates = {
            name: value
            for name, value in FINE_TUNING.items()
            if not set_by_hand(resolved.sources[f"{training.section}.{name}"])
        }
        if rates:
            listed = ", ".join(f"{name}={value}" for name, value in rates.items())
            reporter.note(f"Chosen for the weights of a published model: {listed}.")
        update[training.section] = training.model_copy(update=rates)
    for section in sections:
        values = {
            name.partition(".")[2]: value for name, value in free.items() if name.startswith(f"{section}.")
        }
        update[section] = getattr(initial.config, section).model_copy(update=values)
    return resolved.config.model_copy(update=update)
