"""The vector store that a ``store`` command means, and the text that may go into it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from nanothink.checkpoints import read_summary
from nanothink.config import DataConfig
from nanothink.config.run import resolve_config
from nanothink.data.corpus import find_corpus
from nanothink.data.split import NOTHING, TrainedText
from nanothink.data.tokens import TokenisedCorpus, tokenise
from nanothink.errors import (
    CheckpointMismatchError,
    CheckpointNotFoundError,
    DataError,
    UsageError,
    VectorStoreNotFoundError,
)
from nanothink.models import COMBINED
from nanothink.models.precision import Precision, choose_device
from nanothink.reporter import SILENT, Reporter
from nanothink.runs.experts import as_entries, config_for_experts, find_experts
from nanothink.runs.inherited_split import InheritedSplit, spelled
from nanothink.runs.saved_model import SavedModel, expert_entries
from nanothink.runs.vector_store import KeyExpert, ModelStore, folder_of, key_entry, owner_of
from nanothink.suggestions import suggest
from nanothink.vector_store.manifest import store_folder
from nanothink.vector_store.store import read_texts
from nanothink.wording import counted


@dataclass(frozen=True)
class StoreSource(ModelStore):
    """The vector store of a combined model, or of experts that are yet to be combined, and its text."""

    data: DataConfig
    checkpoint: Path | None
    """The combined model; None if there are only experts yet."""
    split: InheritedSplit
    """The split of the model, or of the experts together."""

    def tokens(
        self,
        data_dir: str | None,
        domains: Sequence[str] | None,
        *,
        skip_bad_records: bool,
        reporter: Reporter = SILENT,
    ) -> TokenisedCorpus:
        """The data that is named, else that of the training, split as for the model.

        Text that the model holds out stays out of its vector store, so that scores on it stay true.
        """
        tokens = self._read(self.split.trained, data_dir, domains, skip_bad_records, reporter)
        if n := sum(s.n_documents for side in (tokens.val, tokens.test) for s in side.values()):
            reporter.note(f"{counted(n, 'document')} held out by {spelled(self.split.rule)}: not put in.")
        return tokens

    def held_out(self, *, reporter: Reporter = SILENT) -> TokenisedCorpus:
        """The data of the training, with a validation side that neither model nor store contains."""
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
        if data_dir is None:
            data_dir, domains = self.data.data_dir, domains or self.data.domains
            if not Path(data_dir).is_dir():
                raise DataError(
                    f"The folder this was trained on, {data_dir}, is not there. Name one: --data-dir DIR."
                )
        corpus = find_corpus(data_dir, domains or None)
        for warning in corpus.warnings:
            reporter.note(str(warning))
        return tokenise(
            corpus,
            self.tokenizer,
            split=self.split.rule,
            trained=trained,
            held_out=self.split.held_out,
            skip_bad_records=skip_bad_records or self.data.skip_bad_records,
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

    Without a checkpoint or experts it is the combined model in the folder, else the experts there.

    Raises:
        CheckpointError: there is none, or it is damaged.
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
                f"experts. Build one for experts that are yet to be combined: "
                + suggest("store build --expert", checkpoint)
            )
        resolved = resolve_config(base=saved.payload["config"], assignments=assignments)
        config, parts = resolved.config, {str(checkpoint): saved.split}
        if not saved.config.vector_store.enabled:
            step = read_summary(checkpoint).step
            use = ("--set", "vector_store.enabled=true", "--max-steps", step + max(1, step // 2))
            raise CheckpointMismatchError(
                f"{checkpoint} was trained without a vector store and cannot use one. Train it further with "
                f"one: {suggest('resume', checkpoint, *use)}"
            )
        entry = key_entry(expert_entries(saved.payload, checkpoint), config.vector_store.expert)
        one, data, folder = saved.expert(entry["name"]), config.data, folder_of(checkpoint)
    else:
        resolved = resolve_config(assignments=assignments, flags=flags)
        try:
            found = find_experts(experts or None, checkpoint_dir, reporter)
        except CheckpointNotFoundError as error:
            raise CheckpointNotFoundError(
                f"No {stem}.pt in {checkpoint_dir}, and no experts to build a vector store for. {error}"
            ) from None
        config, parts = config_for_experts(found, resolved), {str(e.path): e.split for e in found.values()}
        entry = key_entry(as_entries(found), config.vector_store.expert)
        one, folder = found[entry["name"]], store_folder(checkpoint_dir, stem)
        data = config.data if data_dir is not None else one.config.data
    model = one.build(chosen_device)[0].to(chosen_device)
    expert = KeyExpert(owner_of(entry, config, one.tokenizer), lambda: model, precision)
    split = InheritedSplit.of(parts, resolved)
    return StoreSource(folder, config.vector_store, expert, one.tokenizer, data, checkpoint, split)
