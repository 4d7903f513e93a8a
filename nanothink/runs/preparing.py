"""Everything a run needs before its first step, whether it is then run or only estimated."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nanothink.checkpoints import (
    CheckpointPayload,
    SplitRecord,
)
from nanothink.config import Config, TrainConfig
from nanothink.config.run import ResolvedConfig, flatten
from nanothink.data.batches import TrainingBatches
from nanothink.data.corpus import Corpus, find_corpus
from nanothink.data.split import NOTHING, SplitRule, TrainedText
from nanothink.data.tokenizer import Tokenizer, resolve_tokenizer
from nanothink.data.tokens import TokenisedCorpus
from nanothink.errors import (
    CheckpointMismatchError,
    DataError,
    UsageError,
    VectorStoreError,
)
from nanothink.models import COMBINED, ExpertDescription, build_model
from nanothink.models.contract import LanguageModel
from nanothink.models.precision import Precision, choose_device
from nanothink.models.selective_scan import choose_scan
from nanothink.models.store_gate import choose_key_expert
from nanothink.reporter import SILENT, Reporter
from nanothink.runs.experts import (
    FrozenExpert,
    check_same_experts,
    config_for_experts,
    described,
    entries_of,
    find_experts,
)
from nanothink.runs.frozen import FrozenTransformer, check_same_transformer, find_transformer
from nanothink.runs.held_out import InheritedSplit, spelled
from nanothink.runs.rebuilding import rebuild
from nanothink.runs.resuming import ResumePoint, RunSpec, find_start
from nanothink.training.events import RunFinished
from nanothink.training.matmul_types import choose_precision
from nanothink.training.recording import ENDING
from nanothink.training.state import Plan, TrainState
from nanothink.vector_store.store import read_texts, store_folder

Configure = Callable[[Mapping[str, Any] | None], ResolvedConfig]
"""Resolves the settings; takes a checkpoint's settings as their base when a run goes on from one."""


@dataclass(frozen=True)
class RunSetup:
    spec: RunSpec
    config: Config
    sources: Mapping[str, str]
    resume_point: ResumePoint | None
    """None for a new run."""
    corpus: Corpus
    tokenizer: Tokenizer
    tokens: TokenisedCorpus
    split: SplitRecord
    """Rule and trained text, as the checkpoints of this run have them."""
    batches: TrainingBatches
    precision: Precision
    state: TrainState
    plan: Plan
    frozen: FrozenTransformer | None = None
    """The transformer that a diffuser learns from, where this run still needs it."""
    experts: tuple[FrozenExpert, ...] = ()
    """What a combined model starts from; none in a run that goes on, whose checkpoint has them inside."""
    inside: tuple[ExpertDescription, ...] = ()
    """The experts inside a combined model."""
    finds_best_anew: bool = False
    """The best loss of the run so far was measured on other validation text, or in other blocks."""

    @property
    def training(self) -> TrainConfig:
        """How this kind of model is trained."""
        return self.config.training_of(self.spec.kind)

    def build_model(self) -> LanguageModel:
        """A freshly initialised model, into which the weights of ``origin`` are still to be restored."""
        kind, config, vocab_size = self.spec.kind, self.config, self.tokenizer.vocab_size
        if self.resume_point is None:
            return build_model(kind, config, vocab_size, self.inside)
        payload, path = self.resume_point.payload, self.resume_point.path
        return rebuild(kind, config, vocab_size, self.inside, payload=payload, path=path)


def largest_share(setup: RunSetup, n_processes: int) -> int:
    """Blocks of a batch that one of so many processes computes at most.

    Raises UsageError when one would have none.
    """
    batch_size = setup.training.batch_size
    if batch_size < n_processes:
        raise UsageError(
            f"{setup.training.section}.batch_size={batch_size} gives {n_processes} processes less "
            "than one block each. Raise it, or start fewer."
        )
    return -(-batch_size // n_processes)


def prepare(
    spec: RunSpec, configure: Configure, reporter: Reporter = SILENT, types: Mapping[str, str] | None = None
) -> RunSetup:
    """Find the checkpoint to go on from, settle the settings, read and tokenise the data.

    Args:
        types: settings of the types to compute in that another process of the run has chosen.
    """
    resume_point = find_start(spec, reporter)
    payload = resume_point.payload if resume_point is not None else None
    resolved = configure(payload["config"] if payload is not None else None)
    if payload is not None:
        for line in _changes(payload["config"], resolved.config):
            reporter.note(line)
    config = resolved.config
    training = config.training_of(spec.kind).model_copy(update=dict(types or {}))
    device = choose_device(spec.device)
    frozen = frozen_transformer(spec, config, resume_point, reporter)
    experts = experts_to_combine(spec, resolved, resume_point, reporter)
    if experts:
        config = config_for_experts(experts, resolved)
    if resume_point is not None and not Path(config.data.data_dir).is_dir():
        raise DataError(
            f"The folder this run was trained on, {config.data.data_dir}, is not there. "
            "Say where it is now: --data-dir DIR."
        )
    corpus = find_corpus(config.data.data_dir, config.data.domains)
    for warning in corpus.warnings:
        reporter.note(str(warning))
    precision = choose_precision(training, config.model, device)
    reporter.note(f"Computing in {precision.name} on {precision.device}: {precision.reason}.")
    split = _inherited_split(resume_point, frozen, experts, resolved)
    fractions = {"val_split": split.rule.val_split, "test_split": split.rule.test_split}
    if split.rule != SplitRule.of(config.data):
        reporter.note(f"Holding out what {' and '.join(split.trained_by)} held out: {spelled(split.rule)}.")
    config = config.model_copy(update={"data": config.data.model_copy(update=fractions)})
    lender = frozen or (experts[0] if experts else None)
    config = _settled(config, precision, spec.kind, lender, reporter)
    if resume_point is not None:
        tokenizer = _tokenizer_of(resume_point, resolved, corpus)
    elif lender is not None:
        tokenizer = _tokenizer_lent(lender, resolved, corpus)
        named = [f"{e.name} ({e.path})" for e in experts]
        together = " and ".join(part for part in (", ".join(named[:-1]), *named[-1:]) if part)
        what = f"Combining {together}" if experts else f"Learning from {lender.path}"
        reporter.note(f"{what}, with the tokenizer '{tokenizer.name}' of its training.")
    else:
        tokenizer = resolve_tokenizer(
            config.data.tokenizer,
            corpus,
            split=SplitRule.of(config.data),
            skip_bad_records=config.data.skip_bad_records,
            reporter=reporter,
        )
    if spec.kind == COMBINED and config.vector_store.enabled:
        split = replace(split, store=_text_in_store(spec, config, resume_point, experts))
    tokens = split.tokenise(
        corpus,
        tokenizer,
        skip_bad_records=config.data.skip_bad_records,
        reporter=reporter,
    )
    if payload is not None and payload["data_fingerprint"] != tokens.fingerprint:
        reporter.note(
            "The training data is not what this run began with. It goes on with the new data, but will not "
            "equal a run that had either all along."
        )
    batches = TrainingBatches(tokens.train, config.model.max_seq_len, training.seed)
    if resume_point is not None:
        inside = described(resume_point.payload, device, resume_point.path)
    else:
        inside = tuple(expert.describe(device) for expert in experts)
    state = TrainState.from_dict(payload["run"].get("state")) if payload is not None else TrainState()
    state.fit(batches.n_blocks)
    finds_best_anew = (
        payload is not None and state.best_loss is not None and _validates_anew(payload, tokens, config, spec)
    )
    if finds_best_anew:
        state.best_loss, state.evals_without_improvement = None, 0
        reporter.note(
            "The best loss so far was measured on other validation text, or in blocks of another length, so "
            "it counts no more: the next evaluation writes the best checkpoint anew."
        )
    for prompt in training.sample_prompts or ():
        if loss := tokenizer.loss(prompt):
            reporter.note(f"The tokenizer loses a part of a sample prompt: {loss}.")
    return RunSetup(
        spec=spec,
        config=config,
        sources=resolved.sources,
        resume_point=resume_point,
        corpus=corpus,
        tokenizer=tokenizer,
        tokens=tokens,
        split=split.record(tokens),
        batches=batches,
        precision=precision,
        state=state,
        plan=Plan.make(training, batches.n_blocks, state),
        frozen=frozen,
        experts=experts,
        inside=inside,
        finds_best_anew=finds_best_anew,
    )


def _inherited_split(
    resume_point: ResumePoint | None,
    frozen: FrozenTransformer | None,
    experts: Sequence[FrozenExpert],
    resolved: ResolvedConfig,
) -> InheritedSplit:
    """The split of the checkpoint that the run goes on from, else of the models that it builds on."""
    parts: dict[str, SplitRecord] = {}
    for part in (resume_point,) if resume_point is not None else (frozen, *experts):
        if part is not None:
            parts[str(part.path)] = SplitRecord.from_state(part.payload["split"], part.path)
    return InheritedSplit.of(parts, resolved)


def _text_in_store(
    spec: RunSpec, config: Config, resume_point: ResumePoint | None, experts: Sequence[FrozenExpert]
) -> TrainedText:
    """The documents of the vector store that the run will find; none where it will make one."""
    if resume_point is not None:
        entries = entries_of(resume_point.payload["run"], resume_point.path)
        of_experts = {e["name"]: (e["kind"], str(e.get("digest", ""))) for e in entries}
    else:
        of_experts = {e.name: (e.kind, e.digest) for e in experts}
    kinds = {name: kind for name, (kind, _) in of_experts.items()}
    digest = of_experts[choose_key_expert(kinds, config.vector_store.expert)][1]
    try:
        return read_texts(store_folder(spec.checkpoint_dir, spec.stem), digest)
    except VectorStoreError:  # missing, or damaged: whoever opens it says so, or builds it anew
        return NOTHING


def experts_to_combine(
    spec: RunSpec, resolved: ResolvedConfig, resume_point: ResumePoint | None, reporter: Reporter
) -> tuple[FrozenExpert, ...]:
    """The experts that a new NanoThink starts from; none for another kind, or where a run goes on.

    Raises:
        CheckpointError: one is missing or does not fit, or is not the one inside ``origin``.
    """
    if spec.kind != COMBINED:
        return ()
    if resume_point is not None:
        if spec.experts:
            named = find_experts(spec.experts, spec.checkpoint_dir, reporter)
            check_same_experts(named, resume_point.payload["run"], resume_point.path)
        return ()
    experts = find_experts(spec.experts, spec.checkpoint_dir, reporter)
    config_for_experts(experts, resolved)
    return experts


def frozen_transformer(
    spec: RunSpec, config: Config, resume_point: ResumePoint | None, reporter: Reporter
) -> FrozenTransformer | None:
    """The transformer that this run learns from; None for one that needs none (any more).

    A diffuser's checkpoint carries its targets, unless they are hidden states.

    Raises:
        CheckpointError: it is missing, or does not fit.
    """
    if spec.kind != "diffuser":
        return None
    if resume_point is not None and config.diffuser.target != "hidden_state":
        return None
    frozen = find_transformer(config, spec.checkpoint_dir, reporter)
    if resume_point is not None:
        check_same_transformer(frozen, resume_point.payload["run"], resume_point.path)
    return frozen


def earlier_ending(setup: RunSetup) -> RunFinished | None:
    """How this run ended, if nothing is left to do; None if there is.

    A run that stopped early leaves its best epoch behind, from which training could go on. Whether it
    should is decided by whether anything that ends a run was changed since.
    """
    spec = setup.spec
    marker = spec.checkpoint_dir / "runs" / spec.stem / ENDING
    if setup.resume_point is None or spec.store.interrupted.exists() or not marker.exists():
        return None
    try:
        ending: dict[str, Any] = json.loads(marker.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    whole = isinstance(ending, dict) and {"step", "epoch", "reason", "best_loss"} <= ending.keys()
    if not whole or ending.get("settings") != ending_settings(setup.training):
        return None
    return RunFinished(ending["step"], ending["epoch"], ending["reason"], ending["best_loss"], 0.0)


def ending_settings(train: TrainConfig) -> dict[str, Any]:
    return {
        "max_epochs": train.max_epochs,
        "max_steps": train.max_steps,
        "early_stopping_patience": train.early_stopping_patience,
    }


def _changes(before: Mapping[str, Any], config: Config) -> list[str]:
    """What differs from the settings the run began with, and what that does to the schedule."""
    old = {f"{section}.{key}": value for section, values in before.items() for key, value in values.items()}
    lines = [
        f"Changed since this run began: {name} was {old[name]!r}, now {value!r}."
        for name, value in flatten(config).items()
        if name in old and old[name] != value and name != "data.data_dir"
    ]
    bending = ("max_epochs", "max_steps", "batch_size", "grad_accum_steps", "warmup_steps", "schedule", "lr")
    if any(f".{name} " in line for name in bending for line in lines):
        lines.append(
            "The learning rate is a function of the step and of the run's length: from here on it follows "
            "the new settings, so the result will not equal a run that had them from the start."
        )
    return lines


def _validates_anew(
    payload: CheckpointPayload, tokens: TokenisedCorpus, config: Config, spec: RunSpec
) -> bool:
    """Whether losses from here on are of other text than those before, or of tokens with more or less before
    them, and cannot be compared with them."""
    training = config.training_of(spec.kind)
    before, model = (payload["config"].get(section, {}) for section in (training.section, "model"))
    capped_alike = before.get("eval_max_tokens", training.eval_max_tokens) == training.eval_max_tokens
    cut_alike = model.get("max_seq_len", config.model.max_seq_len) == config.model.max_seq_len
    return payload["data_fingerprint"] != tokens.fingerprint or not (capped_alike and cut_alike)


def _tokenizer_of(resume_point: ResumePoint, resolved: ResolvedConfig, corpus: Corpus) -> Tokenizer:
    """The tokenizer inside the checkpoint; another one asked for by hand is refused, not swapped in."""
    own = Tokenizer.from_state(resume_point.payload["tokenizer"])
    if resolved.config.data.tokenizer != resume_point.payload["config"].get("data", {}).get("tokenizer"):
        data = resolved.config.data
        asked = resolve_tokenizer(data.tokenizer, corpus, split=SplitRule.of(data))
        if asked.fingerprint != own.fingerprint:
            raise CheckpointMismatchError(
                f"{resume_point.path} was trained with the tokenizer '{own.name}' ({own.vocab_size} tokens), "
                f"not with '{asked.name}' ({asked.vocab_size}). Leave --tokenizer out: the checkpoint "
                "carries its own."
            )
    return own


def _tokenizer_lent(
    lender: FrozenTransformer | FrozenExpert, resolved: ResolvedConfig, corpus: Corpus
) -> Tokenizer:
    """The tokenizer of the frozen model that this one builds on; another one asked for is refused."""
    data = resolved.config.data
    asked_for = resolved.sources["data.tokenizer"] != "default"
    if asked_for and data.tokenizer != lender.tokenizer_setting:
        asked = resolve_tokenizer(data.tokenizer, corpus, split=SplitRule.of(data))
        if asked.fingerprint != lender.tokenizer.fingerprint:
            kind = lender.payload["kind"]
            raise CheckpointMismatchError(
                f"{lender.path} was trained with the tokenizer '{lender.tokenizer.name}' "
                f"({lender.tokenizer.vocab_size} tokens), not with '{asked.name}' ({asked.vocab_size}). "
                f"Leave --tokenizer out: the {kind}'s own is used. Or train a {kind} with this one: "
                f"nanothink pretrain {kind} --tokenizer {data.tokenizer} --name OTHER"
            )
    return lender.tokenizer


def _settled(
    config: Config,
    precision: Precision,
    kind: str,
    lender: FrozenTransformer | FrozenExpert | None,
    reporter: Reporter,
) -> Config:
    """The config as it is saved: what was measured, relative or left to this machine is now fixed."""
    train = config.training_of(kind)
    data = config.data.model_copy(update={"data_dir": str(Path(config.data.data_dir).resolve())})
    settled: dict[str, Any] = {train.section: train.model_copy(update=precision.settled)}
    if kind == "state_space":
        scan = choose_scan(precision.device.type, config.state_space.scan)
        reporter.note(f"Selective scan: {scan.name} ({scan.reason}).")
        settled["state_space"] = config.state_space.model_copy(update={"scan": scan.name})
    if lender is not None:
        data = data.model_copy(update={"tokenizer": lender.tokenizer_setting})
        if kind == "diffuser" and config.diffuser.transformer is not None:
            named = str(Path(config.diffuser.transformer).resolve())
            settled["diffuser"] = config.diffuser.model_copy(update={"transformer": named})
    return config.model_copy(update={**settled, "data": data})
