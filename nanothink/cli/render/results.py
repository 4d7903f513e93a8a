"""Results of commands as tables and text."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.text import Text

from nanothink.cli.render.console import count, duration, out, printable, say, size, warning
from nanothink.cli.render.tables import facts, fits, table
from nanothink.suggestions import command
from nanothink.wording import counted

if TYPE_CHECKING:
    from nanothink.cli.render.training import TrainingView
    from nanothink.inference.denoising import Reconstruction
    from nanothink.inference.evaluate import Difference, Evaluation
    from nanothink.inference.routed import RoutedPiece
    from nanothink.runs.estimate import RunEstimate
    from nanothink.runs.evaluating import CheckpointEvaluation
    from nanothink.runs.timing import RunTime
    from nanothink.training.events import RunFinished


def training_summary(
    name: str, finished: RunFinished, best: Path, view: TrainingView, *, answers: bool = False
) -> None:
    trained = finished.step > 0  # not where everything is fitted on held-out text
    epochs = counted(finished.epoch, "whole epoch")
    done = f"{finished.reason}, {epochs}" if trained else "fitted, not trained"
    say(f"{name}: {done}, {duration(finished.seconds)}.")
    last = view.last_validation
    shown = last if view.best_validation is None else view.best_validation
    if last is not None and shown is not None:
        columns, rows = ["domain", ">loss", ">perplexity", ">bits per byte", ">tokens"], _score_rows(shown)
        title = "Validation at the end of training" if trained else "Held-out text that nothing was fitted on"
        if shown is not last:
            title = f"Validation of the best model, at step {count(view.best_step)}"
            columns.append(f">at step {count(view.last_step)}")
            rows = [[*row, end[3]] for row, end in zip(rows, _score_rows(last), strict=True)]
        table(columns, rows, title=title, total=True)
        _errors_by_level(shown)
        _trust(shown)
    if best.exists():
        say(f"Best model: {best}")
        asked = ["--chat", "Who are you?"] if answers else ["The beginning of a text of yours"]
        say(f"Try it: {command('generate', *asked, '--checkpoint', best)}")


def _errors_by_level(evaluation: Evaluation) -> None:
    """Print a diffuser's squared error by noise level, as a share of the clean target's variance."""
    if evaluation.denoising:
        table(
            ["level", *(f">{level}" for level in evaluation.denoising)],
            [["error", *(f"{mse:.4f}" for mse in evaluation.denoising.values())]],
            title="Squared error by noise level",
        )


def _trust(evaluation: Evaluation, of: str = "") -> None:
    """Print the mean weight of each expert, and their mean entropy, by domain."""
    if not evaluation.routing:
        return
    names = next(iter(evaluation.routing.values())).weights
    table(
        ["domain", *(f">{name}" for name in names), ">entropy"],
        [
            [domain, *(f"{weight:.3f}" for weight in routing.weights.values()), f"{routing.entropy:.3f}"]
            for domain, routing in evaluation.routing.items()
        ],
        title=f"Mean weight of the experts{of}",
    )
    say("A weight says how much an expert speaks for this text, not how good it is.", style="dim")


def _score_rows(evaluation: Evaluation) -> list[list[object]]:
    scores = {**evaluation.domains, "all": evaluation.overall}
    return [
        [name, f"{s.loss:.4f}", f"{s.perplexity:.2f}", f"{s.bits_per_byte:.4f}", s.tokens]
        for name, s in scores.items()
    ]


def estimate(name: str, estimate: RunEstimate) -> None:
    """Print the estimate of ``--dry-run``."""
    total = sum(estimate.parameters.values()) + estimate.frozen_parameters
    table(
        ["parameters", ">count"],
        [
            *([role, n] for role, n in estimate.parameters.items()),
            *([["frozen", estimate.frozen_parameters]] if estimate.frozen_parameters else []),
            ["all", total],
        ],
        title=name,
        total=True,
    )
    table(
        ["domain", ">training tokens", ">validation tokens"],
        [
            *([d, n, estimate.validation_tokens.get(d, 0)] for d, n in estimate.train_tokens.items()),
            [
                "all",
                count(sum(estimate.train_tokens.values())),
                count(sum(estimate.validation_tokens.values())),
            ],
        ],
        total=True,
    )
    rows: list[list[object]] = [
        ["steps", f"{count(estimate.steps)}, {count(estimate.warmup_steps)} of them warm-up"],
        ["tokens per step", estimate.tokens_per_step],
        ["epochs", f"{estimate.epochs:.2f} of {estimate.steps_per_epoch:.1f} steps"],
        ["time, about" if estimate.time.measured else "time, at least", _time(estimate.time)],
        ["not in it", ", ".join(estimate.time.left_out)],
        ["precision", f"{estimate.precision}: {estimate.precision_reason}"],
        *([["processes", estimate.n_processes]] if estimate.n_processes > 1 else []),
        [
            "peak memory, about" if estimate.n_processes == 1 else "peak memory of each, about",
            f"{size(estimate.peak_memory_bytes)} ("
            + ", ".join(f"{part} {size(n)}" for part, n in estimate.memory.items())
            + ")",
        ],
        *_choices(estimate),
        ["one checkpoint", size(estimate.checkpoint_bytes)],
        ["disk, at most about", f"{size(estimate.disk_bytes)} of {size(estimate.disk_free_bytes)} free"],
    ]
    if estimate.states_bytes:
        rows.append(["experts' states beside the tokens, at most", size(estimate.states_bytes)])
    if estimate.targets_bytes:
        rows.append(["teacher's targets beside the tokens", size(estimate.targets_bytes)])
    facts(rows, title="run")
    if estimate.disk_bytes > estimate.disk_free_bytes:
        warning("The disk may not hold all checkpoints of this run.")


def _choices(estimate: RunEstimate) -> list[list[object]]:
    """Ways to run, where there are several or the run as it is does not fit."""
    if not estimate.available_bytes or (estimate.n_processes == 1 and estimate.choices[0].fits):
        return []
    return [
        [
            choice.name,
            f"{size(choice.n_bytes)} of {size(estimate.available_bytes)} for each: "
            + ("fits" if choice.fits else "does not fit")
            + (f" (--set {choice.settings.replace(' ', ' --set ')})" if choice.settings else ""),
        ]
        for choice in estimate.choices
    ]


def _time(time: RunTime) -> str:
    parts = [f"{counted(time.n_steps, 'step')} of {time.step_seconds:.3g} s"] if time.n_steps else []
    parts += [f"{counted(time.n_evaluations, 'evaluation')} of {time.evaluation_seconds:.3g} s"]
    if time.store_seconds:
        parts.append(f"vector store {duration(time.store_seconds)}")
    if time.targets_seconds:
        parts.append(f"teacher's targets {duration(time.targets_seconds)}")
    how = "measured here just now" if time.measured else "its matrix products; a step is too large to measure"
    return f"{duration(time.seconds)} ({', '.join(parts)}; {how})"


def evaluations(results: Sequence[CheckpointEvaluation], split: str) -> None:
    """One checkpoint in detail, or several side by side by domain."""
    if len(results) == 1:
        found = results[0].evaluation
        errors = [*map(found.standard_error, found.domains), found.standard_error()]
        scores = [*found.domains.values(), found.overall]
        table(
            ["domain", ">loss", ">perplexity", ">bits per byte", ">std. error", ">tokens", ">bytes"],
            [
                [*row[:-1], "-" if error is None else f"{error:.4f}", row[-1], score.n_bytes]
                for row, error, score in zip(_score_rows(found), errors, scores, strict=True)
            ],
            title=f"{results[0].path} ({results[0].kind}), {split} split{_seen(results[0])}",
            total=True,
        )
        _with_cache(results)
        _errors_by_level(found)
        _trust(found)
        return
    _side_by_side(results, split)
    _with_cache(results)
    for r in results:
        _trust(r.evaluation, f" of {r.path}")


def _with_cache(results: Sequence[CheckpointEvaluation]) -> None:
    """Bits per byte without and with a document cache, side by side."""
    scored = [(r, r.with_cache) for r in results if r.with_cache is not None]
    if not scored:
        return
    rows = []
    for r, cached in scored:
        for name, plain, with_cache in (
            *((d, r.evaluation.domains[d], cached.domains[d]) for d in cached.domains),
            ("all", r.evaluation.overall, cached.overall),
        ):
            change = with_cache.bits_per_byte / plain.bits_per_byte - 1
            figures = [
                f"{plain.bits_per_byte:.4f}",
                f"{with_cache.bits_per_byte:.4f}",
                f"{100 * change:+.1f} %",
            ]
            rows.append([*([str(r.path)] if len(scored) > 1 else []), name, *figures])
    columns = [*(["checkpoint"] if len(scored) > 1 else []), "domain", ">without", ">with", ">change"]
    table(columns, rows, title="Bits per byte without and with a document cache", total=len(scored) == 1)


def _side_by_side(results: Sequence[CheckpointEvaluation], split: str) -> None:
    """Print a line for each checkpoint; on a narrow terminal, a line for each domain."""
    from nanothink.runs.evaluating import above_best

    domains = list(dict.fromkeys(d for r in results for d in r.evaluation.domains))
    bits = [
        [r.evaluation.domains[d].bits_per_byte if d in r.evaluation.domains else None for d in domains]
        + [r.evaluation.overall.bits_per_byte]
        for r in results
    ]
    lowest = [min(b for b in column if b is not None) for column in zip(*bits, strict=True)]
    cells = [
        [
            Text("-") if b is None else Text(f"{b:.4f}", style="bold green" if b == best else "")
            for b, best in zip(row, lowest, strict=True)
        ]
        for row in bits
    ]
    perplexities = [f"{r.evaluation.overall.perplexity:.2f}" for r in results]
    above = [_difference(difference) for difference in above_best(results)]
    n_seen = max(r.n_seen for r in results)
    title = f"Bits per byte, {split} split" + (
        "; seen: documents of it that were trained on" if n_seen else ""
    )
    if unknown := [r.path.name for r in results if not r.trained_text_known]:
        title += f"; what {', '.join(unknown)} {'was' if len(unknown) == 1 else 'were'} trained on is unknown"
    columns = ["checkpoint", "kind", *(f">{d}" for d in domains), ">all", ">above the best", ">perplexity"]
    columns += [">seen"] if n_seen else []
    rows: list[list[object]] = [
        [r.path, r.kind, *row, difference, perplexity, *([r.n_seen] if n_seen else [])]
        for r, row, difference, perplexity in zip(results, cells, above, perplexities, strict=True)
    ]
    if fits(columns, rows):
        table(columns, rows, title=title)
        return
    table(
        ["domain", *(f">{r.path.stem.removesuffix('_expert')}" for r in results)],
        [
            *([name, *row] for name, row in zip([*domains, "all"], zip(*cells, strict=True), strict=True)),
            ["above the best", *above],
            ["perplexity", *perplexities],
            *([["seen", *(r.n_seen for r in results)]] if n_seen else []),
        ],
        title=title,
    )


def _seen(result: CheckpointEvaluation) -> str:
    """Mark scores on text that the model was, or may have been, trained on."""
    seen = f"; {counted(result.n_seen, 'document')} of it seen in training" if result.n_seen else ""
    return seen + ("" if result.trained_text_known else "; what the model was trained on is unknown")


def _difference(above: Difference | None) -> str:
    if above is None:
        return "-"
    error = "" if above.standard_error is None else f" ± {above.standard_error:.4f}"
    return f"{above.bits_per_byte:.4f}{error}"


@contextmanager
def streaming(prompt: str) -> Iterator[Callable[[str], None]]:
    """Write text as it is generated: the prompt dim, the continuation plain; piped, only text."""
    if out.is_terminal:
        out.print(Text(_on_screen(prompt), style="dim"), end="", soft_wrap=True)
    else:
        sys.stdout.write(prompt)

    def write(piece: str) -> None:
        sys.stdout.write(_on_screen(piece) if out.is_terminal else piece)
        sys.stdout.flush()

    sys.stdout.flush()
    try:
        yield write
    finally:  # an error has a line of its own
        sys.stdout.write("\n")


def _on_screen(text: str) -> str:
    """Make text safe for a terminal, without the CR of CRLF."""
    return printable(text.replace("\r", ""))


def samples(prompts: Sequence[str], texts: Sequence[str]) -> None:
    for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        if i:
            out.print(Text("─" * min(40, out.width) if out.is_terminal else "---", style="dim"))
        with streaming(prompt) as write:
            write(text)


_COLOURS = ("cyan", "magenta", "yellow", "green", "blue", "red")
_RAISED = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


@contextmanager
def routing(prompt: str) -> Iterator[Callable[[RoutedPiece], None]]:
    """Show text as it is generated, each token in the colour of its most weighted expert.

    Piped, or without colours: a plain line for each token, with the weight of every expert.
    """
    totals: dict[str, float] = {}
    n_tokens = 0
    coloured = out.is_terminal and not out.no_color and not out.is_dumb_terminal
    if coloured:
        out.print(Text(_on_screen(prompt), style="dim"), end="", soft_wrap=True)

    def show(piece: RoutedPiece) -> None:
        nonlocal n_tokens
        if not n_tokens and not coloured:
            sys.stdout.write("\t".join(["token", "expert", *piece.weights]) + "\n")
        n_tokens += 1
        for name, weight in piece.weights.items():
            totals[name] = totals.get(name, 0.0) + weight
        if not coloured:
            numbers = (f"{weight:.3f}" for weight in piece.weights.values())
            line = "\t".join([json.dumps(piece.text, ensure_ascii=False), piece.trusted, *numbers])
            sys.stdout.write(line + "\n")
            return
        colour = _COLOURS[list(piece.weights).index(piece.trusted) % len(_COLOURS)]
        percent = f"{100 * piece.weights[piece.trusted]:.0f}".translate(_RAISED)
        out.print(Text.assemble((_on_screen(piece.text), colour), (percent, "dim")), end="", soft_wrap=True)

    yield show
    if coloured and not n_tokens:
        out.print()
    if coloured and n_tokens:
        legend = [
            (f"{name} {100 * total / n_tokens:.0f} %   ", _COLOURS[i % len(_COLOURS)])
            for i, (name, total) in enumerate(totals.items())
        ]
        number = "70".translate(_RAISED)
        key = f"\n\nColour: the expert with most weight for a token; {number}: with 70 % of the weight.\n"
        out.print(Text.assemble((key, "dim"), "Mean weight: ", *legend), soft_wrap=True)


def reconstructions(found: Sequence[Reconstruction], decode: Callable[[list[int]], str]) -> None:
    """Print the passage rebuilt from each noise level; its first token is never hidden."""
    for result in found:
        say(f"level {result.level}: {100 * result.right:.0f} % of the tokens recovered")
        out.print(Text(_on_screen(decode(result.tokens)), style="dim"), soft_wrap=True)
