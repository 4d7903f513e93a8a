"""Nearest neighbours among many keys: exact while they are few, inverted lists once they are many.

The choice follows FAISS's own guidance ("Guidelines to choose an index", its wiki): exact search needs no
training and is fast enough for tens of thousands; beyond that an inverted file (Jégou, Douze and Schmid 2011)
with 8-bit scalar quantisation, and with product quantisation once memory is what counts. The number of lists
is the power of two at or below 4 √N, a little under what the guidance gives for large N: lists are then
longer, so that a fixed number of probes finds more, and training them takes a fraction of the time.

Keys and queries have length 1, and the similarity is their inner product.

FAISS and torch each bring an OpenMP runtime. FAISS is imported here and nowhere else, always after torch and
only when a vector store is used; it gets as many threads as torch has, and one on a system (macOS) where two
runtimes of the same kind in a process crash.

Shapes: N keys, Q queries, K neighbours, D width.
"""

from __future__ import annotations

import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch  # before FAISS, whoever comes first: see above
from numpy.typing import NDArray

from nanothink.config import VectorStoreConfig
from nanothink.errors import UsageError, VectorStoreDamagedError, VectorStoreError
from nanothink.reporter import SILENT, Reporter
from nanothink.suggestions import install, suggest

Kind = Literal["exact", "sq8", "pq"]
Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]

KEYS_PER_LIST = 64
"""Keys of the sample that lists are trained on, for each list; FAISS asks for 39 at least."""

_LEAST_PER_LIST = 39
_MOST_LISTS = 1 << 14
_PQ_DIMENSIONS = 4  # numbers that share a byte
_CODES = 256  # of a byte
_SYNCED_BYTES = 64 << 20


def import_faiss() -> Any:
    """FAISS, ready for use beside torch.

    Raises:
        UsageError: it is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of its SWIG types, on Python 3.12 and later
            import faiss
    except ImportError:
        raise UsageError(
            f"The vector store needs FAISS, which is not installed: {install('faiss-cpu')}. Everything else "
            "works without it."
        ) from None
    faiss.omp_set_num_threads(1 if sys.platform == "darwin" else torch.get_num_threads())
    return faiss


def choose_kind(settings: VectorStoreConfig, n_keys: int) -> Kind:
    """The kind of index for ``n_keys`` keys."""
    if settings.index != "auto":
        return settings.index
    if n_keys <= settings.exact_below:
        return "exact"
    return "pq" if n_keys > settings.pq_above else "sq8"


def choose_lists(n_keys: int) -> int:
    """Inverted lists for so many keys: see the head of this file."""
    wanted = min(4 * math.sqrt(max(n_keys, 1)), n_keys / _LEAST_PER_LIST, _MOST_LISTS)
    return 1 << max(0, int(math.log2(max(wanted, 1))))


def sample_size(kind: Kind, n_keys: int) -> int:
    """Keys that an index has to be trained on; 0 for an exact one."""
    if kind == "exact":
        return 0
    least = _CODES * _LEAST_PER_LIST if kind == "pq" else 0
    return min(n_keys, max(KEYS_PER_LIST * choose_lists(n_keys), least))


def bytes_per_key(kind: Kind, width: int) -> int:
    """Bytes of a key in the index: code and number."""
    return {"exact": 4 * width, "sq8": width, "pq": -(-width // _PQ_DIMENSIONS)}[kind] + 8


def damaged(path: Path, reason: str) -> VectorStoreDamagedError:
    """The error for a file of a store that is not what was written."""
    return VectorStoreDamagedError(
        f"{path} is damaged: {reason}. Build the vector store again: {rebuild(path.parent)}"
    )


def rebuild(folder: Path) -> str:
    """The command that builds the store in this folder again."""
    model = folder.with_suffix(".pt")
    return suggest("store build", *(["-c", model] if model.exists() else []), "--overwrite")


@contextmanager
def _told(doing: str) -> Iterator[None]:
    """Turns what FAISS raises within into an error that says what was being done, and what to do."""
    try:
        yield
    except (MemoryError, RuntimeError, AssertionError, ValueError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        if isinstance(error, MemoryError) or "bad_alloc" in lines[-1]:
            raise VectorStoreError(
                f"There is not enough memory for {doing}. Keep fewer keys (--set vector_store.max_keys=N), "
                "or less of each (--set vector_store.index=pq)."
            ) from None
        raise VectorStoreError(
            f"FAISS failed at {doing} ({lines[-1][-200:]}). If the vector store may be at fault, build it "
            f"again: {suggest('store build --overwrite')}"
        ) from error


class NeighbourIndex:
    """Keys by number. A thin layer over a FAISS index; see ``create`` and ``read``."""

    def __init__(self, kind: Kind, index: Any, n_probe: int) -> None:
        self._faiss = import_faiss()
        self.kind = kind
        self._index = index
        if kind != "exact":
            index.nprobe = min(n_probe, index.nlist)

    @classmethod
    def create(cls, kind: Kind, width: int, n_keys: int, n_probe: int) -> NeighbourIndex:
        """An empty index, to be trained, for about ``n_keys`` keys.

        Raises:
            UsageError: product quantisation of a width that cannot be divided, or of too few keys.
        """
        faiss = import_faiss()
        if kind == "pq" and n_keys < _CODES:
            raise UsageError(
                f"vector_store.index=pq learns {_CODES} codes from the keys, and there are {n_keys:,} keys. "
                "Use sq8, exact or auto."
            )
        if kind == "pq" and width % _PQ_DIMENSIONS:
            raise UsageError(
                f"vector_store.index=pq keeps {_PQ_DIMENSIONS} numbers in a byte, and the width {width} "
                f"cannot be divided by it; use sq8."
            )
        code = {"exact": "Flat", "sq8": "SQ8", "pq": f"PQ{width // _PQ_DIMENSIONS}"}[kind]
        factory = f"IDMap2,{code}" if kind == "exact" else f"IVF{choose_lists(n_keys)},{code}"
        with _told(f"making an index of {n_keys:,} keys"):
            index = faiss.index_factory(width, factory, faiss.METRIC_INNER_PRODUCT)
        if kind != "exact":
            index.cp.min_points_per_centroid = 1  # else it prints that there are few
        if kind == "pq":
            index.pq.cp.min_points_per_centroid = 1
            # An order of the codes for a search by bits, which is never made; most of the training.
            index.do_polysemous_training = False
        return cls(kind, index, n_probe)

    @classmethod
    def read(cls, path: Path, kind: Kind, n_probe: int, *, writable: bool) -> NeighbourIndex:
        """Open an index file whose digest has been checked; searched where it lies unless ``writable``.

        Raises:
            VectorStoreError: it is no such index, or there is not enough memory for it.
        """
        faiss = import_faiss()
        flags = 0 if writable or kind == "exact" else faiss.IO_FLAG_MMAP
        try:
            index = faiss.read_index(str(path), flags)
        except (RuntimeError, ValueError) as error:
            if "bad_alloc" not in str(error):
                raise damaged(
                    path, f"FAISS cannot read it ({str(error).strip().splitlines()[-1][-200:]})"
                ) from None
            raise VectorStoreError(f"There is not enough memory to open {path}.") from None
        except MemoryError:
            raise VectorStoreError(f"There is not enough memory to open {path}.") from None
        kinds = {"exact": faiss.IndexIDMap2, "sq8": faiss.IndexIVFScalarQuantizer, "pq": faiss.IndexIVFPQ}
        inner = faiss.downcast_index(index.index) if isinstance(index, faiss.IndexIDMap2) else None
        if (
            not isinstance(index, kinds[kind])
            or (kind == "exact" and not isinstance(inner, faiss.IndexFlat))
            or index.metric_type != faiss.METRIC_INNER_PRODUCT
        ):
            raise damaged(path, f"it is not an index of the kind {kind}")
        return cls(kind, index, n_probe)

    @property
    def n_keys(self) -> int:
        return int(self._index.ntotal)

    @property
    def width(self) -> int:
        return int(self._index.d)

    @property
    def n_lists(self) -> int:
        """Inverted lists; 0 of an exact index."""
        return 0 if self.kind == "exact" else int(self._index.nlist)

    @property
    def n_probe(self) -> int:
        """Lists that a search looks into; 0 of an exact index."""
        return 0 if self.kind == "exact" else int(self._index.nprobe)

    def train(self, sample: Float32, reporter: Reporter = SILENT) -> None:
        """Learn lists and codes from (n, D) keys. Nothing to do for an exact index. Deterministic.

        FAISS would go through all of it in one call, without a word and deaf to Ctrl-C. An iteration of
        k-means a call, each from the centroids of the one before, and the codes of a part of the numbers a
        call come to the same.
        """
        if self.kind == "exact":
            return
        index, keys = self._index, np.ascontiguousarray(sample, dtype=np.float32)
        index.cp.max_points_per_centroid = 1 << 30  # the sample is as large as it is meant to be
        clustering = self._faiss.Clustering(index.d, index.nlist, index.cp)
        n_steps, clustering.niter = clustering.niter + 1, 1
        advance = reporter.counter("vector store: learning lists", n_steps)
        learning = f"learning {index.nlist:,} lists from {len(keys):,} keys"
        for _ in range(1, n_steps):
            with _told(learning):
                clustering.train(keys, index.quantizer)
            advance(1)
        with _told(learning):
            if self.kind == "sq8":
                index.train(
                    keys
                )  # finds the lists there, assigns the keys, and sees the range of each number
                advance(1)
            else:
                few = keys[:: -(-len(keys) // (_CODES * index.pq.cp.max_points_per_centroid))]
                rest = self._residuals(np.ascontiguousarray(few))
                advance(1)
                self._train_codes(rest, reporter)

    def _residuals(self, keys: Float32) -> Float32:
        """(n, D) keys less the centroids of their lists."""
        _, lists = self._index.quantizer.search(keys, 1)
        rest, swig = np.empty_like(keys), self._faiss.swig_ptr
        own = np.ascontiguousarray(lists[:, 0])
        self._index.quantizer.compute_residual_n(len(keys), swig(keys), swig(rest), swig(own))
        return rest

    def _train_codes(self, rest: Float32, reporter: Reporter) -> None:
        """Learn the codes of product quantisation from (n, D) residuals, as FAISS does: part by part of D."""
        faiss, index, pq = self._faiss, self._index, self._index.pq
        advance = reporter.counter("vector store: learning codes", pq.M)
        for part in range(pq.M):
            clustering = faiss.Clustering(pq.dsub, pq.ksub, pq.cp)
            numbers = np.ascontiguousarray(rest[:, part * pq.dsub : (part + 1) * pq.dsub])
            clustering.train(numbers, faiss.IndexFlatL2(pq.dsub))
            pq.set_params(clustering.centroids.data(), part)
            advance(1)
        index.is_trained = True
        index.precompute_table()

    def add(self, keys: Float32, numbers: Int64) -> None:
        """(n, D) keys under (n,) numbers of their own."""
        with _told(f"adding to {self.n_keys:,} keys"):
            self._index.add_with_ids(
                np.ascontiguousarray(keys, dtype=np.float32), np.ascontiguousarray(numbers, dtype=np.int64)
            )

    def search(self, queries: Float32, n_neighbours: int) -> tuple[Float32, Int64]:
        """(Q, D) -> similarities (Q, K) and numbers (Q, K), nearest first; -1 where there are fewer."""
        with _told(f"a search among {self.n_keys:,} keys of width {self.width}"):
            similarities, numbers = self._index.search(
                np.ascontiguousarray(queries, dtype=np.float32), n_neighbours
            )
        similarities[numbers < 0] = -np.inf
        return similarities, numbers

    def remove(self, numbers: Int64) -> None:
        with _told(f"taking {len(numbers):,} keys out"):
            self._index.remove_ids(np.ascontiguousarray(numbers, dtype=np.int64))

    def groups(self) -> Iterator[tuple[Int64, Float32]]:
        """All keys, as they are kept, in groups in which keys that are nearly alike stand together.

        Numbers (n,) and keys (n, D): an inverted list at a time, or all at once.
        """
        faiss, index = self._faiss, self._index
        if self.kind == "exact":
            numbers = faiss.vector_to_array(index.id_map).copy()
            flat = faiss.downcast_index(index.index)
            yield (
                numbers,
                flat.reconstruct_n(0, len(numbers)) if len(numbers) else np.empty((0, index.d), "f"),
            )
            return
        lists = index.invlists
        for i in range(index.nlist):
            size = lists.list_size(i)
            if not size:
                continue
            numbers = faiss.rev_swig_ptr(lists.get_ids(i), size).copy()
            codes = faiss.rev_swig_ptr(lists.get_codes(i), size * lists.code_size).copy()
            keys = np.empty((size, index.d), dtype=np.float32)
            of_list = np.full(size, i, dtype=np.int64)
            index.decode_vectors(size, *map(faiss.swig_ptr, (codes, of_list, keys)))
            yield numbers, keys

    @property
    def n_bytes(self) -> int:
        """Size of its file, about."""
        return self.n_keys * bytes_per_key(self.kind, self.width) + self.n_lists * self.width * 4

    def write(self, path: Path, on_bytes: Callable[[int], None] = lambda n: None) -> None:
        """To a new file, piece by piece onto the disk. Raises OSError when the disk refuses.

        Args:
            on_bytes: called with the bytes of each piece.
        """
        unsynced = 0
        with open(path, "wb") as file:

            def write(piece: bytes) -> None:
                nonlocal unsynced
                file.write(piece)
                unsynced += len(piece)
                if unsynced >= _SYNCED_BYTES:  # else a large file is written at once, and waits at the end
                    file.flush()
                    os.fsync(file.fileno())
                    unsynced = 0
                on_bytes(len(piece))

            try:
                self._faiss.write_index(self._index, self._faiss.PyCallbackIOWriter(write, 1 << 20))
            except (RuntimeError, MemoryError) as error:
                raise OSError(0, f"FAISS could not write it ({str(error).splitlines()[-1][:200]})") from error
