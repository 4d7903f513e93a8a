"""Settings of the text, its split and its tokenizer."""

from __future__ import annotations

from pydantic import Field, field_validator, model_validator

from nanothink.config.base import Settings

SPLIT_SEED = 42
"""The seed of the train/validation split. Fixed, so that a document never changes sides between runs."""


class DataConfig(Settings):
    data_dir: str = "data"
    """Folder with one folder of JSONL files per domain."""

    domains: tuple[str, ...] | None = None
    """Domains to use, by folder name; all of them when empty."""

    tokenizer: str = "gpt2"
    """A Hugging Face Hub name, a local folder, or a tokenizer.json file."""

    val_split: float = Field(0.1, gt=0, lt=1)
    """Fraction of the text held out for validation, in whole groups of documents chosen by a hash."""

    test_split: float = Field(0.0, ge=0, lt=1)
    """Fraction of the text kept for testing, which neither training nor validation uses."""

    skip_bad_records: bool = False
    """Skip lines that are not valid records (they are counted and named) instead of stopping."""

    @model_validator(mode="after")
    def _leaves_text_to_train_on(self) -> DataConfig:
        if self.val_split + self.test_split >= 1:
            raise ValueError(
                f"data.val_split={self.val_split} and data.test_split={self.test_split} leave nothing to "
                "train on; together they must be below 1"
            )
        return self

    @field_validator("domains", mode="before")
    @classmethod
    def _split_commas(cls, value: object) -> object:
        if value is None or value == "":
            return None
        if isinstance(value, str):
            value = [value]
        if isinstance(value, (list, tuple)):
            names = [part.strip() for item in value for part in str(item).split(",")]
            return tuple(dict.fromkeys(name for name in names if name)) or None
        return value
