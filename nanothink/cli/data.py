"""``nanothink data``: inspect, validate, sample and import text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nanothink.cli.options import (
    ConfigFile,
    DataDir,
    Domains,
    ForgivingCommand,
    Json,
    Set,
    SkipBadRecords,
    TokenizerName,
    argument,
    data_settings,
    domain_names,
    examples,
    flag,
    option,
)
from nanothink.suggestions import command
from nanothink.wording import counted

if TYPE_CHECKING:
    from nanothink.data.corpus import ValidationReport
    from nanothink.data.importing import ImportReport

app = typer.Typer(
    help="Inspect, validate, sample and import text.", no_args_is_help=True, rich_markup_mode=None
)

DataDirArgument = Annotated[
    str | None, argument("DATA_DIR", "Folder with one folder per domain. [default: data]")
]


def _folder(argument: str | None, option: str | None) -> str:
    return _named_folder(argument, option) or "data"


def _named_folder(argument: str | None, option: str | None) -> str | None:
    from nanothink.errors import UsageError

    if argument and option and Path(argument) != Path(option):
        raise UsageError(f"Two data folders were given: {argument} and {option}. Leave one out.")
    return argument or option


@app.command(cls=ForgivingCommand)
def inspect(
    folder: DataDirArgument = None,
    data_dir: DataDir = None,
    domains: Domains = None,
    tokenizer: TokenizerName = None,
    block: Annotated[int, option("N", "Block length in tokens, for the block counts.", min=2)] = 512,
    near_duplicates: Annotated[
        bool, flag("--near-duplicates", "Find documents that are nearly the same, by MinHash.")
    ] = False,
    config_file: ConfigFile = None,
    assignments: Set = None,
    skip_bad_records: SkipBadRecords = False,
    as_json: Json = False,
) -> None:
    """Count files, records, tokens, lengths, split and duplicates."""
    from nanothink.cli import render
    from nanothink.data.corpus import find_corpus
    from nanothink.data.near_duplicates import find_near_duplicates, import_minhash
    from nanothink.data.split import SplitRule
    from nanothink.data.summary import summarise
    from nanothink.data.tokenizer import resolve_tokenizer
    from nanothink.data.tokens import tokenise

    settings = data_settings(
        config_file,
        assignments,
        data_dir=_named_folder(folder, data_dir),
        domains=domains,
        tokenizer=tokenizer,
        skip_bad_records=skip_bad_records,
    )
    if near_duplicates:
        import_minhash()
    corpus = find_corpus(settings.data_dir, settings.domains)
    split = SplitRule.of(settings)
    with render.reporting() as reporter:
        for problem in corpus.warnings:
            reporter.note(str(problem))
        resolved = resolve_tokenizer(
            settings.tokenizer,
            corpus,
            split=split,
            skip_bad_records=settings.skip_bad_records,
            reporter=reporter,
        )
        tokens = tokenise(
            corpus,
            resolved,
            split=split,
            skip_bad_records=settings.skip_bad_records,
            reporter=reporter,
        )
        alike = find_near_duplicates(corpus, tokens, reporter=reporter) if near_duplicates else None
        whole = tokenise(corpus, resolved, split=None, skip_bad_records=settings.skip_bad_records)
    summary = summarise(corpus, whole, tokens, block_tokens=block)
    if as_json:
        found = {"tokenizer": resolved.name, "vocab_size": resolved.vocab_size, **summary.to_dict()}
        found |= render.bad_lines(tokens.left_out)
        render.print_json(found | ({} if alike is None else {"near_duplicates": alike}))
        return
    # Two tables: one with everything would not fit into 80 columns.
    several = len(summary.domains) > 1
    parts = [*summary.domains, summary.total] if several else summary.domains
    render.table(
        ["domain", ">files", ">records", ">duplicates", ">text", ">median", ">longest"],
        [
            [
                *(p.name, p.n_files, p.n_records, p.n_duplicates),
                *(render.size(p.n_bytes), p.median_tokens, p.longest_tokens),
            ]
            for p in parts
        ],
        title=f"{corpus.root}",
        total=several,
    )
    render.table(
        [
            *("domain", ">tokens", ">bytes/token", ">training", ">validation"),
            *([">test"] if split.test_split else []),
            ">blocks",
        ],
        [
            [
                *(p.name, p.n_tokens, f"{p.n_bytes / max(1, p.n_targets):.2f}"),
                *(p.n_train_tokens, p.n_val_tokens, *([p.n_test_tokens] if split.test_split else [])),
                p.n_train_blocks,
            ]
            for p in parts
        ],
        title=f"Tokens by {resolved.name}, {render.count(resolved.vocab_size)} entries; blocks of {block}",
        total=several,
    )
    if summary.total.n_conversations:
        render.table(
            ["domain", ">conversations", ">answers", ">tokens trained on", ">share"],
            [
                [p.name, p.n_conversations, p.n_answers, p.n_targets, f"{p.n_targets / p.n_tokens:.0%}"]
                for p in parts
            ],
            title="Conversations: their answers are trained on",
            total=several,
        )
    render.histogram("Length of the records", summary.length_counts, summary.length_edges, unit="tokens")
    if summary.total.n_duplicates:
        render.say(
            f"{counted(summary.total.n_duplicates, 'duplicate')}: all copies of a text are on the same side "
            "of the split."
        )
    if alike is not None:
        render.near_duplicates(alike, corpus.root)


@app.command(cls=ForgivingCommand)
def validate(
    folder: DataDirArgument = None,
    data_dir: DataDir = None,
    domains: Domains = None,
    every: Annotated[bool, flag("--all", "Name every bad line, however many there are.")] = False,
    as_json: Json = False,
) -> int:
    """Check every line of every file; exit code 1 if any is bad.

    Of each reason the first 20 lines are named and all are counted.
    """
    from nanothink.cli import render
    from nanothink.data.corpus import find_corpus, validate_corpus
    from nanothink.reporter import SILENT

    corpus = find_corpus(_folder(folder, data_dir), domain_names(domains))
    stream = render.ErrorStream(as_json=as_json) if every else None
    with render.reporting() as reporter:
        report = validate_corpus(
            corpus,
            # With --all the bar and the lines would overwrite one another.
            reporter=SILENT if stream else reporter,
            on_error=stream.add if stream else None,
        )
    if as_json:
        if stream:
            stream.end_json(_rest(report))
        else:
            render.print_json({"errors": report.errors} | _rest(report))
        return 0 if report.ok else 1
    render.problems(report.found_warnings, lambda line: render.say(f"warning: {line}", style="yellow"))
    if not stream:
        render.problems(report.found_errors, lambda line: render.say(f"error: {line}", style="red"))
    render.hints(report.found_errors)
    seconds = max(report.seconds, 1e-9)
    verdict = "all valid" if report.ok else counted(len(report.found_errors), "error")
    render.say(
        f"{counted(report.records, 'record')} in {counted(report.files, 'file')}: {verdict}. "
        f"{render.size(report.n_bytes)} in {seconds:.1f} s: "
        f"{render.count(report.records / seconds)} records/s, {render.size(report.n_bytes / seconds)}/s.",
        style="green" if report.ok else "red",
    )
    return 0 if report.ok else 1


def _rest(report: ValidationReport) -> dict[str, Any]:
    """Keys of ``data validate --json`` beside the errors."""
    return {
        "ok": report.ok,
        "n_files": report.files,
        "n_records": report.records,
        "n_errors": len(report.found_errors),
        "n_warnings": len(report.found_warnings),
        "n_unreadable": len(report.unreadable),
        "warnings": report.warnings,
        "error_groups": report.found_errors.groups,
        "warning_groups": report.found_warnings.groups,
        "n_bytes": report.n_bytes,
        "seconds": report.seconds,
    }


@app.command(cls=ForgivingCommand)
def sample(
    folder: DataDirArgument = None,
    data_dir: DataDir = None,
    overwrite: Annotated[bool, flag("--overwrite", "Replace an earlier sample.")] = False,
    as_json: Json = False,
) -> None:
    """Write a starter corpus, offline.

    Text that comes with NanoThink, from Python's own source: code, manual, docstrings.
    """
    from nanothink.cli import render
    from nanothink.data.starter import write_starter_corpus

    target = Path(_folder(folder, data_dir))
    domains = write_starter_corpus(target, overwrite=overwrite)
    if as_json:
        render.print_json({"data_dir": target, "domains": domains})
        return
    render.table(
        ["domain", ">records", ">text"],
        [[d.name, d.n_records, render.size(d.n_bytes)] for d in domains],
        title=f"Starter corpus in {target}",
    )
    render.say(f"Next: {command('pretrain transformer --data-dir', target, '--preset', 'tiny')}")


@app.command(
    "import",
    cls=ForgivingCommand,
    epilog=examples(
        "data import notes.txt letters/ --domain notes",
        "data import faq.csv --domain faq --template '{title}\\n{body}'",
    ),
)
def import_text(
    sources: Annotated[
        list[str], argument("SOURCE", "Files, folders, quoted patterns, or hf:NAME for the Hub.")
    ],
    domain: Annotated[str, option("NAME", "Domain to put it in.")],
    data_dir: DataDir = None,
    text_field: Annotated[
        str | None, option("NAME", "Field or column that holds the text. [default: text]")
    ] = None,
    template: Annotated[
        str | None, option("TEXT", "Several fields, as in '{subject}\\n\\n{body}'. [default: one field]")
    ] = None,
    name: Annotated[str | None, option("NAME", "Name of the file to write. [default: the source's]")] = None,
    delimiter: Annotated[
        str | None, option("CHAR", "What separates the columns of a table. [default: what fits]")
    ] = None,
    columns: Annotated[
        str | None, option("NAMES", "Columns of a table without a header. [default: its first row]")
    ] = None,
    quotes: Annotated[
        bool | None,
        typer.Option(
            "--quotes/--no-quotes",
            help="Fields of a table may be quoted. [default: yes, but not in tsv]",
            show_default=False,
        ),
    ] = None,
    encoding: Annotated[
        str | None, option("NAME", "Encoding of the text; auto takes the likely one. [default: utf-8]")
    ] = None,
    config_name: Annotated[
        str | None, option("NAME", "Configuration of a Hub data set. [default: its own]")
    ] = None,
    split: Annotated[str, option("NAME", "Split of a Hub data set.")] = "train",
    skip_bad_files: Annotated[
        bool, flag("--skip-bad-files", "Leave out files that cannot be read, and name them.")
    ] = False,
    overwrite: Annotated[bool, flag("--overwrite", "Replace an earlier import of the same name.")] = False,
    dry_run: Annotated[bool, flag("--dry-run", "Show the first records, and write nothing.")] = False,
    as_json: Json = False,
) -> int:
    """Import text of other formats.

    txt, md, html, docx, epub, pdf, csv, tsv, json, jsonl, parquet, folders, or Hub data sets (hf:NAME).
    """
    from nanothink.cli import render
    from nanothink.data.importing import import_source
    from nanothink.data.record_file import record_fields

    with render.reporting() as reporter:
        report = import_source(
            sources,
            domain=domain,
            data_dir=Path(data_dir or "data"),
            name=name,
            text_field=text_field,
            template=template,
            delimiter=delimiter,
            quotes=quotes,
            columns=columns,
            encoding=encoding,
            config_name=config_name,
            split=split,
            skip_bad_files=skip_bad_files,
            overwrite=overwrite,
            dry_run=dry_run,
            reporter=reporter,
        )
    if as_json:
        preview = [record_fields(record) for record in report.preview]
        render.print_json(_import_as_json(report) | ({"preview": preview} if dry_run else {}))
    else:
        render.imported(report)
    return 1 if report.findings.bad_rows or report.findings.bad_files else 0


def _import_as_json(report: ImportReport) -> dict[str, Any]:
    findings = report.findings
    return {
        "path": report.path,
        "domain": report.domain,
        "n_sources": report.n_sources,
        "n_records": report.records,
        "n_bytes": report.n_bytes,
        "n_empty": findings.empty,
        "n_multiline_fields": findings.n_spanning,
        "first_multiline_field": findings.first_spanning,
        "n_bad_rows": len(findings.bad_rows),
        "n_bad_files": len(findings.bad_files),
        "n_warnings": len(findings.warnings),
        "bad_rows": findings.bad_rows.named(),
        "bad_row_groups": findings.bad_rows.groups,
        "bad_files": findings.bad_files.named(),
        "warnings": findings.warnings.named(),
        "seconds": report.seconds,
    }
