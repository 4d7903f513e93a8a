"""``nanothink generate``: continue a prompt with any checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nanothink.cli import completion
from nanothink.cli.generate_options import Sampling, Way, check_options
from nanothink.cli.options import ForgivingCommand, Json, UsedModel, argument, examples, grouped, option
from nanothink.suggestions import suggest

if TYPE_CHECKING:
    from nanothink.runs.trained_model import TrainedModel

EXAMPLES = examples(
    'generate "Once upon a time" -n 200 --seed 1',
    'generate "The" -c checkpoints/nanothink_mla.pt --show-routing',
    "generate - --temperature 0 < prompt.txt",
    "generate --interactive",
    'generate --chat "What is the capital of France?"',
)


def register(app: typer.Typer) -> None:
    app.command(cls=ForgivingCommand, epilog=EXAMPLES)(generate)


@grouped
def generate(
    prompt: Annotated[
        list[str] | None,
        argument(
            "PROMPT",
            "Text to continue, or to answer; several are side by side; '-' reads standard input. "
            "[default: what a pipe brings, or the beginning of a document]",
        ),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        option(
            "PATH",
            "Model to run. [default: the newest best one in --checkpoint-dir that can do it]",
            "--checkpoint",
            "-c",
            complete=completion.checkpoints,
        ),
    ] = None,
    *,
    sampling: Sampling,
    way: Way,
    used: UsedModel,
    as_json: Json = False,
) -> None:
    """Continue a prompt, or answer it, with any checkpoint."""
    from nanothink.cli import render
    from nanothink.errors import UsageError
    from nanothink.inference.sampling import sampling_config
    from nanothink.models import COMBINED
    from nanothink.runs.evaluating import newest_finished

    if way.interactive:
        from nanothink.cli.conversation import talk
        from nanothink.cli.interactive import require_terminal, write_in_turns

        require_terminal()
    check_options(prompt, sampling, way, as_json=as_json)
    prompts = [_read(text) for text in prompt] if prompt else [_piped()]
    if way.chat and not way.interactive and not all(text.strip() for text in prompts):
        raise UsageError(f"--chat needs a message: {suggest('generate Hello --chat')}")
    if way.denoise and (len(prompts) > 1 or not prompts[0]):
        passage = suggest("generate", "Some text", "--denoise")
        raise UsageError(f"--denoise needs one passage to rebuild: {passage}")
    settings, stop = sampling.settings(chat=way.chat), sampling.stop or ()
    sampling_config(**settings)  # raises for a bad value before anything is loaded or printed
    if way.by_ddim:
        settings["ddim_steps"] = way.ddim_steps or 0
    kind = "diffuser" if way.denoise or way.by_ddim else COMBINED if way.show_routing else None
    with render.reporting() as reporter:
        path = checkpoint or newest_finished(used.checkpoint_dir, reporter, kind=kind)
        loaded = used.load(path, reporter)
    for line in loaded.notes:
        render.note(line)
    if way.by_ddim and loaded.kind != "diffuser":  # before the prompt is shown
        raise UsageError(f"{path} holds a {loaded.kind}; only a diffuser can denoise.")
    if way.interactive and way.chat:
        talk(loaded, prompts[0], settings, stop=stop, system=way.system)
        return
    if way.interactive:
        write_in_turns(loaded, prompts[0], settings, stop=stop, show_routing=way.show_routing)
        return
    if way.denoise:
        seed, steps = sampling.seed or 0, settings.get("ddim_steps", 1)
        _rebuild(loaded, prompts[0], way.levels, seed, steps, as_json=as_json)
        return
    for text in prompts:
        if loss := loaded.tokenizer.loss(text):
            render.warning(f"The tokenizer loses a part of the prompt: {loss}.")
    if way.show_routing:
        _generate_routed(loaded, prompts, settings, as_json=as_json)
    elif way.chat:
        first = [] if way.system is None else [{"role": "system", "content": way.system}]
        conversations = [[*first, {"role": "user", "content": text}] for text in prompts]
        _write(loaded, conversations, {"stop": stop, **settings}, as_json=as_json)
    else:
        _write(loaded, prompts, {"stop": stop, **settings}, as_json=as_json)


def _rebuild(
    loaded: TrainedModel, passage: str, levels: list[int] | None, seed: int, ddim_steps: int, *, as_json: bool
) -> None:
    from nanothink.cli import render

    found = loaded.denoise(passage, levels or None, seed=seed, ddim_steps=ddim_steps)
    decode = loaded.tokenizer.decode
    if as_json:
        shown = [{"level": r.level, "right": r.right, "text": decode(r.tokens)} for r in found]
        render.print_json({"checkpoint": loaded.path, "passage": passage, "levels": shown})
    else:
        render.reconstructions(found, decode)


def _write(
    loaded: TrainedModel,
    prompts: Sequence[Any],
    settings: dict[str, Any],
    *,
    as_json: bool,
) -> None:
    """Continue prompts, or answer conversations: as a stream where there is one, else side by side."""
    from nanothink.cli import render

    chats = not isinstance(prompts[0], str)
    write = partial(loaded.answer if chats else loaded.generate, prompts, **settings)
    shown = [f"{one[-1]['content']}\n" if isinstance(one, list) else one for one in prompts]
    if as_json:
        name = "messages" if chats else "prompt"
        samples = [{name: p, "text": text} for p, text in zip(prompts, write(), strict=True)]
        render.print_json({"checkpoint": loaded.path, "kind": loaded.kind, "samples": samples})
        return
    if len(prompts) == 1:
        with render.streaming("" if chats else shown[0]) as show:
            texts = write(on_text=lambda _, piece: show(piece))
    else:
        texts = write()
        render.samples(shown, texts)
    if not chats:
        _say_if_nothing(texts)
    elif not all(texts):
        render.note("The model ends its answer at once.")


def _say_if_nothing(texts: list[str]) -> None:
    """Explain an empty continuation: the model takes the prompt for a whole text."""
    from nanothink.cli import render

    if not all(texts):
        render.note("The model ends the text right after the prompt; --ignore-eos continues past that.")


def _piped() -> str:
    """Return the text of a pipe or a file, without the line end that ``echo`` adds; else nothing.

    Other standard inputs, such as a terminal, are not waited for.
    """
    import os
    import stat
    import sys

    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (AttributeError, OSError, ValueError):  # closed, or none
        return ""
    if not (stat.S_ISFIFO(mode) or stat.S_ISREG(mode)):
        return ""
    text = _read("-")
    return text.removesuffix("\n").removesuffix("\r")


def _read(prompt: str) -> str:
    """Read a prompt byte for byte: the text stream of standard input would turn CRLF into LF."""
    import codecs
    import sys

    from nanothink.config.text_encoding import wide_encoding
    from nanothink.errors import UsageError

    if prompt == "-":
        if sys.stdin is None:
            raise UsageError("Standard input is closed; give the prompt as an argument, or by a pipe.")
        try:
            where, given = "Standard input", sys.stdin.buffer.read()
        except OSError as error:  # of a terminal that has hung up, for example
            raise UsageError(f"Standard input cannot be read: {error.strerror or error}.") from None
        # Windows editors begin a file with a byte-order mark.
        given = given.removeprefix(codecs.BOM_UTF8)
    else:
        where, given = "The prompt", prompt.encode("utf-8", "surrogateescape")
    try:
        return given.decode()
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{where} is not UTF-8 at byte {error.start + 1}. Convert it, for example with: "
            f"iconv -f {wide_encoding(given) or 'ISO-8859-1'} -t UTF-8"
        ) from None


def _generate_routed(
    loaded: TrainedModel, prompts: list[str], sampling: dict[str, Any], *, as_json: bool
) -> None:
    from nanothink.cli import render

    shown = []
    for row, prompt in enumerate(prompts):
        own = {**sampling, **({"seed": sampling["seed"] + row} if "seed" in sampling else {})}
        if as_json:
            pieces = loaded.generate_routed(prompt, **own)
            tokens = [
                {"text": p.text, "token": p.token, "expert": p.trusted, "weights": p.weights} for p in pieces
            ]
            text = loaded.tokenizer.decode([p.token for p in pieces])
            shown.append({"prompt": prompt, "text": text, "tokens": tokens})
        else:
            with render.routing(prompt) as show:
                pieces = loaded.generate_routed(prompt, on_piece=show, **own)
            _say_if_nothing(["".join(piece.text for piece in pieces)])
    if as_json:
        render.print_json({"checkpoint": loaded.path, "kind": loaded.kind, "samples": shown})
