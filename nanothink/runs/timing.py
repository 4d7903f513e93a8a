"""Duration of a run, from a few of its own steps on this machine.

The steps are real ones, of the run's model, types and blocks, on weights that are thrown away. Where a whole
step would take too long it is extrapolated from two smaller ones: a step costs a part that does not depend on
the batch (Muon's products), and a part for each block.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from nanothink.inference.calibration import FIT_TOKENS
from nanothink.inference.evaluate import evaluate_model
from nanothink.models import COMBINED
from nanothink.models.contract import LanguageModel
from nanothink.models.nanothink import NanoThink
from nanothink.models.precision import Precision
from nanothink.reporter import SILENT, Reporter
from nanothink.runs.building import blocks_ahead, build_run, store_of_run
from nanothink.runs.callbacks import make_callbacks
from nanothink.runs.memory import ModelSizes, device_bytes
from nanothink.runs.preparing import RunSetup, largest_share
from nanothink.runs.scoring import BATCH_TOKENS
from nanothink.runs.teacher import TEACHER
from nanothink.training.interruption import StopRequest
from nanothink.training.loop import Run, take_step
from nanothink.training.sharding import without_memory

_STEP_SECONDS = 3.0
"""Longest step that is measured whole."""
_ROUNDS = 3
_EVALUATION_SECONDS = 2.0
_BLOCK_SECONDS = 4.0
"""Longest time of a block's products whose step is measured; Muon's and the rest take several times that."""
_PRODUCTS_A_STEP = 3  # a weight and token: forward, and for both gradients
_SIDE = 1024  # of the product that a machine's speed is told from


@dataclass(frozen=True)
class RunTime:
    """Measured on this machine, at its present load; or computed, see ``_least_time``."""

    step_seconds: float
    evaluation_seconds: float
    """One evaluation of the validation text, with calibration and samples."""
    n_steps: int
    """Steps that are left to take."""
    n_evaluations: int
    store_seconds: float
    """Building the vector store and looking up the neighbours of the training text."""
    targets_seconds: float = 0.0
    """Making what is missing of a teacher's predictions, by its speed on a few blocks."""
    left_out: tuple[str, ...] = ("saving", "what is fitted on held-out text at the end")
    """Parts of the run that the estimate does not include."""
    measured: bool = True

    @property
    def seconds(self) -> float:
        """Estimate of the whole run."""
        evaluating = self.n_evaluations * self.evaluation_seconds
        return self.n_steps * self.step_seconds + evaluating + self.store_seconds + self.targets_seconds


def time_run(setup: RunSetup, n_processes: int = 1, reporter: Reporter = SILENT) -> RunTime:
    """Take a few steps of the run and evaluate a sample; writes nothing but caches.

    A vector store is not built for it, and the experts' states are not kept: later epochs may be faster.
    Where a step of one block does not fit one process, or takes long, the time is computed: a lower bound.
    """
    with without_memory():  # shapes are enough
        model = setup.build_model()
    if not _can_be_timed(setup, model):
        return _least_time(setup, model, n_processes)
    stage, n_stages = "timing a few steps", 3
    reporter.progress(stage, 0, n_stages)
    run = build_run(_without_disk(setup))
    length = setup.config.model.max_seq_len
    n_steps, n_evaluations = _left(setup)
    share = largest_share(setup, n_processes)
    step_seconds = time_step(run, share) if n_steps else 0.0
    reporter.progress(stage, 1, n_stages)
    per_token = step_seconds / (share * run.config.grad_accum_steps * length)
    evaluation_seconds = _time_evaluation(setup, run, per_token)
    reporter.progress(stage, 2, n_stages)
    store_seconds = 0.0
    if isinstance(run.model, NanoThink) and setup.config.vector_store.enabled:
        looked_up = length * sum(1 for _ in blocks_ahead(setup))
        store_seconds = store_of_run(setup, run.model).seconds(setup.tokens, looked_up)
    reporter.progress(stage, n_stages, n_stages)
    return RunTime(step_seconds, evaluation_seconds, n_steps, n_evaluations, store_seconds)


def _left(setup: RunSetup) -> tuple[int, int]:
    """Steps and evaluations that are left."""
    n_steps = max(0, setup.plan.total_steps - setup.state.step)
    n_evaluations = setup.plan.n_evaluations(setup.training.eval_every_steps, setup.state)
    first = setup.spec.kind == COMBINED and setup.state.evaluated_step < 0
    return n_steps, n_evaluations + first


def _can_be_timed(setup: RunSetup, model: LanguageModel) -> bool:
    length, precision = setup.config.model.max_seq_len, setup.precision
    activations = model.activation_bytes(1, length, precision.dtype.itemsize)
    needed = sum(ModelSizes.of(model, setup.training).memory(1, "none", 1, activations).values())
    available = device_bytes(precision.device, 1)
    if available and needed > available:
        return False
    block = _PRODUCTS_A_STEP * _n_weights(model) * length
    return block * _product_seconds(precision) <= _BLOCK_SECONDS


def _least_time(setup: RunSetup, model: LanguageModel, n_processes: int) -> RunTime:
    """Duration of a run's matrix products, at the speed of one of ``_SIDE`` here.

    A weight and token take three multiplications and additions in a step and one in an evaluation (Kaplan et
    al. 2020, "Scaling laws for neural language models", section 2.1).
    """
    a_token = _n_weights(model) * _product_seconds(setup.precision)
    blocks = largest_share(setup, n_processes) * setup.training.grad_accum_steps
    validated = sum(s.sample(setup.training.eval_max_tokens).n_tokens for s in setup.tokens.val.values())
    return RunTime(
        _PRODUCTS_A_STEP * a_token * blocks * setup.config.model.max_seq_len,
        a_token * validated,
        *_left(setup),
        store_seconds=0.0,
        measured=False,
    )


def _n_weights(model: LanguageModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _product_seconds(precision: Precision) -> float:
    """Seconds for a multiplication and an addition, as part of a matrix product."""
    a, b = (torch.ones(_SIDE, _SIDE, dtype=precision.dtype, device=precision.device) for _ in range(2))
    return min(seconds_of(lambda: a @ b, precision.device) for _ in range(_ROUNDS)) / _SIDE**3


def time_step(run: Run, share: int, least_seconds: float = 0.0) -> float:
    """Median seconds of an optimizer step of ``share`` blocks in each of its forward passes.

    The first step of every size is not counted: it builds and allocates. Weights of ``run`` change.

    Args:
        least_seconds: how long steps are taken at least; a busy machine is slow for a moment, then is not.
    """
    accumulated = run.config.grad_accum_steps

    def seconds(n_blocks: int, passes: int = 1, rounds: int = _ROUNDS) -> float:
        config = run.config.model_copy(update={"batch_size": n_blocks, "grad_accum_steps": passes})
        part = replace(run, config=config)
        take_step(part)
        taken: list[float] = []
        while len(taken) < rounds or (n_blocks == share and sum(taken) < least_seconds):
            taken.append(seconds_of(lambda: take_step(part), run.precision.device))
        return statistics.median(taken)

    one = seconds(1)
    if one * share * accumulated <= _STEP_SECONDS:
        return seconds(share, accumulated)
    larger = min(share, max(2, int(_STEP_SECONDS / one)))
    if larger == 1:
        return one * accumulated
    several = seconds(larger, rounds=1)
    of_block = max(0.0, several - one) / (larger - 1)
    return several + of_block * (share * accumulated - larger)


def _time_evaluation(setup: RunSetup, run: Run, step_seconds_per_token: float) -> float:
    """Seconds of one evaluation, from a sample of the validation text.

    Calibration and a diffuser's errors by noise level have a sample of fixed size in every evaluation.
    """
    whole = {name: s.sample(run.config.eval_max_tokens) for name, s in setup.tokens.val.items()}
    n_whole = sum(stream.n_tokens for stream in whole.values())
    wanted = int(_EVALUATION_SECONDS / step_seconds_per_token) if step_seconds_per_token else FIT_TOKENS
    share = min(FIT_TOKENS, max(512, wanted)) / max(1, n_whole)
    sample = {name: s.sample(int(share * s.n_tokens)) for name, s in whole.items()} if share < 1 else whole
    n_sample = sum(stream.n_tokens for stream in sample.values())
    smaller = replace(setup, tokens=replace(setup.tokens, val=sample))
    callbacks = make_callbacks(smaller, run, setup.spec.store, SILENT, StopRequest())
    device = run.precision.device

    def scored() -> object:
        length = setup.config.model.max_seq_len
        return evaluate_model(
            run.model,
            sample,
            length=length,
            batch_size=max(1, BATCH_TOKENS // length),
            precision=run.precision,
        )

    scored()  # the first one builds and allocates
    scoring = seconds_of(scored, device)
    calibrating = max(0.0, seconds_of(callbacks.evaluate, device) - scoring)
    sampling = seconds_of(callbacks.sample, device) if run.config.sample_tokens else 0.0
    calibrated = min(n_whole, FIT_TOKENS) / n_sample
    return scoring * n_whole / n_sample + calibrating * max(1.0, calibrated) + sampling


def _without_disk(setup: RunSetup) -> RunSetup:
    """The same run without what is kept on the disk for it: vector store, experts' states, a teacher's
    predictions."""
    config = setup.config
    if setup.spec.kind == COMBINED:
        memoryless: dict[str, Any] = {
            "vector_store": config.vector_store.model_copy(update={"enabled": False}),
            "train_mla": config.train_mla.model_copy(update={"states_disk_gb": 0.0}),
        }
        config = config.model_copy(update=memoryless)
    parts = {name: part for name, part in setup.parts.items() if name != TEACHER}
    return replace(setup, config=config, parts=parts)


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Duration of a call, with what it has left a device to do."""
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
