"""``nanothink tokenizer``: a vocabulary of your own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nanothink.cli.options import (
    GROUP,
    ConfigFile,
    DataDir,
    Domains,
    ForgivingCommand,
    Json,
    Set,
    data_settings,
    flag,
    option,
)

app = typer.Typer(help="Train a byte-level BPE tokenizer.", **GROUP)


@app.callback()
def group() -> None:
    """Keeps `train` a subcommand although it is the only one."""


@app.command(cls=ForgivingCommand)
def train(
    data_dir: DataDir = None,
    domains: Domains = None,
    vocab_size: Annotated[int | None, option("N", "Entries. [default: sized to the corpus]", min=257)] = None,
    out: Annotated[Path, option("DIR", "Folder to write it to.", "--out", "-o")] = Path("tokenizer"),
    overwrite: Annotated[bool, flag("--overwrite", "Replace a tokenizer that is there.")] = False,
    config_file: ConfigFile = None,
    assignments: Set = None,
    as_json: Json = False,
) -> None:
    """Train a byte-level BPE on the training split of your data."""
    from nanothink.cli import render
    from nanothink.data.corpus import find_corpus, left_out
    from nanothink.data.problems import Problems
    from nanothink.data.split import SplitRule
    from nanothink.data.tokenizer import save_tokenizer, train_on_corpus
    from nanothink.disk import try_to_write
    from nanothink.errors import UsageError
    from nanothink.suggestions import again

    if (out / "tokenizer.json").exists() and not overwrite:
        raise UsageError(
            f"{out} already holds a tokenizer. Choose another --out, or replace it: {again('--overwrite')}"
        )
    try_to_write(out)
    settings = data_settings(config_file, assignments, data_dir=data_dir, domains=domains)
    corpus = find_corpus(settings.data_dir, settings.domains)
    bad = Problems()
    with render.reporting() as reporter:
        for problem in corpus.warnings:
            reporter.note(str(problem))
        trained = train_on_corpus(
            corpus,
            vocab_size=vocab_size,
            split=SplitRule.of(settings),
            reporter=reporter,
            on_bad_line=bad.add,
        )
        if bad:
            reporter.note(f"Left out: {left_out(bad, corpus.root)}")
    path = save_tokenizer(trained, out)
    result = {"path": str(path), "vocab_size": trained.vocab_size, "fingerprint": trained.fingerprint}
    result |= render.bad_lines(bad)
    if as_json:
        render.print_json(result)
    else:
        render.say(
            f"{path}: {render.count(trained.vocab_size)} entries, fingerprint {trained.fingerprint[:16]}"
        )
        render.say(f"Use it with --tokenizer {out}")
