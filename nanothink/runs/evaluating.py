"""Checkpoints side by side on the same text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from nanothink.checkpoints import (
    CheckpointSummary,
    DamagedEntry,
    list_checkpoints,
    parse_name,
    verify_checkpoint,
)
from nanothink.data.corpus import find_corpus
from nanothink.data.problems import Problems
from nanothink.errors import CheckpointError, CheckpointNotFoundError, DataError, SeenTextError, UsageError
from nanothink.inference.evaluate import Difference, Evaluation
from nanothink.inference.gated import Reading, evaluate_gated
from nanothink.models import COMBINED
from nanothink.reporter import SILENT, Reporter
from nanothink.runs.held_out import ScoredText, Side, TextToScore
from nanothink.runs.inherited_split import binding_rules
from nanothink.runs.scoring import score
from nanothink.runs.trained_model import TrainedModel, load
from nanothink.suggestions import again, suggest
from nanothink.training.matmul_types import AS_TRAINED
from nanothink.wording import counted


@dataclass(frozen=True)
class CheckpointEvaluation:
    path: Path
    kind: str
    evaluation: Evaluation
    n_seen: int = 0
    """Documents of the text that it was trained on, or has in its vector store."""
    trained_text_known: bool = True
    """False: it is, or builds on, a published model, which may have read any of the text."""
    with_cache: Evaluation | None = None
    """The same text with a document cache, where that was asked for."""
    left_out: Problems = field(default_factory=Problems)
    """Bad lines of the text, which was scored without them."""


def above_best(results: Sequence[CheckpointEvaluation]) -> list[Difference | None]:
    """Difference in bits per byte between each model and the best.

    None for the best itself, and for a model that was scored on other documents. A model with a finite score
    is better than one without.
    """

    def order(result: CheckpointEvaluation) -> float:
        bits = result.evaluation.overall.bits_per_byte
        # NaN compares with nothing, so that min would keep one that comes first.
        return math.inf if math.isnan(bits) else bits

    best = min(results, key=order)
    return [None if result is best else result.evaluation.less(best.evaluation) for result in results]


def evaluate_checkpoints(
    paths: Sequence[Path],
    *,
    data_dir: str | None = None,
    domains: Sequence[str] | None = None,
    split: Side = "val",
    max_tokens: int | None = None,
    device: str | None = None,
    skip_bad_records: bool = False,
    vector_store: bool = True,
    document_cache: bool = False,
    quantize: Literal["int8"] | None = None,
    allow_seen: bool = False,
    reporter: Reporter = SILENT,
) -> list[CheckpointEvaluation]:
    """Score each checkpoint on the same documents.

    Without ``data_dir`` the text is that of the domains that the checkpoints were trained on, in one folder.
    ``TextToScore`` decides which documents are held out: by the rule of the checkpoints' split, and without
    the documents that one of them was trained on, unless ``allow_seen``. Each checkpoint tokenises the text
    with its own tokenizer and reads it in blocks of its own ``max_seq_len``. A model that was trained with a
    vector store is scored with it, unless ``vector_store`` is False. With ``document_cache`` it is scored
    again with that. ``quantize`` is that of ``load``. Documents that a joint gate was fitted on are left out
    where one is used.

    Raises:
        SeenTextError: one of them was trained on some of the text.
        UsageError: the checkpoints come from different data, and none was given.
        DataError: there is no text to score.
    """
    options: Any = {
        "device": device,
        "vector_store": vector_store,
        "document_cache": document_cache,
        "quantize": quantize,
    }
    loaded = [load(path, **options, reporter=reporter) for path in paths]
    for model in loaded:
        for line in model.notes:
            reporter.note(f"{model.path}: {line}")
    corpus = find_corpus(*_where(loaded, data_dir, domains, reporter))
    for warning in corpus.warnings:
        reporter.note(str(warning))
    if len({model.tokenizer.fingerprint for model in loaded}) > 1:
        reporter.note(
            "These checkpoints have different tokenizers: compare their bits per byte. Loss and perplexity "
            "are by token, and do not compare."
        )
    own = {Path(model.config.data.data_dir).resolve() for model in loaded}
    if split == "val" and corpus.root.resolve() not in own:
        reporter.note(
            f"Of {corpus.root} the part that training would hold out is scored; --split all scores all of it."
        )
    rules = set(binding_rules(model.split for model in loaded))
    if len(rules) > 1 and split in ("val", "test"):
        fractions = sorted({getattr(rule, f"{split}_split") for rule in rules})
        reporter.note(
            f"These checkpoints held out different fractions of their data (data.{split}_split "
            f"{', '.join(map(str, fractions))}). They are scored on what all of them held out."
        )
    text = TextToScore(
        corpus,
        loaded,
        split,
        max_tokens=max_tokens,
        allow_seen=allow_seen,
        skip_bad_records=skip_bad_records,
        reporter=reporter,
    )
    results = []
    for number, model in enumerate(loaded):
        scored = text.in_tokens_of(model.tokenizer)
        if not allow_seen:
            scored = _without_fitted(scored, loaded, reporter if not number else SILENT)
        if model.precision.reason != AS_TRAINED:
            reporter.note(
                f"{model.path.name}: computing in {model.precision.name}: {model.precision.reason}."
            )
        evaluation = score(
            model.model,
            scored.streams,
            length=model.config.model.max_seq_len,
            precision=model.precision,
            max_tokens=max_tokens,
            reporter=reporter,
            stage=f"evaluating {model.path.name}",
        )
        results.append(
            CheckpointEvaluation(
                model.path,
                model.kind,
                evaluation,
                scored.n_seen[number],
                model.split.trained.complete,
                _with_cache(model, scored, max_tokens, reporter) if document_cache else None,
                scored.left_out,
            )
        )
    return results


def _with_cache(
    model: TrainedModel, scored: ScoredText, max_tokens: int | None, reporter: Reporter
) -> Evaluation:
    cache = model.config.document_cache
    length = model.config.model.max_seq_len
    return evaluate_gated(
        model.model,
        scored.streams,
        Reading(length, model.precision, cache.window_tokens, cache.n_neighbours),
        max_tokens=max_tokens,
        reporter=reporter,
        stage=f"evaluating {model.path.name} with a document cache",
    )


def _without_fitted(scored: ScoredText, loaded: Sequence[TrainedModel], reporter: Reporter) -> ScoredText:
    """The text without the documents that a gate in use was fitted on: a few hundred numbers know them."""
    fitted = np.array(
        [key for model in loaded if model.uses_gate for key in model.gate_documents], dtype=np.uint64
    )
    rest = {domain: stream.without(fitted) for domain, stream in scored.streams.items()}
    n_left_out = sum(s.n_documents - rest[domain].n_documents for domain, s in scored.streams.items())
    if not n_left_out:
        return scored
    rest = {domain: stream for domain, stream in rest.items() if stream.n_tokens}
    if not rest:
        raise SeenTextError(
            "The joint gate was fitted on all of this text. Name other text: --data-dir DIR. Or score it all "
            f"the same: {again('--allow-seen')}"
        )
    reporter.note(f"Left out: {counted(n_left_out, 'document')} that a joint gate was fitted on.")
    return replace(scored, streams=rest)


def _where(
    loaded: Sequence[TrainedModel],
    data_dir: str | None,
    domains: Sequence[str] | None,
    reporter: Reporter,
) -> tuple[str, Sequence[str] | None]:
    """Folder and domains of the text: as named, else those of the training."""
    if data_dir is not None:
        return data_dir, domains
    folders = sorted({model.config.data.data_dir for model in loaded})
    if len(folders) > 1:
        raise UsageError(
            f"These checkpoints were trained on different data ({', '.join(folders)}). "
            "Say which text to score them on: --data-dir DIR."
        )
    folder = Path(folders[0])
    if not folder.is_dir():
        raise DataError(f"The folder this was trained on, {folder}, is not there. Name one: --data-dir DIR.")
    if domains is None:
        own = sorted({domain for model in loaded for domain in model.split.domains})
        domains = [domain for domain in own if (folder / domain).is_dir()] or own or None
        if gone := sorted(set(own) - set(domains or own)):
            reporter.note(f"Not scored, because {folder} has no such domains any more: {', '.join(gone)}.")
    return str(folder), domains


def finished_checkpoints(checkpoint_dir: Path, reporter: Reporter = SILENT) -> list[Path]:
    """The best checkpoint of every model in a folder, without damaged ones, which are noted.

    Raises:
        CheckpointNotFoundError: there is none.
    """
    found = list(_sound(_best_of_each(checkpoint_dir), reporter))
    if not found:
        raise _nothing_trained(checkpoint_dir)
    return found


def newest_finished(
    checkpoint_dir: Path,
    reporter: Reporter = SILENT,
    *,
    kind: str | None = None,
) -> Path:
    """The newest of the best checkpoints in a folder; damaged newer ones are noted.

    Args:
        kind: of which it must be, where not any will do.

    Raises:
        CheckpointNotFoundError: there is none.
    """
    newest_first = sorted(_best_of_each(checkpoint_dir), key=lambda entry: entry.modified, reverse=True)
    wanted = [e for e in newest_first if isinstance(e, DamagedEntry) or kind in (None, e.kind)]
    for path in _sound(wanted, reporter):
        return path
    raise _nothing_trained(checkpoint_dir, kind)


def _best_of_each(checkpoint_dir: Path) -> list[CheckpointSummary | DamagedEntry]:
    named = ((entry, parse_name(entry.path.name)) for entry in list_checkpoints(checkpoint_dir))
    return [entry for entry, name in named if name is not None and name.role == "best"]


def _sound(
    entries: Sequence[CheckpointSummary | DamagedEntry],
    reporter: Reporter,
) -> Iterator[Path]:
    for entry in entries:
        try:
            verify_checkpoint(entry.path, reporter=reporter)
        except CheckpointError as error:
            reporter.note(f"Passing over {error}")
        else:
            yield entry.path


def _nothing_trained(checkpoint_dir: Path, kind: str | None = None) -> CheckpointNotFoundError:
    how = suggest("train-mla") if kind == COMBINED else suggest("pretrain", kind or "transformer")
    named = ((entry.path, parse_name(entry.path.name)) for entry in list_checkpoints(checkpoint_dir))
    interrupted = [path for path, name in named if name is not None and name.role == "interrupted"]
    if interrupted and kind is None:
        return CheckpointNotFoundError(
            f"No trained model in {checkpoint_dir}, but an interrupted run. Train it to its first "
            f"validation: {suggest('resume', interrupted[-1])}. Or name its checkpoint."
        )
    return CheckpointNotFoundError(
        f"No trained {kind or 'model'} in {checkpoint_dir}. Train one ({how}), or name a checkpoint."
    )
