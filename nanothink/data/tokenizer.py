"""Text to token ids and back: where tokenizers come from, and the one form they all take here.

    load_tokenizer      a folder, a tokenizer.json, or a name of the Hugging Face Hub
    train_tokenizer     byte-level BPE (data/bpe.py, in a process of its own)
    resolve_tokenizer   load, or train a stand-in when the Hub cannot be reached

A ``Tokenizer`` is pure: no truncation, padding, dropout or special tokens come between text and ids,
whatever its file says, and text that spells a special token is text. Documents are ended by ``eos_id``
alone, so no document can fake a boundary.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import tokenizers
from numpy.typing import NDArray

from nanothink.data.bpe import make_byte_level
from nanothink.data.bpe_process import Progress, learn_in_process
from nanothink.data.byte_level import ByteLevelEncoder, is_byte_level, rounds
from nanothink.data.cache import cache_folder, locked, storage_error, write_whole
from nanothink.data.corpus import Corpus, bad_records_error, find_corpus, validate_corpus
from nanothink.data.hub import TokenizerUnreachableError, hub_folder
from nanothink.data.records import Problem, Record, iter_records
from nanothink.data.split import TRAIN, SplitRule, assign_sides, cut_text, group_key, single_texts, text_key
from nanothink.data.tokenizer_json import check_tokenizer_json, failures_told
from nanothink.errors import DataError, TokenizerError

__all__ = [
    "Tokenizer",
    "TokenizerUnreachableError",
    "load_tokenizer",
    "resolve_tokenizer",
    "save_tokenizer",
    "train_on_corpus",
    "train_tokenizer",
]

EOS = "<|endoftext|>"
_KNOWN_EOS = (EOS, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "<｜end▁of▁sentence｜>")
REPLACEABLE = "gpt2"
"""The name that a tokenizer trained here may stand in for: the default of ``DataConfig``."""
_MAX_EOS_CHARS = 1000
_PROBE = "Hello world"
_MAX_TRAINING_BYTES = 256 * 2**20  # counts of words have settled long before
_STANDS_FOR = "nanothink_stands_for"


class Tokenizer:
    """Token ids of a text. Equal fingerprints mean equal ids for every text.

    Parameters
    ----------
    backend: copied, and freed of everything that is not text to ids.
    name: what the user calls it; no part of its identity.
    eos_token: ends every document; added to the vocabulary when it is not there (or None: ``<|endoftext|>``).

    Raises TokenizerError for one that cannot give "Hello world" back, or that takes a text spelling
    its EOS for the end of a document.
    """

    name: str
    vocab_size: int
    """One more than the largest id: rows of an embedding that fits."""
    eos_id: int
    fingerprint: str
    """SHA-256, in hex, of the vocabulary, rules and EOS."""

    def __init__(self, backend: tokenizers.Tokenizer, name: str, eos_token: str | None = None) -> None:
        where = f"tokenizer '{name:.100}'"
        eos = eos_token or EOS
        if len(eos) > _MAX_EOS_CHARS or not eos.isprintable():
            raise TokenizerError(
                f"The EOS token of {where} is too long or holds odd characters: {eos!r:.60}."
            )
        self.name, self._eos = name, eos
        with failures_told(where):
            self._backend, canonical = _purified(backend, eos)
            self._json = canonical.decode()
            vocabulary = self._backend.get_vocab(with_added_tokens=True)
            self.vocab_size = max(vocabulary.values()) + 1
            self.eos_id = vocabulary[eos]
            self.fingerprint = hashlib.sha256(canonical + b"\0" + eos.encode()).hexdigest()
            byte_level = is_byte_level(orjson.loads(canonical))
            self._words = ByteLevelEncoder(self._encode_whole) if byte_level else None
            self._check()

    def encode(self, text: str) -> list[int]:
        """Ids of one text, without EOS. Raises TokenizerError for a lone surrogate."""
        with _encodable(text):
            return list(self._backend.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """Ids of each text; the same as ``encode`` gives one by one, several times faster."""
        with _encodable(*texts):
            if self._words is not None:
                return self._words(texts)
            return [
                np.array(ids, dtype=np.uint32) for group in rounds(texts) for ids in self._encode_whole(group)
            ]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids. Bytes that are no UTF-8 become U+FFFD; EOS is written as it is spelled."""
        try:
            return self._backend.decode([int(i) for i in ids], skip_special_tokens=False)
        except OverflowError as error:
            raise TokenizerError(f"Token ids lie between 0 and {self.vocab_size - 1}.") from error

    def to_state(self) -> dict[str, str]:
        """Everything there is to it, in strings only, for a checkpoint."""
        return {"name": self.name, "eos_token": self._eos, "tokenizer_json": self._json}

    @classmethod
    def from_state(cls, state: dict[str, str]) -> Tokenizer:
        """The tokenizer that ``to_state`` described; same fingerprint."""
        try:
            name, eos, text = (state[key] for key in ("name", "eos_token", "tokenizer_json"))
        except (KeyError, TypeError) as error:
            raise TokenizerError(f"A saved tokenizer lacks {error}.") from error
        return cls(_parse(text, f"saved tokenizer '{name}'"), name, eos)

    def __repr__(self) -> str:
        return f"Tokenizer({self.name!r}, vocab_size={self.vocab_size}, fingerprint={self.fingerprint[:16]})"

    def _encode_whole(self, texts: Sequence[str]) -> list[list[int]]:
        return [e.ids for e in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def _check(self) -> None:
        back = self.decode(self.encode(_PROBE))
        if back != _PROBE:
            raise TokenizerError(
                f"Tokenizer '{self.name}' gives {back!r} back for {_PROBE!r}: it loses text, or its files "
                "are incomplete. Nothing could be measured with it; use another."
            )
        if self.eos_id in self.encode(f"a{self._eos}b") + self.encode(self._eos):
            raise TokenizerError(
                f"Tokenizer '{self.name}' cannot tell a text that spells '{self._eos}' from the end of a "
                "document; use another."
            )


def _purified(backend: tokenizers.Tokenizer, eos: str) -> tuple[tokenizers.Tokenizer, bytes]:
    """A copy that maps text to ids and nothing else, with its JSON in one canonical order."""
    state: dict[str, Any] = orjson.loads(backend.to_str())
    state.update(truncation=None, padding=None, post_processor=None)
    if "dropout" in state["model"]:
        state["model"]["dropout"] = None
    for token in state["added_tokens"]:
        token["special"] = token["special"] or token["content"] == eos
    pure = tokenizers.Tokenizer.from_str(orjson.dumps(state).decode())
    if all(token["content"] != eos for token in state["added_tokens"]):
        pure.add_special_tokens([tokenizers.AddedToken(eos, special=True, normalized=False)])
    pure.encode_special_tokens = True
    return pure, orjson.dumps(orjson.loads(pure.to_str()), option=orjson.OPT_SORT_KEYS)


@contextlib.contextmanager
def _encodable(*texts: str) -> Iterator[None]:
    try:
        yield
    except TypeError as error:
        for text in texts:
            try:
                text.encode()
            except UnicodeEncodeError as wrong:
                raise TokenizerError(
                    f"Character {wrong.start + 1} of the text is half of a surrogate pair, which is no "
                    "valid Unicode; remove it."
                ) from error
        raise


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer in a folder or a tokenizer.json file, or of that name on the Hugging Face Hub.

    Raises TokenizerError (TokenizerUnreachableError when only the Hub could have it and it is offline).
    """
    path = Path(name).expanduser()
    try:
        if name and path.is_dir():
            return _from_folder(path, name)
        if path.is_file():
            eos = _eos_beside(path)
            return _with_eos(_parse(_read(path), str(path)), name, eos)
    except OSError as error:
        raise TokenizerError(f"Cannot read tokenizer {path}: {error.strerror}.") from error
    if _looks_like_path(name):
        raise TokenizerError(
            f"There is no tokenizer at {path}: give a folder, a tokenizer.json or a Hub name."
        )
    return _from_folder(hub_folder(name), name)


def _looks_like_path(name: str) -> bool:
    """A Hub name is 'name' or 'owner/name'; anything else with a separator is meant as a path."""
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
        return _with_eos(_parse(_read(whole), str(whole)), name, _eos_beside(whole))
    if vocab.is_file() and merges.is_file():
        return _with_eos(_gpt2(vocab, merges), name, _eos_beside(vocab))
    return _through_transformers(folder, name)


def _gpt2(vocab: Path, merges: Path) -> tokenizers.Tokenizer:
    """GPT-2's cutting and bytes around a vocabulary and merges; transformers would cost 3 s to import."""
    try:
        model = tokenizers.models.BPE.from_file(str(vocab), str(merges))
    except Exception as error:
        raise TokenizerError(f"{vocab} and {merges.name} make no tokenizer: {error}.") from error
    backend = tokenizers.Tokenizer(model)
    make_byte_level(backend)
    return backend


def _through_transformers(folder: Path, name: str) -> Tokenizer:
    """Other formats (SentencePiece and the like), which transformers knows how to convert."""
    if not any(
        file.name.startswith(("tokenizer", "vocab", "spiece", "sentencepiece")) for file in folder.iterdir()
    ):
        raise TokenizerError(
            f"{folder} holds no tokenizer: it needs tokenizer.json, or vocab.json and merges.txt."
        )
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        backend = loaded.backend_tokenizer
    except Exception as error:
        raise TokenizerError(f"transformers cannot read the tokenizer in {folder}: {error}") from error
    return Tokenizer(backend, name, loaded.eos_token)


def _with_eos(backend: tokenizers.Tokenizer, name: str, eos: str | None) -> Tokenizer:
    if eos is None:
        special = {t.content for t in backend.get_added_tokens_decoder().values() if t.special}
        known = special | ({EOS} if backend.token_to_id(EOS) is not None else set())
        eos = next((token for token in _KNOWN_EOS if token in known), None)
    return Tokenizer(backend, name, eos)


def _eos_beside(path: Path) -> str | None:
    """EOS as the configuration files beside a tokenizer name it."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        token = _settings(path.with_name(name)).get("eos_token")
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str) and token:
            return token
    return None


def _settings(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = orjson.loads(path.read_bytes())
    except orjson.JSONDecodeError as error:
        raise TokenizerError(f"{path} is not valid JSON: {error}.") from error
    return content if isinstance(content, dict) else {}


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{path} is not a tokenizer: it is not UTF-8 text.") from error


def _parse(text: str, where: str) -> tokenizers.Tokenizer:
    check_tokenizer_json(text, where)
    with failures_told(where):
        return tokenizers.Tokenizer.from_str(text)


def fitting_vocab_size(n_bytes: int) -> int:
    """Vocabulary for a corpus of ``n_bytes``: 1,024 at 100 KB, growing with the root of its size.

    A token is learnt from its occurrences. With n tokens and V rows a row is seen n/V times on average,
    and by Zipf's law the rarest far less often; V ~ sqrt(n) lets the rarest grow more frequent as the
    corpus does (words by Heaps' law grow about as fast). 32,768 are enough for any text at this scale.
    """
    size: float = 1024 * (n_bytes / 100_000) ** 0.5
    return min(max(round(size / 64) * 64, 512), 32768)


def train_tokenizer(
    texts: Iterable[str], vocab_size: int | None, *, n_bytes: int, on_progress: Progress | None = None
) -> Tokenizer:
    """Byte-level BPE that can spell any text; the same texts always give the same tokenizer.

    ``n_bytes`` is the size of all texts; it sets the vocabulary when ``vocab_size`` is None. A corpus
    with too few different words gives a smaller vocabulary than asked for. ``on_progress`` hears of
    "merging", which begins after the last text.
    """
    size = fitting_vocab_size(n_bytes) if vocab_size is None else vocab_size
    if size < 257:
        raise TokenizerError(f"A vocabulary of {size} is too small: 256 bytes and an end of text need 257.")
    learnt = learn_in_process(texts, size, EOS, on_progress)
    return Tokenizer(tokenizers.Tokenizer.from_str(learnt), "trained", EOS)


def train_on_corpus(
    corpus: Corpus,
    *,
    vocab_size: int | None = None,
    split: SplitRule,
    on_progress: Progress | None = None,
) -> Tokenizer:
    """``train_tokenizer`` on the training side of a corpus, on an even sample of it when that is very large.

    Bad records are passed over. The corpus is read twice, once to split it and once to train.
    ``on_progress`` hears of three stages, each with a speed of its own: "reading" and "counting words" with
    the bytes of files read and to be read, then "merging". Raises DataError when there is nothing to
    train on.
    """

    def reader_of(stage: str) -> Callable[[int], None]:
        done = 0

        def advance(n_bytes: int) -> None:
            nonlocal done
            done += n_bytes
            if on_progress:
                on_progress(stage, min(done, corpus.n_bytes), corpus.n_bytes)

        return advance

    advance = reader_of("reading")
    rows: dict[str, NDArray[Any]] = {}
    for domain, paths in corpus.domains.items():
        rows[domain] = np.fromiter(
            (
                (text_key(record.text), group_key(record.group, record.source), len(record.text.encode()))
                for record in _records(paths, advance)
            ),
            dtype=[("key", "<u8"), ("group", "<u8"), ("n_bytes", "<i8")],
        )
    if not any(len(own) for own in rows.values()):
        raise DataError(f"No record in {corpus.root} is valid, so there is nothing to train a tokenizer on.")
    sides = assign_sides(rows, split)
    single = single_texts({domain: own["key"] for domain, own in rows.items()})
    n_bytes = sum(int(own["n_bytes"][sides[domain] == TRAIN].sum()) for domain, own in rows.items())
    share = min(1.0, _MAX_TRAINING_BYTES / max(n_bytes, 1))

    def chosen() -> Iterator[str]:
        advance = reader_of("counting words")
        for domain, paths in corpus.domains.items():
            keys = rows[domain]["key"].tolist()
            for record, key, side in zip(_records(paths, advance), keys, sides[domain], strict=False):
                if key in single:
                    yield cut_text(record.text, split, single[key])[0]
                elif side == TRAIN and key % 2**32 < share * 2**32:
                    yield record.text

    return train_tokenizer(chosen(), vocab_size, n_bytes=n_bytes, on_progress=on_progress)


def _records(paths: Sequence[Path], on_bytes: Callable[[int], None]) -> Iterator[Record]:
    def pass_over(_problem: Problem) -> None: ...

    for path in paths:
        for _, record in iter_records(path, on_problem=pass_over, on_bytes=on_bytes):
            yield record


def save_tokenizer(
    tokenizer: Tokenizer, folder: Path, *, stands_for: str | None = None, context: int | None = None
) -> Path:
    """Writes tokenizer.json and tokenizer_config.json; ``load_tokenizer`` and transformers read them.

    Both give the same ids. A text begins after EOS, as in GPT-2, so that is the BOS of those that ask for
    one; nothing puts it there unasked. ``context`` is the most tokens that a model of this tokenizer takes.

    Whole or not at all: while the configuration changes there is no tokenizer.json, so an old one is
    never read with a new EOS.
    """
    state = tokenizer.to_state()
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": state["eos_token"],
        "eos_token": state["eos_token"],
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # text that spells EOS is text
    }
    if context is not None:
        settings["model_max_length"] = context
    if stands_for is not None:
        settings[_STANDS_FOR] = stands_for
    content = orjson.dumps(settings, option=orjson.OPT_INDENT_2)
    whole, config = folder / "tokenizer.json", folder / "tokenizer_config.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not config.is_file() or config.read_bytes() != content:
            whole.unlink(missing_ok=True)
            write_whole(config, content)
    except OSError as error:
        raise storage_error(error, folder) from error
    write_whole(whole, state["tokenizer_json"].encode())
    return folder


def resolve_tokenizer(
    name: str,
    corpus: Corpus,
    *,
    split: SplitRule,
    skip_bad_records: bool = False,
    note: Callable[[str], None],
    on_progress: Progress | None = None,
) -> Tokenizer:
    """``load_tokenizer``, or a stand-in trained here when the default ``gpt2`` cannot be had.

    Only the default is ever replaced: a name that was asked for by hand may be a slip, and a quiet
    stand-in would train the wrong vocabulary.

    The stand-in is trained on the training split of every domain in the data root, not only of those
    selected, and is used for that name from then on, whatever becomes of the corpus or the network:
    experts can only be combined if they share one tokenizer. ``on_progress`` hears of the stages of that.
    """
    if _looks_like_path(name) or Path(name).expanduser().exists():
        return load_tokenizer(name)
    cache = cache_folder(corpus.root)
    folder = cache / "tokenizer"
    if _replaced_by(folder) == name and (kept := _stand_in(folder, name, note)):
        return kept
    try:
        return load_tokenizer(name)
    except TokenizerUnreachableError:
        if name != REPLACEABLE:
            raise

    def told(stage: str, done: int, total: int) -> None:
        if on_progress is not None:
            on_progress(f"tokenizer: {stage}", done, total)

    if not skip_bad_records and (
        problems := validate_corpus(corpus, on_progress=lambda *at: told("validating", *at)).errors
    ):
        raise bad_records_error(
            corpus.root, problems, len(problems)
        )  # a refused corpus leaves nothing behind
    with locked(cache, note):
        if kept := _stand_in(folder, name, note):
            return kept
        trained = train_on_corpus(find_corpus(corpus.root), split=split, on_progress=told)
        save_tokenizer(trained, folder, stands_for=name)
    note(
        f"Tokenizer '{name}' is neither cached nor reachable, so one was trained on this corpus instead "
        f"({trained.vocab_size:,} tokens); it is kept in {folder} and used from now on."
    )
    return load_tokenizer(str(folder))


def _replaced_by(folder: Path) -> str | None:
    try:
        name = _settings(folder / "tokenizer_config.json").get(_STANDS_FOR)
    except (OSError, TokenizerError):
        return None
    return name if isinstance(name, str) else None


def _stand_in(folder: Path, name: str, note: Callable[[str], None]) -> Tokenizer | None:
    if not (folder / "tokenizer.json").is_file():
        return None
    try:
        kept = load_tokenizer(str(folder))
    except TokenizerError as error:
        note(f"The tokenizer trained here earlier is damaged and is trained again ({error})")
        return None
    note(
        f"Using the tokenizer trained here in place of '{name}' ({kept.vocab_size:,} tokens). Experts "
        f"trained with it combine only with each other; to try '{name}' again, delete {folder}."
    )
    return kept
