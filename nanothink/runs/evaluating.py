"""Checkpoints side by side on the same text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from nanothink.checkpoints import (
    CheckpointSummary,
    DamagedEntry,
    Progress,
    list_checkpoints,
    parse_name,
    verify_checkpoint,
)
from nanothink.data.corpus import find_corpus
from nanothink.data.split import SplitRule
from nanothink.data.tokens import TokenStream, tokenise
from nanothink.errors import CheckpointError, CheckpointNotFoundError, DataError, UsageError
from nanothink.inference.denoising import denoising_errors
from nanothink.inference.evaluate import Difference, Evaluation, evaluate_model
from nanothink.models import COMBINED
from nanothink.models.diffuser import Diffuser
from nanothink.models.nanothink import NanoThink
from nanothink.runs.loading import LoadedModel, load

Split = Literal["train", "val", "all"]
_BATCH_TOKENS = 8192


@dataclass(frozen=True)
class CheckpointEvaluation:
    path: Path
    kind: str
    evaluation: Evaluation


def above_best(results: Sequence[CheckpointEvaluation]) -> list[Difference | None]:
    """How far each is above the one with the fewest bits per byte.

    None for that one itself, and for what was not scored on the same documents. A model without a finite
    score is never the best beside one that has one.
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
    split: Split = "val",
    max_tokens: int | None = None,
    device: str | None = None,
    skip_bad_records: bool = False,
    memory: bool = True,
    note: Callable[[str], None],
    progress: Progress,
) -> list[CheckpointEvaluation]:
    """Score each checkpoint on the same documents.

    Without ``data_dir`` the text is what the checkpoints were trained on (its held-out part under
    ``split="val"``), and several checkpoints must agree on the folder. Each checkpoint cuts the text up
    with its own tokenizer and reads it in blocks of its own ``max_seq_len``. Where they held out different
    fractions, it is the text that all of them held out, or trained on. A model that was trained with a memory
    is scored with it unless ``memory`` is False.

    Raises:
        UsageError: the checkpoints come from different data, and none was given.
        DataError: there is no text to score.
    """
    loaded = [load(path, device=device, memory=memory, progress=progress) for path in paths]
    for model in loaded:
        for line in model.notes:
            note(f"{model.path}: {line}")
    if data_dir is None:
        folders = sorted({model.config.data.data_dir for model in loaded})
        if len(folders) > 1:
            raise UsageError(
                f"These checkpoints were trained on different data ({', '.join(folders)}). "
                "Say which text to score them on: --data-dir DIR."
            )
        data_dir = folders[0]
        if not Path(data_dir).is_dir():
            raise DataError(
                f"The folder this was trained on, {data_dir}, is not there. Name one: --data-dir DIR."
            )
        if domains is None and all(model.config.data.domains for model in loaded):
            domains = sorted({d for model in loaded for d in model.config.data.domains or ()})
    corpus = find_corpus(data_dir, domains)
    for warning in corpus.warnings:
        note(str(warning))
    if len({model.tokenizer.fingerprint for model in loaded}) > 1:
        note(
            "These checkpoints have different tokenizers: compare their bits per byte. Loss and perplexity "
            "are by token, and do not compare."
        )
    own = {Path(model.config.data.data_dir).resolve() for model in loaded}
    if split == "val" and Path(data_dir).resolve() not in own:
        note(f"Of {data_dir} the part that training would hold out is scored; --split all scores all of it.")
    fractions = sorted({model.config.data.val_split for model in loaded})
    val_split = {"train": fractions[-1], "val": fractions[0], "all": None}[split]
    if len(fractions) > 1 and val_split is not None:
        did = "held out" if split == "val" else "trained on"
        note(
            f"These checkpoints held out different fractions of their data (data.val_split "
            f"{', '.join(map(str, fractions))}). They are scored on what all of them {did}."
        )
    results = []
    for model in loaded:
        tokens = tokenise(
            corpus,
            model.tokenizer,
            split=None if val_split is None else SplitRule(val_split),
            skip_bad_records=skip_bad_records or model.config.data.skip_bad_records,
            on_progress=lambda done, total: progress("tokenising", done, total),
            note=note,
        )
        length = model.config.model.max_seq_len
        streams = tokens.val if split == "val" else tokens.train
        if (recalled := _inside_memory(model, streams)) > 0:
            note(
                f"Warning: {recalled:,} of these documents are in the memory of {model.path}, which knows "
                "them by heart: these figures say nothing about other text."
            )
        label = f"evaluating {model.path.name}"
        evaluation = evaluate_model(
            model.model,
            streams,
            length=length,
            batch_size=max(1, _BATCH_TOKENS // length),
            precision=model.precision,
            max_tokens=max_tokens,
            on_progress=lambda done, total, label=label: progress(label, done, total),  # type: ignore[misc]
        )
        if not evaluation.domains:
            raise DataError(f"There is no text in the {split} part of {data_dir}.")
        if isinstance(model.model, Diffuser) and model.config.diffuser.target != "hidden_state":
            errors = denoising_errors(
                model.model,
                streams,
                length=length,
                precision=model.precision,
                on_progress=lambda done, total: progress("errors by noise level", done, total),
            )
            evaluation = replace(evaluation, denoising=errors)
        results.append(CheckpointEvaluation(model.path, model.kind, evaluation))
    return results


def _inside_memory(model: LoadedModel, streams: Mapping[str, TokenStream]) -> int:
    """Documents of these streams that the model has in its memory."""
    if not isinstance(model.model, NanoThink) or model.model.memory is None:
        return 0
    from nanothink.memory.store import VectorStore
    from nanothink.runs.remembering import held_out_inside

    assert isinstance(model.model.memory, VectorStore)
    return held_out_inside(model.model.memory, streams.values())


def finished_checkpoints(
    checkpoint_dir: Path, note: Callable[[str], None], progress: Progress | None = None
) -> list[Path]:
    """The best checkpoint of every model in a folder; ``note`` hears of damaged ones, which are left out.

    Raises:
        CheckpointNotFoundError: there is none.
    """
    found = list(_sound(_best_of_each(checkpoint_dir), note, progress))
    if not found:
        raise _nothing_trained(checkpoint_dir)
    return found


def newest_finished(
    checkpoint_dir: Path,
    note: Callable[[str], None],
    progress: Progress | None = None,
    *,
    kind: str | None = None,
) -> Path:
    """Of the best checkpoints in a folder the one written last; ``note`` hears of damaged newer ones.

    Args:
        kind: of which it must be, where not any will do.

    Raises:
        CheckpointNotFoundError: there is none.
    """
    newest_first = sorted(_best_of_each(checkpoint_dir), key=lambda entry: entry.modified, reverse=True)
    wanted = [e for e in newest_first if isinstance(e, DamagedEntry) or kind in (None, e.kind)]
    for path in _sound(wanted, note, progress):
        return path
    raise _nothing_trained(checkpoint_dir, kind)


def _best_of_each(checkpoint_dir: Path) -> list[CheckpointSummary | DamagedEntry]:
    named = ((entry, parse_name(entry.path.name)) for entry in list_checkpoints(checkpoint_dir))
    return [entry for entry, name in named if name is not None and name.role == "best"]


def _sound(
    entries: Sequence[CheckpointSummary | DamagedEntry],
    note: Callable[[str], None],
    progress: Progress | None,
) -> Iterator[Path]:
    for entry in entries:
        try:
            verify_checkpoint(entry.path, progress=progress)
        except CheckpointError as error:
            note(f"Passing over {error}")
        else:
            yield entry.path


def _nothing_trained(checkpoint_dir: Path, kind: str | None = None) -> CheckpointNotFoundError:
    how = "train-mla" if kind == COMBINED else f"pretrain {kind or 'transformer'}"
    return CheckpointNotFoundError(
        f"No trained {kind or 'model'} in {checkpoint_dir}. Train one (nanothink {how}), or name a "
        "checkpoint."
    )
