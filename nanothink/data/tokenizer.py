"""The tokenizer of a corpus: loaded, trained, saved, or a stand-in.

    load_tokenizer      a folder, a tokenizer.json, or a name of the Hugging Face Hub (tokenizer_files.py)
    train_tokenizer     byte-level BPE (bpe.py, in a process of its own)
    resolve_tokenizer   load, or train a stand-in when the Hub cannot be reached

All of them give a ``Tokenizer`` (encoding.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import tokenizers
from numpy.typing import NDArray

from nanothink.data.bpe_process import learn_in_process
from nanothink.data.cache import cache_folder
from nanothink.data.corpus import Corpus, bad_records_error, find_corpus, left_out, validate_corpus
from nanothink.data.encoding import EOS, Tokenizer
from nanothink.data.hub import TokenizerUnreachableError
from nanothink.data.problems import Problems
from nanothink.data.records import ProblemSink, Record, ignored, iter_records
from nanothink.data.sides import CUT, TRAIN, assign_sides
from nanothink.data.split import SplitRule, cut_text, group_key, text_key
from nanothink.data.tokenizer_files import (
    CHAT_TEMPLATE,
    load_tokenizer,
    looks_like_path,
    tokenizer_settings,
)
from nanothink.disk import locked, make_folder, storage_error, write_whole
from nanothink.errors import DataError, TokenizerError
from nanothink.reporter import SILENT, Reporter

REPLACEABLE = "gpt2"
"""Name of the tokenizer that one trained here may replace: the default of ``DataConfig``."""
_MAX_TRAINING_BYTES = 256 * 2**20  # counts of words have settled long before
_STANDS_FOR = "nanothink_stands_for"
_SPLIT = "nanothink_split"


def fitting_vocab_size(n_bytes: int) -> int:
    """Vocabulary size for a corpus of ``n_bytes``: 1,024 at 100 KB, growing with the square root of its size.

    With n tokens and V rows, a row is trained on n/V occurrences on average, the rarest on far fewer. V ~
    sqrt(n) makes the rarest more frequent as the corpus grows. 32,768 are enough for any text at this scale.
    """
    size: float = 1024 * (n_bytes / 100_000) ** 0.5
    return min(max(round(size / 64) * 64, 512), 32768)


def train_tokenizer(
    texts: Iterable[str], vocab_size: int | None, *, n_bytes: int, reporter: Reporter = SILENT
) -> Tokenizer:
    """Train a byte-level BPE, which can encode any text. The same texts always give the same tokenizer.

    ``n_bytes`` is the size of all texts; it sets the vocabulary when ``vocab_size`` is None. A corpus
    with too few different words gives a smaller vocabulary than asked for. Progress is reported
    after the last text.
    """
    size = fitting_vocab_size(n_bytes) if vocab_size is None else vocab_size
    if size < 257:
        raise TokenizerError(f"A vocabulary of {size} is too small: 256 bytes and an end of text need 257.")
    learnt = learn_in_process(texts, size, EOS, reporter)
    return Tokenizer(tokenizers.Tokenizer.from_str(learnt), "trained", EOS)


def train_on_corpus(
    corpus: Corpus,
    *,
    vocab_size: int | None = None,
    split: SplitRule,
    reporter: Reporter = SILENT,
    on_bad_line: ProblemSink | None = None,
) -> Tokenizer:
    """Train a tokenizer on the training side of a corpus, or on an even sample of a very large one.

    Bad records are skipped. The corpus is read twice, once to split it and once to train.
    Three stages are reported, each with a speed of its own: reading and counting words, in bytes of files,
    and merging. Raises DataError when there is nothing to train on.
    """

    total = corpus.n_bytes  # asks the disk for the size of every file

    advance = reporter.counter("tokenizer: reading", total)
    rows: dict[str, NDArray[Any]] = {}
    for domain, paths in corpus.domains.items():
        rows[domain] = np.fromiter(
            (
                (text_key(record.text), group_key(record.group, record.source), record.n_bytes)
                for record in _records(paths, advance, on_bad_line or ignored)
            ),
            dtype=[("key", "<u8"), ("group", "<u8"), ("n_bytes", "<i8")],
        )
    if not any(len(own) for own in rows.values()):
        raise DataError(f"No record in {corpus.root} is valid, so there is nothing to train a tokenizer on.")
    assigned = assign_sides(rows, split)
    sides = assigned.sides
    n_bytes = sum(int(own["n_bytes"][sides[domain] == TRAIN].sum()) for domain, own in rows.items())
    share = min(1.0, _MAX_TRAINING_BYTES / max(n_bytes, 1))

    def chosen() -> Iterator[str]:
        advance = reporter.counter("tokenizer: counting words", total)
        for domain, paths in corpus.domains.items():
            keys = rows[domain]["key"].tolist()
            for record, key, side in zip(
                _records(paths, advance, ignored), keys, sides[domain], strict=False
            ):
                if side == CUT:
                    yield cut_text(record.text, split, assigned.cut[key])[0]
                elif side == TRAIN and key % 2**32 < share * 2**32:
                    yield record.text

    return train_tokenizer(chosen(), vocab_size, n_bytes=n_bytes, reporter=reporter)


def _records(
    paths: Sequence[Path], on_bytes: Callable[[int], None], on_problem: ProblemSink
) -> Iterator[Record]:
    for path in paths:
        for _, record in iter_records(path, on_problem=on_problem, on_bytes=on_bytes):
            yield record


def save_tokenizer(
    tokenizer: Tokenizer,
    folder: Path,
    *,
    stands_for: str | None = None,
    split: SplitRule | None = None,
    context: int | None = None,
) -> Path:
    """Write tokenizer.json, tokenizer_config.json and, if it has one, chat_template.jinja, which
    ``load_tokenizer`` and transformers read.

    Both give the same ids. Without a BOS a text begins after EOS, as in GPT-2, so that is the BOS of those
    that ask for one; nothing puts it there unasked. ``split`` is the rule whose training side it was trained
    on; ``context`` is the most tokens that a model of this tokenizer takes.

    Whole or not at all: while the configuration changes there is no tokenizer.json, so an old one is
    never read with a new EOS.
    """
    state, chat = tokenizer.to_state(), tokenizer.chat
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokenizer.bos_token or state["eos_token"],
        "eos_token": state["eos_token"],
        "clean_up_tokenization_spaces": False,
        # Text that spells EOS is text; but transformers has no other way to encode what a template writes.
        "split_special_tokens": chat is None,
        **({} if chat is None else dict(chat.special_tokens)),
    }
    if context is not None:
        settings["model_max_length"] = context
    if stands_for is not None:
        settings[_STANDS_FOR] = stands_for
    if split is not None:
        settings[_SPLIT] = split.to_dict()
    content = orjson.dumps(settings, option=orjson.OPT_INDENT_2)
    whole, config = folder / "tokenizer.json", folder / "tokenizer_config.json"
    try:
        make_folder(folder)
        if not config.is_file() or config.read_bytes() != content:
            whole.unlink(missing_ok=True)
            write_whole(config, content, explain=storage_error)
        template = folder / CHAT_TEMPLATE
        if chat is not None:
            write_whole(template, chat.template.encode(), explain=storage_error)
        else:
            template.unlink(missing_ok=True)
    except OSError as error:
        raise storage_error(folder, error) from error
    write_whole(whole, state["tokenizer_json"].encode(), explain=storage_error)
    return folder


def resolve_tokenizer(
    name: str,
    corpus: Corpus,
    *,
    split: SplitRule,
    skip_bad_records: bool = False,
    reporter: Reporter = SILENT,
) -> Tokenizer:
    """Load a tokenizer, or train a stand-in if the default ``gpt2`` is not available.

    Only the default is ever replaced: another name may be misspelt, and a silent stand-in would train the
    wrong vocabulary.

    The stand-in is trained on the training split of every domain in the data root, not only of those
    selected, and is used for that name from then on, whatever becomes of the corpus or the network:
    experts can only be combined if they share one tokenizer. Its stages are reported.
    """
    if looks_like_path(name) or Path(name).expanduser().exists():
        return load_tokenizer(name)
    cache = cache_folder(corpus.root)
    folder = cache / "tokenizer"
    if _replaced_by(folder) == name and (kept := _stand_in(folder, name, split, reporter)):
        return kept
    try:
        return load_tokenizer(name)
    except TokenizerUnreachableError:
        if name != REPLACEABLE:
            raise

    if not skip_bad_records:  # a refused corpus leaves nothing behind
        report = validate_corpus(corpus, reporter=reporter)
        if report.unreadable:
            raise report.unreadable[0]
        if not report.ok:
            raise bad_records_error(corpus.root, report.found_errors)
    with locked(cache, reporter):
        if kept := _stand_in(folder, name, split, reporter):
            return kept
        bad = Problems()
        trained = train_on_corpus(
            find_corpus(corpus.root), split=split, reporter=reporter, on_bad_line=bad.add
        )
        save_tokenizer(trained, folder, stands_for=name, split=split)
    if bad:
        reporter.note(f"The tokenizer is trained without {left_out(bad, corpus.root)}")
    reporter.note(
        f"Tokenizer '{name}' is neither cached nor reachable, so one was trained on this corpus instead "
        f"({trained.vocab_size:,} tokens); it is kept in {folder} and used from now on."
    )
    return load_tokenizer(str(folder))


def _replaced_by(folder: Path) -> str | None:
    try:
        name = tokenizer_settings(folder / "tokenizer_config.json").get(_STANDS_FOR)
    except (OSError, TokenizerError):
        return None
    return name if isinstance(name, str) else None


def _stand_in(folder: Path, name: str, split: SplitRule, reporter: Reporter) -> Tokenizer | None:
    if not (folder / "tokenizer.json").is_file():
        return None
    try:
        kept = load_tokenizer(str(folder))
    except TokenizerError as error:
        reporter.note(f"The tokenizer trained here earlier is damaged and is trained again ({error})")
        return None
    reporter.note(
        f"Using the tokenizer trained here in place of '{name}' ({kept.vocab_size:,} tokens). Experts "
        f"trained with it combine only with each other; to try '{name}' again, delete {folder}."
    )
    with contextlib.suppress(OSError, TokenizerError, ValueError, KeyError):
        rule = SplitRule.from_dict(tokenizer_settings(folder / "tokenizer_config.json")[_SPLIT])
        if rule.val_split < split.val_split or rule.test_split < split.test_split:
            reporter.note(
                f"It was trained at data.val_split={rule.val_split} and data.test_split={rule.test_split}, "
                f"so also on text that is held out now. To train it anew, delete {folder}."
            )
    return kept
