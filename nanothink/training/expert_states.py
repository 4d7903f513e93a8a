"""Disk cache of frozen experts' states over the training blocks, so that each is computed once.

    <cache>/states/<key>/
        identity.json     everything the states depend on; a folder with another identity is not used
        states.f32        (E, T, D) float32 per block, in order; a hole where none was written yet
        marks.u64         one number per block: 0, or 2^32 plus the CRC-32 of its states

Nothing is computed ahead: a block's states are written when it is first read, and its mark after them
(disk/block_file.py). After a killed process, a power cut or damage to a file, the blocks concerned are
computed again, and runs that share a folder cannot harm one another.

The states are bit for bit those that the experts compute, so a run ends in the same weights with the cache,
without it, or with part of it. This requires that a block's states do not depend on the other blocks of
its batch, which is tested on the first batch of every run.

Shapes: B blocks of a batch, T time, D model width, E experts.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanothink.disk.block_file import BlockFile
from nanothink.errors import StorageError
from nanothink.models.nanothink import NanoThink
from nanothink.reporter import SILENT, Reporter
from nanothink.suggestions import again
from nanothink.training.block_folder import MARKS, NoFolderError, in_words, open_folder
from nanothink.wording import counted

_FORMAT = 1
_IN_VAIN = "so they are computed in every epoch"

Shape = tuple[int, int, int, int]
"""Blocks, E, T, D."""


def states_bytes(shape: Shape) -> int:
    """Bytes that the states of all blocks take on the disk."""
    return 4 * int(np.prod(shape, dtype=np.int64)) + 8 * shape[0]


class ExpertStates:
    """The states of one set of experts over one set of blocks.

    Args:
        folder: made by ``open_states``.
        shape: of all states.
        number: index of the block at a position of the run.
    """

    def __init__(self, folder: Path, shape: Shape, number: Callable[[int], int], reporter: Reporter) -> None:
        self.folder = folder
        self._shape, self._number, self._reporter = shape, number, reporter
        self._tried = self._told = False
        self._file: BlockFile | None = BlockFile(folder / "states.f32", folder / MARKS)
        try:
            self._file.hold()  # so that others do not make room here
        except OSError:
            self.close()
            raise

    def n_filled(self) -> int:
        """Number of blocks whose states are cached."""
        return int(self._file.filled(self._shape[0]).sum()) if self._file is not None else 0

    def of(self, model: NanoThink, inputs: Tensor, positions: Sequence[int]) -> list[Tensor]:
        """``model.expert_states(inputs)``, read from the cache or computed and cached.

        Args:
            inputs: (B, T) int64, on the CPU.
            positions: of its blocks in the run.
        """
        if self._file is None:
            return model.expert_states(inputs)
        numbers = [self._number(position) for position in positions]
        states = torch.empty(self._shape[1], len(numbers), *self._shape[2:])  # (E, B, T, D)
        try:
            missing = [i for i, number in enumerate(numbers) if not self._read(number, states[:, i])]
            if not self._tried:
                return self._try_out(model, inputs, numbers, states, missing)
            if missing:
                for own, made in zip(states, model.expert_states(inputs[missing]), strict=True):
                    own[missing] = made
                self._write(numbers, states, missing)
        except OSError as error:
            self._give_up(f"{self.folder} failed ({error.strerror or error})")
            return model.expert_states(inputs)
        return list(states)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None

    def _try_out(
        self, model: NanoThink, inputs: Tensor, numbers: list[int], known: Tensor, missing: list[int]
    ) -> list[Tensor]:
        """Compute the first batch without the cache, and compare it with the cached states."""
        self._tried = True
        made = model.expert_states(inputs)
        alone = model.expert_states(inputs[-1:])
        there = [i for i in range(len(numbers)) if i not in missing]
        if not all(torch.equal(one[0], own[-1]) for one, own in zip(alone, made, strict=True)):
            self._give_up("here a block's states depend on those beside it in a batch")
        elif not all(torch.equal(own[there], new[there]) for own, new in zip(known, made, strict=True)):
            self._give_up(f"those in {self.folder} are not what the experts compute here")
        else:
            self._write(numbers, torch.stack(made), missing)
        return made

    def _read(self, number: int, into: Tensor) -> bool:
        """Fill (E, T, D) with the states of a block; False if they are missing or damaged."""
        assert self._file is not None
        if self._file.read(number, [part.numpy() for part in into]):
            return True
        if self._file.damaged and not self._told:
            self._told = True
            self._reporter.note(f"Some of the states in {self.folder} are damaged; they are made again.")
        return False

    def _write(self, numbers: Sequence[int], states: Tensor, rows: Sequence[int]) -> None:
        assert self._file is not None
        for row in rows:
            self._file.write(numbers[row], [part.numpy() for part in states[:, row]])

    def _give_up(self, why: str) -> None:
        """Stop caching and delete the folder: the space belongs to the checkpoints."""
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        self._reporter.note(f"The experts' states are no longer kept: {why}, {_IN_VAIN}.")


def open_states(
    root: Path,
    identity: Mapping[str, Any],
    shape: Shape,
    *,
    budget_bytes: int,
    begin: bool,
    number: Callable[[int], int],
    reporter: Reporter = SILENT,
) -> ExpertStates | None:
    """Open the cache of this identity, or make an empty one; None, with a note, if neither is possible.

    Args:
        root: the data's folder, beside whose tokens they are kept.
        identity: plain values, everything that a bit of the states depends on.
        budget_bytes: limit for all states in the folder together. The least recently used ones are deleted,
            unless a run is using them.
        begin: make a cache if there is none.
        number: index of the block at a position of the run.
    """
    needed = states_bytes(shape)
    if needed > budget_bytes:
        reporter.note(
            f"The experts' states take {in_words(needed)}, and train_mla.states_disk_gb allows "
            f"{in_words(budget_bytes)}, {_IN_VAIN}. To keep them: "
            f"{again('--set', f'train_mla.states_disk_gb={math.ceil(needed / 1e8) / 10:g}', '--overwrite')}"
        )
        return None
    described = {"format": _FORMAT, "shape": shape, **identity}
    sizes = {"states.f32": needed - 8 * shape[0], MARKS: 8 * shape[0]}
    try:
        states = open_folder(
            root,
            "states",
            described,
            sizes,
            lambda folder: ExpertStates(folder, shape, number, reporter),
            budget_bytes=budget_bytes,
            begin=begin,
            reporter=reporter,
        )
        if states is None:
            return None
        n_filled = states.n_filled()
    except NoFolderError as error:
        reporter.note(f"The experts' states take {in_words(needed)}, and {error}, {_IN_VAIN}.")
        return None
    except (OSError, StorageError) as error:
        why = (error.strerror if isinstance(error, OSError) else None) or error
        reporter.note(f"The experts' states cannot be kept beside {root} ({why}), {_IN_VAIN}.")
        return None
    blocks = counted(shape[0], "block")
    there = f"{n_filled:,} of {blocks} are there already" if n_filled else blocks
    reporter.note(f"The experts' states are kept in {states.folder}: {there}, {in_words(needed)} for all.")
    return states
