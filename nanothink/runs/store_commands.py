"""The vector store by itself: what the commands of ``nanothink store`` do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nanothink.checkpoints import ModelPayload, SplitRecord, read_checkpoint, restore_model
from nanothink.config import Config, VectorStoreConfig
from nanothink.config.run import resolve_config
from nanothink.data.corpus import find_corpus
from nanothink.data.split import NOTHING, TrainedText
from nanothink.data.tokenizer import Tokenizer
from nanothink.data.tokens import TokenisedCorpus, tokenise
from nanothink.errors import (
    CheckpointMismatchError,
    CheckpointNotFoundError,
    DataError,
    UsageError,
    VectorStoreNotFoundError,
    counted,
)
from nanothink.inference.evaluate import Evaluation, evaluate_model
from nanothink.models import COMBINED
from nanothink.models.precision import Precision, choose_device
from nanothink.models.store_gate import choose_key_expert
from nanothink.reporter import SILENT, Reporter
from nanothink.runs.experts import config_for_experts, entries_of, find_experts, scan_that_runs
from nanothink.runs.held_out import InheritedSplit, spelled
from nanothink.runs.rebuilding import rebuild
from nanothink.runs.vector_store import KeyExpert, cost, folder_of, owner_of
from nanothink.vector_store.building import BATCH_TOKENS, BuildPlan, build, plan_build
from nanothink.vector_store.compact import merge_duplicates
from nanothink.vector_store.contents import Owner, VectorStore
from nanothink.vector_store.index import import_faiss
from nanothink.vector_store.store import open_store, read_texts, store_bytes, store_folder, write_store


@dataclass(frozen=True)
class StoreSource:
    """A combined model, or experts that are to become one, and where its vector store lies."""

    folder: Path
    expert: KeyExpert
    config: Config
    tokenizer: Tokenizer
    checkpoint: Path | None
    """None where there are only experts so far."""
    split: InheritedSplit
    """Of the model, or of the experts together."""

    @property
    def settings(self) -> VectorStoreConfig:
        return self.config.vector_store

    def open(self, *, writable: bool = False, reporter: Reporter = SILENT) -> VectorStore:
        """The vector store that is there, verified."""
        return open_store(
            self.folder, self.settings, owner=self.expert.owner, writable=writable, reporter=reporter
        )

    def tokens(
        self,
        data_dir: str | None,
        domains: Sequence[str] | None,
        *,
        skip_bad_records: bool,
        reporter: Reporter = SILENT,
    ) -> TokenisedCorpus:
        """The data named, or what the model was trained on, split as for the model.

        Text that the model holds out stays out of its vector store, so that figures on it stay true.
        """
        tokens = self._read(self.split.trained, data_dir, domains, skip_bad_records, reporter)
        if n := sum(s.n_documents for side in (tokens.val, tokens.test) for s in side.values()):
            reporter.note(f"{counted(n, 'document')} held out by {spelled(self.split.rule)}: not put in.")
        return tokens

    def held_out(self, *, reporter: Reporter = SILENT) -> TokenisedCorpus:
        """The model's own data, whose validation side is in neither the model nor its vector store."""
        try:
            inside = read_texts(self.folder, self.expert.owner.digest)
        except VectorStoreNotFoundError:
            inside = NOTHING
        return self._read(self.split.trained | inside, None, None, False, reporter)

    def _read(
        self,
        trained: TrainedText,
        data_dir: str | None,
        domains: Sequence[str] | None,
        skip_bad_records: bool,
        reporter: Reporter,
    ) -> TokenisedCorpus:
        data = self.config.data
        spec = data_dir or data.data_dir
        if data_dir is None and not Path(spec).is_dir():
            raise DataError(
                f"The folder this was trained on, {spec}, is not there. Name one: --data-dir DIR."
            )
        corpus = find_corpus(spec, domains or (data.domains if data_dir is None else None))
        for warning in corpus.warnings:
            reporter.note(str(warning))
        return tokenise(
            corpus,
            self.tokenizer,
            split=self.split.rule,
            trained=trained,
            held_out=self.split.held_out,
            skip_bad_records=skip_bad_records or data.skip_bad_records,
            reporter=reporter,
        )


def find_store_source(
    checkpoint: Path | None,
    experts: Sequence[Path],
    checkpoint_dir: Path,
    *,
    name: str | None = None,
    assignments: Sequence[str] = (),
    data_dir: str | None = None,
    device: str | None = None,
    reporter: Reporter = SILENT,
) -> StoreSource:
    """Find the model of a ``store`` command: a combined one, or the experts of one yet to be trained.

    Without a checkpoint or experts it is the combined model in the folder, or else the three experts there.

    Raises:
        CheckpointError: there is nothing of the kind.
    """
    stem = f"{name}_{COMBINED}" if name else COMBINED
    if checkpoint is None and not experts and (checkpoint_dir / f"{stem}.pt").exists():
        checkpoint = checkpoint_dir / f"{stem}.pt"
    chosen_device = choose_device(device)
    precision = Precision(chosen_device, torch.float32, "keys are made in float32")
    flags = {"data.data_dir": ("--data-dir", data_dir)}
    if checkpoint is not None:
        if experts:
            raise UsageError("Name a combined model's checkpoint or experts (--expert), not both.")
        payload = read_checkpoint(checkpoint, mmap=True, reporter=reporter)
        if payload["kind"] != COMBINED:
            raise CheckpointMismatchError(
                f"{checkpoint} holds a {payload['kind']}; a vector store belongs to a model that combines "
                f"experts. Build one for experts that are yet to be combined: nanothink store build --expert "
                f"{checkpoint}"
            )
        resolved = resolve_config(base=payload["config"], assignments=assignments)
        config = resolved.config
        parts = {str(checkpoint): SplitRecord.from_state(payload["split"], checkpoint)}
        tokenizer = Tokenizer.from_state(payload["tokenizer"])
        entries = {entry["name"]: entry for entry in entries_of(payload["run"], checkpoint)}
        chosen = choose_key_expert({n: e["kind"] for n, e in entries.items()}, config.vector_store.expert)
        own = scan_that_runs(resolve_config(base=entries[chosen]["config"]).config, chosen_device)
        prefix = f"experts.{list(entries).index(chosen)}."
        weights = {
            key.removeprefix(prefix): tensor
            for key, tensor in payload["model_state"].items()
            if key.startswith(prefix)
        }
        inside: ModelPayload = {
            "kind": entries[chosen]["kind"],
            "model_state": weights,
            "config": payload["config"],
            "tokenizer": payload["tokenizer"],
            "split": payload["split"],
            "run": payload["run"],
        }
        model = rebuild(inside["kind"], own, tokenizer.vocab_size, payload=inside, path=checkpoint)
        report = restore_model(model, inside, expect_kind=inside["kind"], path=checkpoint)
        if not report.complete:
            raise CheckpointMismatchError(
                f"{checkpoint}: the weights of its expert '{chosen}' are not what its settings say: "
                f"{'. '.join(report.lines())}. Use another checkpoint"
            )
        entry: Mapping[str, Any] = entries[chosen]
        folder = folder_of(checkpoint)
    else:
        resolved = resolve_config(assignments=assignments, flags=flags)
        try:
            found = find_experts(experts or None, checkpoint_dir, reporter)
        except CheckpointNotFoundError as error:
            raise CheckpointNotFoundError(
                f"No {stem}.pt in {checkpoint_dir}, and no experts to build a vector store for. {error}"
            ) from None
        config = config_for_experts(found, resolved)
        parts = {str(e.path): SplitRecord.from_state(e.payload["split"], e.path) for e in found}
        kinds = {e.name: e.kind for e in found}
        one = next(e for e in found if e.name == choose_key_expert(kinds, config.vector_store.expert))
        tokenizer = one.tokenizer
        if data_dir is None:
            config = config.model_copy(update={"data": one.config.data})
        model = one.build(chosen_device)
        entry = {"name": one.name, "kind": one.kind, "digest": one.digest}
        folder = store_folder(checkpoint_dir, stem)
    model.to(chosen_device).eval().requires_grad_(False)
    expert = KeyExpert(owner_of(entry, config, tokenizer), model, precision)
    return StoreSource(folder, expert, config, tokenizer, checkpoint, InheritedSplit.of(parts, resolved))


@dataclass(frozen=True)
class StoreFacts:
    """What ``store info`` says."""

    folder: Path
    owner: Owner
    kind: str
    n_lists: int
    n_keys: int
    n_tokens: int
    n_documents: int
    keys_by_domain: Mapping[str, int]
    n_merged: int
    n_held_out: int
    n_bytes: int
    neighbours_bytes: int
    """Of what training has looked up and kept."""


def facts_of(store: VectorStore) -> StoreFacts:
    contents = store.contents
    ends = contents.documents["end"]
    sizes = np.diff(ends, prepend=0)
    by_domain = {
        name: int(sizes[contents.documents["domain"] == i].sum()) for i, name in enumerate(contents.domains)
    }
    kept = sum(path.stat().st_blocks * 512 for path in store.folder.glob("neighbours-*/*") if path.is_file())
    return StoreFacts(
        folder=store.folder,
        owner=store.owner,
        kind=store.index.kind,
        n_lists=store.index.n_lists,
        n_keys=store.index.n_keys,
        n_tokens=len(contents.tokens),
        n_documents=len(contents.documents),
        keys_by_domain=by_domain,
        n_merged=len(contents.merged),
        n_held_out=len(contents.held_out),
        n_bytes=store_bytes(store.folder),
        neighbours_bytes=kept,
    )


def plan_store(found: StoreSource, tokens: TokenisedCorpus, store: VectorStore | None = None) -> BuildPlan:
    """What building, or adding to ``store``, would take."""
    import_faiss()
    return plan_build(tokens, found.settings, found.expert.owner, found.expert.states, store)


def build_store(
    found: StoreSource,
    plan: BuildPlan,
    tokens: TokenisedCorpus,
    store: VectorStore | None = None,
    *,
    reporter: Reporter = SILENT,
) -> VectorStore:
    """Carry out a plan, and open the result."""
    if not plan.n_keys:
        raise DataError(
            f"There is nothing new to remember: {counted(plan.n_known, 'document')} known already, "
            f"{plan.n_held_out:,} held out by earlier data."
        )
    reporter.note(cost(found.folder, plan))
    build(
        plan,
        found.folder,
        found.settings,
        found.expert.owner,
        found.expert.states,
        tokens,
        vocab_size=found.tokenizer.vocab_size,
        store=store,
        reporter=reporter,
    )
    return found.open(reporter=reporter)


@dataclass(frozen=True)
class StoreHit:
    """A key that a text brings to mind."""

    similarity: float
    weight: float
    """Its part of p_mem, at the temperature the model has learnt, or 0.05."""
    before: str
    """What stands before the token in its document."""
    token: str
    """What followed there."""
    domain: str
    source: str
    """File and line."""
    stands_for: int
    """Keys that it stands for, itself included."""


def search_store(
    found: StoreSource, store: VectorStore, text: str, n_neighbours: int, n_before: int = 24
) -> list[StoreHit]:
    """What the end of ``text`` brings to mind, nearest first.

    Raises:
        UsageError: an empty text.
    """
    ids = found.tokenizer.encode(text)
    if not ids:
        raise UsageError("There is no text to search by.")
    window = torch.tensor([ids[-found.expert.owner.block_length :]])
    similarities, numbers = store.index.search(found.expert.states(window)[0, -1:], n_neighbours)
    neighbours = store.neighbours(similarities, numbers)
    counts = neighbours.counts
    scores = neighbours.similarities[0] / _temperature(found)
    weights = (scores + (counts[0].log() if counts is not None else 0.0)).softmax(-1)
    hits = []
    for i, number in enumerate(numbers[0].tolist()):
        if number < 0:
            break
        document = store.contents.documents[int(store.document(np.array([number]))[0])]
        path = store.contents.files[int(document["file"])]
        hits.append(
            StoreHit(
                similarity=float(similarities[0, i]),
                weight=float(weights[i]),
                before=found.tokenizer.decode(store.passage(number, n_before)),
                token=found.tokenizer.decode([int(store.contents.tokens[number])]),
                domain=store.contents.domains[int(document["domain"])],
                source=f"{path}:{int(document['line'])}",
                stands_for=int(counts[0, i]) if counts is not None else 1,
            )
        )
    return hits


def _temperature(found: StoreSource) -> float:
    if found.checkpoint is not None:
        learnt = read_checkpoint(found.checkpoint, mmap=True)["model_state"].get("store_gate.log_temperature")
        if learnt is not None:
            return float(learnt.exp())
    return 0.05


@dataclass(frozen=True)
class Compaction:
    """A store before and after keys were merged."""

    before: StoreFacts
    after: StoreFacts
    evaluation_before: Evaluation | None
    """On the validation text; None where there is no trained model to ask."""
    evaluation_after: Evaluation | None


def compact_store(
    found: StoreSource,
    similarity: float,
    *,
    tokens: TokenisedCorpus | None,
    max_tokens: int | None,
    reporter: Reporter = SILENT,
) -> Compaction:
    """Merge near-duplicates with the same token, and score the model before and after.

    Args:
        tokens: text to score on; None to leave that out.
        max_tokens: at most so many of each domain.
    """

    def score(stage: str) -> Evaluation | None:
        if tokens is None or found.checkpoint is None:
            return None
        from nanothink.runs.loading import load

        loaded = load(found.checkpoint, device=str(found.expert.precision.device), reporter=reporter)
        length = found.config.model.max_seq_len
        return evaluate_model(
            loaded.model,
            tokens.val,
            length=length,
            batch_size=max(1, BATCH_TOKENS // length),
            precision=loaded.precision,
            max_tokens=max_tokens,
            reporter=reporter,
            stage=stage,
        )

    store = found.open(writable=True, reporter=reporter)
    before, scored_before = facts_of(store), score("evaluating before")
    contents = merge_duplicates(store, similarity, reporter)
    write_store(found.folder, found.expert.owner, store.index, contents, reporter=reporter)
    after = facts_of(found.open(reporter=reporter))
    return Compaction(before, after, scored_before, score("evaluating after"))
