"""The model that a vector store belongs to: a combined one, or experts that are yet to be combined."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

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
from nanothink.models import COMBINED
from nanothink.models.precision import Precision, choose_device
from nanothink.models.store_gate import choose_key_expert
from nanothink.reporter import SILENT, Reporter
from nanothink.runs.experts import config_for_experts, find_experts
from nanothink.runs.inherited_split import InheritedSplit, spelled
from nanothink.runs.saved_model import SavedModel, expert_entries
from nanothink.runs.vector_store import KeyExpert, folder_of, owner_of
from nanothink.vector_store.contents import VectorStore
from nanothink.vector_store.store import open_store, read_texts, store_folder


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
        saved = SavedModel.read(checkpoint, reporter)
        if saved.kind != COMBINED:
            raise CheckpointMismatchError(
                f"{checkpoint} holds a {saved.kind}; a vector store belongs to a model that combines "
                f"experts. Build one for experts that are yet to be combined: nanothink store build --expert "
                f"{checkpoint}"
            )
        resolved = resolve_config(base=saved.payload["config"], assignments=assignments)
        config, tokenizer = resolved.config, saved.tokenizer
        parts = {str(checkpoint): saved.split}
        entries = {entry["name"]: entry for entry in expert_entries(saved.payload, checkpoint)}
        kinds = {name: entry["kind"] for name, entry in entries.items()}
        chosen = choose_key_expert(kinds, config.vector_store.expert)
        one, entry = saved.expert(chosen), entries[chosen]
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
        parts = {str(expert.path): expert.split for expert in found.values()}
        kinds = {name: expert.kind for name, expert in found.items()}
        chosen = choose_key_expert(kinds, config.vector_store.expert)
        one = found[chosen]
        tokenizer = one.tokenizer
        if data_dir is None:
            config = config.model_copy(update={"data": one.config.data})
        entry = {"name": chosen, "kind": one.kind, "digest": one.digest}
        folder = store_folder(checkpoint_dir, stem)
    model = one.build(chosen_device)[0].to(chosen_device)
    expert = KeyExpert(owner_of(entry, config, tokenizer), model, precision)
    return StoreSource(folder, expert, config, tokenizer, checkpoint, InheritedSplit.of(parts, resolved))
