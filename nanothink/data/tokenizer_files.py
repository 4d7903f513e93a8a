"""Loading of tokenizers from a folder, a tokenizer.json, or the Hugging Face Hub. No code found there is
run."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import orjson
import tokenizers

from nanothink.data.bpe import make_byte_level
from nanothink.data.chat import MAX_TEMPLATE_CHARS, SPECIAL_TOKENS, ChatFormat
from nanothink.data.encoding import EOS, Tokenizer, parse_tokenizer
from nanothink.data.hub import DATA_FILES, hub_folder
from nanothink.data.tokenizer_json import MAX_JSON_BYTES, check_tokenizer_json
from nanothink.errors import TokenizerError

CONFIG, CHAT_TEMPLATE, _TOKENS_MAP = "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"

_KNOWN_EOS = (EOS, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "<｜end▁of▁sentence｜>")


def load_tokenizer(name: str) -> Tokenizer:
    """Load the tokenizer in a folder or a tokenizer.json file, or of that name on the Hugging Face Hub.

    Raises:
        TokenizerUnreachableError: only the Hub could have it, and it does not answer.
        TokenizerError: it cannot be found, read or used.
    """
    path = Path(name).expanduser()
    try:
        if name and path.is_dir():
            return _from_folder(path, name)
        if path.is_file():
            return _with_settings(parse_tokenizer(_read(path), str(path)), name, path)
    except OSError as error:
        raise TokenizerError(f"Cannot read tokenizer {path}: {error.strerror}.") from error
    if looks_like_path(name):
        raise TokenizerError(
            f"There is no tokenizer at {path}: give a folder, a tokenizer.json or a Hub name."
        )
    return _from_folder(hub_folder(name), name)


def looks_like_path(name: str) -> bool:
    """Return whether a name is meant as a path. A Hub name is 'name' or 'owner/name'."""
    parts = name.split("/")
    return (
        not name
        or name.endswith(".json")
        or "\\" in name
        or len(parts) > 2
        or parts[0] in ("", ".", "..", "~")
        or not parts[-1]
        or (len(parts) == 2 and Path(parts[0]).is_dir())
    )


def _from_folder(folder: Path, name: str) -> Tokenizer:
    whole, vocab, merges = folder / "tokenizer.json", folder / "vocab.json", folder / "merges.txt"
    if whole.is_file():
        return _with_settings(parse_tokenizer(_read(whole), str(whole)), name, whole)
    if vocab.is_file() and merges.is_file():
        return _with_settings(_gpt2(vocab, merges), name, vocab)
    return _through_transformers(folder, name)


def _gpt2(vocab: Path, merges: Path) -> tokenizers.Tokenizer:
    """Build a GPT-2 tokenizer from vocabulary and merges; transformers would take 3 s to import."""
    try:
        ids = orjson.loads(_read(vocab))
        lines = _read(merges).removesuffix("\n").split("\n")
        rules = [line.split(" ") for line in lines if line and not line.startswith("#version")]
        pairs = [(left, right) for left, right in rules]
        check_tokenizer_json(orjson.dumps({"model": {"vocab": ids}}).decode(), str(vocab))
        model = tokenizers.models.BPE(ids, pairs)
    except TokenizerError:
        raise
    except Exception as error:
        raise TokenizerError(f"{vocab} and {merges.name} make no tokenizer: {error}.") from error
    backend = tokenizers.Tokenizer(model)
    make_byte_level(backend)
    return backend


def _through_transformers(folder: Path, name: str) -> Tokenizer:
    """Load another format (SentencePiece and the like) through transformers.

    It gets a copy of the data files alone and is told to trust no code, so a stranger's folder runs none.
    """
    found = [file for file in DATA_FILES if (folder / file).is_file()]
    if not any(file.startswith(("tokenizer.", "vocab.", "spiece", "sentencepiece", "spm")) for file in found):
        code = ", ".join(sorted(file.name for file in folder.glob("*.py"))[:3])
        reason = f" ({code}: code that comes with a tokenizer is never run)" if code else ""
        raise TokenizerError(
            f"{folder} holds no tokenizer{reason}: it needs tokenizer.json, or vocab.json and merges.txt."
        )
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory(prefix="nanothink-tokenizer-") as copy:
        try:
            for file in found:
                shutil.copyfile(folder / file, Path(copy, file))
            loaded = AutoTokenizer.from_pretrained(copy, local_files_only=True, trust_remote_code=False)
        except Exception as error:
            reason = str(error).replace(copy, str(folder))
            if "trust_remote_code" in reason:
                reason = "it needs Python code of its own, and code that comes with a tokenizer is never run"
            raise TokenizerError(f"transformers cannot read the tokenizer in {folder}: {reason}") from error
    backend = getattr(loaded, "backend_tokenizer", None)
    if not isinstance(backend, tokenizers.Tokenizer):
        raise TokenizerError(
            f"The tokenizer in {folder} is a {type(loaded).__name__}, which works in Python alone, so no "
            "checkpoint could keep it. Use one that has a tokenizer.json."
        )
    return Tokenizer(backend, name, loaded.eos_token, _chat_beside(folder / CONFIG))


def _with_settings(backend: tokenizers.Tokenizer, name: str, path: Path) -> Tokenizer:
    """The tokenizer with EOS and chat template of the files beside ``path``."""
    eos = _eos_beside(path)
    if eos is None:
        special = {t.content for t in backend.get_added_tokens_decoder().values() if t.special}
        known = special | ({EOS} if backend.token_to_id(EOS) is not None else set())
        eos = next((token for token in _KNOWN_EOS if token in known), None)
    return Tokenizer(backend, name, eos, _chat_beside(path))


def _chat_beside(path: Path) -> ChatFormat | None:
    """Chat template in the files beside a tokenizer; a file of its own counts before the settings."""
    files = [tokenizer_settings(path.with_name(name)) for name in (_TOKENS_MAP, CONFIG)]
    settings = {key: value for found in files for key, value in found.items()}
    template, own = settings.get("chat_template"), path.with_name(CHAT_TEMPLATE)
    if own.is_file() and own.stat().st_size <= 4 * MAX_TEMPLATE_CHARS:
        template = own.read_text("utf-8", errors="replace")
    return ChatFormat.of(template, {name: settings.get(name) for name in SPECIAL_TOKENS})


def _eos_beside(path: Path) -> str | None:
    """EOS token named by the configuration files beside a tokenizer."""
    for name in (CONFIG, _TOKENS_MAP):
        token = tokenizer_settings(path.with_name(name)).get("eos_token")
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str) and token:
            return token
    return None


def tokenizer_settings(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = orjson.loads(_read(path))
    except orjson.JSONDecodeError as error:
        raise TokenizerError(f"{path} is not valid JSON: {error}.") from error
    return content if isinstance(content, dict) else {}


def _read(path: Path) -> str:
    if path.stat().st_size > 4 * MAX_JSON_BYTES:
        raise TokenizerError(f"{path} is not a tokenizer: it takes {path.stat().st_size:,} bytes.")
    try:
        return path.read_text(encoding="utf-8-sig")  # editors of Windows begin a file with a byte-order mark
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{path} is not a tokenizer: it is not UTF-8 text.") from error
