"""Tokenizer files of the Hugging Face Hub: from its cache, or downloaded into it.

Only ``DATA_FILES`` are ever fetched or read, none of which can hold code.
Offline is a normal state here, so it is found out within seconds and before anything heavy is imported.
"""

from __future__ import annotations

import os
import ssl
import threading
import urllib.error
import urllib.request
from pathlib import Path

from nanothink.errors import TokenizerError

_PROBE_SECONDS = 5.0
_MARKS = ("tokenizer.json", "vocab.json", "tokenizer.model", "spiece.model")
DATA_FILES = (
    *(
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "config.json",
    ),
    *("vocab.json", "merges.txt", "vocab.txt"),
    *("tokenizer.model", "spiece.model", "sentencepiece.model", "sentencepiece.bpe.model", "spm.model"),
)
"""Names of the files that tokenizers consist of: JSON, text and SentencePiece's tables."""


class TokenizerUnreachableError(TokenizerError):
    """The Hub did not answer, and its cache holds no such tokenizer. Nothing is known about the name."""


def hub_folder(name: str) -> Path:
    """The folder of the Hub's cache that holds the tokenizer files of ``name``.

    Raises TokenizerUnreachableError when they are not cached and the Hub cannot be asked,
    TokenizerError when the Hub answers that it has no such thing or does not hand it out.
    """
    cached = _cached(name)
    if cached is not None:
        return cached
    reason = _why_unreachable(name)
    if reason is not None:
        raise TokenizerUnreachableError(
            f"Tokenizer '{name}' is neither a local path nor in the Hugging Face cache, and the Hub cannot "
            f"be reached ({reason}). Connect once, or give a local folder or tokenizer.json file."
        )
    return _download(name)


def availability(name: str) -> str:
    """Where the tokenizer of that name would come from, or why it cannot be had. Loads nothing."""
    if _cached(name) is not None:
        return "in the Hugging Face cache"
    reason = _why_unreachable(name)
    if reason is None:
        return "not cached yet; the Hugging Face Hub answers"
    return f"neither cached nor reachable ({reason}); one is trained on your data in its place"


def _cached(name: str) -> Path | None:
    import huggingface_hub

    for mark in _MARKS:
        found = huggingface_hub.try_to_load_from_cache(name, mark)
        if isinstance(found, str):
            return Path(found).parent
    return None


def _why_unreachable(name: str) -> str | None:
    """None when something answers; else why not."""
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(variable, "").lower() in ("1", "true", "yes", "on"):
            return f"{variable} is set"
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    answer: list[str | None] = []
    # In a thread, because a name server that does not answer is not bound by a socket's timeout.
    probe = threading.Thread(
        target=lambda: answer.append(_probe(f"{endpoint}/{name}/resolve/main/tokenizer_config.json")),
        daemon=True,
    )
    probe.start()
    probe.join(_PROBE_SECONDS + 1)
    return answer[0] if answer else f"no answer in {_PROBE_SECONDS:.0f} seconds"


def _probe(address: str) -> str | None:
    try:
        with urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=_PROBE_SECONDS):
            return None
    except urllib.error.HTTPError:
        return None  # an answer, if not the one hoped for
    except urllib.error.URLError as error:
        # A certificate this probe does not trust may be fine for the Hub's own client.
        return None if isinstance(error.reason, ssl.SSLError) else str(error.reason)
    except (OSError, ValueError) as error:
        return str(error)


def _download(name: str) -> Path:
    import huggingface_hub
    from huggingface_hub import errors
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    shown = not are_progress_bars_disabled()
    try:
        disable_progress_bars()
        return Path(
            huggingface_hub.snapshot_download(name, allow_patterns=[*DATA_FILES], etag_timeout=_PROBE_SECONDS)
        )
    except errors.GatedRepoError as error:
        raise TokenizerError(
            f"The Hub hands out '{name}' only to those who accepted its terms: do so on its page, then run "
            "`hf auth login`."
        ) from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise TokenizerError(
            f"There is no tokenizer '{name}': no local path of that name, and the Hub knows of none. "
            "Check the spelling; a private one needs `hf auth login`."
        ) from error
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise TokenizerUnreachableError(f"Downloading tokenizer '{name}' failed: {reason}") from error
    finally:
        if shown:
            enable_progress_bars()
