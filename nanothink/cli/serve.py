"""``nanothink serve``: an OpenAI-compatible server of trained models, and a playground in the browser."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nanothink.cli import completion
from nanothink.cli.options import (
    ForgivingCommand,
    UsedModel,
    argument,
    examples,
    grouped,
    option,
)
from nanothink.suggestions import install

EXAMPLES = examples(
    "serve",
    "serve checkpoints/nanothink_mla.pt --port 8080",
    "serve --host 0.0.0.0 --api-key @key.txt",
)


def register(app: typer.Typer) -> None:
    app.command(cls=ForgivingCommand, epilog=EXAMPLES)(serve)


@grouped
def serve(
    checkpoint: Annotated[
        list[Path] | None,
        argument(
            "CHECKPOINT",
            "Models, called by the names of their files. [default: every best one in --checkpoint-dir]",
            complete=completion.checkpoints,
        ),
    ] = None,
    host: Annotated[
        str, option("ADDRESS", "Where to listen; others than this machine's own need --api-key.", "--host")
    ] = "127.0.0.1",
    port: Annotated[int, option("N", "Port; 0 takes a free one.", "--port", "-p", min=0, max=65_535)] = 8000,
    api_key: Annotated[
        str | None,
        option("KEY", "Ask for this key; @FILE reads it from a file. [default: none]", "--api-key"),
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        option(
            "URL", "Pages of this origin may ask too (CORS); repeatable. [default: none]", "--allow-origin"
        ),
    ] = None,
    chat_template: Annotated[
        Path | None,
        option(
            "FILE",
            "Jinja template for chats. [default: each model's own; without one, plain text]",
            "--chat-template",
        ),
    ] = None,
    max_batch: Annotated[int, option("N", "Texts of a model written at a time.", "--max-batch", min=1)] = 32,
    max_queue: Annotated[int, option("N", "Texts taken on in all.", "--max-queue", min=1)] = 512,
    max_tokens: Annotated[
        int, option("N", "Longest text that can be asked for.", "--max-tokens", min=1)
    ] = 4096,
    *,
    used: UsedModel,
) -> None:
    """Serve models by OpenAI's API, with a playground.

    Needs two more packages: pip install -e '.[serve]'.
    """
    from nanothink.cli import render
    from nanothink.errors import UsageError

    try:
        from nanothink.serve import server
    except ModuleNotFoundError as error:
        if error.name not in ("starlette", "uvicorn"):
            raise
        raise UsageError(f"The server needs two more packages: {install('nanothink[serve]')}") from None
    from nanothink.runs.evaluating import finished_checkpoints
    from nanothink.serve.endpoints import Limits

    access = server.access(host, api_key, allow_origin or ())
    template = None
    if chat_template is not None:
        try:
            template = chat_template.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"The chat template cannot be read: {error}.") from None
    bound = server.listen(host, port)
    with render.reporting() as reporter:
        paths = checkpoint or finished_checkpoints(used.checkpoint_dir, reporter)
        if not checkpoint:
            paths.sort(key=lambda path: path.stat().st_mtime, reverse=True)
        loaded = [used.load(path, reporter) for path in paths]
    models = server.served_models(loaded, template)
    for model in loaded:
        for line in model.notes:
            render.note(f"{model.path}: {line}")

    def ready() -> None:
        names, url = ", ".join(model.name for model in models), server.url_of(bound)
        render.say(f"Serving {names} at {url}/v1; playground: {url}/; stop with Ctrl-C.")

    limits = Limits(max_batch=max_batch, max_texts=max_queue, max_tokens=max_tokens)
    server.build_server(models, access, limits, note=render.note, on_ready=ready).run(sockets=[bound])
