"""A run on a tiny real model, for tests of the loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from reports import Told

from nanothink.config import Config, TrainExpertConfig
from nanothink.config.run import resolve_config
from nanothink.data.tokens import IGNORE
from nanothink.inference.evaluate import Evaluation, Score
from nanothink.models import build_model
from nanothink.models.precision import Precision
from nanothink.training.events import RunFinished, StepDone
from nanothink.training.interruption import StopRequest
from nanothink.training.loop import Callbacks, Run, train
from nanothink.training.objectives import next_token
from nanothink.training.optimizer import GroupedOptimizer
from nanothink.training.state import Plan, TrainState

VOCABULARY, LENGTH = 17, 8


class Blocks:
    """Blocks whose content depends on their position alone; some targets are ignored."""

    def __init__(self, period: int = 1 << 30) -> None:
        self.period = period

    def read(self, start: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows = []
        for position in range(start, start + count):
            generator = torch.Generator().manual_seed(position % self.period)
            rows.append(torch.randint(0, VOCABULARY, (LENGTH + 1,), generator=generator))
        blocks = torch.stack(rows)
        targets = blocks[:, 1:].clone()
        targets[torch.arange(start, start + count) % 3 == 0, LENGTH // 2 :] = IGNORE
        return blocks[:, :-1].contiguous(), targets


class Harness:
    """A run on a tiny real model, everything that it reports and saves kept in lists."""

    def __init__(
        self,
        *,
        validation: list[float] | None = None,
        n_blocks: int = 8,
        period: int = 1 << 30,
        **settings: Any,
    ) -> None:
        settings = {
            "batch_size": 2,
            "max_epochs": 3,
            "warmup_steps": 0,
            "sample_tokens": 0,
            "log_every_steps": 1,
        } | settings
        self.config = TrainExpertConfig(**settings)
        config: Config = resolve_config(
            assignments=[
                "model.d_model=16",
                "model.max_seq_len=8",
                "transformer.n_layers=1",
                "transformer.n_heads=2",
            ]
        ).config
        torch.manual_seed(0)
        model = build_model("transformer", config, VOCABULARY)
        state = TrainState()
        self.run = Run(
            model=model,
            optimizer=GroupedOptimizer(model.parameter_groups(), self.config),
            scaler=None,
            objective=next_token,
            batches=Blocks(period),
            precision=Precision(torch.device("cpu"), torch.float32, "test"),
            config=self.config,
            plan=Plan.make(self.config, n_blocks, state),
            state=state,
        )
        self.stop = StopRequest()
        self.events: list[Any] = []
        self.notes: list[str] = []
        self.saved: list[tuple[str, int, int]] = []
        self.validation = iter(validation or [])

    def evaluate(self) -> Evaluation:
        return Evaluation({"d": Score(next(self.validation, 1.0), 1, 1)})

    def save(self, role: str) -> Path:
        self.saved.append((role, self.run.state.epoch, self.run.state.step))
        return Path(role)

    def go(self) -> RunFinished:
        callbacks = Callbacks(
            evaluate=lambda: self.evaluate(),
            sample=dict,
            save=self.save,
            reporter=Told(self.notes.append, event=self.events.append),
            stop=self.stop,
        )
        return train(self.run, callbacks)

    @property
    def steps(self) -> list[StepDone]:
        return [e for e in self.events if isinstance(e, StepDone)]

    @property
    def weights(self) -> torch.Tensor:
        return torch.cat([p.detach().flatten() for p in self.run.model.parameters()])
