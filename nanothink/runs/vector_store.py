"""The vector store where it meets runs and checkpoints: built for a run, attached to a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F

from nanothink.checkpoints import parse_name
from nanothink.config import Config, VectorStoreConfig
from nanothink.data.tokenizer import Tokenizer
from nanothink.data.tokens import TokenisedCorpus
from nanothink.errors import (
    VectorStoreDamagedError,
    VectorStoreError,
    VectorStoreMismatchError,
)
from nanothink.models.contract import LanguageModel
from nanothink.models.nanothink import NanoThink
from nanothink.models.precision import Precision
from nanothink.models.store_gate import choose_key_expert
from nanothink.reporter import SILENT, Reporter
from nanothink.runs.inherited_split import seen_documents
from nanothink.runs.saved_model import SavedModel, expert_entries
from nanothink.vector_store.building import BuildPlan, build, plan_build, search_seconds
from nanothink.vector_store.contents import Owner, VectorStore
from nanothink.vector_store.index import Float32
from nanothink.vector_store.neighbours import RepeatedSearch, TrainingNeighbours
from nanothink.vector_store.store import exists, open_store, store_folder

_LONG_SECONDS = 300  # of building, beyond which the way to a smaller memory is said
_FEWER_KEYS = 200_000


@dataclass(frozen=True)
class KeyExpert:
    """The frozen expert whose states are keys and queries."""

    owner: Owner
    model: LanguageModel
    precision: Precision

    def states(self, tokens: torch.Tensor) -> Float32:
        """(B, T) int64 -> (B, T, D) states of length 1, on the CPU."""
        with torch.inference_mode(), self.precision.autocast():
            states = self.model.hidden(tokens.to(self.precision.device))
            found: Float32 = F.normalize(states.float(), dim=-1).cpu().numpy()
        return found


def key_expert(
    model: NanoThink,
    experts: Iterable[Mapping[str, Any]],
    config: Config,
    tokenizer: Tokenizer,
    precision: Precision,
) -> KeyExpert:
    """The one inside a combined model.

    Args:
        experts: name, kind and digest of each, as a checkpoint has them.
    """
    entries = {entry["name"]: entry for entry in experts}
    name = choose_key_expert({n: e["kind"] for n, e in entries.items()}, config.vector_store.expert)
    inside = cast(LanguageModel, model.experts[model.names.index(name)])
    return KeyExpert(owner_of(entries[name], config, tokenizer), inside, precision)


def owner_of(entry: Mapping[str, Any], config: Config, tokenizer: Tokenizer) -> Owner:
    return Owner(
        expert=entry["name"],
        kind=entry["kind"],
        digest=entry.get("digest", ""),
        tokenizer=tokenizer.fingerprint,
        width=config.model.d_model,
        block_length=config.model.max_seq_len,
    )


def update_store(
    folder: Path,
    model: NanoThink,
    expert: KeyExpert,
    settings: VectorStoreConfig,
    tokens: TokenisedCorpus,
    places: Callable[[], Iterable[tuple[str, int]]],
    *,
    vocab_size: int,
    replace_other: bool,
    reporter: Reporter = SILENT,
) -> TrainingNeighbours:
    """Attach a vector store to a model in training: build it if missing, and find the blocks' neighbours.

    Args:
        places: the blocks that the run will read.
        replace_other: build anew where the store is damaged or another model's.

    Raises:
        VectorStoreError: the store is damaged, another model's, or holds what this run validates on.
    """
    store: VectorStore | None = None
    if exists(folder):
        try:
            store = open_store(folder, settings, owner=expert.owner, reporter=reporter)
        except (VectorStoreDamagedError, VectorStoreMismatchError) as error:
            if not replace_other:
                raise
            reporter.note(f"{error} It is built again now (--overwrite).")
    if store is None:
        plan = plan_build(tokens, settings, expert.owner, expert.states)
        reporter.note(cost(folder, plan))
        build(
            plan,
            folder,
            settings,
            expert.owner,
            expert.states,
            tokens,
            vocab_size=vocab_size,
            reporter=reporter,
        )
        store = open_store(folder, settings, owner=expert.owner, reporter=reporter)
    if held := sum(seen_documents(side, store.trained_text) for side in (tokens.val, tokens.test)):
        raise VectorStoreMismatchError(
            f"{folder} holds {held} of the documents that this run holds out, so its figures would say "
            "nothing. Build it again from this data: nanothink store build --overwrite, or start with "
            "--overwrite."
        )
    known = TrainingNeighbours(store, tokens, expert.owner.block_length, expert.states)
    missing = known.missing(places())
    if missing:
        n_queries = sum(map(len, missing.values())) * expert.owner.block_length
        seconds = search_seconds(
            n_queries, store.index.n_keys, store.index.kind, settings.n_probe, expert.owner.width
        )
        reporter.note(
            f"Looking up the neighbours of {n_queries:,} training tokens, once: about {_duration(seconds)} "
            f"and {_size(known.n_bytes(missing))} on the disk."
        )
        known.find(missing, reporter)
    model.vector_store = RepeatedSearch(store)
    return known


def cost(folder: Path, plan: BuildPlan) -> str:
    kept = {
        "exact": "as they are",
        "sq8": f"in {plan.n_lists:,} lists, a byte a number",
        "pq": f"in {plan.n_lists:,} lists, a byte for four numbers",
    }[plan.kind]
    doing = "Adding to" if plan.n_old else "Building"
    shorter = f" Fewer keys take less: --set vector_store.max_keys={_FEWER_KEYS}."
    return (
        f"{doing} the vector store {folder}: {plan.n_keys:,} keys, kept {kept}. That takes about "
        f"{_duration(plan.seconds)}, {_size(plan.memory_bytes)} of memory and {_size(plan.disk_bytes)} on "
        "the disk." + (shorter if plan.seconds > _LONG_SECONDS and plan.n_keys > _FEWER_KEYS else "")
    )


def _duration(seconds: float) -> str:
    whole = max(1, round(seconds))
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min" if whole < 3600 else f"{whole / 3600:.1f} h"


def _size(n_bytes: float) -> str:
    return f"{n_bytes / 1e6:,.1f} MB" if n_bytes < 1e9 else f"{n_bytes / 1e9:,.1f} GB"


def folder_of(checkpoint: Path) -> Path:
    """The vector store that belongs to a checkpoint, be it best, interrupted or of some epoch."""
    name = parse_name(checkpoint.name)
    return store_folder(checkpoint.parent, name.stem if name is not None else checkpoint.stem)


def open_beside(saved: SavedModel, key_expert: str, reporter: Reporter = SILENT) -> VectorStore:
    """Open the vector store that lies beside a combined model's checkpoint.

    Args:
        key_expert: name of the expert whose states the keys are.

    Raises:
        VectorStoreError: it is missing, damaged, or another model's.
    """
    entries = {entry["name"]: entry for entry in expert_entries(saved.payload, saved.path)}
    owner = owner_of(entries[key_expert], saved.config, saved.tokenizer)
    try:
        return open_store(folder_of(saved.path), saved.config.vector_store, owner=owner, reporter=reporter)
    except VectorStoreError as error:
        raise type(error)(
            f"{saved.path} was trained with a vector store. {error} To run without it: --no-vector-store "
            "(in Python: vector_store=False)."
        ) from None
