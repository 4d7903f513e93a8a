"""Options of ``nanothink generate`` in groups: how tokens are drawn, and in which way a text is written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from nanothink.cli.options import flag, option
from nanothink.errors import UsageError

CHAT_TOKENS = 512
"""Most tokens of an answer by default; a model ends most of them by itself."""


@dataclass(frozen=True)
class Sampling:
    """Options that draw tokens and end a text. None: the model's default."""

    max_new_tokens: Annotated[
        int | None, option("N", "Tokens to write. [default: 128; 512 with --chat]", "--max-new-tokens", "-n")
    ] = None
    temperature: Annotated[
        float | None,
        option("T", "0 always takes the likeliest token. [default: 0.8; 0 with DDIM]", "--temperature", "-t"),
    ] = None
    top_k: Annotated[int | None, option("K", "Choose among the K likeliest; 0 for all. [default: 50]")] = None
    top_p: Annotated[
        float | None,
        option("P", "Choose among the likeliest that together have this probability. [default: 1]"),
    ] = None
    repetition_penalty: Annotated[
        float | None, option("X", "Above 1, the last 64 tokens become less likely. [default: 1]")
    ] = None
    seed: Annotated[
        int | None, option("N", "Same seed, same text; prompt i takes N + i. [default: none]")
    ] = None
    ignore_eos: Annotated[bool, flag("--ignore-eos", "Continue past the end of a text.")] = False
    stop: Annotated[
        list[str] | None, option("TEXT", "End before this text; repeatable. [default: none]", "--stop")
    ] = None

    def settings(self, *, chat: bool) -> dict[str, Any]:
        """The fields of ``SamplingConfig`` that were asked for."""
        names = ("max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "seed")
        asked = {name: value for name in names if (value := getattr(self, name)) is not None}
        if chat:
            asked.setdefault("max_new_tokens", CHAT_TOKENS)
        return asked | ({"stop_at_eos": False} if self.ignore_eos else {})


@dataclass(frozen=True)
class Way:
    """Options that choose a way to write: plain, from noise, with weights, in turns, as an answer."""

    ddim: Annotated[bool, flag("--ddim", "A diffuser: denoise every token from drawn noise, by DDIM.")] = (
        False
    )
    ddim_steps: Annotated[
        int | None,
        option("N", "The same, in this many evaluations a token. [default: the model's, 10]", min=1),
    ] = None
    denoise: Annotated[
        bool, flag("--denoise", "A diffuser: hide the prompt behind noise and rebuild it, by level.")
    ] = False
    levels: Annotated[
        list[int] | None,
        option("T", "Noise level for --denoise; repeatable. [default: a spread of them]", "--level"),
    ] = None
    show_routing: Annotated[
        bool,
        flag(
            "--show-routing",
            "A NanoThink: show the expert, or vector store, with the most weight at each token.",
        ),
    ] = False
    interactive: Annotated[
        bool,
        flag("--interactive", "Write in turns with the model, in the terminal.", "-i"),
    ] = False
    chat: Annotated[
        bool, flag("--chat", "Answer the prompt, by the model's chat template; see --interactive.")
    ] = False
    system: Annotated[
        str | None, option("TEXT", "With --chat: what the model is told first. [default: none]", "--system")
    ] = None

    @property
    def by_ddim(self) -> bool:
        return self.ddim or self.ddim_steps is not None


def check_options(prompt: list[str] | None, sampling: Sampling, way: Way, *, as_json: bool) -> None:
    """Raise UsageError for options that do not go together."""
    one_prompt = not prompt or (len(prompt) == 1 and prompt != ["-"])
    for given, message in (
        (
            way.chat and (way.denoise or way.show_routing or way.by_ddim),
            "--chat is for answers that are written plainly, without --denoise, --ddim, --show-routing.",
        ),
        (
            way.show_routing and (way.denoise or way.by_ddim),
            "--show-routing is for models that combine experts; --denoise and --ddim are not.",
        ),
        (
            sampling.stop and (way.show_routing or way.denoise),
            "--stop is for text that is written plainly, without --show-routing or --denoise.",
        ),
        (
            way.interactive and (way.denoise or as_json or not one_prompt),
            "--interactive takes at most one prompt, and neither --denoise nor --json.",
        ),
        (sampling.stop and not all(sampling.stop), "--stop needs some text."),
        (way.system is not None and not way.chat, "--system is for --chat."),
        (way.levels and not way.denoise, "--level is for --denoise."),
    ):
        if given:
            raise UsageError(message)
