"""Work of the ``nanothink store`` commands: facts, search, compaction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from nanothink.checkpoints import read_checkpoint
from nanothink.data.tokenizer import Tokenizer
from nanothink.data.tokens import TokenisedCorpus
from nanothink.errors import (
    UsageError,
)
from nanothink.inference.evaluate import Evaluation
from nanothink.reporter import SILENT, Reporter
from nanothink.runs.scoring import score
from nanothink.runs.store_source import StoreSource
from nanothink.runs.trained_model import load
from nanothink.vector_store.compact import merge_duplicates
from nanothink.vector_store.contents import Owner, VectorStore
from nanothink.vector_store.index import Float32
from nanothink.vector_store.store import store_bytes, write_store


@dataclass(frozen=True)
class StoreFacts:
    """Facts of a vector store, for ``store info``."""

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
    """Neighbours that training has looked up and kept."""


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


@dataclass(frozen=True)
class StoreHit:
    """A key near the end of a text."""

    similarity: float
    weight: float
    """Its share of p_mem, at the temperature that the model has learnt, or 0.05."""
    before: str
    """Text before the token in its document."""
    token: str
    """The token that follows the key."""
    domain: str
    source: str
    """File and line."""
    stands_for: int
    """Number of merged keys that it stands for, itself included."""


def search_store(
    found: StoreSource, store: VectorStore, text: str, n_neighbours: int, n_before: int = 24
) -> list[StoreHit]:
    """The keys nearest to the end of ``text``, nearest first.

    Raises:
        UsageError: an empty text.
    """
    ids = found.tokenizer.encode_prompt(text)
    if not text:
        raise UsageError("There is no text to search by.")
    window = torch.tensor([ids[-found.expert.owner.block_length :]])
    query = found.expert.states(window)[0, -1:]
    return nearest_passages(store, found.tokenizer, query, _temperature(found), n_neighbours, n_before)


def nearest_passages(
    store: VectorStore,
    tokenizer: Tokenizer,
    query: Float32,
    temperature: float,
    n_neighbours: int,
    n_before: int = 24,
) -> list[StoreHit]:
    """The keys nearest to a query (1, D) of length 1, nearest first, each with the text before it."""
    similarities, numbers = store.index.search(query, n_neighbours)
    neighbours = store.neighbours(similarities, numbers)
    counts = neighbours.counts
    scores = neighbours.similarities[0] / temperature
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
                before=tokenizer.decode(store.passage(number, n_before)),
                token=tokenizer.decode([int(store.contents.tokens[number])]),
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
    """On validation text; None if there is no trained model."""
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
        max_tokens: upper bound on the tokens scored in each domain.
    """

    def scored(stage: str) -> Evaluation | None:
        if tokens is None or found.checkpoint is None:
            return None
        loaded = load(found.checkpoint, device=str(found.expert.precision.device), reporter=reporter)
        return score(
            loaded.model,
            tokens.val,
            length=found.expert.owner.block_length,
            precision=loaded.precision,
            max_tokens=max_tokens,
            reporter=reporter,
            stage=stage,
        )

    store = found.open(writable=True, reporter=reporter)
    before, scored_before = facts_of(store), scored("evaluating before")
    contents = merge_duplicates(store, similarity, reporter)
    write_store(found.folder, found.expert.owner, store.index, contents, reporter=reporter)
    after = facts_of(found.open(reporter=reporter))
    return Compaction(before, after, scored_before, scored("evaluating after"))
