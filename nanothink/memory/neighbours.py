"""Neighbours of the training blocks, found once and kept: the experts are frozen, and so are they.

For each domain a row of numbers and one of similarities for every block of its stream, in sparse files (a
block that was never searched takes no space), and a flag that is set once both are on the disk. So a search
that was stopped goes on where it was, and a longer run only searches what it reads in addition. A token's own
document, and copies of it, are never among its neighbours.

Similarities are kept in 16 bits, in steps of 1/32767.

Shapes: B blocks, T tokens of a block, K neighbours.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import orjson
import torch
from numpy.typing import NDArray

from nanothink.data.cache import storage_error
from nanothink.data.tokens import IGNORE, TokenisedCorpus
from nanothink.errors import StorageError
from nanothink.memory.building import BATCH_TOKENS, Progress, States
from nanothink.memory.index import Float32, Int64
from nanothink.memory.store import VectorStore
from nanothink.models.recall import Neighbours

BYTES_PER_NEIGHBOUR = 6

_MISSING = np.uint32(0xFFFFFFFF)
_SCALE = 32767.0


class TrainingNeighbours:
    """Neighbours of the blocks of a corpus's training side.

    Args:
        store: what is searched.
        tokens: the corpus.
        length: T.
    """

    def __init__(self, store: VectorStore, tokens: TokenisedCorpus, length: int) -> None:
        self._store, self._streams, self._length = store, tokens.train, length
        self._k = store.n_neighbours
        described = [tokens.fingerprint, length, self._k, store.index.n_probe]
        name = hashlib.blake2b(orjson.dumps(described), digest_size=6).hexdigest()
        self.folder = store.folder / f"neighbours-{store.generation}-{name}"
        self._files: dict[str, tuple[NDArray[Any], NDArray[Any], NDArray[Any]]] = {}

    def missing(self, places: Iterable[tuple[str, int]]) -> dict[str, Int64]:
        """Of these blocks (domain, index), those that were not searched yet, by domain."""
        wanted: dict[str, set[int]] = {}
        for domain, block in places:
            wanted.setdefault(domain, set()).add(block)
        found = {}
        for domain, blocks in wanted.items():
            known = self._known(domain)
            left = np.array(sorted(b for b in blocks if not known[b]), np.int64)
            if len(left):
                found[domain] = left
        return found

    def n_bytes(self, missing: Mapping[str, Int64]) -> int:
        """What keeping them will take."""
        return sum(map(len, missing.values())) * self._length * self._k * BYTES_PER_NEIGHBOUR

    def find(self, missing: Mapping[str, Int64], states: States, progress: Progress) -> None:
        """Search these blocks and keep what is found.

        Raises:
            StorageError: the disk refused.
        """
        # Writing past the end of a full disk through a mapped file would end the process, not raise.
        needed, free = self.n_bytes(missing), shutil.disk_usage(self._store.folder).free
        if needed > free:
            raise StorageError(
                f"Keeping the neighbours of the training text takes {needed / 1e9:.2f} GB in {self.folder}, "
                f"and {free / 1e9:.2f} GB are free. Make room, or lower vector_store.n_neighbours."
            )
        done, total = 0, sum(map(len, missing.values()))
        at_once = max(1, BATCH_TOKENS // self._length)
        for domain, blocks in missing.items():
            stream = self._streams[domain]
            documents = stream.documents()
            ends = np.cumsum(documents.n_tokens)
            try:
                numbers, similarities, known = self._open(domain, "r+")
                for first in range(0, len(blocks), at_once):
                    some = blocks[first : first + at_once]
                    read = [stream.block(int(index), self._length) for index in some]
                    inputs, targets = (np.stack(part) for part in zip(*read, strict=True))  # (B, T)
                    places = some[:, None] * self._length + np.arange(self._length)
                    own = documents.keys[np.searchsorted(ends, places, side="right").clip(max=len(ends) - 1)]
                    near, which = self._store.search_elsewhere(
                        states(torch.from_numpy(inputs)).reshape(-1, self._store.owner.width),
                        own.reshape(-1),
                        self._k,
                    )
                    which[targets.reshape(-1) == IGNORE] = -1
                    numbers[some] = np.where(which < 0, _MISSING, which).reshape(*inputs.shape, -1)
                    similarities[some] = _coded(near).reshape(*inputs.shape, -1)
                    numbers.flush()  # type: ignore[attr-defined]
                    similarities.flush()  # type: ignore[attr-defined]
                    known[some] = True
                    known.flush()  # type: ignore[attr-defined]
                    done += len(some)
                    progress("neighbours of the training text", done, total)
            except OSError as error:
                raise storage_error(error, self.folder) from error
        self._files.clear()

    def read(self, places: Sequence[tuple[str, int]]) -> Neighbours:
        """(B, T, K) of the blocks at these places, all of which were searched."""
        similarities = np.empty((len(places), self._length, self._k), np.float32)
        which = np.empty((len(places), self._length, self._k), np.int64)
        for row, (domain, block) in enumerate(places):
            if domain not in self._files:
                try:
                    self._files[domain] = self._open(domain, "r")
                except OSError as error:
                    raise StorageError(
                        f"{self.folder} is gone or cannot be read: was the memory built anew meanwhile? Go "
                        "on with --resume, which looks its neighbours up again."
                    ) from error
            numbers, coded, _ = self._files[domain]
            which[row] = np.where(numbers[block] == _MISSING, -1, numbers[block].astype(np.int64))
            similarities[row] = coded[block].astype(np.float32) / _SCALE
        similarities[which < 0] = -np.inf
        return self._store.neighbours(similarities, which)

    def _known(self, domain: str) -> NDArray[Any]:
        try:
            return np.asarray(self._open(domain, "r")[2])
        except FileNotFoundError:
            return np.zeros(self._streams[domain].n_blocks(self._length), np.bool_)
        except OSError as error:
            raise storage_error(error, self.folder) from error

    def _open(self, domain: str, mode: Literal["r", "r+"]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        """Numbers, similarities and flags of a domain, memory-mapped; made when they are to be written."""
        named = hashlib.blake2b(domain.encode(), digest_size=6).hexdigest()
        n = self._streams[domain].n_blocks(self._length)
        shape = (n, self._length, self._k)
        opened = []
        for role, dtype, of_shape in (
            ("numbers", np.uint32, shape),
            ("similarities", np.int16, shape),
            ("known", np.bool_, (n,)),
        ):
            path = self.folder / f"{named}-{role}.npy"
            if mode == "r+" and not path.exists():
                self.folder.mkdir(parents=True, exist_ok=True)
                made = path.with_suffix(f".tmp{os.getpid()}")
                np.lib.format.open_memmap(made, "w+", dtype, of_shape).flush()
                made.rename(path)
            opened.append(np.load(path, mmap_mode=mode))
        return opened[0], opened[1], opened[2]


def _coded(similarities: Float32) -> NDArray[np.int16]:
    finite = np.where(np.isfinite(similarities), similarities, 0.0)
    return np.rint(finite.clip(-1.0, 1.0) * _SCALE).astype(np.int16)


class RepeatedSearch:
    """A ``Memory`` that remembers what it was asked: a run validates on the same text again and again."""

    _LEAST_ROWS = 64  # fewer are a sample being written, which nobody asks again
    _MOST_ROWS = 500_000  # about 200 MB at 32 neighbours

    def __init__(self, store: VectorStore) -> None:
        self._store = store
        self._found: dict[bytes, Neighbours] = {}
        self._n_rows = 0

    def search(self, queries: torch.Tensor) -> Neighbours:
        """See ``VectorStore.search``."""
        n = len(queries)
        if n < self._LEAST_ROWS:
            return self._store.search(queries)
        content = queries.detach().float().cpu().contiguous().numpy()
        asked = hashlib.blake2b(content.data, digest_size=16).digest()
        found = self._found.get(asked)
        if found is None:
            found = self._store.search(queries)
            if self._n_rows + n <= self._MOST_ROWS:
                self._found[asked] = found
                self._n_rows += n
        return found
