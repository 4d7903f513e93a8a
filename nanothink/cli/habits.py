"""Advice for people who come from other programs: their commands and options, and ours."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanothink.models import EXPERTS, training_section
from nanothink.suggestions import domain_named_after, suggest

_GUESSES = {
    **dict.fromkeys(("finetune", "fine-tune", "fine_tune"), "pretrain --help"),
    **dict.fromkeys(("chat", "infer", "inference", "predict", "complete", "run", "write"), "generate"),
    **dict.fromkeys(("evaluate", "test", "score", "perplexity", "benchmark"), "eval"),
    **dict.fromkeys(("combine", "merge", "train_mla", "mla", "train-nanothink", "nanothink"), "train-mla"),
    **dict.fromkeys(("plot", "tensorboard", "curves", "runs"), "report"),
    **dict.fromkeys(("ui", "web", "playground", "server", "api"), "serve"),
    **dict.fromkeys(("list", "models", "checkpoint"), "checkpoints ls"),
    **dict.fromkeys(("convert", "save", "gguf"), "checkpoints export"),
    **dict.fromkeys(("tokenize", "train-tokenizer", "train_tokenizer"), "tokenizer train"),
    **dict.fromkeys(("prepare", "check", "preprocess"), "data validate"),
    **dict.fromkeys(("continue", "restart"), "resume"),
    **dict.fromkeys(("init", "new", "setup"), "data sample"),
    "presets": "config presets",
    "settings": "config show",
}
"""Commands that other programs have, and ours."""


def calls_meant(args: Sequence[str], tree: Any) -> list[str]:
    """The commands that an unknown one may mean: with its arguments, or with --help if it lacks some."""
    found = []
    for call in _commands_meant(args[0], tree):
        target, words = tree, call.split()
        while words and words[0] in getattr(target, "commands", {}):
            target = target.commands[words.pop(0)]
        lacks = len(args) == 1 and not words and any(p.required for p in target.params)
        rest = [] if "--help" in call else ["--help"] if lacks else args[1:]
        found.append(suggest(call, *rest))
    return found


def _commands_meant(word: str, tree: Any) -> list[str]:
    """The commands that an unknown one may mean, by habit, by kind of model, or by its name in a group."""
    if word in _GUESSES:
        return [_GUESSES[word]]
    if kinds := [kind for kind in EXPERTS if kind in word.replace("-", "_")]:
        return [f"pretrain {kinds[0]}"]
    groups = ((name, getattr(found, "commands", {})) for name, found in tree.commands.items())
    return [f"{name} {word}" for name, commands in groups if word in commands]


def option_meant(option: str, args: Sequence[str]) -> str:
    """The whole command with a setting in place of an option that another program has; may be empty."""
    from nanothink.config.other_names import setting_meant

    kind = next((word for word in args if word.replace("-", "_") in EXPERTS), "")
    phase = (
        "train_mla" if args[0] == "train-mla" else training_section(kind.replace("-", "_") or "transformer")
    )
    meant = setting_meant(option.lstrip("-"), phase)
    at = next((i for i, word in enumerate(args) if word.partition("=")[0].replace("_", "-") == option), None)
    if not meant or at is None or args[0] not in ("pretrain", "train-mla", "resume", "train"):
        return ""
    _, together, value = args[at].partition("=")
    if not together:
        value = args[at + 1] if at + 1 < len(args) and not args[at + 1].startswith("--") else "VALUE"
    rest = args[at + 1 :] if together or value == "VALUE" else args[at + 2 :]
    flag = {"max_epochs": "--max-epochs", "max_steps": "--max-steps", "data_dir": "--data-dir"}
    key = meant.partition(".")[2]
    words = [flag[key], value] if key in flag else ["--set", f"{meant}={value}"]
    return suggest(args[0], *args[1:at], *words, *rest)


def domain_meant(args: Sequence[str]) -> str:
    """The whole ``data import`` that lacks a domain, with one named after its first file; else empty."""
    if [*args[:2]] != ["data", "import"] or "--domain" in args:
        return ""
    source = next((Path(word) for word in args[2:] if Path(word).exists()), None)
    name = "" if source is None else domain_named_after(source)
    return suggest("data import", *args[2:], "--domain", name) if name else ""
