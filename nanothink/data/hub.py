"""Tokenizers and models of the Hugging Face Hub: their files from its cache, or downloaded into it.

Only ``DATA_FILES`` and ``MODEL_FILES`` are fetched or read; none of them can hold code. The Hub is asked with
a short timeout before anything is downloaded, because being offline is normal. Whether to ask at all
(HF_HUB_OFFLINE), which server (HF_ENDPOINT) and where the cache is (HF_HOME) are huggingface_hub's own
settings.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from nanothink.errors import TokenizerError

_ANSWER_SECONDS = 5.0
_MARKS = ("tokenizer.json", "vocab.json", "tokenizer.model", "spiece.model")
DATA_FILES = tuple(
    (
        "tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json chat_template.jinja "
        "config.json vocab.json merges.txt vocab.txt tokenizer.model spiece.model sentencepiece.model "
        "sentencepiece.bpe.model spm.model"
    ).split()
)
"""Names of the files that tokenizers consist of: JSON, text and SentencePiece's tables."""

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
MODEL_FILES = (*DATA_FILES, *_WEIGHTS, "model-*.safetensors", "README.md", "LICENSE")
"""Names and patterns of the files that a model is imported from."""


class TokenizerUnreachableError(TokenizerError):
    """The cache holds no such tokenizer, and the Hub did not answer. The name may be right or wrong."""

    def __init__(self, name: str, reason: str, what: str = "tokenizer") -> None:
        local = "a local folder" if what == "model" else "a local folder or tokenizer.json file"
        super().__init__(
            f"{what.capitalize()} '{name}' is neither a local path nor in the Hugging Face cache, and the "
            f"Hub cannot be reached ({reason}). Connect once, or give {local}."
        )
        self.reason = reason


def hub_folder(name: str) -> Path:
    """Return the folder of the Hub's cache with the tokenizer files of ``name``; download them if needed.

    Raises:
        TokenizerUnreachableError: they are not cached, and the Hub does not answer.
        TokenizerError: the Hub has no such tokenizer, or does not hand it out.
    """
    return _cached(name, _MARKS) or _downloaded(name, DATA_FILES, "tokenizer")


def model_folder(name: str) -> Path:
    """Return the folder of the Hub's cache with a model's weights and tokenizer; download them if needed.

    Raises as ``hub_folder``.
    """
    return _cached(name, _WEIGHTS) or _downloaded(name, MODEL_FILES, "model")


def _downloaded(name: str, patterns: Sequence[str], what: str) -> Path:
    import huggingface_hub

    with _hub_errors_explained(name, what), no_progress_bars():
        huggingface_hub.model_info(name, timeout=_ANSWER_SECONDS)  # the download itself has no timeout
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=[*patterns]))


def availability(name: str) -> str:
    """Say where the tokenizer would come from, or why it cannot be had. Loads nothing."""
    import huggingface_hub

    if _cached(name, _MARKS) is not None:
        return "in the Hugging Face cache"
    try:
        with _hub_errors_explained(name):
            huggingface_hub.model_info(name, timeout=_ANSWER_SECONDS)
    except TokenizerUnreachableError as error:
        return f"neither cached nor reachable ({error.reason}); one is trained on your data in its place"
    except TokenizerError:
        pass
    return "not cached yet; the Hugging Face Hub answers"


def _cached(name: str, marks: Sequence[str]) -> Path | None:
    import huggingface_hub

    for mark in marks:
        found = huggingface_hub.try_to_load_from_cache(name, mark)
        if isinstance(found, str):
            return Path(found).parent
    return None


@contextmanager
def _hub_errors_explained(name: str, what: str = "tokenizer") -> Iterator[None]:
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise TokenizerError(
            f"The Hub hands out '{name}' only to those who accepted its terms: do so on its page, then run "
            "`hf auth login`."
        ) from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise TokenizerError(
            f"There is no {what} '{name}': no local path of that name, and the Hub knows of none. "
            "Check the spelling; a private one needs `hf auth login`."
        ) from error
    except Exception as error:  # the network library raises many kinds, and is not always the same one
        reason = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
        raise TokenizerUnreachableError(name, reason, what) from error


@contextmanager
def no_progress_bars() -> Iterator[None]:
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
