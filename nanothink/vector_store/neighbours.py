"""Neighbours of the training blocks: looked up once and kept, since the experts are frozen.

Each domain has its blocks in a sparse file (disk/block_file.py). A block that was never searched takes no
space, and a block's checksum is verified on every read. So an interrupted search continues where it stopped,
a longer run only searches its additional blocks, and a damaged block is searched again. A token's own
document, and copies of it, are never among its neighbours.

Similarities are kept in 16 bits, in steps of 1/32767.

Shapes: B blocks, T tokens of a block, K neighbours.
"""

from __future__ import annotations

import hashlib
import shutil
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import orjson
import torch
from numpy.typing import NDArray

from nanothink.data.tokens import IGNORE, TokenisedCorpus
from nanothink.disk import make_folder, storage_error
from nanothink.disk.block_file import BlockFile
from nanothink.errors import StorageError
from nanothink.models.store_gate import Neighbours
from nanothink.reporter import SILENT, Reporter
from nanothink.vector_store.building import BATCH_TOKENS, States
from nanothink.vector_store.contents import VectorStore
from nanothink.vector_store.index import Float32, Int64

_FORMAT = 2
_MOST_OPEN = 64  # domains whose two files are open at a time
_SCALE = 32767.0


def number_dtype(n_keys: int) -> np.dtype[Any]:
    """Smallest unsigned type for the number of a key; its largest value means none."""
    return np.dtype(np.uint32 if n_keys < 0xFFFFFFFF else np.uint64)


def bytes_per_neighbour(n_keys: int) -> int:
    """Bytes of a neighbour on the disk: number and similarity."""
    return number_dtype(n_keys).itemsize + 2


class TrainingNeighbours:
    """Neighbours of the blocks of a corpus's training side.

    Args:
        store: the store to search.
        tokens: the corpus.
        length: T.
        states: computes the states of the key expert.
    """

    def __init__(self, store: VectorStore, tokens: TokenisedCorpus, length: int, states: States) -> None:
        self._store, self._streams, self._length = store, tokens.train, length
        self._states = states
        self._k = store.n_neighbours
        self._numbers = number_dtype(len(store.contents.tokens))
        self._missing = np.iinfo(self._numbers).max
        described = [_FORMAT, tokens.fingerprint, length, self._k, store.index.n_probe]
        name = hashlib.blake2b(orjson.dumps(described), digest_size=6).hexdigest()
        self.folder = store.folder / f"neighbours-{store.generation}-{name}"
        self._files: OrderedDict[str, BlockFile] = OrderedDict()
        self._read_documents: dict[str, tuple[Int64, NDArray[np.uint64]]] = {}

    def missing(self, places: Iterable[tuple[str, int]]) -> dict[str, Int64]:
        """The blocks (domain, index) that were not searched yet, by domain."""
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
        """Disk space that the neighbours of these blocks take."""
        n_neighbours = sum(map(len, missing.values())) * self._length * self._k
        return n_neighbours * bytes_per_neighbour(len(self._store.contents.tokens))

    def find(self, missing: Mapping[str, Int64], reporter: Reporter = SILENT) -> None:
        """Search these blocks and keep the result.

        Raises:
            StorageError: the disk refused.
        """
        needed, free = self.n_bytes(missing), shutil.disk_usage(self._store.folder).free
        if needed > free:
            raise StorageError(
                f"Keeping the neighbours of the training text takes {needed / 1e9:.2f} GB in {self.folder}, "
                f"and {free / 1e9:.2f} GB are free. Make room, or lower vector_store.n_neighbours."
            )
        total = sum(map(len, missing.values()))
        advance = reporter.counter("vector store: training neighbours", total)
        at_once = max(1, BATCH_TOKENS // self._length)
        try:
            make_folder(self.folder, within=self.folder.parent)
            for domain, blocks in missing.items():
                file = self._file(domain, create=True)
                for first in range(0, len(blocks), at_once):
                    some = blocks[first : first + at_once]
                    for block, *found in zip(some, *self._search(domain, some), strict=True):
                        file.write(int(block), found)
                    advance(len(some))
        except OSError as error:
            raise storage_error(self.folder, error) from error

    def _search(self, domain: str, blocks: Int64) -> tuple[NDArray[Any], NDArray[np.int16]]:
        """Numbers and coded similarities, (B, T, K) both."""
        stream = self._streams[domain]
        ends, keys = self._documents(domain)
        read = [stream.block(int(index), self._length) for index in blocks]
        inputs, targets = (np.stack(part) for part in zip(*read, strict=True))  # (B, T)
        own = documents_at(ends, keys, blocks, self._length)
        near, which = self._store.search_elsewhere(
            self._states(torch.from_numpy(inputs)).reshape(-1, self._store.owner.width),
            own.reshape(-1),
            self._k,
        )
        which[targets.reshape(-1) == IGNORE] = -1
        shape = (*inputs.shape, self._k)
        numbers = which.astype(self._numbers)
        numbers[which < 0] = self._missing
        return numbers.reshape(shape), _coded(near).reshape(shape)

    def read(self, places: Sequence[tuple[str, int]]) -> Neighbours:
        """(B, T, K) of the blocks at these places, all of which were searched.

        Raises:
            StorageError: they are gone, or the disk refused.
        """
        shape = (len(places), self._length, self._k)
        numbers, coded = np.empty(shape, self._numbers), np.empty(shape, np.int16)
        for row, (domain, block) in enumerate(places):
            try:
                file = self._file(domain, create=False)
                if not file.read(block, [numbers[row], coded[row]]):
                    again = self._search(domain, np.array([block]))
                    numbers[row], coded[row] = again[0][0], again[1][0]
                    file.write(block, [numbers[row], coded[row]])
            except OSError as error:
                raise StorageError(
                    f"{self.folder} is gone or cannot be read. Was the vector store built again meanwhile? "
                    "Resume with --resume, which looks the neighbours up again."
                ) from error
        similarities = coded.astype(np.float32) / _SCALE
        which = np.where(numbers == self._missing, -1, numbers.astype(np.int64))
        similarities[which < 0] = -np.inf
        return self._store.neighbours(similarities, which)

    def _documents(self, domain: str) -> tuple[Int64, NDArray[np.uint64]]:
        """End of each document of a domain, in tokens, and the hash of its text. Read once."""
        if domain not in self._read_documents:
            documents = self._streams[domain].documents()
            self._read_documents[domain] = np.cumsum(documents.n_tokens), documents.keys
        return self._read_documents[domain]

    def close(self) -> None:
        """Close the files. A later read opens them again."""
        while self._files:
            self._files.popitem()[1].close()

    def _known(self, domain: str) -> NDArray[np.bool_]:
        n_blocks = self._streams[domain].n_blocks(self._length)
        try:
            return self._file(domain, create=False).filled(n_blocks)
        except FileNotFoundError:
            return np.zeros(n_blocks, np.bool_)
        except OSError as error:
            raise storage_error(self.folder, error) from error

    def _file(self, domain: str, *, create: bool) -> BlockFile:
        """The open file of a domain; valid until the file of another domain is opened."""
        if domain in self._files:
            self._files.move_to_end(domain)
        else:
            named = hashlib.blake2b(domain.encode(), digest_size=6).hexdigest()
            paths = (self.folder / f"{named}{ending}" for ending in (".blocks", ".marks"))
            self._files[domain] = BlockFile(*paths, create=create)
            if len(self._files) > _MOST_OPEN:
                self._files.popitem(last=False)[1].close()
        return self._files[domain]


def _coded(similarities: Float32) -> NDArray[np.int16]:
    finite = np.where(np.isfinite(similarities), similarities, 0.0)
    return np.rint(finite.clip(-1.0, 1.0) * _SCALE).astype(np.int16)


def documents_at(ends: Int64, keys: NDArray[np.uint64], blocks: Int64, length: int) -> NDArray[np.uint64]:
    """(B, length): hash of the document of each target in blocks of a stream.

    Args:
        ends: of its documents, in tokens.
        keys: hashes of their texts.
    """
    places = blocks[:, None] * length + np.arange(length)
    found: NDArray[np.uint64] = keys[np.searchsorted(ends, places, side="right").clip(max=len(ends) - 1)]
    return found


class SearchElsewhere:
    """A ``NeighbourSearch`` that leaves the document of each query, and copies of it, out.

    Args:
        own: (N,) hash of the document of each row. A search may have several queries for each, in order.
    """

    def __init__(self, store: VectorStore, own: NDArray[np.uint64]) -> None:
        self._store, self._own = store, own

    def search(self, queries: torch.Tensor) -> Neighbours:
        """See ``VectorStore.search``."""
        own = np.repeat(self._own, len(queries) // len(self._own))
        asked = queries.detach().float().cpu().numpy()
        found = self._store.search_elsewhere(asked, own, self._store.n_neighbours)
        return self._store.neighbours(*found).to(queries.device)


class RepeatedSearch:
    """A ``NeighbourSearch`` with a cache: a run validates on the same text again and again."""

    _LEAST_ROWS = 64  # fewer are a sample that is being generated, and do not repeat
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
