"""Near-duplicates that ``data inspect`` finds in a corpus."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from nanothink.cli.render.console import count, say
from nanothink.cli.render.tables import table
from nanothink.wording import counted

if TYPE_CHECKING:
    from nanothink.data.near_duplicates import NearDuplicates, Place

_SIDES = {"train": "training", "val": "validation", "test": "test"}
_SHOWN_PAIRS = 5


def near_duplicates(found: NearDuplicates, root: Path) -> None:
    """Print how many documents are nearly the same, how many across the split, and the first pairs."""
    straddling = [_share(found.n_val_in_training, found.n_val, "validation text")]
    if found.n_test:
        straddling.append(_share(found.n_test_in_training, found.n_test, "test text"))
    say(
        f"Near-duplicates: {_share(found.n_near_duplicates, found.n_documents, 'text')} have one; "
        f"{' and '.join(straddling)} have one in training."
    )
    if not found.pairs:
        return

    def place(of: Place) -> str:
        return f"{root / of.file}:{of.line} ({_SIDES[of.side]})"

    across = found.n_val_in_training + found.n_test_in_training > 0
    table(
        [">similarity", "document", "near-duplicate"],
        [
            [f"{pair.similarity:.2f}", place(pair.first), place(pair.second)]
            for pair in found.pairs[:_SHOWN_PAIRS]
            if not across or pair.straddles
        ],
        title="Across the split" if across else "The most alike",
    )
    if across:
        say(
            "A held-out document that is nearly the same as one in training is easier than other text. Give "
            'such documents one "group", or delete one of each pair.'
        )


def _share(n: int, of: int, what: str) -> str:
    return f"{count(n)} of {counted(of, what)}"
