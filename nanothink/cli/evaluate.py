"""``nanothink eval``: loss, perplexity and bits per byte, by domain, checkpoints side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from nanothink.cli import completion
from nanothink.cli.options import (
    CheckpointDir,
    Device,
    DocumentCache,
    Domains,
    ForgivingCommand,
    Json,
    NoVectorStore,
    Quantize,
    SkipBadRecords,
    argument,
    domain_names,
    examples,
    flag,
    option,
)

if TYPE_CHECKING:
    from nanothink.runs.evaluating import CheckpointEvaluation

EXAMPLES = examples(
    "eval",
    "eval checkpoints/nanothink_mla.pt --max-tokens 20000",
    "eval --data-dir other_data --split all --json",
)


def register(app: typer.Typer) -> None:
    app.command("eval", cls=ForgivingCommand, epilog=EXAMPLES)(evaluate)


def evaluate(
    checkpoint: Annotated[
        list[Path] | None,
        argument(
            "CHECKPOINT",
            "Checkpoints. [default: every best one in --checkpoint-dir]",
            complete=completion.checkpoints,
        ),
    ] = None,
    data_dir: Annotated[
        str | None, option("DIR", "Text to score. [default: the data they were trained on]")
    ] = None,
    domains: Domains = None,
    split: Annotated[
        Literal["val", "test", "train", "all"],
        option("NAME", "Which part of each domain: val, test, train or all."),
    ] = "val",
    max_tokens: Annotated[
        int | None,
        option("N", "Score a sample of each domain of at most this many tokens. [default: all]", min=1),
    ] = None,
    checkpoint_dir: CheckpointDir = Path("checkpoints"),
    device: Device = None,
    skip_bad_records: SkipBadRecords = False,
    no_vector_store: NoVectorStore = False,
    document_cache: DocumentCache = False,
    quantize: Quantize = None,
    allow_seen: Annotated[
        bool, flag("--allow-seen", "Score text that a model was trained on too; it is marked.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Score checkpoints on held-out text.

    Loss, perplexity and bits per byte, by domain and overall, several checkpoints side by side. The kind of a
    NanoThink, a router over experts, is nanothink_mla.
    """
    from nanothink.cli import render
    from nanothink.runs.evaluating import evaluate_checkpoints, finished_checkpoints

    with render.reporting() as reporter:
        paths = checkpoint or finished_checkpoints(checkpoint_dir, reporter)
        results = evaluate_checkpoints(
            paths,
            data_dir=data_dir,
            domains=domain_names(domains),
            split=split,
            max_tokens=max_tokens,
            device=device,
            skip_bad_records=skip_bad_records,
            vector_store=not no_vector_store,
            document_cache=document_cache,
            quantize=quantize,
            allow_seen=allow_seen,
            reporter=reporter,
        )
    if as_json:
        render.print_json({"checkpoints": _rows(results)} | render.bad_lines(results[0].left_out))
    else:
        render.evaluations(results, split)


def _rows(results: Sequence[CheckpointEvaluation]) -> list[dict[str, Any]]:
    from nanothink.runs.evaluating import above_best

    rows = []
    for result, above in zip(results, above_best(results), strict=True):
        found = result.evaluation
        scores = found.to_dict()
        scores["overall"]["bits_per_byte_stderr"] = found.standard_error()
        for name, score in scores["domains"].items():
            score["bits_per_byte_stderr"] = found.standard_error(name)
        if (cached := result.with_cache) is not None:
            scores["with_document_cache"] = cached.to_dict()
            scores["with_document_cache"]["overall"]["bits_per_byte_stderr"] = cached.standard_error()
        rows.append(
            {
                "path": result.path,
                "kind": result.kind,
                "seen_documents": result.n_seen,
                "trained_text_known": result.trained_text_known,
                "above_best": above
                and {"bits_per_byte": above.bits_per_byte, "bits_per_byte_stderr": above.standard_error},
                **scores,
            }
        )
    return rows
