from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from pydantic import ValidationError

from nanothink.config import Config, DataConfig, ModelConfig, TrainExpertConfig, TransformerConfig
from nanothink.config.run import (
    flatten,
    known_settings,
    preset_names,
    preset_text,
    resolve_config,
)
from nanothink.errors import ConfigError
from nanothink.models import training_of


def test_defaults_are_those_of_the_design() -> None:
    config = Config()
    assert (config.model.d_model, config.model.max_seq_len) == (384, 512)
    assert (config.transformer.n_layers, config.transformer.ffn_mult) == (6, 4)
    train = config.train_expert
    assert (train.lr, train.batch_size, train.max_epochs, train.grad_clip) == (3e-4, 32, 20, 1.0)
    assert (config.data.tokenizer, config.data.val_split, config.data.domains) == ("gpt2", 0.1, None)


def test_the_diffuser_has_a_training_section_of_its_own() -> None:
    config = Config()
    assert (config.diffuser.n_layers, config.diffuser.training_steps, config.diffuser.inference_steps) == (
        4,
        100,
        10,
    )
    assert (config.train_diffuser.lr, config.train_diffuser.batch_size) == (1e-4, 64)
    assert training_of("diffuser", config) is config.train_diffuser
    assert training_of("transformer", config) is config.train_expert
    for name in preset_names():  # three times the multipliers make up for a third of the rate
        config = resolve_config(preset=name).config
        for group in ("matrices", "embeddings", "head", "other"):
            ours, theirs = (
                train.lr * getattr(train, f"lr_{group}")
                for train in (config.train_diffuser, config.train_expert)
            )
            assert ours == pytest.approx(theirs), (name, group)
    tiny = resolve_config(preset="tiny").config
    assert tiny.train_diffuser.batch_size == tiny.train_expert.batch_size


def test_more_sampling_steps_than_noise_levels_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"inference_steps=10 is more than diffuser\.training_steps=5"):
        resolve_config(assignments=["diffuser.training_steps=5"])


def test_each_layer_wins_over_the_one_before(tmp_path: Path) -> None:
    file = tmp_path / "nanothink.toml"
    file.write_text("[train_expert]\nlr = 0.003\nbatch_size = 3\nmax_epochs = 3\nwarmup_steps = 3\n")
    resolved = resolve_config(
        preset="tiny",
        folder=tmp_path,
        environ={
            "NANOTHINK_TRAIN_EXPERT__BATCH_SIZE": "4",
            "NANOTHINK_TRAIN_EXPERT__WARMUP_STEPS": "4",
            "HOME": "x",
        },
        assignments=["train_expert.warmup_steps=5", "train_expert.max_epochs=5"],
        flags={"train_expert.max_epochs": ("--max-epochs", 6), "train_expert.seed": ("--seed", None)},
    )
    train, sources = resolved.config.train_expert, resolved.sources
    assert resolved.config.model.d_model == 128
    assert sources["model.d_model"] == "preset tiny"
    assert (train.lr, sources["train_expert.lr"]) == (0.003, str(file))
    assert (train.batch_size, sources["train_expert.batch_size"]) == (4, "NANOTHINK_TRAIN_EXPERT__BATCH_SIZE")
    assert (train.warmup_steps, sources["train_expert.warmup_steps"]) == (5, "--set")
    assert (train.max_epochs, sources["train_expert.max_epochs"]) == (6, "--max-epochs")
    assert (train.seed, sources["train_expert.seed"]) == (42, "default")


def test_an_explicit_file_takes_the_place_of_the_one_in_the_folder(tmp_path: Path) -> None:
    (tmp_path / "nanothink.toml").write_text("[model]\nd_model = 96\n")
    other = tmp_path / "other.toml"
    other.write_text("[model]\nmax_seq_len = 64\n")
    config = resolve_config(folder=tmp_path, file=other).config
    assert (config.model.d_model, config.model.max_seq_len) == (384, 64)


def test_a_checkpoint_stands_where_the_defaults_stand() -> None:
    base = resolve_config(preset="tiny", assignments=["train_expert.lr=0.5"]).config.model_dump(mode="json")
    resolved = resolve_config(base=base, assignments=["train_expert.max_epochs=9"])
    assert resolved.config.train_expert.lr == 0.5
    assert resolved.sources["train_expert.lr"] == "checkpoint"
    assert resolved.config.train_expert.max_epochs == 9
    assert resolved.sources["train_expert.max_epochs"] == "--set"


def test_a_setting_that_an_old_checkpoint_still_has_is_passed_over() -> None:
    base = Config().model_dump(mode="json")
    base["transformer"]["gone"] = 1
    assert resolve_config(base=base).config == Config()


@pytest.mark.parametrize(
    ("assignment", "said"),
    [
        ("train_expert.lrr=1", "Did you mean 'train_expert.lr'?"),
        ("lr=1", "Did you mean 'train_expert.lr'?"),
        ("trian_expert.lr=1", "Did you mean 'train_expert.lr'?"),
        ("train_expert=1", "is a section"),
        ("train_expert.lr", "expected section.key=value"),
        ("train_expert.lr=fast", "train_expert.lr = 'fast' (from --set)"),
        ("train_expert.lr=-1", "greater than 0"),
        ("train_expert.lr=nan", "finite"),
        ("transformer.n_heads=5", "use one of 1, 2, 3, 4, 6"),
        pytest.param("train_expert.max_steps=" + "1" * 5000, "1111...", id="5,000 digits"),
        pytest.param("train_expert.max_steps=0x" + "f" * 5000, "more than 64 bits", id="20,000 bits"),
        pytest.param(
            "train_expert.lr=[0x" + "f" * 5000 + "]", "too long to show", id="20,000 bits in a list"
        ),
        pytest.param("train_expert.lr=" + "[" * 5000, "[[[...", id="5,000 brackets"),
        ("train_expert.schedule=linear", "'cosine' or 'trapezoid'"),
    ],
)
def test_a_bad_assignment_says_what_to_change(assignment: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_config(assignments=[assignment])
    assert said in str(caught.value)
    assert caught.value.exit_code == 2


def test_unknown_keys_in_a_file_name_the_file(tmp_path: Path) -> None:
    file = tmp_path / "my.toml"
    file.write_text("[model]\nd_modle = 3\n")
    with pytest.raises(
        ConfigError, match=r"my\.toml: there is no setting 'model\.d_modle'\. Did you mean 'model\.d_model'"
    ):
        resolve_config(file=file)
    file.write_text("d_model = 3\n")
    with pytest.raises(ConfigError, match="stands outside a section"):
        resolve_config(file=file)
    file.write_text("[model\n")
    with pytest.raises(ConfigError, match="not valid TOML"):
        resolve_config(file=file)
    for value in ("1" * 5000, "[" * 5000):
        file.write_text(f"[train_expert]\nmax_steps = {value}\n")
        with pytest.raises(ConfigError, match=r"my\.toml is not valid TOML"):
            resolve_config(file=file)
    with pytest.raises(ConfigError, match="does not exist"):
        resolve_config(file=tmp_path / "none.toml")


@pytest.mark.parametrize("given_by_hand", [True, False])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_file_of_any_editor_is_read(tmp_path: Path, encoding: str, end: str, given_by_hand: bool) -> None:
    file = tmp_path / "nanothink.toml"
    file.write_bytes(f"# Größe{end}[model]{end}d_model = 96{end}".encode(encoding))
    resolved = resolve_config(file=file) if given_by_hand else resolve_config(folder=tmp_path)
    assert resolved.config.model.d_model == 96
    assert resolved.sources["model.d_model"] == str(file)


@pytest.mark.parametrize(
    "encoding",
    ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be", "iso-8859-1"],
)
def test_a_file_of_another_encoding_is_refused_with_a_command_that_works(
    tmp_path: Path, encoding: str
) -> None:
    file = tmp_path / "größe 1.toml"
    file.write_bytes("[model]\n# Größe\nd_model = 96\n".encode(encoding))
    with pytest.raises(ConfigError, match="is not UTF-8 text") as caught:
        resolve_config(file=file)
    subprocess.run(str(caught.value).partition("use that: ")[2], shell=True, check=True, cwd=tmp_path)
    assert resolve_config(file=tmp_path / "größe 1-utf8.toml").config.model.d_model == 96


def test_an_unknown_variable_of_ours_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"Did you mean 'model\.d_model'"):
        resolve_config(environ={"NANOTHINK_MODEL__D_MODLE": "3"})


def test_values_are_read_as_toml_would() -> None:
    config = resolve_config(
        assignments=[
            "train_expert.betas=[0.8, 0.99]",
            "train_expert.use_amp=False",
            "train_expert.max_steps=none",
            "data.domains=code, law",
            "data.tokenizer=my/tokenizer",
        ]
    ).config
    assert config.train_expert.betas == (0.8, 0.99)
    assert config.train_expert.use_amp is False
    assert config.train_expert.max_steps is None
    assert config.data.domains == ("code", "law")
    assert config.data.tokenizer == "my/tokenizer"


@pytest.mark.parametrize("name", preset_names())
def test_presets_are_valid(name: str) -> None:
    assert resolve_config(preset=name).config
    assert preset_text(name)


def test_presets_that_are_promised() -> None:
    assert {"tiny", "default", "large"} <= set(preset_names())
    with pytest.raises(ConfigError, match="Did you mean 'tiny'"):
        resolve_config(preset="tinny")


def test_the_default_preset_is_the_defaults() -> None:
    assert resolve_config(preset="default").config == Config()


def test_settings_are_frozen_and_closed() -> None:
    with pytest.raises(ValidationError):
        ModelConfig(d_model=384, depth=3)  # type: ignore[call-arg]
    with pytest.raises(ValidationError):
        ModelConfig().d_model = 3  # type: ignore[misc]


@pytest.mark.parametrize("section", [ModelConfig, TransformerConfig, DataConfig, TrainExpertConfig])
def test_every_setting_says_what_it_is(section: type[ModelConfig]) -> None:
    undocumented = [name for name, field in section.model_fields.items() if not field.description]
    assert undocumented == []


def test_a_config_survives_the_trip_through_a_checkpoint() -> None:
    config = resolve_config(preset="tiny", assignments=["data.domains=a,b"]).config
    assert resolve_config(base=config.model_dump(mode="json")).config == config
    assert set(flatten(config)) == set(known_settings())


def test_domains_come_comma_separated_or_repeated() -> None:
    assert DataConfig(domains=("a,b", "c", "a")).domains == ("a", "b", "c")
    assert DataConfig(domains=()).domains is None
