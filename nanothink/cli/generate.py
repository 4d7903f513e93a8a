"""``nanothink generate``: continue a prompt with any checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nanothink.cli import completion
from nanothink.cli.options import (
    CheckpointDir,
    Device,
    DocumentCache,
    ForgivingCommand,
    Json,
    NoVectorStore,
    Quantize,
    argument,
    examples,
    flag,
    option,
)
from nanothink.suggestions import suggest

if TYPE_CHECKING:
    from nanothink.runs.trained_model import TrainedModel


CHAT_TOKENS = 512
"""Most tokens of an answer by default; a model ends most of them by itself."""

EXAMPLES = examples(
    'generate "Once upon a time" -n 200 --seed 1',
    'generate "The" -c checkpoints/nanothink_mla.pt --show-routing',
    "generate - --temperature 0 < prompt.txt",
    "generate --interactive",
    'generate --chat "What is the capital of France?"',
)


def register(app: typer.Typer) -> None:
    app.command(cls=ForgivingCommand, epilog=EXAMPLES)(generate)


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
    max_new_tokens: Annotated[
        int | None, option("N", "Tokens to write. [default: 128; 512 with --chat]", "--max-new-tokens", "-n")
    ] = None,
    temperature: Annotated[
        float | None,
        option("T", "0 always takes the likeliest token. [default: 0.8; 0 with DDIM]", "--temperature", "-t"),
    ] = None,
    top_k: Annotated[
        int | None, option("K", "Choose among the K likeliest; 0 for all. [default: 50]")
    ] = None,
    top_p: Annotated[
        float | None,
        option("P", "Choose among the likeliest that together have this probability. [default: 1]"),
    ] = None,
    repetition_penalty: Annotated[
        float | None, option("X", "Above 1, the last 64 tokens become less likely. [default: 1]")
    ] = None,
    seed: Annotated[
        int | None, option("N", "Same seed, same text; prompt i takes N + i. [default: none]")
    ] = None,
    ignore_eos: Annotated[bool, flag("--ignore-eos", "Continue past the end of a text.")] = False,
    stop: Annotated[
        list[str] | None, option("TEXT", "End before this text; repeatable. [default: none]", "--stop")
    ] = None,
    ddim: Annotated[
        bool, flag("--ddim", "A diffuser: denoise every token from drawn noise, by DDIM.")
    ] = False,
    ddim_steps: Annotated[
        int | None,
        option("N", "The same, in this many evaluations a token. [default: the model's, 10]", min=1),
    ] = None,
    denoise: Annotated[
        bool, flag("--denoise", "A diffuser: hide the prompt behind noise and rebuild it, by level.")
    ] = False,
    levels: Annotated[
        list[int] | None,
        option("T", "Noise level for --denoise; repeatable. [default: a spread of them]", "--level"),
    ] = None,
    show_routing: Annotated[
        bool,
        flag(
            "--show-routing",
            "A NanoThink: show the expert, or vector store, with the most weight at each token.",
        ),
    ] = False,
    interactive: Annotated[
        bool,
        flag("--interactive", "Write in turns with the model, in the terminal.", "-i"),
    ] = False,
    chat: Annotated[
        bool, flag("--chat", "Answer the prompt, by the model's chat template; see --interactive.")
    ] = False,
    system: Annotated[
        str | None, option("TEXT", "With --chat: what the model is told first. [default: none]", "--system")
    ] = None,
    no_vector_store: NoVectorStore = False,
    document_cache: DocumentCache = False,
    quantize: Quantize = None,
    checkpoint_dir: CheckpointDir = Path("checkpoints"),
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Continue a prompt, or answer it, with any checkpoint."""
    from nanothink.cli import render
    from nanothink.errors import UsageError
    from nanothink.inference.sampling import sampling_config
    from nanothink.models import COMBINED
    from nanothink.runs.evaluating import newest_finished
    from nanothink.runs.trained_model import load

    asked: dict[str, Any] = {
        "max_new_tokens": CHAT_TOKENS if chat and max_new_tokens is None else max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
        "stop_at_eos": False if ignore_eos else None,
    }
    if interactive:
        from nanothink.cli.conversation import talk
        from nanothink.cli.interactive import require_terminal, write_in_turns

        require_terminal()
    by_ddim = ddim or ddim_steps is not None
    to_chat = "--chat is for answers that are written plainly, without --denoise, --ddim, --show-routing."
    to_route = "--show-routing is for models that combine experts; --denoise and --ddim are not."
    to_stop = "--stop is for text that is written plainly, without --show-routing or --denoise."
    in_turns = "--interactive takes at most one prompt, and neither --denoise nor --json."
    one_prompt = not prompt or (len(prompt) == 1 and prompt != ["-"])
    _refuse(
        (chat and (denoise or show_routing or by_ddim), to_chat),
        (show_routing and (denoise or by_ddim), to_route),
        (stop and (show_routing or denoise), to_stop),
        (interactive and (denoise or as_json or not one_prompt), in_turns),
        (stop and not all(stop), "--stop needs some text."),
        (system is not None and not chat, "--system is for --chat."),
        (levels and not denoise, "--level is for --denoise."),
    )
    prompts = [_read(text) for text in prompt] if prompt else [_piped()]
    if chat and not interactive and not all(text.strip() for text in prompts):
        raise UsageError(f"--chat needs a message: {suggest('generate Hello --chat')}")
    if denoise and (len(prompts) > 1 or not prompts[0]):
        passage = suggest("generate", "Some text", "--denoise")
        raise UsageError(f"--denoise needs one passage to rebuild: {passage}")
    sampling = {name: value for name, value in asked.items() if value is not None}
    sampling_config(**sampling)  # raises for a bad value before anything is loaded or printed
    if by_ddim:
        sampling["ddim_steps"] = ddim_steps or 0
    kind = "diffuser" if denoise or "ddim_steps" in sampling else COMBINED if show_routing else None
    with render.reporting() as reporter:
        path = checkpoint or newest_finished(checkpoint_dir, reporter, kind=kind)
        loaded = load(
            path,
            device=device,
            vector_store=not no_vector_store,
            document_cache=document_cache,
            quantize=quantize,
            reporter=reporter,
        )
    for line in loaded.notes:
        render.note(line)
    if "ddim_steps" in sampling and loaded.kind != "diffuser":  # before the prompt is shown
        raise UsageError(f"{path} holds a {loaded.kind}; only a diffuser can denoise.")
    if interactive and chat:
        talk(loaded, prompts[0], sampling, stop=stop or (), system=system)
        return
    if interactive:
        write_in_turns(loaded, prompts[0], sampling, stop=stop or (), show_routing=show_routing)
        return
    if denoise:
        _rebuild(loaded, prompts[0], levels, seed or 0, sampling.get("ddim_steps", 1), as_json=as_json)
        return
    for text in prompts:
        if loss := loaded.tokenizer.loss(text):
            render.warning(f"The tokenizer loses a part of the prompt: {loss}.")
    if show_routing:
        _generate_routed(loaded, prompts, sampling, as_json=as_json)
    elif chat:
        first = [] if system is None else [{"role": "system", "content": system}]
        conversations = [[*first, {"role": "user", "content": text}] for text in prompts]
        _write(loaded, conversations, {"stop": stop or (), **sampling}, as_json=as_json)
    else:
        _write(loaded, prompts, {"stop": stop or (), **sampling}, as_json=as_json)


def _refuse(*combinations: tuple[object, str]) -> None:
    """Raise UsageError for the first combination of options that was given; each has its message."""
    from nanothink.errors import UsageError

    for given, message in combinations:
        if given:
            raise UsageError(message)


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
