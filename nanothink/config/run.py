"""The root config, and the sources of its values.

    default < preset < nanothink.toml or --config < NANOTHINK_... environment < --set < flag

``resolve_config`` merges these sources, records the source of each value, and validates the result once.
Below the command line nothing reads flags, files or the environment.

In a resumed run the checkpoint's settings replace the defaults, and only the command line itself (preset,
file,
--set, flag) overrides them: a ``nanothink.toml`` in the folder must not silently change a run.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import ValidationError, model_validator

from nanothink.config.base import Settings
from nanothink.config.data import DataConfig
from nanothink.config.distributed import DistributedConfig
from nanothink.config.model import (
    DiffuserConfig,
    DocumentCacheConfig,
    MLAConfig,
    ModelConfig,
    StateSpaceConfig,
    TransformerConfig,
    VectorStoreConfig,
)
from nanothink.config.other_names import setting_meant
from nanothink.config.text_encoding import conversion, wide_encoding
from nanothink.config.training import (
    DistillationConfig,
    TrainDiffuserConfig,
    TrainExpertConfig,
    TrainMLAConfig,
)
from nanothink.errors import ConfigError
from nanothink.suggestions import did_you_mean, suggest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found, unused-ignore]

DEFAULT_FILE = "nanothink.toml"
ENVIRONMENT_PREFIX = "NANOTHINK_"
_MAX_SHOWN_CHARS = 200
"""Longest part of a wrong value that an error shows."""


class Config(Settings):
    """All settings of a run, by section."""

    model: ModelConfig = ModelConfig()
    transformer: TransformerConfig = TransformerConfig()
    state_space: StateSpaceConfig = StateSpaceConfig()
    diffuser: DiffuserConfig = DiffuserConfig()
    mla: MLAConfig = MLAConfig()
    vector_store: VectorStoreConfig = VectorStoreConfig()
    document_cache: DocumentCacheConfig = DocumentCacheConfig()
    data: DataConfig = DataConfig()
    distributed: DistributedConfig = DistributedConfig()
    train_expert: TrainExpertConfig = TrainExpertConfig()
    train_diffuser: TrainDiffuserConfig = TrainDiffuserConfig()
    train_mla: TrainMLAConfig = TrainMLAConfig()
    distillation: DistillationConfig = DistillationConfig()

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Config:
        width, shape = self.model.d_model, self.transformer
        heads, groups = shape.n_heads, shape.n_kv_heads or shape.n_heads
        if heads % groups:
            raise ValueError(
                f"transformer.n_kv_heads={groups} does not divide transformer.n_heads={heads}; each head of "
                "keys serves an equal number of attention heads"
            )
        if shape.head_dim is not None:
            if shape.head_dim % 2:
                raise ValueError(f"transformer.head_dim={shape.head_dim} is odd; rotary positions need pairs")
        elif width % heads or (width // heads) % 2:
            fitting = [h for h in range(1, width // 2 + 1) if width % h == 0 and width // h % 2 == 0]
            raise ValueError(
                f"transformer.n_heads={heads} does not split model.d_model={width} into heads of even width; "
                + (f"use one of {', '.join(map(str, fitting[:12]))}" if fitting else "make d_model even")
            )
        return self

    @model_validator(mode="after")
    def _sampling_visits_trained_levels(self) -> Config:
        if self.diffuser.inference_steps > self.diffuser.training_steps:
            raise ValueError(
                f"diffuser.inference_steps={self.diffuser.inference_steps} is more than "
                f"diffuser.training_steps={self.diffuser.training_steps}, the noise levels there are"
            )
        return self


@dataclass(frozen=True)
class ResolvedConfig:
    """A validated config, and the source of each ``section.key``."""

    config: Config
    sources: Mapping[str, str]


@cache
def known_settings() -> Mapping[str, str]:
    """Every ``section.key`` with its one-sentence description."""
    return {
        f"{section}.{key}": " ".join((field.description or "").split())
        for section, model in _sections().items()
        for key, field in model.model_fields.items()
    }


def flatten(config: Config) -> dict[str, Any]:
    """The values of a config by ``section.key``, as plain JSON values."""
    return {
        f"{section}.{key}": value
        for section, values in config.model_dump(mode="json").items()
        for key, value in values.items()
    }


def preset_names() -> list[str]:
    return sorted(
        entry.name.removesuffix(".toml")
        for entry in resources.files("nanothink.config").joinpath("presets").iterdir()
        if entry.name.endswith(".toml")
    )


def preset_text(name: str) -> str:
    """TOML text of a preset. Raises ConfigError for an unknown name."""
    if name not in preset_names():
        known = ", ".join(preset_names())
        raise ConfigError(f"There is no preset '{name}'.{did_you_mean(name, preset_names())} Known: {known}.")
    return resources.files("nanothink.config").joinpath("presets").joinpath(f"{name}.toml").read_text("utf-8")


def resolve_config(
    *,
    base: Mapping[str, Any] | None = None,
    preset: str | None = None,
    file: Path | None = None,
    environ: Mapping[str, str] | None = None,
    assignments: Iterable[str] = (),
    flags: Mapping[str, tuple[str, Any]] | None = None,
    folder: Path | None = None,
) -> ResolvedConfig:
    """Merge all sources of settings and validate the result.

    Args:
        base: nested settings of a checkpoint, which replace the defaults in a resumed run.
        preset: name of a preset.
        file: a TOML file; if None, ``nanothink.toml`` in ``folder`` if there is one.
        environ: the environment; only ``NANOTHINK_SECTION__KEY`` variables are read.
        assignments: ``section.key=value`` strings of ``--set``.
        flags: ``section.key`` -> (flag as typed, value); a value of None means the flag was not given.
        folder: folder of ``nanothink.toml``; None: no such file is read.

    Raises:
        ConfigError: an unknown name (with a suggestion), a value out of bounds (with its source), or a
            file that cannot be read.
    """
    values = dict(flatten(Config()))
    sources = dict.fromkeys(values, "default")

    def lay(layer: Mapping[str, Any], source: str) -> None:
        for name, value in layer.items():
            _check_known(name, source)
            if isinstance(value, int) and value.bit_length() > 64:
                raise ConfigError(f"{source}: {name} is an integer of more than 64 bits. Give a smaller one.")
            values[name] = value
            sources[name] = source

    if base is not None:
        known = known_settings()
        lay({k: v for k, v in _flat(base, "checkpoint").items() if k in known}, "checkpoint")
    if preset is not None:
        lay(
            _flat(_parse_toml(preset_text(preset), f"preset {preset}"), f"preset {preset}"),
            f"preset {preset}",
        )
    if file is None and folder is not None and (folder / DEFAULT_FILE).is_file():
        file = folder / DEFAULT_FILE
    if file is not None:
        lay(_flat(_read_toml(file), str(file)), str(file))
    for variable, raw in sorted((environ or {}).items()):
        if variable.startswith(ENVIRONMENT_PREFIX):
            name = variable.removeprefix(ENVIRONMENT_PREFIX).lower().replace("__", ".")
            lay({name: _parse_value(raw)}, variable)
    for assignment in assignments:
        name, equals, raw = assignment.partition("=")
        if not equals:
            raise ConfigError(
                f"--set {assignment}: expected section.key=value, for example train_expert.lr=1e-3."
            )
        lay({name.strip().replace("-", "_"): _parse_value(raw.strip())}, "--set")
    for name, (flag, value) in (flags or {}).items():
        if value is not None:
            lay({name: value}, flag)

    nested: dict[str, dict[str, Any]] = {section: {} for section in _sections()}
    for name, value in values.items():
        section, _, key = name.partition(".")
        nested[section][key] = value
    try:
        return ResolvedConfig(Config.model_validate(nested), sources)
    except ValidationError as error:
        raise ConfigError(_explain(error, sources)) from None


def with_preset(resolved: ResolvedConfig, preset: str) -> ResolvedConfig:
    """The same settings with another preset; values that were set by hand stay.

    Raises:
        ConfigError: they do not go together.
    """
    by_hand = {
        name: (resolved.sources[name], value)
        for name, value in flatten(resolved.config).items()
        if set_by_hand(resolved.sources[name])
    }
    return resolve_config(preset=preset, flags=by_hand)


def set_by_hand(source: str) -> bool:
    """True for the source of a value that neither a default nor a preset gives."""
    return source != "default" and not source.startswith("preset ")


def _sections() -> dict[str, type[Settings]]:
    return {
        name: field.annotation
        for name, field in Config.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, Settings)
    }


def _check_known(name: str, source: str) -> None:
    known = known_settings()
    if name in known:
        return
    section, _, key = name.partition(".")
    if not key and section in _sections():
        raise ConfigError(
            f"{source}: '{section}' is a section; name one of its settings, as in {section}.KEY=VALUE."
        )
    candidates = list(known)
    # A key without its section is the most common mistake, so suggest by key as well.
    meant = setting_meant(key or section, *([section] if section.startswith("train_") else []))
    suggestion = f" Did you mean '{meant}'?" if meant in known else did_you_mean(name, candidates)
    if not suggestion:
        keys = {full.partition(".")[2]: full for full in reversed(candidates)}  # the first section wins
        hint = did_you_mean(key or section, keys)
        for short, full in keys.items():
            hint = hint.replace(f"'{short}'", f"'{full}'")
        suggestion = hint
    raise ConfigError(
        f"{source}: there is no setting '{name}'.{suggestion} {suggest('config show')} lists them all."
    )


def _flat(nested: Mapping[str, Any], source: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for section, values in nested.items():
        if not isinstance(values, Mapping):
            raise ConfigError(
                f"{source}: '{section}' stands outside a section.{did_you_mean(section, _sections())} "
                f"Settings belong under one of {', '.join(f'[{s}]' for s in _sections())}."
            )
        for key, value in values.items():
            flat[f"{section}.{key}"] = value
    return flat


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"Config file {path} does not exist.") from None
    except OSError as error:
        raise ConfigError(f"Config file {path} cannot be read: {error.strerror}.") from None
    encoding, place = wide_encoding(content), ""
    if not encoding:
        try:
            text = content.decode("utf-8-sig")  # editors of Windows begin a file with a byte-order mark
            return _parse_toml(text.replace("\r\n", "\n").replace("\r", "\n"), str(path))
        except UnicodeDecodeError as error:
            line = content[: error.start].count(b"\n") + 1
            encoding, place = "ISO-8859-1", f": byte 0x{content[error.start]:02x} in line {line} does not fit"
    raise ConfigError(
        f"Config file {path} is not UTF-8 text{place}. Convert it to a new file and use that: "
        f"{conversion(encoding, str(path), f'{path.stem}-utf8.toml')}"
    )


def _parse_toml(text: str, source: str) -> dict[str, Any]:
    try:
        loaded: dict[str, Any] = tomllib.loads(text)
    except RecursionError:
        raise ConfigError(f"{source} is not valid TOML: its values are nested too deeply.") from None
    except ValueError as error:  # TOMLDecodeError, or an integer of more digits than Python converts
        raise ConfigError(f"{source} is not valid TOML: {error}.") from None
    return loaded


def _parse_value(raw: str) -> Any:
    """Parse a value as TOML; plain text if it is not TOML; None for none/null."""
    if raw.lower() in {"none", "null"}:
        return None
    if raw.lower() in {"true", "false"}:
        return raw.lower() == "true"
    try:
        return tomllib.loads(f"value = {raw}")["value"]
    except (ValueError, RecursionError):
        return raw


def _shortened(value: Any) -> str:
    try:
        shown = repr(value)
    except ValueError:  # an integer of more digits than Python converts, written in hexadecimal
        return "a number that is too long to show"
    return shown if len(shown) <= _MAX_SHOWN_CHARS else f"{shown[:_MAX_SHOWN_CHARS]}..."


def _explain(error: ValidationError, sources: Mapping[str, str]) -> str:
    lines = []
    for problem in error.errors():
        name = ".".join(str(part) for part in problem["loc"][:2])
        message = problem["msg"].removeprefix("Value error, ")
        if name in sources:
            lines.append(f"{name} = {_shortened(problem['input'])} (from {sources[name]}): {message}.")
        else:
            lines.append(message if message.endswith(".") else f"{message}.")
    return "\n".join(lines)
