"""``nanothink checkpoints``: list, show, verify, prune, import, export and push checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from nanothink.cli import completion, push
from nanothink.cli.options import (
    CheckpointDir,
    ForgivingCommand,
    Json,
    NewestCheckpoint,
    argument,
    flag,
    option,
)
from nanothink.suggestions import command

app = typer.Typer(
    help="List, show, verify, prune, import, export and push checkpoints.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.command("ls", cls=ForgivingCommand)
def list_all(checkpoint_dir: CheckpointDir = Path("checkpoints"), as_json: Json = False) -> None:
    """List every checkpoint in the folder."""
    from nanothink.checkpoints import CheckpointSummary, list_checkpoints
    from nanothink.cli import render

    entries = list_checkpoints(checkpoint_dir)
    if as_json:
        render.print_json({"checkpoints": entries})
        return
    if not entries:
        render.note(f"No checkpoints in {checkpoint_dir}.")
        return
    columns = ["file", "kind", ">epoch", ">step", ">best loss", ">size", ">parameters", "written"]
    rows: list[list[object]] = []
    for entry in entries:
        if isinstance(entry, CheckpointSummary):
            loss = None if entry.best_loss is None else f"{entry.best_loss:.4f}"
            state = [entry.kind, entry.epoch, entry.step, loss]
            parameters = render.count(entry.n_parameters)
        else:
            state, parameters = ["", "", "", "damaged"], ""
        rows.append([entry.path.name, *state, render.size(entry.n_bytes), parameters, _when(entry.modified)])
    if not render.fits(columns, rows):  # `checkpoints show` has the rest
        kept = [columns.index(name) for name in ("file", ">epoch", ">step", ">best loss", ">size")]
        columns, rows = [columns[i] for i in kept], [[row[i] for i in kept] for row in rows]
    render.table(columns, rows)
    for entry in entries:
        if not isinstance(entry, CheckpointSummary):
            render.warning(f"{entry.path}: {entry.reason}")


@app.command(cls=ForgivingCommand)
def show(
    checkpoint: Annotated[
        Path, argument("CHECKPOINT", "A checkpoint file.", complete=completion.checkpoints)
    ],
    as_json: Json = False,
) -> None:
    """Show what is inside one checkpoint.

    The state of the run, its settings, its tokenizer, the shape of every tensor.
    """
    from nanothink.checkpoints import read_checkpoint, read_summary
    from nanothink.checkpoints.split_record import SplitRecord
    from nanothink.cli import render
    from nanothink.data.chat import PLAIN, ChatFormat
    from nanothink.wording import counted

    summary = read_summary(checkpoint)
    payload = read_checkpoint(checkpoint, mmap=True, shapes_only=True)
    chat = ChatFormat.from_state(payload["tokenizer"])
    split = SplitRecord.from_state(payload["split"], checkpoint).described()
    shapes = {name: list(tensor.shape) for name, tensor in payload["model_state"].items()}
    facts: dict[str, Any] = {
        **render.plain(summary),
        "tokenizer": payload["tokenizer"].get("name"),
        "chat_template": None if chat is None else chat.template,
        "data_fingerprint": payload["data_fingerprint"],
        "split": split,
        "run": payload["run"],
    }
    if as_json:
        render.print_json({**facts, "config": payload["config"], "tensors": shapes})
        return
    stood = payload["run"].get("state")
    shown = {
        "kind": summary.kind,
        "run": summary.name or "-",
        "step": summary.step,
        "epoch": f"{render.count(summary.epoch)} completed, {counted(summary.position, 'block')} read in all",
        "best loss": "-" if summary.best_loss is None else f"{summary.best_loss:.4f} nats a token",
        "parameters": summary.n_parameters,
        "size": render.size(summary.n_bytes),
        "written": _when(summary.modified),
        "format": str(summary.format_version),
        "tokenizer": str(facts["tokenizer"]),
        "chat template": {None: "none", PLAIN: "plain"}.get(chat, "the model's own"),
        "data fingerprint": str(facts["data_fingerprint"])[:16] or "-",
        "split": f"val_split {split['val_split']}, test_split {split['test_split']}, seed {split['seed']}; "
        f"trained on {counted(split['n_trained_documents'], 'document')} of {', '.join(split['domains'])}"
        if split["domains"]
        else "published model; what it was trained on is unknown",
        **_origin(payload["run"].get("imported")),
        **_fitted(payload["run"], payload["model_state"]),
        **{
            name.replace("_", " "): render.count(value)
            for name, value in (stood if isinstance(stood, dict) else {}).items()
            if name in ("evals_without_improvement", "skipped_steps") and isinstance(value, int)
        },
    }
    render.facts(shown.items(), title=str(checkpoint))
    render.table(
        ["setting", "value"],
        [
            [f"{section}.{key}", render.setting(value)]
            for section, values in payload["config"].items()
            for key, value in values.items()
        ],
    )
    render.table(
        ["tensor", ">shape"],
        [[name, " x ".join(map(render.count, shape)) or "scalar"] for name, shape in shapes.items()],
    )


@app.command(cls=ForgivingCommand)
def verify(
    checkpoint: Annotated[
        list[Path] | None,
        argument(
            "CHECKPOINT",
            "Checkpoint files. [default: all in --checkpoint-dir]",
            complete=completion.checkpoints,
        ),
    ] = None,
    checkpoint_dir: CheckpointDir = Path("checkpoints"),
    as_json: Json = False,
) -> int:
    """Check every byte and weight; exit code 1 if any file is damaged."""
    from nanothink.checkpoints import list_checkpoints, verify_checkpoint
    from nanothink.cli import render
    from nanothink.errors import CheckpointError

    paths = checkpoint or [entry.path for entry in list_checkpoints(checkpoint_dir)]
    results: dict[Path, str | None] = {}
    with render.reporting() as reporter:
        for path in paths:
            try:
                verify_checkpoint(path, reporter=reporter)
                results[path] = None
            except CheckpointError as error:
                results[path] = str(error).removeprefix(f"{path}: ")
    sound = not any(results.values())
    if as_json:
        files = [{"path": p, "ok": reason is None, "reason": reason} for p, reason in results.items()]
        render.print_json({"ok": sound, "files": files})
    else:
        for path, reason in results.items():
            verdict = "ok" if reason is None else "DAMAGED" if path.exists() else "MISSING"
            render.say(f"{verdict:<8} {path}" + (f": {reason}" if reason else ""))
        if not results:
            render.note(f"No checkpoints in {checkpoint_dir}.")
    return 0 if sound else 1


@app.command(cls=ForgivingCommand)
def prune(
    checkpoint_dir: CheckpointDir = Path("checkpoints"),
    keep: Annotated[int, option("N", "Undamaged epoch snapshots to keep of each run.", min=1)] = 1,
    dry_run: Annotated[bool, flag("--dry-run", "Only list what would be removed.")] = False,
    as_json: Json = False,
) -> None:
    """Remove old epoch snapshots and what killed saves left behind.

    A best or interrupted file is never removed.
    """
    from nanothink.checkpoints import prune as prune_folder
    from nanothink.cli import render

    removed = prune_folder(checkpoint_dir, keep=keep, dry_run=dry_run)
    if as_json:
        render.print_json({"removed": removed, "dry_run": dry_run})
        return
    for path in removed:
        render.say(f"{'would remove' if dry_run else 'removed'} {path}")
    if not removed:
        render.say(f"Nothing to prune in {checkpoint_dir}.")


@app.command("import", cls=ForgivingCommand)
def import_(
    source: Annotated[str, argument("SOURCE", "A model folder, a GGUF file, or a name on the Hub.")],
    name: Annotated[
        str | None, option("NAME", "The checkpoint is NAME_expert.pt. [default: SOURCE's name]")
    ] = None,
    context: Annotated[
        int | None, option("N", "Tokens of context. [default: the model's own]", min=2)
    ] = None,
    overwrite: Annotated[
        bool, flag("--overwrite", "Replace a checkpoint of that name; it is moved to replaced/.")
    ] = False,
    checkpoint_dir: CheckpointDir = Path("checkpoints"),
    as_json: Json = False,
) -> None:
    """Make an expert of a published model.

    Llama, Mistral, Qwen2, Qwen3, GPT-2, GPT-NeoX, Mamba and FalconMamba, with safetensors and tokenizer.
    """
    from nanothink.cli import render
    from nanothink.runs.import_model import import_model

    with render.reporting() as reporter:
        done = import_model(
            source,
            name=name,
            context=context,
            checkpoint_dir=checkpoint_dir,
            overwrite=overwrite,
            reporter=reporter,
        )
    asked = ["--chat", "Who are you?"] if done.answers else ["Once upon a time"]
    rows = [
        ["source", f"{done.source} ({done.family})"],
        ["licence", done.licence or "not stated by its files"],
        ["kind", done.kind],
        _parameters(done.n_parameters, done.matrix_type, done.n_bytes),
        [
            "context",
            "any length" if done.context_length is None else f"{render.count(done.context_length)} tokens",
        ],
        [
            "vocabulary",
            f"{render.count(done.vocab_size)} tokens"
            + (f"; {render.count(done.n_cut_rows)} unused rows left out" if done.n_cut_rows else ""),
        ],
        ["try it", command("generate", *asked, "-c", done.path)],
    ]
    render.result(done, rows, title=done.path, as_json=as_json)


@app.command(cls=ForgivingCommand)
def export(
    to: Annotated[Path, option("PATH", "Folder to write, or the file of --format gguf.", "--to")],
    checkpoint: NewestCheckpoint = None,
    format: Annotated[
        Literal["transformers", "gguf"],
        option(
            "FORMAT",
            "transformers: a model folder. gguf: a file for llama.cpp, Ollama and others.",
            "--format",
        ),
    ] = "transformers",
    quantize: Annotated[
        Literal["f32", "f16", "q8_0"],
        option("TYPE", "Of the matrices of a GGUF file: f32, f16 or q8_0.", "--quantize"),
    ] = "f32",
    overwrite: Annotated[bool, flag("--overwrite", "Replace an earlier export.")] = False,
    checkpoint_dir: CheckpointDir = Path("checkpoints"),
    as_json: Json = False,
) -> None:
    """Write a model as a folder or a file for other programs.

    A folder has weights in safetensors, config.json, tokenizer, model card. transformers opens a transformer
    (as Qwen3) and a state-space model (as Mamba) without further code. A GGUF file runs in llama.cpp.
    """
    from nanothink.cli import render
    from nanothink.errors import UsageError
    from nanothink.runs.evaluating import newest_finished
    from nanothink.runs.exporting import Export, export_checkpoint
    from nanothink.runs.exporting_gguf import GgufExport, export_gguf

    if quantize != "f32" and format != "gguf":
        raise UsageError(f"--quantize {quantize} goes with --format gguf; a model folder is float32.")
    with render.reporting() as reporter:
        path = checkpoint or newest_finished(checkpoint_dir, reporter)
        done: Export | GgufExport
        if format == "gguf":
            done = export_gguf(path, to, quantization=quantize, overwrite=overwrite, reporter=reporter)
        else:
            done = export_checkpoint(path, to, overwrite=overwrite, reporter=reporter)
    rows = [["checkpoint", str(path)], ["kind", done.kind]]
    if isinstance(done, GgufExport):
        title = done.file
        rows += [
            _parameters(done.n_parameters, done.quantization, done.n_bytes),
            ["llama.cpp", f"llama-completion -m {done.file} -p 'Once upon a time'"],
            ["Ollama", f"ollama create {done.file.stem} -f {done.modelfile}"],
        ]
    else:
        title = done.folder
        rows += [
            ["opens as", done.architecture or "a model of NanoThink's own"],
            ["parameters", f"{render.count(done.n_parameters)}, float32"],
            ["files", f"{', '.join(done.files)} ({render.size(done.n_bytes)})"],
            ["from Python", done.how_to_load],
            ["for other programs", command("serve", done.folder)],
        ]
    render.result(done, rows, title=title, as_json=as_json, notes=(f"{path}: {line}" for line in done.notes))


app.command(cls=ForgivingCommand)(push.push)


def _parameters(n_parameters: int, types: str, n_bytes: int) -> list[str]:
    from nanothink.cli import render

    return ["parameters", f"{render.count(n_parameters)}, {types} ({render.size(n_bytes)})"]


def _origin(imported: Any) -> dict[str, str]:
    """Source and licence of an imported model."""
    if not isinstance(imported, dict):
        return {}
    return {
        "imported from": f"{imported.get('source')} ({imported.get('family')})",
        "licence": str(imported.get("licence") or "not stated by its files"),
    }


def _when(timestamp: float) -> str:
    import time

    return time.strftime("%Y-%m-%d %H:%M", time.localtime(timestamp))


def _fitted(run: Mapping[str, Any], weights: Mapping[str, Any]) -> dict[str, str]:
    """The teacher of a student, the factor from calibration, and the joint gate."""
    from nanothink.models.joint_gate import GATE_PREFIX, MEMORIES

    found = {}
    if isinstance(teacher := run.get("teacher"), dict):
        found["teacher"] = f"{teacher.get('path')} ({teacher.get('kind')})"
    if isinstance(scale := run.get("logit_scale"), float):
        found["calibration"] = f"logits times {scale:.4f}"
    temperatures = weights.get(f"{GATE_PREFIX}log_temperature")
    if temperatures is not None:
        n_caches = int(weights.get(f"{GATE_PREFIX}n_caches", 1))
        of_each = [name.replace("_", " ") for name in MEMORIES[n_caches - len(temperatures) + 1 :]]
        if n_caches > 1:
            of_each[-1] = f"{n_caches} {of_each[-1]}s"
        over = " and ".join(of_each)
        n = sum(t.numel() for key, t in weights.items() if key.startswith(GATE_PREFIX))
        found["joint gate"] = f"over the model and its {over}, {n:,} numbers"
    return found
