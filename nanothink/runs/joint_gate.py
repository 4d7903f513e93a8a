"""Phase 2 on held-out text, and the joint gate that every run ends with.

A part of the validation text is set aside to fit on, and what is fitted is only kept if the rest says so. So
phase 2 is never worse than the ensemble that it starts from, which the loop has evaluated and saved first.

Where no document can be set aside, the gate is the usual one, whose weights are from other text, and the
experts' weights are fitted on the validation text itself, as calibration is: a number for each expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from nanothink.checkpoints import CheckpointStore, read_checkpoint
from nanothink.checkpoints.restore import model_state, restore_model
from nanothink.config import TrainMLAConfig
from nanothink.data.tokens import TokenStream
from nanothink.inference.calibration import expert_fit_text, fit_scales
from nanothink.inference.evaluate import Evaluation, evaluate_model
from nanothink.inference.gated import Reading, evaluate_gated
from nanothink.inference.generate import evaluating
from nanothink.models.contract import LanguageModel
from nanothink.models.joint_gate import memory_names
from nanothink.models.nanothink import NanoThink
from nanothink.reporter import Reporter
from nanothink.runs.preparing import RunSetup
from nanothink.suggestions import again
from nanothink.training.distributed import ALONE, Processes
from nanothink.training.gate_fitting import (
    FEW_TOKENS,
    FIT_TOKENS,
    fit_joint_gate,
    unigram_log_frequencies,
)
from nanothink.training.loop import Run
from nanothink.training.sharding import give_memory, without_memory
from nanothink.wording import counted

_COMPARED_TOKENS = 16_384
"""Of training text and of held-out text, to see whether the experts know one better than the other."""

_KNOWN_BETTER = 0.03
"""By which fraction the loss on training text must be lower: at one pass over ample text it is not."""

_FEWEST = 200
"""Tokens: fewer are not set aside."""

_EVIDENCE = 2.0
"""Nats by which fitted weights must make the held-out text likelier than equal ones do."""


def settle_fit(setup: RunSetup, reporter: Reporter, processes: Processes = ALONE) -> RunSetup:
    """The setup with ``train_mla.fit`` decided; in gate mode without steps, and without MLA layers."""
    training = setup.training
    if not isinstance(training, TrainMLAConfig):
        return setup
    fit = training.fit
    if fit == "auto" and training.max_steps is not None:
        fit = "full"  # steps were asked for
    if fit == "auto":
        own = _known_better(setup, reporter) if processes.is_rank0 else 0.0
        gap = processes.all_reduce_sum([own])[0]
        fit = "gate" if gap > _KNOWN_BETTER else "full"
        why = (
            "too little text to train more on. Their weights are fitted on held-out text instead; to train "
            f"all the same: {again('--set', 'train_mla.fit=full', '--overwrite')}"
            if fit == "gate"
            else "enough text to train on"
        )
        reporter.note(
            f"train_mla.fit=auto takes '{fit}': the experts' loss is {100 * gap:.1f} % lower on their "
            f"training text than on held-out text, so that is {why}."
        )
    if fit == "full":
        return _with_fit(setup, fit)
    layers = {} if setup.resume_point is not None else {"n_layers": 0}
    setup = _with_fit(setup, fit)
    mla = setup.config.mla.model_copy(update=layers)
    config = setup.config.model_copy(update={"mla": mla})
    return replace(setup, config=config, plan=replace(setup.plan, total_steps=setup.state.step))


def _with_fit(setup: RunSetup, fit: str) -> RunSetup:
    settled = setup.config.train_mla.model_copy(update={"fit": fit})
    return replace(setup, config=setup.config.model_copy(update={"train_mla": settled}))


def _known_better(setup: RunSetup, reporter: Reporter) -> float:
    """By which fraction the experts' mean loss on training text is below that on held-out text."""
    sides = (setup.tokens.train, setup.tokens.val)
    sums = [0.0, 0.0]
    for expert in setup.parts.values():
        model = expert.build(setup.precision.device)[0].to(setup.precision.device)
        length = expert.config.model.max_seq_len
        for side, streams in enumerate(sides):
            sample = {d: s.sample(_COMPARED_TOKENS // len(streams)) for d, s in streams.items()}
            stage = f"{expert.kind} on {('training', 'held-out')[side]} text"
            sums[side] += _score(model, sample, setup, length, reporter, stage).overall.loss
    return 1 - sums[0] / sums[1] if sums[1] else 0.0


def _score(
    model: LanguageModel,
    streams: Mapping[str, TokenStream],
    setup: RunSetup,
    length: int,
    reporter: Reporter,
    stage: str,
) -> Evaluation:
    return evaluate_model(
        model,
        streams,
        length=length,
        batch_size=max(1, 8192 // length),
        precision=setup.precision,
        reporter=reporter,
        stage=stage,
    )


@dataclass(frozen=True)
class _Text:
    """The validation text: a part to fit on, and the rest, which decides."""

    to_fit: Mapping[str, TokenStream]
    rest: Mapping[str, TokenStream]

    @classmethod
    def of(cls, streams: Mapping[str, TokenStream], max_tokens: int | None) -> _Text:
        """Divide ``streams``; of the rest a sample of at most ``max_tokens`` of each domain."""
        total = sum(stream.n_tokens for stream in streams.values())
        to_fit = {
            name: stream.part_to_fit(FIT_TOKENS * stream.n_tokens // max(1, total))
            for name, stream in streams.items()
        }
        if sum(part.n_tokens for part in to_fit.values()) < _FEWEST:
            to_fit = {name: stream.part_to_fit(0) for name, stream in streams.items()}
        rest = {name: stream.without(to_fit[name].documents().keys) for name, stream in streams.items()}
        return cls(to_fit, {name: stream.sample(max_tokens) for name, stream in rest.items()})

    @property
    def keys(self) -> list[int]:
        found = [stream.documents().keys for stream in self.to_fit.values()]
        return [int(key) for key in np.concatenate(found)]

    @property
    def n_tokens(self) -> int:
        return sum(stream.n_tokens for stream in self.to_fit.values())


def finish_best(setup: RunSetup, run: Run, store: CheckpointStore, reporter: Reporter) -> Evaluation | None:
    """Fit what is fitted on held-out text to the best model, and write its checkpoint again.

    In gate mode returns the score of the result on the held-out text that nothing was fitted on, and the
    checkpoint's best loss is that one: no loss of training describes it.

    The result is a function of the best checkpoint and the data: a run that is killed here does it again.

    Args:
        reporter: receives what was found.
    """
    best = store.best
    payload = read_checkpoint(best, mmap=True)  # moments stay on the disk
    model = run.model
    if run.processes.size > 1:  # this process has a part of it
        with without_memory():
            model = setup.new_model()
        give_memory(model, setup.precision.device)
        if isinstance(model, NanoThink) and isinstance(run.model, NanoThink):
            model.vector_store = run.model.vector_store
    restore_model(model, payload, expect_kind=model.kind, path=best)
    training = setup.training
    text = _Text.of(setup.tokens.val, training.eval_max_tokens)
    in_gate_mode = isinstance(training, TrainMLAConfig) and training.fit == "gate"
    if in_gate_mode and isinstance(model, NanoThink):
        _fit_weights(model, setup, text, reporter)
    _fit_gate(model, setup, text, reporter)
    fitted = None
    if in_gate_mode:
        fitted = _score(
            model, text.rest, setup, setup.config.model.max_seq_len, reporter, "validating as fitted"
        )
        payload["best_loss"] = fitted.overall.loss
    state = {**payload["run"], "logit_scale": model.logit_scale, "gate_documents": text.keys}
    store.write(best, {**payload, "model_state": model_state(model), "run": state})
    return fitted


def _fit_weights(model: NanoThink, setup: RunSetup, text: _Text, reporter: Reporter) -> None:
    """One weight for each expert, and the scale of the product.

    They are kept if they make the text that decides likelier by ``_EVIDENCE``; if that is the text they were
    fitted on, by a nat more for each weight beside the first, which chance gives (Akaike 1974).
    """
    apart = text.n_tokens > 0
    if len(model.names) == 1 and not apart:
        return  # calibration has fitted its scale
    to_fit, needed = (text.to_fit, _EVIDENCE) if apart else (text.rest, _EVIDENCE + len(model.names) - 1)
    length = setup.config.model.max_seq_len
    before = _score(model, text.rest, setup, length, reporter, "validating with equal weights").overall
    with evaluating(model), torch.inference_mode():
        states, targets = expert_fit_text(
            model, to_fit, length=length, precision=setup.precision, reporter=reporter
        )
        with setup.precision.autocast():
            found = fit_scales(states, targets, model.expert_heads(), model.expert_scales(), reporter)
    earlier = (model.router.bias.detach().clone(), model.log_scale.detach().clone(), model.logit_scale)
    model.set_expert_scales(found)
    model.logit_scale = 1.0
    after = _score(model, text.rest, setup, length, reporter, "validating with fitted weights").overall
    if before.nats - after.nats > needed:
        weights = ", ".join(f"{n} {a / sum(found):.2f}" for n, a in zip(model.names, found, strict=True))
        n_tokens = sum(stream.n_tokens for stream in to_fit.values())
        reporter.note(
            f"Weights fitted on {counted(n_tokens, 'held-out token')}: {weights}; scale {sum(found):.2f}. "
            f"Bits per byte on {'the rest' if apart else 'these'} {before.bits_per_byte:.4f} → "
            f"{after.bits_per_byte:.4f}. The model is saved with them."
        )
        return
    with torch.no_grad():
        model.router.bias.copy_(earlier[0])
        model.log_scale.copy_(earlier[1])
    model.logit_scale = earlier[2]
    reporter.note(
        f"Equal weights are kept: fitted ones give {after.bits_per_byte:.4f} bits per byte, equal ones "
        f"{before.bits_per_byte:.4f}{'' if after.loss > before.loss else ', which may be chance'}."
    )


def _fit_gate(model: LanguageModel, setup: RunSetup, text: _Text, reporter: Reporter) -> None:
    """The joint gate over the model, its vector store if it has one, and the document cache."""
    cache, length = setup.config.document_cache, setup.config.model.max_seq_len
    if not cache.fit_steps:
        return
    reading = Reading(length, setup.precision, cache.window_tokens, cache.n_neighbours)
    own = setup.training.batch_size * length  # more tokens at a time would take more memory than training
    reading = replace(reading, batch_tokens=min(own, reading.batch_tokens))
    stored = isinstance(model, NanoThink) and model.vector_store is not None
    few = sum(stream.n_targets for stream in text.to_fit.values()) < FEW_TOKENS
    names = memory_names(stored, 1 if few else len(model.expert_names))
    unigram = unigram_log_frequencies(setup.tokens.train, model.vocab_size).to(setup.precision.device)
    checked = stored or few
    if checked:
        before = _score(model, text.rest, setup, length, reporter, "validating before the joint gate").overall
    fitting: Any = {"steps": cache.fit_steps, "seed": setup.training.seed, "reporter": reporter}
    gate = fit_joint_gate(model, text.to_fit, names, unigram, reading, **fitting)
    model.joint_gate = gate.to(setup.precision.device)
    gate_of = "Joint gate" if stored else "Gate of the document cache"
    how = f"{gate_of} fitted on {counted(text.n_tokens, 'held-out token')}"
    if not text.n_tokens:
        how = (
            f"{gate_of} with its usual weights, since no held-out document can be set aside to fit others on"
        )
    use = "it is used with eval --document-cache and generate --document-cache"
    if not checked:
        reporter.note(f"{how}; {use}.")
        return
    told: Any = {"reporter": reporter, "stage": "validating with the document cache"}
    after = cached = evaluate_gated(model, text.rest, reading, **told).overall
    figures = f"Bits per byte on {'the rest' if text.n_tokens else 'the held-out text'}"
    if stored:
        told["stage"] = "validating with the joint gate"
        after = evaluate_gated(model, text.rest, reading, with_cache=False, **told).overall
        figures += (
            f", with the vector store: {before.bits_per_byte:.4f} → {after.bits_per_byte:.4f}; with the "
            f"document cache too {cached.bits_per_byte:.4f}."
        )
    else:
        figures += f": {before.bits_per_byte:.4f} → {cached.bits_per_byte:.4f}."
    if after.loss <= before.loss:
        reporter.note(f"{how}. {figures} The model is saved with it{'' if stored else '; ' + use}.")
        return
    better = "the gate that was trained with the vector store does better"
    if cached.loss < before.loss:
        model.joint_gate = model.joint_gate.for_cache_alone()
        reporter.note(f"{how}. {figures} It is used with a document cache alone: without one {better}.")
        return
    model.joint_gate = None
    without = better if stored else "it has no document cache"
    reporter.note(f"{how}. {figures} The model is saved without it: {without}.")
