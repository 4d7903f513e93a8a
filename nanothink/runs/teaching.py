"""A teacher's predictions for the blocks of a student's run, made before its first step and kept.

Its predictions on the training text are those of NanoThink's own training: the vector store leaves out the
document of each position, and copies of it. With it, the store would answer with the very token that follows,
and the student would learn the text by heart. For the same reason text that the teacher writes from the first
tokens of a block of training text is written without the document of these.

A student that reads the same blocks many times follows its teacher on them and not elsewhere. So the text has
several versions: in all but the first, some of the tokens are drawn from the predictions of the first, all at
once, and the teacher predicts after these.

Shapes: B blocks, T time, K likeliest tokens.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nanothink.data.batches import Mixture
from nanothink.inference.generate import evaluating, generate
from nanothink.inference.sampling import SamplingConfig
from nanothink.models.contract import LanguageModel
from nanothink.models.distillation_loss import SoftTargets
from nanothink.models.nanothink import NanoThink
from nanothink.models.precision import Precision
from nanothink.reporter import SILENT, Reporter
from nanothink.runs.preparing import RunSetup
from nanothink.runs.saved_model import SavedModel
from nanothink.runs.teacher import TEACHER, teacher_digest
from nanothink.runs.vector_store import folder_of, open_beside
from nanothink.training.block_folder import in_words
from nanothink.training.distillation import (
    GROUP,
    REDRAWN,
    Numbering,
    TargetShape,
    TaughtBatches,
    TeacherTargets,
    number_of,
    open_targets,
    redrawn,
)
from nanothink.vector_store.contents import VectorStore
from nanothink.vector_store.manifest import read_manifest
from nanothink.vector_store.neighbours import SearchElsewhere, documents_at
from nanothink.wording import counted

Keys = NDArray[np.uint64]

_PROMPT = 16  # tokens of the corpus at the start of a written block, where blocks are long enough
_PROBED_TOKENS = 8  # written to see how fast the teacher is


@dataclass(frozen=True)
class Teacher:
    """A frozen model that predicts, with its vector store if it has one."""

    model: LanguageModel
    store: VectorStore | None
    precision: Precision
    eos_id: int

    @classmethod
    def open(cls, saved: SavedModel, precision: Precision, reporter: Reporter = SILENT) -> Teacher:
        """The model of a checkpoint, on the device of the student."""
        model, differences = saved.build(precision.device)
        for line in differences:
            reporter.note(f"{saved.path}: {line}")
        store = None
        if isinstance(model, NanoThink) and model.store_gate is not None:
            store = open_beside(saved, reporter, otherwise="")
        if model.joint_gate is not None:
            model.joint_gate = model.joint_gate.to(precision.device)
        return cls(model.to(precision.device), store, precision, saved.tokenizer.eos_id)

    def predict(self, inputs: Tensor, own: Keys, k: int) -> SoftTargets:
        """The K likeliest tokens after each of (B, T) tokens, and their probabilities; on the CPU.

        Args:
            own: (B, T) or (B, 1) hash of the document of each target.
        """
        self._search_elsewhere(own)
        tokens, probabilities = [], []
        with evaluating(self.model), torch.inference_mode(), self.precision.autocast():
            for logits in self.model.predictions(inputs.to(self.precision.device)):
                likeliest = logits.float().softmax(-1).topk(k)
                tokens.append(likeliest.indices.cpu())
                probabilities.append(likeliest.values.cpu())
        shape = (*inputs.shape, k)
        return SoftTargets(torch.cat(tokens).view(shape), torch.cat(probabilities).view(shape))

    def write(self, prompts: Tensor, own: Keys, n_tokens: int, seed: int) -> Tensor:
        """Continue (B, P) prompts by so many tokens, drawn as predicted; (B, P + n_tokens) with them.

        An end of a document is a token like others, and another document follows.

        Args:
            own: (B, 1) hash of the document of each prompt.
        """
        self._search_elsewhere(own)
        law = SamplingConfig(
            temperature=1.0, top_k=None, max_new_tokens=n_tokens, stop_at_eos=False, seed=seed
        )
        added = generate(self.model, prompts.tolist(), law, eos_id=self.eos_id)
        return torch.cat([prompts, torch.tensor(added, dtype=torch.int64)], dim=1)

    def _search_elsewhere(self, own: Keys) -> None:
        if isinstance(self.model, NanoThink) and self.store is not None:
            self.model.vector_store = SearchElsewhere(self.store, own.reshape(-1))


@dataclass(frozen=True)
class Teaching:
    """What a teacher has to do for a run."""

    setup: RunSetup
    shape: TargetShape
    order: Mixture
    n_written: int
    """Blocks that it writes."""
    n_prompt: int
    """P: tokens of the corpus that each of them begins with."""
    numbering: tuple[Numbering, Numbering]
    """Numbers of the corpus's blocks in all versions, and of written blocks, the last group filled up."""
    _documents: dict[str, tuple[NDArray[np.int64], Keys]] = field(default_factory=dict)

    @classmethod
    def of(cls, setup: RunSetup) -> Teaching:
        length, vocabulary = setup.config.model.max_seq_len, setup.tokenizer.vocab_size
        shape = TargetShape(length, min(setup.config.distillation.top_k, vocabulary), vocabulary)
        n_corpus = setup.batches.n_blocks
        order = Mixture(n_corpus, setup.n_written, setup.training.seed)
        numbering = (
            Numbering(n_corpus, setup.config.distillation.versions),
            Numbering(-(-setup.n_written // GROUP) * GROUP),
        )
        return cls(setup, shape, order, setup.n_written, max(1, min(_PROMPT, length // 4)), numbering)

    @property
    def n_bytes(self) -> int:
        """Bytes of all targets on the disk."""
        return self.shape.block_bytes * sum(numbering.total for numbering in self.numbering)

    def groups(self) -> tuple[list[int], list[int]]:
        """The groups of blocks of the corpus, and of written ones, that the run still reads.

        Those of the first version are read also for what is drawn from them.
        """
        setup, plan, (of_corpus, of_written) = self.setup, self.setup.plan, self.numbering
        found: tuple[set[int], set[int]] = (set(), set())
        for position in range(setup.state.position, plan.total_steps * plan.blocks_per_step):
            written, at = self.order.source(position)
            number = at if written else number_of(setup.batches, at, of_corpus)
            found[written].add(number // GROUP)
            if not written:
                found[0].add(of_corpus.split(number // GROUP)[1].start // GROUP)
            if len(found[0]) == of_corpus.groups * of_corpus.versions and len(found[1]) == of_written.groups:
                break
        return sorted(found[0]), sorted(found[1])

    def open(self, reporter: Reporter, *, begin: bool) -> list[TeacherTargets | None]:
        """The kept targets of the corpus, and of written text; None for what does not exist."""
        saved = self.setup.parts[TEACHER]
        identity: dict[str, Any] = {
            "teacher": teacher_digest(saved),
            "store": None,
            "data": self.setup.tokens.fingerprint,
            "products": self.setup.precision.name,
        }
        if saved.config.vector_store.enabled:
            identity["store"] = read_manifest(folder_of(saved.path))["digest"]
        of_written = {**identity, "seed": self.setup.training.seed, "prompt": self.n_prompt}
        kinds = [(identity, self.numbering[0])]
        if self.n_written:
            kinds.append((of_written, self.numbering[1]))
        return [
            open_targets(self.setup.corpus.root, who, self.shape, numbering, reporter, begin=begin)
            for who, numbering in kinds
        ] + [None] * (2 - len(kinds))

    def corpus_group(self, numbers: range) -> tuple[Tensor, Keys]:
        """Texts (B, T + 1) of these blocks, and the hash of the document of each target, (B, T)."""
        setup, length = self.setup, self.shape.length
        texts, own = [], []
        for domain, index in map(setup.batches.numbered, numbers):
            stream = setup.tokens.train[domain]
            inputs, targets = stream.block(index, length)
            texts.append(np.append(inputs, targets[-1:].clip(0)))
            if domain not in self._documents:
                documents = stream.documents()
                self._documents[domain] = np.cumsum(documents.n_tokens), documents.keys
            own.append(documents_at(*self._documents[domain], np.array([index]), length)[0])
        return torch.from_numpy(np.stack(texts)), np.stack(own)

    def version_group(self, targets: TeacherTargets, group: int) -> tuple[Tensor, Keys]:
        """Texts (B, T + 1) of a group of any version of the corpus, and the hashes of ``corpus_group``."""
        version, blocks = self.numbering[0].split(group)
        texts, own = self.corpus_group(blocks)
        if version:
            known = targets.soft_targets(blocks)
            texts = redrawn(texts, known, REDRAWN, _seed("redrawn", version, blocks.start))
        return texts, own

    def write_group(self, teacher: Teacher, group: int, n_tokens: int) -> tuple[Tensor, Keys]:
        """Texts (B, P + n_tokens) that begin as blocks of the corpus; keys of their documents, (B, 1)."""
        batches = self.setup.batches
        numbers = [batches.number(group * GROUP + row) for row in range(GROUP)]
        begun = [self.corpus_group(range(number, number + 1)) for number in numbers]
        prompts = torch.cat([text[:, : self.n_prompt] for text, _ in begun])
        own = np.concatenate([keys[:, self.n_prompt - 1 : self.n_prompt] for _, keys in begun])
        seed = _seed(self.setup.training.seed, "written", group)
        return teacher.write(prompts, own, n_tokens, seed), own


def _seed(*named: object) -> int:
    digest = hashlib.blake2b("\0".join(map(str, named)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2


def make_targets(setup: RunSetup, reporter: Reporter = SILENT) -> TaughtBatches:
    """Open the teacher's targets for all blocks that the run reads; make those that are missing.

    Raises:
        StorageError: the disk refused.
        VectorStoreError: the teacher's vector store is damaged or another model's.
    """
    teaching = Teaching.of(setup)
    on_corpus, on_written = teaching.open(reporter, begin=True)
    assert on_corpus is not None
    groups = teaching.groups()
    missing = (on_corpus.missing(groups[0]), on_written.missing(groups[1]) if on_written else [])
    if any(missing):
        teacher = Teacher.open(setup.parts[TEACHER], setup.precision, reporter)

        def predict(targets: TeacherTargets, numbers: range, texts: Tensor, own: Keys) -> None:
            found = teacher.predict(texts[:, :-1], own, teaching.shape.k)
            for row, number in enumerate(numbers):
                one = SoftTargets(found.tokens[row], found.probabilities[row])
                targets.write(number, texts[row], one)

        # Each group is looked for again: another run may have made it meanwhile.
        for done, group in enumerate(missing[0]):
            if on_corpus.missing([group]):
                predict(on_corpus, on_corpus.numbers(group), *teaching.version_group(on_corpus, group))
            reporter.progress("the teacher's predictions", done + 1, len(missing[0]))
        for done, group in enumerate(missing[1]):
            assert on_written is not None
            if on_written.missing([group]):
                n_tokens = teaching.shape.length + 1 - teaching.n_prompt
                texts, own = teaching.write_group(teacher, group, n_tokens)
                predict(on_written, on_written.numbers(group), texts, own)
            reporter.progress("text that the teacher writes", done + 1, len(missing[1]))
    versions = teaching.numbering[0].versions
    reporter.note(
        f"Learning the predictions of {setup.parts[TEACHER].path} on "
        f"{counted(setup.batches.n_blocks, 'block')} of the text"
        + (f" in {versions} versions" if versions > 1 else "")
        + (f" and {teaching.n_written:,} that it wrote" if teaching.n_written else "")
        + f"; they are kept in {on_corpus.folder.parent} ({in_words(teaching.n_bytes)})."
    )
    return TaughtBatches(setup.batches, teaching.order, on_corpus, on_written, teaching.n_prompt)


def estimate_targets(setup: RunSetup, reporter: Reporter = SILENT) -> tuple[int, float]:
    """Bytes of the teacher's targets on the disk, and seconds to make those that are missing.

    The teacher reads one group of blocks and writes a few tokens, to see how fast it is.
    """
    teaching = Teaching.of(setup)
    opened = teaching.open(reporter, begin=False)
    groups = teaching.groups()
    missing = [
        targets.missing(wanted) if targets is not None else wanted
        for targets, wanted in zip(opened, groups, strict=True)
    ]
    for targets in opened:
        if targets is not None:
            targets.close()
    seconds = 0.0
    if any(missing):
        teacher = Teacher.open(setup.parts[TEACHER], setup.precision, reporter)
        numbers = range(min(GROUP, setup.batches.n_blocks))
        texts, own = teaching.corpus_group(numbers)
        teacher.predict(texts[:1, :-1], own[:1], teaching.shape.k)  # the first call prepares much
        reading = _seconds(lambda: teacher.predict(texts[:, :-1], own, teaching.shape.k))
        seconds += reading * (len(missing[0]) * GROUP + len(missing[1]) * GROUP) / len(numbers)
        if missing[1]:
            teaching.write_group(teacher, 0, 1)
            few = _seconds(lambda: teaching.write_group(teacher, 0, 1))
            more = _seconds(lambda: teaching.write_group(teacher, 0, 1 + _PROBED_TOKENS))
            n_tokens = teaching.shape.length + 1 - teaching.n_prompt
            seconds += len(missing[1]) * max(0.0, more - few) / _PROBED_TOKENS * n_tokens
    return teaching.n_bytes, seconds


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
