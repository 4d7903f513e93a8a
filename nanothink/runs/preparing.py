"""Preparation of a run, to train it or to estimate it: checkpoint, settings, data, tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nanothink.checkpoints import CheckpointPayload
from nanothink.checkpoints.split_record import SplitRecord
from nanothink.config import Config, TrainConfig
from nanothink.config.run import ResolvedConfig, flatten
from nanothink.data.batches import TrainingBatches
from nanothink.data.chat import PLAIN
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
from nanothink.models import COMBINED, EXPERTS, ExpertDescription, build_model, training_of
from nanothink.models.contract import LanguageModel
from nanothink.models.precision import Precision, choose_device
from nanothink.reporter import SILENT, Reporter
from nanothink.runs.experts import as_entries, config_for_experts
from nanothink.runs.inherited_split import InheritedSplit, spelled
from nanothink.runs.initial import INITIAL, check_same_adapters, config_of_initial, with_adapters
from nanothink.runs.parts import find_parts
from nanothink.runs.rebuilding import rebuild
from nanothink.runs.regularising import fit_to_text
from nanothink.runs.resuming import ResumePoint, RunSpec, find_start
from nanothink.runs.saved_model import SavedModel, expert_entries, experts_inside
from nanothink.runs.teacher import TEACHER, config_of_student, text_in_store
from nanothink.runs.vector_store import key_entry
from nanothink.suggestions import suggest
from nanothink.training.matmul_types import choose_precision
from nanothink.training.state import Plan, TrainState
from nanothink.vector_store.manifest import store_folder
from nanothink.vector_store.store import read_texts

Configure = Callable[[Mapping[str, Any] | None], ResolvedConfig]
"""Resolves the settings; takes a checkpoint's settings as their base when one is resumed."""


@dataclass(frozen=True)
class RunSetup:
    """A run before its first step."""

    spec: RunSpec
    config: Config
    sources: Mapping[str, str]
    resume_point: ResumePoint | None
    """None for a new run."""
    corpus: Corpus
    tokenizer: Tokenizer
    tokens: TokenisedCorpus
    split: SplitRecord
    """Rule of the split and text trained on, as they stand in the checkpoints of this run."""
    batches: TrainingBatches
    precision: Precision
    state: TrainState
    plan: Plan
    parts: Mapping[str, SavedModel] = field(default_factory=dict)
    """The frozen models that this run starts from, by name: see ``find_parts``."""
    inside: tuple[ExpertDescription, ...] = ()
    """The experts inside a combined model."""
    n_written: int = 0
    """Blocks that the teacher writes, beside those of ``batches``."""
    best_is_reset: bool = False
    """Best loss reset: the validation text or the length of the blocks changed."""

    @property
    def training(self) -> TrainConfig:
        """The settings by which this kind of model is trained."""
        return training_of(self.spec.kind, self.config)

    def build_model(self) -> LanguageModel:
        """A freshly initialised model. The weights of ``resume_point`` are not restored yet."""
        kind, config, vocab_size = self.spec.kind, self.config, self.tokenizer.vocab_size
        if self.resume_point is None:
            return self.new_model()
        payload, path = self.resume_point.payload, self.resume_point.path
        model = rebuild(kind, config, vocab_size, self.inside, payload=payload, path=path)
        return with_adapters(model, self.training)

    def new_model(self) -> LanguageModel:
        """A freshly initialised model, whatever the run resumes from."""
        model = build_model(self.spec.kind, self.config, self.tokenizer.vocab_size, self.inside)
        return with_adapters(model, self.training)


def largest_share(setup: RunSetup, n_processes: int) -> int:
    """Blocks of a batch that one process computes, at most.

    Raises:
        UsageError: there are more processes than blocks.
    """
    batch_size = setup.training.batch_size
    if batch_size < n_processes:
        raise UsageError(
            f"{setup.training.section}.batch_size={batch_size} gives {n_processes} processes less "
            "than one block each. Raise it, or start fewer processes."
        )
    return -(-batch_size // n_processes)


def prepare(
    spec: RunSpec, configure: Configure, reporter: Reporter = SILENT, types: Mapping[str, str] | None = None
) -> RunSetup:
    """Find the checkpoint to resume from, settle the settings, read and tokenise the data.

    Args:
        types: the settings of precision that rank 0 has chosen; None to choose them here.
    """
    resume_point = find_start(spec, reporter)
    payload = resume_point.payload if resume_point is not None else None
    resolved = configure(payload["config"] if payload is not None else None)
    if payload is not None:
        check_same_adapters(payload["config"], training_of(spec.kind, resolved.config))
        for line in _changes(payload["config"], resolved.config):
            reporter.note(line)
    config = resolved.config
    device = choose_device(spec.device)
    parts = find_parts(spec, resolved, resume_point, reporter)
    combines = spec.kind == COMBINED
    if combines and parts:
        config = config_for_experts(parts, resolved)
    if INITIAL in parts:
        config = config_of_initial(parts[INITIAL], resolved, reporter)
    if TEACHER in parts and resume_point is None:
        config = config_of_student(parts[TEACHER], resolved, reporter)
    training = training_of(spec.kind, config).model_copy(update=dict(types or {}))
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
    split = _inherited_split(resume_point, parts, resolved)
    fractions = {"val_split": split.rule.val_split, "test_split": split.rule.test_split}
    if split.rule != SplitRule.of(config.data):
        reporter.note(f"Holding out what {' and '.join(split.trained_by)} held out: {spelled(split.rule)}.")
    config = config.model_copy(update={"data": config.data.model_copy(update=fractions)})
    lender = next(iter(parts.values()), None)
    config = _settled(config, precision, spec.kind, lender, reporter)
    if resume_point is not None:
        tokenizer = _tokenizer_of(resume_point, resolved, corpus)
    elif lender is not None:
        tokenizer = _tokenizer_lent(lender, resolved, corpus)
        if tokenizer.chat is None:  # an expert of plain text beside one that answers
            tokenizer = tokenizer.with_chat(
                next(filter(None, (p.tokenizer.chat for p in parts.values())), None)
            )
        named = [f"{name} ({expert.path})" for name, expert in parts.items()]
        together = " and ".join(part for part in (", ".join(named[:-1]), *named[-1:]) if part)
        what = f"Combining {together}" if combines else f"Learning from {lender.path}"
        if INITIAL in parts:
            what = f"Starting from the weights of {lender.path}"
        reporter.note(f"{what}, with the tokenizer '{tokenizer.name}' of its training.")
    else:
        tokenizer = resolve_tokenizer(
            config.data.tokenizer,
            corpus,
            split=SplitRule.of(config.data),
            skip_bad_records=config.data.skip_bad_records,
            reporter=reporter,
        )
    if combines and config.vector_store.enabled:
        split = replace(split, store=_text_in_store(spec, config, resume_point, parts))
    if TEACHER in parts:
        split = replace(split, store=text_in_store(parts[TEACHER]))
    tokens = split.tokenise(
        corpus,
        tokenizer,
        skip_bad_records=config.data.skip_bad_records,
        reporter=reporter,
    )
    if tokens.has_conversations and tokenizer.chat is None:
        tokenizer = tokenizer.with_chat(PLAIN)  # from here on a model of it answers
        reporter.note(
            f"The tokenizer '{tokenizer.name}' has no chat template: conversations are written in the plain "
            "one (docs/data.md)."
        )
    if payload is not None and payload["data_fingerprint"] != tokens.fingerprint:
        reporter.note(
            "The training data is not what this run began with. It resumes with the new data; its result "
            "will differ from that of a run that had either from the start."
        )
    if resume_point is None:
        base = None if TEACHER in parts else next(iter(parts.values()), None)
        told = (resolved.sources, tokens, tokenizer.vocab_size, reporter)
        built_on = None if base is None else base.config
        config = fit_to_text(spec.kind, config, *told, base=built_on, taught=TEACHER in parts)
        fitted = training_of(spec.kind, config)
        training = fitted.model_copy(update=dict(types or {}))
    batches = TrainingBatches(tokens.train, config.model.max_seq_len, training.seed)
    n_written = 0
    if TEACHER in parts:
        fraction = config.distillation.written_fraction
        n_written = round(batches.n_blocks * fraction / (1 - fraction))
    if resume_point is not None:
        inside = experts_inside(resume_point.payload, device, resume_point.path)
    else:
        inside = tuple(part.described(name, device) for name, part in parts.items() if combines)
    state = TrainState.from_dict(payload["run"].get("state")) if payload is not None else TrainState()
    state.fit(batches.n_blocks + n_written)
    had_best = payload is not None and state.best_loss is not None
    best_is_reset = had_best and _validation_changed(payload, tokens, config, training)
    if best_is_reset:
        state.best_loss, state.evals_without_improvement = None, 0
        reporter.note(
            "Best loss reset: the validation text or the length of the blocks changed. The next evaluation "
            "writes a new best checkpoint."
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
        plan=Plan.make(training, batches.n_blocks + n_written, state),
        parts=parts,
        inside=inside,
        n_written=n_written,
        best_is_reset=best_is_reset,
    )


def _inherited_split(
    resume_point: ResumePoint | None, parts: Mapping[str, SavedModel], resolved: ResolvedConfig
) -> InheritedSplit:
    """The split of the checkpoint that is resumed, else of the models that the run builds on."""
    if resume_point is not None:
        own = SplitRecord.from_state(resume_point.payload["split"], resume_point.path)
        return InheritedSplit.of({str(resume_point.path): own}, resolved)
    return InheritedSplit.of({str(part.path): part.split for part in parts.values()}, resolved)


def _text_in_store(
    spec: RunSpec, config: Config, resume_point: ResumePoint | None, experts: Mapping[str, SavedModel]
) -> TrainedText:
    """The documents in the vector store that the run will use; none if it has yet to be built."""
    if resume_point is not None:
        entries = expert_entries(resume_point.payload, resume_point.path)
    else:
        entries = as_entries(experts)
    digest = key_entry(entries, config.vector_store.expert).get("digest", "")
    try:
        return read_texts(store_folder(spec.checkpoint_dir, spec.stem), digest)
    except VectorStoreError:  # missing or damaged: an error, or a new build, when it is opened
        return NOTHING


def _changes(before: Mapping[str, Any], config: Config) -> list[str]:
    """A line for each setting that changed since the run began, and one if that changes the schedule."""
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
            "the new settings, so the result will differ from that of a run that had them from the start."
        )
    return lines


def _validation_changed(
    payload: CheckpointPayload | None, tokens: TokenisedCorpus, config: Config, training: TrainConfig
) -> bool:
    """True if validation losses from here on cannot be compared with those before."""
    assert payload is not None
    before, model = (payload["config"].get(section, {}) for section in (training.section, "model"))
    capped_alike = before.get("eval_max_tokens", training.eval_max_tokens) == training.eval_max_tokens
    cut_alike = model.get("max_seq_len", config.model.max_seq_len) == config.model.max_seq_len
    return payload["data_fingerprint"] != tokens.fingerprint or not (capped_alike and cut_alike)


def _tokenizer_of(resume_point: ResumePoint, resolved: ResolvedConfig, corpus: Corpus) -> Tokenizer:
    """The tokenizer in the checkpoint. Another one that is asked for is refused."""
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


def _tokenizer_lent(lender: SavedModel, resolved: ResolvedConfig, corpus: Corpus) -> Tokenizer:
    """The tokenizer of the model that this one builds on. Another one that is asked for is refused."""
    data = resolved.config.data
    asked_for = resolved.sources["data.tokenizer"] != "default"
    if asked_for and data.tokenizer != lender.config.data.tokenizer:
        asked = resolve_tokenizer(data.tokenizer, corpus, split=SplitRule.of(data))
        if asked.fingerprint != lender.tokenizer.fingerprint:
            kind, other = lender.kind, ""
            if kind != COMBINED:
                words = ("--tokenizer", data.tokenizer, "--name", f"{kind}_anew")
                other = f" Or train a {kind} with this one: {suggest('pretrain', kind, *words)}"
            raise CheckpointMismatchError(
                f"{lender.path} was trained with the tokenizer '{lender.tokenizer.name}' "
                f"({lender.tokenizer.vocab_size} tokens), not with '{asked.name}' ({asked.vocab_size}). "
                f"Leave --tokenizer out: the {kind}'s own is used.{other}"
            )
    return lender.tokenizer


def _settled(
    config: Config,
    precision: Precision,
    kind: str,
    lender: SavedModel | None,
    reporter: Reporter,
) -> Config:
    """The config as it is saved: paths absolute, and every choice made that was left to this machine."""
    train = training_of(kind, config)
    data = config.data.model_copy(update={"data_dir": str(Path(config.data.data_dir).resolve())})
    settled: dict[str, Any] = {train.section: train.model_copy(update=precision.settled)}
    if lender is not None:
        data = data.model_copy(update={"tokenizer": lender.config.data.tokenizer})
    if kind != COMBINED:
        config, choice = EXPERTS[kind].model().settle(config, precision.device)
        if choice:
            reporter.note(choice)
    return config.model_copy(update={**settled, "data": data})
