"""The checkpoint that a new run starts from: its weights, shape and tokenizer, not its training state.

Text that it was trained on stays in training, and the rule of its split is kept, as for all models that a run
builds on (inherited_split.py).
"""

from __future__ import annotations

from nanothink.config import Config
from nanothink.config.run import ResolvedConfig, flatten
from nanothink.errors import CheckpointMismatchError, UsageError
from nanothink.models import EXPERTS, shape_sections
from nanothink.reporter import SILENT, Reporter
from nanothink.runs.resuming import RunSpec
from nanothink.runs.saved_model import SavedModel

INITIAL = "init"
"""Name of this checkpoint among the parts of a run."""

_BLOCK = "model.max_seq_len"
_FREE = {_BLOCK, "state_space.scan"}
"""Settings of a shape that no weight depends on."""


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
            f"{spec.init} holds a {found.kind}, not a {spec.kind}. Train it further by: nanothink pretrain "
            f"{found.kind} --init {spec.init}"
        )
    return found


def config_of_initial(initial: SavedModel, resolved: ResolvedConfig, reporter: Reporter = SILENT) -> Config:
    """The settings of a run that starts from ``initial``: its shape is that model's.

    Blocks may be shorter than its context, which then is theirs.

    Raises:
        UsageError: another shape is asked for, or blocks beyond its context.
    """
    # always the transformer too: its heads must divide the width
    sections = dict.fromkeys(("model", "transformer", *shape_sections(initial.kind)))
    own, asked = flatten(initial.config), flatten(resolved.config)
    for name, source in resolved.sources.items():
        by_hand = source != "default" and not source.startswith("preset ")
        if name.partition(".")[0] in sections and name not in _FREE and by_hand and asked[name] != own[name]:
            raise UsageError(
                f"{name} is {own[name]} in {initial.path}, whose weights this run starts from, and "
                f"{asked[name]} from {source}. Leave it out."
            )
    length, longest = asked[_BLOCK], own[_BLOCK]
    if length > longest and resolved.sources[_BLOCK] != "default":
        raise UsageError(
            f"{_BLOCK}={length} is beyond the context of {initial.path}. Use at most {longest}: --set "
            f"{_BLOCK}={longest}"
        )
    if length < longest:
        reporter.note(
            f"Blocks of {length} tokens: the new model's context. {initial.path} has one of {longest:,}; for "
            f"longer blocks: --set {_BLOCK}=N"
        )
    free = {_BLOCK: min(length, longest), **{name: asked[name] for name in _FREE - {_BLOCK}}}
    update = {}
    for section in sections:
        values = {
            name.partition(".")[2]: value for name, value in free.items() if name.startswith(f"{section}.")
        }
        update[section] = getattr(initial.config, section).model_copy(update=values)
    return resolved.config.model_copy(update=update)
