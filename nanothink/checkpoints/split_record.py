"""The split of a model, as its checkpoint and its export keep it.

The rule says what to hold out of text that is new to the model; the hashes of the documents that any part of
it was trained on say what must never count as held out, wherever that text turns up again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanothink.checkpoints.archive import damaged
from nanothink.config import DataConfig
from nanothink.data.split import HeldOutText, SplitRule, TrainedText


@dataclass(frozen=True)
class SplitRecord:
    """The rule of a split, its domains, and the text that it left for training."""

    rule: SplitRule
    domains: tuple[str, ...]
    """Folder names of the domains of the run, sorted."""
    trained: TrainedText
    """Documents that any part of the model was trained on: its experts, a diffuser's transformer, and data
    that a resumed run began with."""
    held_out: HeldOutText
    """Documents on the other sides of the run, moved ones included: they stay there in a part of the data."""

    @property
    def n_documents(self) -> int:
        """Documents that were trained on; a cut one counts by its head."""
        return len(self.trained.keys)

    def described(self) -> dict[str, Any]:
        """The rule, domains and number of documents as JSON values."""
        return {
            **self.rule.to_dict(),
            "domains": list(self.domains),
            "n_trained_documents": self.n_documents,
            "trained_text_known": self.trained.complete,
            "n_cut_documents": len(self.trained.heads),
            "n_validation_documents": len(self.held_out.val),
            "n_test_documents": len(self.held_out.test),
        }

    def to_state(self) -> dict[str, Any]:
        """The ``split`` entry of a checkpoint."""
        return {
            "rule": self.rule.to_dict(),
            "domains": list(self.domains),
            "trained": self.trained.to_state(),
            "held_out": self.held_out.to_state(),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any], path: Path) -> SplitRecord:
        """The inverse of ``to_state``, for what was read from ``path``.

        Raises:
            CheckpointDamagedError: it is anything else.
        """
        try:
            if state.keys() != {"rule", "domains", "trained", "held_out"}:
                raise ValueError("it has other parts than rule, domains, trained and held_out")
            domains = state["domains"]
            if not isinstance(domains, list) or not all(isinstance(name, str) for name in domains):
                raise ValueError("its domains are not a list of names")
            return cls(
                SplitRule.from_dict(state["rule"]),
                tuple(domains),
                TrainedText.from_state(state["trained"]),
                HeldOutText.from_state(state["held_out"]),
            )
        except ValueError as error:
            raise damaged(path, f"its split makes no sense ({error})") from None


UNKNOWN_TEXT = SplitRecord(SplitRule.of(DataConfig()), (), TrainedText(complete=False), HeldOutText())
"""The record of a published model: it was trained elsewhere, and nobody knows on which documents. Without
domains its rule binds nobody, and any text is held out as far as is known."""
