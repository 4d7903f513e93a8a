"""Settings that follow from the size of the text: those of the preset auto, and advice to other runs."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import ValidationError

from nanothink.config import Config
from nanothink.config.run import set_by_hand
from nanothink.data.tokens import TokenisedCorpus
from nanothink.models import COMBINED, build_model, training_of
from nanothink.reporter import Reporter
from nanothink.runs.initial import with_adapters
from nanothink.suggestions import suggest
from nanothink.training.regularisation import AMPLE, Regularisation, is_measured, narrowed
from nanothink.training.sharding import without_memory

_FITTED = ("dropout", "weight_decay_tables", "max_epochs", "early_stopping_patience")


def fit_to_text(
    kind: str,
    config: Config,
    sources: Mapping[str, str],
    tokens: TokenisedCorpus,
    vocab_size: int,
    reporter: Reporter,
    *,
    base: Config | None = None,
    taught: bool = False,
) -> Config:
    """The settings of a new expert's run, fitted to the text where ``fit_to_text`` says so.

    Values that were set by hand stay. Without ``fit_to_text`` nothing changes; a note says if the text is
    too little for these settings.

    Args:
        base: of the model that this one builds on, and whose width it has, if there is one.
        taught: it learns a teacher's predictions.
    """
    if kind == COMBINED:
        return config
    training = training_of(kind, config)
    n_tokens = sum(stream.n_targets for stream in tokens.train.values())
    if n_tokens > AMPLE * 2 * vocab_size * config.model.d_model and not training.fit_to_text:
        return config  # tables alone tell that there is enough text
    sized: dict[str, int] = {}
    if width_is_fitted(kind, config, sources):
        width, layers = narrowed(config.model.d_model, n_tokens, taught=taught)
        if base is not None:
            width, layers = base.model.d_model, None
        if layers is None or set_by_hand(sources[f"{kind}.n_layers"]):
            layers = getattr(config, kind).n_layers
        config, sized = _of_size(config, kind, width, layers)
    with without_memory():  # shapes are enough
        model = with_adapters(build_model(kind, config, vocab_size), training)
    n_parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    rule = Regularisation.of(n_tokens, n_parameters, taught=taught)
    size = (
        f"{n_tokens:,} training tokens for {n_parameters / 1e6:.2f} M parameters "
        f"({rule.tokens_per_parameter:.2g} a parameter)"
    )
    if not training.fit_to_text:
        # without a preset even as many epochs as the rule gives are those of a model that is too large
        many = training.max_epochs > 1.5 * rule.max_epochs or sources["model.d_model"] == "default"
        if training.dropout < rule.dropout and many and training.max_steps is None:
            reporter.note(
                f"{size} are few for {training.max_epochs} epochs without dropout: the model will overfit. "
                "To choose dropout and epochs by the size of the text: "
                f"{suggest('pretrain', kind, '--preset', 'auto', '--overwrite')}."
            )
        return config

    by_hand = {name for name in _FITTED if set_by_hand(sources[f"{training.section}.{name}"])}
    fitted = {name: getattr(rule, name) for name in _FITTED if name not in by_hand}
    listed = ", ".join(f"{name}={value}" for name, value in {**sized, **fitted}.items())
    guessed = "" if is_measured(n_tokens) else " No text of this size was measured; see docs/training.md."
    reporter.note(f"{size}. Chosen for it: {listed or 'nothing, all is set by hand'}.{guessed}")
    return config.model_copy(update={training.section: training.model_copy(update=fitted)})


def width_is_fitted(kind: str, config: Config, sources: Mapping[str, str]) -> bool:
    """True if ``fit_to_text`` chooses the width of this expert too."""
    return training_of(kind, config).fit_to_text and not set_by_hand(sources["model.d_model"])


def _of_size(config: Config, kind: str, width: int, n_layers: int) -> tuple[Config, dict[str, int]]:
    """The settings with an expert of this size, with heads as wide as before, and those that have changed.

    As they were where the heads do not divide the width.
    """
    before = {"model.d_model": config.model.d_model, f"{kind}.n_layers": getattr(config, kind).n_layers}
    found = {"model.d_model": width, f"{kind}.n_layers": n_layers}
    values = config.model_dump()
    for name, value in found.items():
        section, _, key = name.partition(".")
        values[section][key] = value
    for section in ("transformer", "mla"):
        values[section]["n_heads"] = max(1, values[section]["n_heads"] * width // config.model.d_model)
    try:
        fitted = Config.model_validate(values)
    except ValidationError:
        return config, {}
    return fitted, {name: value for name, value in found.items() if value != before[name]}
