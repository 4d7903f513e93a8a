"""The vector store of one model: built for a run, added to by commands, opened beside a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from nanothink.checkpoints import parse_name
from nanothink.config import Config, VectorStoreConfig
from nanothink.data.tokenizer import Tokenizer
from nanothink.data.tokens import TokenisedCorpus
from nanothink.errors import DataError, VectorStoreDamagedError, VectorStoreError, VectorStoreMismatchError
from nanothink.models.contract import LanguageModel
from nanothink.models.precision import Precision
from nanothink.models.store_gate import choose_key_expert
from nanothink.reporter import SILENT, Reporter
from nanothink.runs.inherited_split import seen_documents
from nanothink.runs.saved_model import SavedModel, expert_entries
from nanothink.vector_store.building import BuildPlan, build, plan_build, search_seconds
from nanothink.vector_store.contents import Owner, VectorStore
from nanothink.vector_store.index import Float32, import_faiss, rebuild
from nanothink.vector_store.manifest import exists, store_folder
from nanothink.vector_store.neighbours import TrainingNeighbours
from nanothink.vector_store.store import open_store
from nanothink.wording import rounded_duration

_LONG_SECONDS = 300  # a build that takes longer comes with advice
_FEWER_KEYS = 200_000


@dataclass(frozen=True)
class KeyExpert:
    """The frozen expert whose states are keys and queries."""

    owner: Owner
    load: Callable[[], LanguageModel]
    """Gives the model, whole, where it runs; called when text is to be read."""
    precision: Precision

    def states(self, tokens: torch.Tensor) -> Float32:
        """(B, T) int64 -> (B, T, D) states of length 1, on the CPU."""
        with torch.inference_mode(), self.precision.autocast():
            states = self.load().hidden(tokens.to(self.precision.device))
            found: Float32 = F.normalize(states.float(), dim=-1).cpu().numpy()
        return found


@dataclass(frozen=True)
class ModelStore:
    """Folder, settings and key expert of a model's vector store, whether it is built yet or not."""

    folder: Path
    settings: VectorStoreConfig
    expert: KeyExpert
    tokenizer: Tokenizer

    def open(self, *, writable: bool = False, reporter: Reporter = SILENT) -> VectorStore:
        """The store, verified. Raises as ``open_store``."""
        owner = self.expert.owner
        return open_store(self.folder, self.settings, owner=owner, writable=writable, reporter=reporter)

    def plan(self, tokens: TokenisedCorpus, store: VectorStore | None = None) -> BuildPlan:
        """Text and cost of a new store, or of an addition to ``store``."""
        import_faiss()
        return plan_build(tokens, self.settings, self.expert.owner, self.expert.states, store)

    def build(
        self,
        plan: BuildPlan,
        tokens: TokenisedCorpus,
        store: VectorStore | None = None,
        *,
        reporter: Reporter = SILENT,
    ) -> VectorStore:
        """Carry out a plan and open the result. Notes the cost first.

        Raises:
            DataError: there is nothing to put in.
            StorageError: it cannot be written; the old store is intact.
        """
        if not plan.n_keys:
            raise DataError(
                "There is nothing new to put in: every document is held out or in the store already "
                f"({plan.n_known:,})."
            )
        reporter.note(_cost(self.folder, plan))
        build(
            plan,
            self.folder,
            self.settings,
            self.expert.owner,
            self.expert.states,
            tokens,
            vocab_size=self.tokenizer.vocab_size,
            store=store,
            reporter=reporter,
        )
        return self.open(reporter=reporter)

    def open_or_build(
        self, tokens: TokenisedCorpus, *, replace: bool, reporter: Reporter = SILENT
    ) -> VectorStore:
        """The store for a run over ``tokens``; built if it is missing.

        Args:
            replace: build it again if it is damaged or another model's.

        Raises:
            VectorStoreError: it is damaged, another model's, or holds text that the run holds out.
        """
        store: VectorStore | None = None
        if exists(self.folder):
            try:
                store = self.open(reporter=reporter)
            except (VectorStoreDamagedError, VectorStoreMismatchError) as error:
                if not replace:
                    raise
                reporter.note(f"{error} It is built again now (--overwrite).")
        if store is None:
            store = self.build(self.plan(tokens), tokens, reporter=reporter)
        if held := sum(seen_documents(side, store.trained_text) for side in (tokens.val, tokens.test)):
            raise VectorStoreMismatchError(
                f"{self.folder} holds {held} of the documents that this run holds out, so its figures would "
                f"say nothing. Build it again from this data: {rebuild(self.folder)}, or start "
                "with --overwrite."
            )
        return store

    def seconds(self, tokens: TokenisedCorpus, n_looked_up: int) -> float:
        """Estimated duration of building the store and of looking up ``n_looked_up`` tokens."""
        plan, width = self.plan(tokens), self.expert.owner.width
        return plan.seconds + search_seconds(
            n_looked_up, plan.n_keys, plan.kind, self.settings.n_probe, width
        )

    def neighbours(
        self,
        store: VectorStore,
        tokens: TokenisedCorpus,
        places: Iterable[tuple[str, int]],
        reporter: Reporter = SILENT,
    ) -> TrainingNeighbours:
        """Neighbours of the training blocks at ``places`` (domain, index); looks up the missing ones."""
        length = self.expert.owner.block_length
        known = TrainingNeighbours(store, tokens, length, self.expert.states)
        if missing := known.missing(places):
            n_queries = sum(map(len, missing.values())) * length
            index = store.index
            seconds = search_seconds(n_queries, index.n_keys, index.kind, self.settings.n_probe, index.width)
            reporter.note(
                f"Looking up the neighbours of {n_queries:,} training tokens, once: about "
                f"{rounded_duration(seconds)} and {_size(known.n_bytes(missing))} on the disk."
            )
            known.find(missing, reporter)
        return known


def key_entry(entries: Sequence[Mapping[str, Any]], asked: str | None) -> Mapping[str, Any]:
    """The entry of the expert whose states are keys and queries.

    Args:
        entries: of a combined model, as ``expert_entries`` gives them.
        asked: ``vector_store.expert``.
    """
    name = choose_key_expert({entry["name"]: entry["kind"] for entry in entries}, asked)
    return next(entry for entry in entries if entry["name"] == name)


def owner_of(entry: Mapping[str, Any], config: Config, tokenizer: Tokenizer) -> Owner:
    """The owner of a store whose keys are states of this expert."""
    return Owner(
        expert=entry["name"],
        kind=entry["kind"],
        digest=entry.get("digest", ""),
        tokenizer=tokenizer.fingerprint,
        width=entry["config"]["model"]["d_model"],
        block_length=config.model.max_seq_len,
    )


def folder_of(checkpoint: Path) -> Path:
    """Folder of the vector store of a checkpoint: best, interrupted or snapshot."""
    name = parse_name(checkpoint.name)
    return store_folder(checkpoint.parent, name.stem if name is not None else checkpoint.stem)


def open_beside(
    saved: SavedModel,
    reporter: Reporter = SILENT,
    *,
    otherwise: str = "To run without it: --no-vector-store (in Python: vector_store=False).",
) -> VectorStore:
    """Open the vector store that lies beside a combined model's checkpoint.

    Args:
        otherwise: advice in the error.

    Raises:
        VectorStoreError: it is missing, damaged, or another model's.
    """
    settings = saved.config.vector_store
    entry = key_entry(expert_entries(saved.payload, saved.path), settings.expert)
    owner = owner_of(entry, saved.config, saved.tokenizer)
    try:
        return open_store(folder_of(saved.path), settings, owner=owner, reporter=reporter)
    except VectorStoreError as error:
        raise type(error)(
            f"{saved.path} was trained with a vector store. {error} {otherwise}".strip()
        ) from None


def _cost(folder: Path, plan: BuildPlan) -> str:
    kept = {
        "exact": "as they are",
        "sq8": f"in {plan.n_lists:,} lists, a byte a number",
        "pq": f"in {plan.n_lists:,} lists, a byte for four numbers",
    }[plan.kind]
    doing = "Adding to" if plan.n_old else "Building"
    shorter = f" Fewer keys take less: --set vector_store.max_keys={_FEWER_KEYS}."
    return (
        f"{doing} the vector store {folder}: {plan.n_keys:,} keys, kept {kept}. That takes about "
        f"{rounded_duration(plan.seconds)}, {_size(plan.memory_bytes)} of memory and "
        f"{_size(plan.disk_bytes)} on the disk."
        + (shorter if plan.seconds > _LONG_SECONDS and plan.n_keys > _FEWER_KEYS else "")
    )


def _size(n_bytes: float) -> str:
    return f"{n_bytes / 1e6:,.1f} MB" if n_bytes < 1e9 else f"{n_bytes / 1e9:,.1f} GB"
