"""Contents of the vector store and passages found in it, as tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.text import Text

from nanothink.cli.render.console import count, out, printable, size
from nanothink.cli.render.tables import facts, fits, table
from nanothink.wording import counted

if TYPE_CHECKING:
    from nanothink.runs.store_commands import Compaction, StoreFacts, StoreHit


def store_facts(found: StoreFacts) -> None:
    """Print the facts of ``store info``."""
    kept = {
        "exact": "exact",
        "sq8": f"{counted(found.n_lists, 'list')}, a byte a number",
        "pq": f"{counted(found.n_lists, 'list')}, a byte for four numbers",
    }[found.kind]
    owner = found.owner.expert
    if owner != found.owner.kind:
        owner = f"'{owner}' ({found.owner.kind})"
    rows: list[list[object]] = [
        ["keys", f"{count(found.n_keys)}, states of {owner}"],
        ["index", kept],
        ["bytes a key", f"{found.n_bytes / max(1, found.n_keys):.1f}"],
        ["size", size(found.n_bytes)],
        ["kept for training", size(found.neighbours_bytes)],
        ["documents", found.n_documents],
        ["merged keys", found.n_merged],
        ["texts never let in", found.n_held_out],
    ]
    facts(rows, title=str(found.folder))
    table(["domain", ">tokens"], [[name, n] for name, n in found.keys_by_domain.items()])


def hits(found: Sequence[StoreHit]) -> None:
    """Print the hits of ``store search``: passage, the token that followed it, and its file and line."""
    rows = [
        (
            f"{min(1.0, one.similarity):.3f}",  # keys are kept rounded: a cosine can come out above 1
            f"{one.weight:.3f}",
            Text.assemble((_line(one.before), "dim"), (f"[{_line(one.token)}]", "bold green")),
            one.source + (f" and {one.stands_for - 1} more" if one.stands_for > 1 else ""),
        )
        for one in found
    ]
    columns = [">similarity", ">weight", "passage and what followed", "where"]
    if fits(columns, rows):
        table(columns, rows)
    else:  # side by side both would be narrow
        columns = [">similarity", ">weight", "passage and what followed, and where"]
        table(columns, [[*row[:2], Text.assemble(row[2], "\n", printable(row[3]))] for row in rows])
    if not found:
        out.print("The vector store is empty.")


def compaction(done: Compaction) -> None:
    """Print size and scores before and after ``store compact``."""
    rows: list[list[object]] = [
        [
            "keys",
            done.before.n_keys,
            done.after.n_keys,
            _change(done.before.n_keys, done.after.n_keys),
        ],
        [
            "size",
            size(done.before.n_bytes),
            size(done.after.n_bytes),
            _change(done.before.n_bytes, done.after.n_bytes),
        ],
    ]
    if done.evaluation_before is not None and done.evaluation_after is not None:
        for domain, score in {
            **done.evaluation_before.domains,
            "all": done.evaluation_before.overall,
        }.items():
            after = (
                done.evaluation_after.overall if domain == "all" else done.evaluation_after.domains[domain]
            )
            rows.append(
                [
                    f"bits per byte, {domain}",
                    f"{score.bits_per_byte:.4f}",
                    f"{after.bits_per_byte:.4f}",
                    _change(score.bits_per_byte, after.bits_per_byte),
                ]
            )
    table(["", ">before", ">after", ">change"], rows, title=str(done.after.folder))


def _change(before: float, after: float) -> str:
    return f"{100 * (after / before - 1):+.2f} %" if before else ""


def _line(text: str) -> str:
    return printable(text).replace("\n", "⏎").replace("\t", " ")
