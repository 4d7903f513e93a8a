"""Training on a teacher's predictions, which are kept on the disk.

    <cache>/targets/<key>/
        identity.json     everything the targets depend on; a folder with another identity is not used
        targets.bin       a block after another: tokens (T + 1), the K likeliest tokens (T, K), and their
                          probabilities (T, K) in 16 bits
        marks.u64         one number per block, as in disk/block_file.py

All blocks that a run reads are there before its first step. They are made in groups whose composition is
fixed, since the last bits of a prediction may depend on what else is in a batch: a run that is killed while
they are made, and resumed, has the same targets as one that was not.

Shapes: B blocks of a batch, T time, K likeliest tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nanothink.data.batches import Mixture, TrainingBatches
from nanothink.data.tokens import IGNORE
from nanothink.disk import storage_error
from nanothink.disk.block_file import BlockFile, Parts
from nanothink.errors import StorageError
from nanothink.models.contract import Batch, LanguageModel, Loss
from nanothink.models.distillation_loss import SoftTargets, linear_distillation
from nanothink.reporter import Reporter
from nanothink.suggestions import again
from nanothink.training.block_folder import MARKS, NoFolderError, in_words, open_folder

GROUP = 32
"""Blocks that the teacher reads or writes together."""

REDRAWN = 0.15
"""Share of the tokens of a version of the text that the teacher draws anew."""

_BUDGET_BYTES = 8 * 10**9  # for all targets beside a corpus; older ones give way
_FORMAT = 1


@dataclass(frozen=True)
class TargetShape:
    """Numbers that say how a block of targets lies on the disk."""

    length: int
    """T."""
    k: int
    vocab_size: int

    @property
    def tokens(self) -> np.dtype[Any]:
        return np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)

    @property
    def block_bytes(self) -> int:
        return sum(part.nbytes for part in self.empty())

    def empty(self) -> Parts:
        """A block to be filled: its text, likeliest tokens, probabilities."""
        shape = (self.length, self.k)
        text = np.empty(self.length + 1, self.tokens)
        return [text, np.empty(shape, self.tokens), np.empty(shape, np.float16)]


@dataclass(frozen=True)
class Numbering:
    """Numbers of blocks of which there are several versions: no group holds blocks of two of them."""

    n_blocks: int
    """Of one version."""
    versions: int = 1

    @property
    def groups(self) -> int:
        """Groups of one version."""
        return -(-self.n_blocks // GROUP)

    @property
    def total(self) -> int:
        """Numbers, some of which stand for no block."""
        return self.versions * self.groups * GROUP

    def number(self, version: int, block: int) -> int:
        return version * self.groups * GROUP + block

    def split(self, group: int) -> tuple[int, range]:
        """Version and blocks of a group."""
        version, place = divmod(group, self.groups)
        return version, range(place * GROUP, min((place + 1) * GROUP, self.n_blocks))


class TeacherTargets:
    """The targets of a set of blocks, open.

    Args:
        folder: made by ``open_targets``.
    """

    def __init__(self, folder: Path, shape: TargetShape, numbering: Numbering) -> None:
        self.folder, self.shape, self.numbering = folder, shape, numbering
        self._file = BlockFile(folder / "targets.bin", folder / MARKS)
        try:
            self._file.hold()
        except OSError:
            self.close()
            raise

    def numbers(self, group: int) -> range:
        """The numbers of a group's blocks, GROUP of them or fewer."""
        first = group * GROUP
        return range(first, first + len(self.numbering.split(group)[1]))

    def missing(self, groups: Iterable[int]) -> list[int]:
        """The groups of which a block is not there, or is damaged."""
        block = self.shape.empty()
        return [
            group
            for group in groups
            if not all(self._file.read(number, block) for number in self.numbers(group))
        ]

    def write(self, number: int, text: Tensor, targets: SoftTargets) -> None:
        """Keep a block: its T + 1 tokens, and the targets after the first T of them, (T, K)."""
        parts = [
            text.numpy().astype(self.shape.tokens),
            targets.tokens.numpy().astype(self.shape.tokens),
            targets.probabilities.numpy().astype(np.float16),
        ]
        try:
            self._file.write(number, parts)
        except OSError as error:
            raise storage_error(self.folder, error) from error

    def read(self, number: int) -> Parts:
        """A block, as ``TargetShape.empty`` lists its parts.

        Raises:
            StorageError: it is gone or damaged.
        """
        parts = self.shape.empty()
        try:
            if self._file.read(number, parts):
                return parts
        except OSError as error:
            raise storage_error(self.folder, error) from error
        raise StorageError(
            f"A block of the teacher's targets in {self.folder} is damaged or gone. Resume the run: what is "
            "missing is made again."
        )

    def soft_targets(self, numbers: Iterable[int]) -> SoftTargets:
        """(B, T, K) of the blocks with these numbers. Raises as ``read``."""
        return _soft_targets([self.read(number) for number in numbers])

    def close(self) -> None:
        self._file.close()


def _soft_targets(blocks: Iterable[Parts]) -> SoftTargets:
    _, tokens, probabilities = zip(*blocks, strict=True)
    return SoftTargets(
        torch.from_numpy(np.stack(tokens).astype(np.int64)),
        torch.from_numpy(np.stack(probabilities).astype(np.float32)),
    )


def open_targets(
    root: Path,
    identity: Mapping[str, Any],
    shape: TargetShape,
    numbering: Numbering,
    reporter: Reporter,
    *,
    begin: bool = True,
) -> TeacherTargets | None:
    """Open the targets of this identity, or make an empty folder for them.

    Args:
        root: the data's folder, beside whose tokens they are kept.
        identity: plain values, everything that a bit of the targets depends on.
        begin: make a folder; False: return None if there is none.

    Raises:
        StorageError: there is no room for them, or the disk refused.
    """
    described = {
        "format": _FORMAT,
        "length": shape.length,
        "k": shape.k,
        "vocabulary": shape.vocab_size,
        "blocks": numbering.n_blocks,
        "versions": numbering.versions,
        "group": GROUP,
        **identity,
    }
    needed = numbering.total * shape.block_bytes
    sizes = {"targets.bin": needed, MARKS: 8 * numbering.total}
    try:
        return open_folder(
            root,
            "targets",
            described,
            sizes,
            lambda folder: TeacherTargets(folder, shape, numbering),
            budget_bytes=max(_BUDGET_BYTES, 2 * needed),
            begin=begin,
            reporter=reporter,
        )
    except NoFolderError as error:
        raise StorageError(
            f"The teacher's targets take {in_words(needed)} beside {root}, and {error}. Make room, or keep "
            "fewer versions of the text, or fewer of its likeliest tokens: "
            + again("--set", "distillation.versions=1", "--set", f"distillation.top_k={max(1, shape.k // 2)}")
        ) from None
    except OSError as error:
        raise storage_error(root, error) from error


def number_of(corpus: TrainingBatches, position: int, numbering: Numbering) -> int:
    """The number of the block at a position of the corpus: each pass over a domain reads the next version."""
    return numbering.number(corpus.passes(position) % numbering.versions, corpus.number(position))


def redrawn(text: Tensor, targets: SoftTargets, share: float, seed: int) -> Tensor:
    """Texts (B, T + 1), about this share of whose tokens but the first are drawn from the targets (B, T, K)
    of the token before."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.multinomial(targets.probabilities.flatten(0, 1), 1, generator=generator)
    drawn = targets.tokens.flatten(0, 1).gather(1, places).view(targets.tokens.shape[:2])
    chosen = torch.rand(drawn.shape, generator=generator) < share
    return torch.cat([text[:, :1], torch.where(chosen, drawn, text[:, 1:])], 1)


@dataclass(frozen=True)
class TaughtBatches:
    """Blocks of the corpus and of what the teacher wrote, with the teacher's targets for both."""

    corpus: TrainingBatches
    order: Mixture
    on_corpus: TeacherTargets
    on_written: TeacherTargets | None
    """None: it wrote nothing."""
    n_prompt: int
    """Tokens at the start of each written block that are not the teacher's own."""

    def read(self, start: int, count: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets, (count, T) int64 each, of positions start .. start+count-1."""
        inputs, targets = zip(*map(self._block, range(start, start + count)), strict=True)
        return torch.stack(inputs), torch.stack(targets)

    def soft_targets(self, positions: Sequence[int]) -> SoftTargets:
        """(B, T, K) of the blocks at these positions."""
        return _soft_targets([self._kept(position) for position in positions])

    def close(self) -> None:
        for targets in (self.on_corpus, self.on_written):
            if targets is not None:
                targets.close()

    def _block(self, position: int) -> tuple[Tensor, Tensor]:
        written, at = self.order.source(position)
        text: NDArray[Any] = self._kept(position)[0].astype(np.int64)
        if not written:
            (targets,) = self.corpus.read(at, 1)[1]
            return torch.from_numpy(text[:-1].copy()), targets
        own = torch.from_numpy(text[1:].copy())
        own[: self.n_prompt - 1] = IGNORE
        return torch.from_numpy(text[:-1].copy()), own

    def _kept(self, position: int) -> Parts:
        written, at = self.order.source(position)
        if not written:
            return self.on_corpus.read(number_of(self.corpus, at, self.on_corpus.numbering))
        assert self.on_written is not None
        return self.on_written.read(at)


@dataclass(frozen=True)
class Taught:
    """The objective of a student: see models/distillation_loss.py.

    Its parts are ``cross_entropy`` of the text and ``divergence`` from the teacher.
    """

    batches: TaughtBatches
    share: float
    """Of the divergence in the loss."""

    def __call__(self, model: LanguageModel, batch: Batch, scale: float) -> Loss:
        teacher = self.batches.soft_targets(batch.positions).to(batch.inputs.device)
        states = model.hidden(batch.inputs).flatten(0, 1)
        loss, of_text, of_teacher = linear_distillation(
            states,
            model.head_weight,
            batch.targets.flatten(),
            teacher.flatten(),
            share=self.share,
            scale=scale,
        )
        return Loss(loss, {"cross_entropy": of_text, "divergence": of_teacher})
