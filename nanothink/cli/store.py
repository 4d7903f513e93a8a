"""``nanothink store``: build, extend, inspect, search and compact the vector store of a NanoThink."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nanothink.cli import completion
from nanothink.cli.options import (
    GROUP,
    CheckpointDir,
    Device,
    Domains,
    DryRun,
    ForgivingCommand,
    Json,
    Set,
    SkipBadRecords,
    argument,
    domain_names,
    examples,
    flag,
    grouped,
    option,
)
from nanothink.suggestions import suggest

if TYPE_CHECKING:
    from nanothink.data.problems import Problems
    from nanothink.reporter import Reporter
    from nanothink.runs.store_commands import StoreFacts
    from nanothink.runs.store_source import StoreSource
    from nanothink.vector_store.building import BuildPlan

app = typer.Typer(help="Build, add to, search and compact the vector store of a model.", **GROUP)


@dataclass(frozen=True)
class Source:
    """Options that name the model whose vector store is meant."""

    checkpoint: Annotated[
        Path | None,
        option(
            "PATH",
            "A NanoThink. [default: nanothink_mla.pt in --checkpoint-dir, or its experts]",
            "--checkpoint",
            "-c",
            complete=completion.checkpoints,
        ),
    ] = None
    name: Annotated[str | None, option("NAME", "Name of the model, where it is NAME_nanothink_mla.pt.")] = (
        None
    )
    checkpoint_dir: CheckpointDir = Path("checkpoints")
    device: Device = None
    as_json: Json = False

    def find(self, reporter: Reporter, experts: Sequence[Path] = (), **more: Any) -> StoreSource:
        from nanothink.runs.store_source import find_store_source

        return find_store_source(
            self.checkpoint,
            experts,
            self.checkpoint_dir,
            name=self.name,
            device=self.device,
            reporter=reporter,
            **more,
        )


@app.command(cls=ForgivingCommand)
@grouped
def build(
    expert: Annotated[
        list[Path] | None,
        option(
            "PATH",
            "Experts that are yet to be combined, as for train-mla; repeatable.",
            complete=completion.checkpoints,
        ),
    ] = None,
    data_dir: Annotated[
        str | None, option("DIR", "Text to store. [default: what the model was trained on]")
    ] = None,
    domains: Domains = None,
    assignments: Set = None,
    skip_bad_records: SkipBadRecords = False,
    overwrite: Annotated[bool, flag("--overwrite", "Replace the vector store that is there.")] = False,
    dry_run: DryRun = False,
    *,
    source: Source,
) -> None:
    """Build the vector store of a NanoThink, or of its experts.

    A key for each token of the training text; text held out for validation is never in it.
    """
    from nanothink.cli import render
    from nanothink.disk import try_to_write
    from nanothink.errors import UsageError
    from nanothink.runs.store_commands import facts_of
    from nanothink.vector_store.manifest import exists

    with render.reporting() as reporter:
        found = source.find(reporter, expert or (), assignments=assignments or (), data_dir=data_dir)
    if exists(found.folder) and not overwrite and not dry_run:
        raise UsageError(
            f"{found.folder} is there already. Look at it: {suggest('store info')}. Build it anew: "
            f"{suggest('store build --overwrite')}. Put more text in: {suggest('store add --help')}"
        )
    if not dry_run:
        try_to_write(found.folder.parent)
    with render.reporting() as reporter:
        tokens = found.tokens(
            data_dir, domain_names(domains), skip_bad_records=skip_bad_records, reporter=reporter
        )
        plan = found.plan(tokens)
        if not dry_run:
            store = found.build(plan, tokens, reporter=reporter)
    if dry_run:
        _show_plan(found.folder, plan, tokens.left_out, as_json=source.as_json)
    else:
        _show(facts_of(store), tokens.left_out, as_json=source.as_json)


@app.command(cls=ForgivingCommand, epilog=examples("store add data --domains recipes"))
@grouped
def add(
    data_dir: Annotated[str, argument("DATA_DIR", "Folder with one folder of JSONL files per domain.")],
    domains: Domains = None,
    skip_bad_records: SkipBadRecords = False,
    dry_run: DryRun = False,
    *,
    source: Source,
) -> None:
    """Add text to a vector store.

    The model can then use it without training.
    """
    from nanothink.cli import render
    from nanothink.disk import try_to_write
    from nanothink.runs.store_commands import facts_of
    from nanothink.wording import counted

    with render.reporting() as reporter:
        found = source.find(reporter)
        store = found.open(writable=True, reporter=reporter)
    if not dry_run:
        try_to_write(found.folder.parent)
    with render.reporting() as reporter:
        tokens = found.tokens(
            data_dir, domain_names(domains), skip_bad_records=skip_bad_records, reporter=reporter
        )
        plan = found.plan(tokens, store)
        for n, why in (
            (plan.n_known, "known already"),
            (plan.n_held_out, "held out by earlier data"),
        ):
            if n:
                reporter.note(f"{counted(n, 'document')} left out: {why}.")
        if not dry_run:
            store = found.build(plan, tokens, store, reporter=reporter)
    if dry_run:
        _show_plan(found.folder, plan, tokens.left_out, as_json=source.as_json)
    else:
        _show(facts_of(store), tokens.left_out, as_json=source.as_json)


@app.command(cls=ForgivingCommand)
@grouped
def info(source: Source) -> None:
    """Show what a vector store holds; every byte is verified."""
    from nanothink.cli import render
    from nanothink.runs.store_commands import facts_of

    with render.reporting() as reporter:
        found = source.find(reporter)
        store = found.open(reporter=reporter)
    _show(facts_of(store), as_json=source.as_json)


@app.command(cls=ForgivingCommand, epilog=examples('store search "In the beginning"'))
@grouped
def search(
    text: Annotated[str, argument("TEXT", "Text whose end is the query.")],
    neighbours: Annotated[int, option("N", "Passages to show.", "--neighbours", "-k", min=1)] = 8,
    *,
    source: Source,
) -> None:
    """Show the stored passages nearest to the end of a text.

    With the token that followed each, and its file and line.
    """
    from nanothink.cli import render
    from nanothink.runs.store_commands import search_store

    with render.reporting() as reporter:
        found = source.find(reporter)
        store = found.open(reporter=reporter)
    if loss := found.tokenizer.loss(text):
        render.warning(f"The tokenizer loses a part of the text: {loss}.")
    hits = search_store(found, store, text, neighbours)
    if source.as_json:
        render.print_json({"text": text, "found": hits})
    else:
        render.hits(hits)


@app.command(cls=ForgivingCommand)
@grouped
def compact(
    similarity: Annotated[
        float, option("X", "Keys at least so similar are merged.", min=0.5, max=1.0)
    ] = 0.95,
    max_tokens: Annotated[
        int, option("N", "Tokens of each domain to score on; 0: do not score.", min=0)
    ] = 20_000,
    *,
    source: Source,
) -> None:
    """Merge keys that are nearly alike and led to the same token.

    Prints the size of the vector store and the model's score, before and after.
    """
    from nanothink.cli import render
    from nanothink.disk import try_to_write
    from nanothink.runs.store_commands import compact_store

    with render.reporting() as reporter:
        found = source.find(reporter)
    try_to_write(found.folder.parent)
    with render.reporting() as reporter:
        tokens = None
        if max_tokens and found.checkpoint is not None:
            tokens = found.held_out(reporter=reporter)
        done = compact_store(
            found, similarity, tokens=tokens, max_tokens=max_tokens or None, reporter=reporter
        )
    if source.as_json:
        scores = {"before": done.evaluation_before, "after": done.evaluation_after}
        render.print_json(
            {
                "before": done.before,
                "after": done.after,
                "bits_per_byte": {
                    when: None if found is None else found.overall.bits_per_byte
                    for when, found in scores.items()
                },
            }
        )
    else:
        render.compaction(done)


def _show(facts: StoreFacts, left_out: Problems | None = None, *, as_json: bool) -> None:
    from nanothink.cli import render

    if as_json:
        render.print_json(render.plain(facts) | ({} if left_out is None else render.bad_lines(left_out)))
    else:
        render.store_facts(facts)


def _show_plan(folder: Path, plan: BuildPlan, left_out: Problems, *, as_json: bool) -> None:
    from nanothink.cli import render

    facts = {
        "folder": str(folder),
        "n_new_keys": plan.n_keys,
        "n_old_keys": plan.n_old,
        "index": plan.kind,
        "n_lists": plan.n_lists,
        "seconds": plan.seconds,
        "memory_bytes": plan.memory_bytes,
        "disk_bytes": plan.disk_bytes,
        "n_known_documents": plan.n_known,
        "n_held_out_documents": plan.n_held_out,
    }
    if as_json:
        render.print_json(facts | render.bad_lines(left_out))
        return
    shown = {
        **facts,
        "seconds": f"about {render.duration(plan.seconds)}",
        "memory_bytes": render.size(plan.memory_bytes),
        "disk_bytes": render.size(plan.disk_bytes),
    }
    names = {"seconds": "time", "memory_bytes": "memory", "disk_bytes": "disk"}
    render.facts((names.get(k, k.removeprefix("n_").replace("_", " ")), v) for k, v in shown.items())
