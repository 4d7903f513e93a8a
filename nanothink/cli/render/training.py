"""A run in progress: redrawn in place on a terminal, one line for each event elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress import TaskID
from rich.table import Table
from rich.text import Text

from nanothink.cli.render.console import count, duration, err, note, redraws
from nanothink.cli.render.progress import BarReporter, ProgressBars, progress_columns
from nanothink.cli.render.tables import sparkline
from nanothink.wording import counted

if TYPE_CHECKING:
    from nanothink.inference.evaluate import Evaluation
    from nanothink.training.events import Evaluated


class TrainingView(BarReporter):
    """Shows a run from its events."""

    def __init__(self, bars: ProgressBars | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(bars, clock)
        self.last_validation: Evaluation | None = None
        self.best_validation: Evaluation | None = None
        self.best_step = self.last_step = 0
        self._started: Any = None
        self._durations: list[float] = []
        self._stepped = 0.0  # time of the last step
        self._step_number = self._total_steps = self._evaluated_step = self._steps_between = 0
        self._evaluation_seconds = 0.0

    def event(self, event: object) -> None:
        from nanothink.training import events

        if isinstance(event, events.RunStarted):
            self._started = event
            self._step_number = self._evaluated_step = event.step
            self._total_steps, self._stepped = event.total_steps, self._clock()
        elif isinstance(event, events.StepDone):
            self._durations = [*self._durations[-49:], event.seconds]
            self._step_number, self._stepped = event.step, self._clock()
        elif isinstance(event, events.Evaluated):
            self._steps_between = event.step - self._evaluated_step or self._steps_between
            self._evaluated_step = event.step
            self._evaluation_seconds = self._clock() - self._stepped
            self._stepped = self._clock()
            self.last_validation = event.evaluation
            if event.best:
                self.best_validation, self.best_step = event.evaluation, event.step
            self.last_step = event.step
            self._note_validation(event)
        elif isinstance(event, events.CheckpointSaved) and event.role != "interrupted":
            self.note(f"saved {event.path}")

    def _note_validation(self, event: Evaluated) -> None:
        overall = event.evaluation.overall
        best = "best so far" if event.best else f"no better for {event.evals_without_improvement}"
        if event.fitted:
            best = "as fitted, on the rest of the held-out text"
        self.note(
            f"validation at step {event.step}  epoch {event.epoch}  loss {overall.loss:.4f}  "
            f"bits per byte {overall.bits_per_byte:.4f} ({_bits_by_domain(event.evaluation)})  {best}"
        )
        if event.evaluation.denoising:
            self.note(f"squared error by noise level  {errors_by_level(event.evaluation)}")
        if event.evaluation.routing:
            self.note(f"weight of the experts  {trust_by_domain(event.evaluation)}")

    def remaining(self) -> float | None:
        """Seconds to the end, by the median step and the last validation; None once these are over.

        One slow step does not distort the median.
        """
        if not self._durations:
            return None
        step, last = sorted(self._durations)[len(self._durations) // 2], self._total_steps
        left = step * (last - self._step_number)
        if self._steps_between:
            left += self._evaluation_seconds * -(-(last - self._evaluated_step) // self._steps_between)
        left -= self._clock() - self._stepped
        return left if left >= 0 else None


def _bits_by_domain(evaluation: Evaluation) -> str:
    return ", ".join(f"{name} {score.bits_per_byte:.3f}" for name, score in evaluation.domains.items())


def errors_by_level(evaluation: Evaluation) -> str:
    """Format a diffuser's squared error by noise level."""
    return "  ".join(f"{level}: {mse:.3f}" for level, mse in evaluation.denoising.items())


def trust_by_domain(evaluation: Evaluation) -> str:
    """Format the mean weight of each expert, and their entropy, by domain."""
    return ";  ".join(
        f"{domain}: "
        + ", ".join(f"{name} {100 * weight:.0f} %" for name, weight in routing.weights.items())
        + f" (entropy {routing.entropy:.3f})"
        for domain, routing in evaluation.routing.items()
    )


def _rates(event: Any) -> str:
    """Format the learning rate of each group of parameters: the matrices' first, without a name."""
    rates = dict(event.learning_rates) or {"matrices": event.learning_rate}
    first = rates.pop("matrices", None)
    named = [f"{role} {rate:.1e}" for role, rate in rates.items()]
    return ", ".join(named if first is None else [f"{first:.1e}", *named])


class PlainTrainingView(TrainingView):
    """Shows a run as one line for each event, for logs and pipes."""

    def note(self, message: str) -> None:
        note(message)

    def event(self, event: object) -> None:
        from nanothink.training import events

        super().event(event)
        if isinstance(event, events.RunStarted):
            note(
                f"{event.name}: from step {count(event.step)} to {count(event.total_steps)}, epochs of "
                + counted(event.n_blocks, "block")
            )
        elif isinstance(event, events.StepDone) and (event.logged or event.skipped):
            eta = duration(self.remaining() or 0.0)
            skipped = "  not finite: skipped" if event.skipped else ""
            named = ", ".join(f"{name.replace('_', ' ')} {part:.3f}" for name, part in event.parts.items())
            parts = f"({named})  " if named else ""
            note(
                f"step {count(event.step)}/{count(event.total_steps)}  epoch {event.epoch}  "
                f"loss {event.loss:.4f}  {parts}lr {_rates(event)}  "
                f"grad {event.gradient_norm:.2f}  {count(event.tokens / max(event.seconds, 1e-9))} tok/s  "
                f"ETA {eta}{skipped}"
            )
        elif isinstance(event, events.Sampled):
            for prompt, text in event.texts.items():
                note(f"sample: {prompt + text!r}")


class LiveTrainingView(TrainingView):
    """Shows a run as a panel redrawn in place: progress with ETA, loss curve, validation by domain."""

    def __init__(self) -> None:
        self._bar = ProgressBars(*progress_columns(), console=err)
        super().__init__(self._bar)
        self._task: TaskID | None = None
        self._losses: list[float] = []
        self._step: Any = None
        self._validation: Any = None
        self._sample: tuple[str, str] | None = None
        self._live = Live(console=err, get_renderable=self._render, refresh_per_second=4, transient=True)

    def __enter__(self) -> LiveTrainingView:
        self._live.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._live.__exit__(*exception)

    def event(self, event: object) -> None:
        from nanothink.training import events

        super().event(event)
        if isinstance(event, events.RunStarted):
            self._task = self._bar.add_task(
                event.name, total=event.total_steps, completed=event.step, eta=self.remaining
            )
        elif isinstance(event, events.StepDone):
            self._step = event
            if not event.skipped:
                smoothed = event.loss if not self._losses else 0.9 * self._losses[-1] + 0.1 * event.loss
                self._losses.append(smoothed)
            if self._task is not None:
                self._bar.update(self._task, completed=event.step)
        elif isinstance(event, events.Evaluated):
            self._validation = event
        elif isinstance(event, events.Sampled) and event.texts:
            self._sample = next(iter(event.texts.items()))

    def _render(self) -> RenderableType:
        parts: list[RenderableType] = [self._bar]
        step = self._step
        if step is not None:
            facts = Table.grid(padding=(0, 2))
            numbers = {
                "step": f"{count(step.step)}/{count(step.total_steps)}",
                "whole epochs": f"{step.epoch} of {self._started.epochs}",
                "loss": f"{self._losses[-1]:.4f}" if self._losses else "-",
                "gradient norm": f"{step.gradient_norm:.2f}",
                "tokens/s": count(step.tokens / max(step.seconds, 1e-9)),
            }
            facts.add_row(*(Text(name, style="dim") for name in numbers))
            facts.add_row(*(Text(value, style="bold") for value in numbers.values()))
            parts.append(facts)
            parts.append(Text.assemble(("learning rates  ", "dim"), _rates(step)))
            curve = Text("loss  ", style="dim")
            curve.append(sparkline(self._losses, min(60, err.width - 12)), style="cyan")
            parts.append(curve)
        if (latest := self._validation) is not None:
            scores = {**latest.evaluation.domains, "all": latest.evaluation.overall}
            number = "bold green" if latest.best else "bold"
            by_domain = [
                Text.assemble((f"{name} ", "dim"), (f"{score.bits_per_byte:.4f}", number))
                for name, score in scores.items()
            ]
            parts.append(Text(f"bits per byte at step {count(latest.step)}", style="dim"))
            parts.append(Columns(by_domain, padding=(0, 2)))
        if self._sample is not None:
            prompt, text = self._sample
            shown = " ".join((prompt + text).split())[: max(20, err.width - 4)]
            parts.append(Text(shown, style="italic dim", overflow="ellipsis", no_wrap=True))
        return Group(*parts)


@contextmanager
def training_view() -> Iterator[PlainTrainingView | LiveTrainingView]:
    if not redraws():
        yield PlainTrainingView()
        return
    with LiveTrainingView() as view:
        yield view
