"""Advice before a run that takes more than an hour on a CPU: a smaller preset, and its time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from nanothink.config.run import ResolvedConfig, preset_names, resolve_config, with_preset
from nanothink.errors import ConfigError
from nanothink.models import EXPERTS
from nanothink.reporter import Reporter
from nanothink.runs.preparing import Configure, RunSetup, prepare
from nanothink.runs.timing import RunTime, time_run
from nanothink.suggestions import suggest
from nanothink.training.sharding import without_memory
from nanothink.wording import counted, rounded_duration

LONG_SECONDS = 3600

_FASTEST_OF_A_THREAD = 2e11  # floating-point operations a second that no thread reaches in training
_SURELY_SHORT = LONG_SECONDS / 30  # at that speed; at a thirtieth of it the run is still no long one


def warn_of_long_run(setup: RunSetup, configure: Configure, reporter: Reporter) -> None:
    """Time a new run and say how long it takes, if that is long. Runs that are surely short are not timed."""
    if setup.precision.device.type != "cpu" or setup.resume_point is not None:
        return
    with without_memory():  # shapes are enough
        n_parameters = sum(parameter.numel() for parameter in setup.build_model().parameters())
    n_tokens = setup.plan.total_steps * setup.plan.blocks_per_step * setup.config.model.max_seq_len
    fastest = 6 * n_parameters * n_tokens / (_FASTEST_OF_A_THREAD * torch.get_num_threads())
    if fastest > _SURELY_SHORT:
        advise_smaller(setup, time_run(setup, reporter=reporter), configure, reporter)


def advise_smaller(setup: RunSetup, needed: RunTime, configure: Configure, reporter: Reporter) -> None:
    """Note the time of a long run on a CPU, and of a smaller preset where one can be had."""
    if setup.precision.device.type != "cpu" or needed.seconds <= LONG_SECONDS:
        return
    least, how = ("about", "measured just now") if needed.measured else ("at least", "its products alone")
    said = (
        f"This run takes {least} {rounded_duration(needed.seconds)} on this CPU: "
        f"{counted(needed.n_steps, 'step')} of {needed.step_seconds:.3g} s, {how}."
    )
    found = _smaller(setup, configure, reporter)
    if found is not None and found[1] < needed.seconds:  # not so if the machine became busy meanwhile
        preset, seconds = found
        said += (
            f" With a smaller model it takes about {rounded_duration(seconds)}: "
            f"{suggest('pretrain', setup.spec.kind, '--preset', preset, '--overwrite')}."
        )
    else:
        section = setup.training.section
        said += (
            f" Fewer epochs take less (now {section}.max_epochs={setup.training.max_epochs}): --max-epochs N."
        )
    reporter.note(said)


def _smaller(setup: RunSetup, configure: Configure, reporter: Reporter) -> tuple[str, float] | None:
    """The largest smaller preset that takes no long run, else the smallest, with its seconds."""
    spec = setup.spec
    if spec.kind not in EXPERTS or setup.parts:
        return None  # its width is that of other models
    widths = {name: resolve_config(preset=name).config.model.d_model for name in preset_names()}
    smaller = [name for name in widths if widths[name] < setup.config.model.d_model]
    found = None
    for name in sorted(smaller, key=widths.__getitem__, reverse=True):

        def resized(base: Mapping[str, Any] | None, name: str = name) -> ResolvedConfig:
            return with_preset(configure(base), name)

        try:
            other = prepare(replace(spec, resume=None), resized)
        except ConfigError:  # a setting by hand that does not go with it
            continue
        needed = time_run(other, reporter=reporter)
        if not needed.measured:
            continue
        found = name, needed.seconds
        if found[1] <= LONG_SECONDS:
            break
    return found
