"""The report of runs: their records, passages from their models, and one HTML file, written whole."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nanothink import __version__
from nanothink.checkpoints import parse_name
from nanothink.data.corpus import find_corpus
from nanothink.data.tokens import TokenStream
from nanothink.disk import try_to_write, write_whole
from nanothink.errors import CheckpointNotFoundError, DataError, NanoThinkError, StorageError, UsageError
from nanothink.inference.denoising import reconstruct
from nanothink.inference.generate import StreamDecoder
from nanothink.models.diffuser import Diffuser
from nanothink.models.nanothink import NanoThink
from nanothink.report import (
    GENERATOR,
    Missing,
    Rebuilding,
    RebuiltPassage,
    ReportedRun,
    RoutedPassage,
    RoutedToken,
    page,
)
from nanothink.reporter import SILENT, Reporter
from nanothink.runs.held_out import held_out
from nanothink.runs.trained_model import TrainedModel, load
from nanothink.suggestions import did_you_mean, suggest
from nanothink.training.records import RunRecords, read_description, read_run

PASSAGE_TOKENS = 120
"""Tokens of a held-out passage that is routed or rebuilt, at most the context."""

REBUILT_FRACTIONS = (0.1, 0.25, 0.5, 0.75, 1.0)
"""Noise levels that a passage is rebuilt from, as fractions of the highest."""

ROUTED_DOMAINS, REBUILT_DOMAINS = 6, 2
"""Domains that show a passage."""

_SEARCHED_DOCUMENTS = 1000
_WITH_PASSAGES = {"nanothink_mla", "diffuser"}


@dataclass(frozen=True)
class Report:
    path: Path
    n_bytes: int
    runs: tuple[ReportedRun, ...]


def write_report(
    folders: Sequence[Path],
    out: Path,
    *,
    data_dir: str | None = None,
    device: str | None = None,
    reporter: Reporter = SILENT,
) -> Report:
    """Read the records in ``folders`` and write their page to ``out``, whole or not at all.

    Args:
        folders: of the runs, as ``find_runs`` gives them.
        out: the HTML file; an earlier report there is replaced.
        data_dir: where the passages come from, when the data is no longer where the run had it.
        device: that the models of the passages are run on.

    Raises:
        DataError: a folder holds no records.
        UsageError: ``out`` is something other than a report.
        StorageError: it cannot be written.
    """
    guard(out)
    try_to_write(out.parent)
    runs: list[ReportedRun] = []
    for number, folder in enumerate(folders):
        reporter.progress("reading runs", number, len(folders))
        records = read_run(folder)
        label = records.name
        if any(label == run.label for run in runs):
            label = f"{label} ({folder})"
        runs.append(ReportedRun(label, records, *_passages(records, data_dir, device, reporter)))
        passages = runs[-1].passages
        if isinstance(passages, Missing):
            reporter.note(f"{label}: no passage of held-out text is shown. {passages.reason}")
    reporter.progress("reading runs", len(folders), len(folders))
    made = time.strftime("%Y-%m-%d %H:%M")
    html = page(runs, made=made, version=__version__).encode("utf-8", "replace")
    write_whole(out, html, explain=_cannot_write)
    return Report(out, len(html), tuple(runs))


def find_runs(names: Sequence[str], checkpoint_dir: Path) -> list[Path]:
    """Folders of the runs that are meant: by name, by folder, or by checkpoint; all of them without a name.

    In the order given, or else in the order in which they were started.

    Raises:
        UsageError: there is no such run.
        CheckpointNotFoundError: the folder has no run at all.
    """
    home = checkpoint_dir / "runs"
    known = {p.parent.name: p.parent for p in home.glob("*/config.json")}
    if names:
        return list(dict.fromkeys(_folder_of(name, known, home) for name in names))
    if not known:
        raise CheckpointNotFoundError(
            f"No run in {home}. Train a model ({suggest('pretrain transformer')}), or name "
            "the folder of a run."
        )
    return sorted(known.values(), key=_started)


def guard(out: Path) -> None:
    """Refuse to write where something other than a report stands.

    Raises:
        UsageError: it does, or the folder is not there.
    """
    if out.is_dir():
        raise UsageError(f"--out {out} is a folder; name a file, such as {out / 'report.html'}.")
    if out.parent.exists() and not out.parent.is_dir():
        raise UsageError(f"--out {out}: {out.parent} is a file, not a folder. Name another place.")
    if not out.parent.is_dir():
        raise UsageError(f"--out {out}: the folder {out.parent} does not exist. Make it first.")
    try:
        with out.open("rb") as file:
            beginning = file.read(4096)
    except FileNotFoundError:
        return
    except OSError as error:
        raise StorageError(
            f"{out} cannot be read: {error.strerror or error}. Choose another --out."
        ) from None
    if GENERATOR.encode() not in beginning:
        raise UsageError(f"{out} is there and is not a report. Choose another --out, or remove it.")


def _folder_of(name: str, known: dict[str, Path], home: Path) -> Path:
    path = Path(name)
    if (path / "config.json").is_file():
        return path
    if name in known:
        return known[name]
    if (parsed := parse_name(path.name)) is not None:
        own = path.parent / "runs" / parsed.stem
        if (own / "config.json").is_file():
            return own
    there = f" There: {', '.join(sorted(known))}." if known else ""
    raise UsageError(f"There is no run '{name}' in {home}.{did_you_mean(name, known)}{there}")


def _started(folder: Path) -> tuple[str, str]:
    try:
        return str(read_description(folder).get("started", "")), folder.name
    except NanoThinkError:
        return "", folder.name


def _passages(
    records: RunRecords, data_dir: str | None, device: str | None, reporter: Reporter
) -> tuple[tuple[RoutedPassage, ...] | tuple[RebuiltPassage, ...] | Missing, tuple[str, ...]]:
    """Passages of held-out text from the best checkpoint of a run, and remarks about them."""
    if records.kind not in _WITH_PASSAGES:
        return (), ()
    path = records.folder.parent.parent / f"{records.name}.pt"
    if records.folder.parent.name != "runs" or not path.is_file():
        return Missing(f"Its checkpoint is not there ({path})."), ()
    try:
        loaded = load(path, device=device, reporter=reporter)
        streams, same = _held_out(loaded, records, data_dir, reporter)
        remarks = () if same else ("The data has changed since; its passages come from the data of today.",)
        if isinstance(loaded.model, Diffuser):
            return _rebuilt(loaded, streams), remarks
        if isinstance(loaded.model, NanoThink):
            return _routed(loaded, streams), remarks
        return Missing(f"{path} holds a {loaded.kind}: it is of another run."), ()
    except NanoThinkError as error:
        return Missing(str(error)), ()


def _held_out(
    loaded: TrainedModel, records: RunRecords, data_dir: str | None, reporter: Reporter
) -> tuple[dict[str, list[int]], bool]:
    """A passage of validation text by domain, beginning with EOS; True if the data has not changed."""
    config = loaded.config.data
    folder = data_dir or config.data_dir
    if not Path(folder).is_dir():
        raise DataError(f"The folder it was trained on, {folder}, is not there. Name it: --data-dir DIR.")
    tokens = held_out(
        find_corpus(folder, config.domains),
        [loaded],
        loaded.tokenizer,
        skip_bad_records=True,
        reporter=reporter,
    )
    length = min(PASSAGE_TOKENS, loaded.config.model.max_seq_len)
    found = {
        domain: [loaded.tokenizer.eos_id, *_passage(stream, length - 1)]
        for domain, stream in tokens.val.items()
        if stream.n_tokens > 1
    }
    if not found:
        raise DataError(f"There is no validation text in {folder}.")
    then = records.description.get("data")
    return found, isinstance(then, dict) and then.get("fingerprint") == tokens.fingerprint


def _passage(stream: TokenStream, n_tokens: int) -> list[int]:
    """The beginning of the first document that is long enough, else of the longest there is."""
    sizes = stream.documents().n_tokens[:_SEARCHED_DOCUMENTS] - 1  # without EOS
    long_enough = (sizes >= n_tokens).nonzero()[0]
    chosen = int(long_enough[0]) if len(long_enough) else int(sizes.argmax())
    start = int((sizes[:chosen] + 1).sum())
    stop = start + min(n_tokens, int(sizes[chosen]))
    return stream.block(0, stop)[1][start:].tolist()  # type: ignore[no-any-return]


def _routed(loaded: TrainedModel, passages: dict[str, list[int]]) -> tuple[RoutedPassage, ...]:
    assert isinstance(loaded.model, NanoThink)
    found = []
    for domain, tokens in list(passages.items())[:ROUTED_DOMAINS]:
        weights = loaded.routing(torch.tensor([tokens[:-1]]))[0].tolist()  # (T - 1, E), or E + 1
        pieces = zip(_texts(loaded, tokens[1:]), weights, strict=True)
        own = tuple(RoutedToken(text, weight) for text, weight in pieces if text)
        found.append(RoutedPassage(domain, loaded.model.components, own))
    return tuple(found)


def _rebuilt(loaded: TrainedModel, passages: dict[str, list[int]]) -> tuple[RebuiltPassage, ...]:
    assert isinstance(loaded.model, Diffuser)
    n_levels = loaded.model.shape.training_steps
    levels = sorted({max(1, round(fraction * n_levels)) for fraction in REBUILT_FRACTIONS})
    found = []
    for domain, tokens in list(passages.items())[:REBUILT_DOMAINS]:
        rebuilt = tuple(
            Rebuilding(
                level.level,
                level.right,
                tuple(
                    (_on_one_line(text), guess == true)
                    for text, guess, true in zip(
                        _texts(loaded, level.tokens), level.tokens, tokens[1:], strict=True
                    )
                    if text
                ),
            )
            for level in reconstruct(loaded.model, tokens, levels)
        )
        text = _on_one_line(loaded.tokenizer.decode(tokens[1:]))
        found.append(RebuiltPassage(domain, text, n_levels, rebuilt))
    return tuple(found)


def _texts(loaded: TrainedModel, tokens: Sequence[int]) -> list[str]:
    """The text that becomes final with each token; the last has what is left of an unfinished character."""
    decoder = StreamDecoder(loaded.tokenizer)
    texts = [decoder.push(token) for token in tokens]
    texts[-1] += decoder.flush()
    return texts


def _on_one_line(text: str) -> str:
    return text.replace("\n", "↵ ")


def _cannot_write(out: Path, error: OSError) -> StorageError:
    return StorageError(
        f"The report cannot be written to {out}: {error.strerror or error}. Free space or permissions "
        "there, or choose another --out."
    )


def summary(run: ReportedRun) -> dict[str, Any]:
    """A run in the numbers that scripts read."""
    records, best = run.records, run.records.best
    return {
        "name": run.label,
        "kind": records.kind,
        "folder": records.folder,
        "ending": (records.ending or {}).get("reason"),
        "step": records.last_step,
        "epoch": records.last_epoch,
        "best": {key: best.get(key) for key in ("step", "loss", "bits_per_byte")} if best else None,
        "passages": 0 if isinstance(run.passages, Missing) else len(run.passages),
    }
