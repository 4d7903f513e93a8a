"""Speed of this machine at the shapes of a training plan, measured on random tokens."""

from __future__ import annotations

import torch

from nanothink.config.run import resolve_config
from nanothink.models import EXPERTS, build_model, training_of
from nanothink.models.contract import Expert
from nanothink.models.precision import choose_device
from nanothink.reporter import SILENT, Reporter
from nanothink.runs.plan_sizes import Shape, StepTime
from nanothink.runs.planning import shape_settings
from nanothink.runs.scoring import BATCH_TOKENS
from nanothink.runs.timing import seconds_of, time_step
from nanothink.training.loop import Run
from nanothink.training.matmul_types import choose_precision
from nanothink.training.objectives import ExpertObjective
from nanothink.training.optimizer import GroupedOptimizer
from nanothink.training.state import Plan, TrainState

_LEAST_SECONDS = 1.0


class MachineSpeed:
    """Times of training and scoring, measured at each call on random tokens.

    Args:
        device: as ``--device``; None for the best there is.
    """

    def __init__(self, device: str | None = None, reporter: Reporter = SILENT) -> None:
        self._device, self._reporter = choose_device(device), reporter

    def __call__(self, kind: str, shape: Shape, vocab_size: int) -> StepTime:
        stage = f"timing a {kind.replace('_', '-')} model of width {shape.d_model}"
        self._reporter.progress(stage, 0, 1)
        settings = {name: ("plan", value) for name, value in shape_settings(shape).items()}
        config, _ = EXPERTS[kind].model().settle(resolve_config(flags=settings).config, self._device)
        training = training_of(kind, config)
        precision = choose_precision(training, config.model, self._device)
        torch.manual_seed(0)
        blocks = _RandomBlocks(vocab_size, shape.length)
        model = build_model(kind, config, vocab_size)
        assert isinstance(model, Expert)
        if (base := model.base(config)) is not None:
            model.adopt(build_model(base.kind, config, vocab_size), blocks.read(0, 1)[1])
        training = training.model_copy(update=precision.settled)
        run = Run(
            model=model.to(self._device),
            optimizer=GroupedOptimizer(model.parameter_groups(), training),
            scaler=None,
            objective=ExpertObjective(training.seed),
            batches=blocks,
            precision=precision,
            config=training,
            plan=Plan(shape.batch_size, shape.batch_size, 1),
            state=TrainState(),
        )
        step_seconds = time_step(run, shape.batch_size, _LEAST_SECONDS)
        inputs, targets = (t.to(self._device) for t in blocks.read(0, max(1, BATCH_TOKENS // shape.length)))

        def scored() -> object:
            with torch.inference_mode(), precision.autocast():
                return model.eval().log_likelihood(inputs, targets)

        scored()
        token_seconds = seconds_of(scored, self._device) / inputs.numel()
        self._reporter.progress(stage, 1, 1)
        return StepTime(step_seconds=step_seconds, token_seconds=token_seconds)


class _RandomBlocks:
    def __init__(self, vocab_size: int, length: int) -> None:
        self._vocab_size, self._length = vocab_size, length

    def read(self, start: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(start)
        tokens = torch.randint(self._vocab_size, (count, self._length + 1), generator=generator)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
